"""Draws the figures and makes the measurements that README.md in this folder reports.

    python figures/measure.py                                       lists the commands
    python figures/measure.py cg RUN/checkpoint.pt tasks=8 out=DIR  runs one of them

A word with an equals sign is a setting: `out` is the folder to write to (default: this
one), every other name is an argument of the command or a field of `Config`. The program
itself never imports this file.
"""
import ast
import csv
import json
import os
import re
import resource
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from gymnasium.wrappers.vector import TransformReward

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import maml_trpo as mt  # noqa: E402  (found only now that the folder above is searched)

# %% What several commands need


def loaded(start, **settings):
    """Config, family, policy and state of a checkpoint, or of a task before training.

    `start` is a file or a task's name; the settings take the place of the config's.
    """
    if start in mt.TASKS:
        config, state = mt.Config(task=start), None
    else:
        config, state = mt.load_checkpoint(Path(start))
    config = mt.complete(replace(config, **settings))
    family = mt.family_of(config)
    policy = mt.make_policy(family, config)
    return config, family, policy, state or mt.TrainState.initial(policy, config)


def sampled(config: mt.Config, theta: torch.Tensor, tasks: int):
    """The policy, and data of new tasks, sampled with θ and with each task's θ′."""
    family, key = mt.family_of(config), (config.seed, 10**6)    # no iteration's own key
    policy = mt.make_policy(family, config)
    drawn = family.sample_tasks(mt.random_stream(*key), tasks)
    return policy, [mt.sample_task_data(policy, theta, family, task, config, (*key, m))
                    for m, task in enumerate(drawn)]


def product(policy, theta: torch.Tensor, data: list, config: mt.Config, **settings):
    """v ↦ H·v with some settings changed, computed once for each v."""
    known = {}
    multiply = mt.kl_hessian_product(policy, theta, data, replace(config, **settings))

    def look_up(v):
        key = v.numpy().tobytes()
        if key not in known:
            known[key] = multiply(v)
        return known[key]
    return look_up


def in_float64(policy, theta: torch.Tensor, data: list, config: mt.Config):
    """θ and the data in float64, and from them the exact product and the mean g.

    The old policy of each task is computed again in float64, too.
    """
    theta, converted = theta.double(), []
    for one in data:
        *inner, outer = [mt.Trajectories(*(x.double() for x in vars(step).values()))
                         for step in (*one.inner, one.outer)]
        phi = mt.adapt(policy, theta, inner, config.alpha, False).detach()
        converted.append(mt.TaskData(inner, outer, policy.distribution(phi, outer.obs)))
    exact = product(policy, theta, converted, config, hvp="gauss-newton")
    g = mt.mean_over_tasks(
        lambda one: mt.meta_gradient(policy, theta, one, config.alpha), converted)
    return (theta, converted), exact, g


# %% fd-error: how wrong a finite difference is


def fd_error(words, out, iterations=12, tasks=4, **settings):
    """Error of the difference product against its step (1 minute; PNG, CSV).

    ReLU and tanh, the first θ and one trained for `iterations` with 10 tasks an
    iteration, float32 and float64, one-sided and symmetric; the product with g.
    """
    panels = [("relu", 0), ("tanh", 0), ("relu", iterations), ("tanh", iterations)]
    rows, settings = [], dict(meta_batch_size=10, workers=1) | settings
    for activation, after in panels:
        config = mt.complete(mt.Config(activation=activation, iterations=after,
                                       **settings))
        theta, _ = mt.train_maml(config)
        rows += [(activation, after, *row) for row in fd_errors(config, theta, tasks)]
    mt.write_csv(out / "fd-error.csv", (
        "activation", "iterations", "dtype", "difference", "step", "error"), rows)
    figure, _ = mt.new_figure(1, 8.0, 6.4)
    figure.clear()
    axes = figure.subplots(2, 2, sharex=True, sharey=True)
    for ax, panel in zip(axes.flat, panels):
        draw_fd_error(ax, *panel, [row[2:] for row in rows if row[:2] == panel])
    figure.supxlabel("length of the move in θ, ‖εv‖", fontsize=10)
    figure.supylabel("relative error of H·v", fontsize=10)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center",
                  ncols=3, frameon=False, fontsize=9)
    figure.savefig(out / "fd-error.png")


def fd_errors(config: mt.Config, theta: torch.Tensor, tasks: int):
    """Yields (dtype, difference, step, error), and the authors' moves in one CG."""
    policy, data = sampled(config, theta, tasks)
    in_64, exact, g = in_float64(policy, theta, data, config)

    def error(x):
        return float((x.double() - exact(g)).norm() / exact(g).norm())

    for dtype, problem in (("float32", (theta, data)), ("float64", in_64)):
        v = g.to(problem[0].dtype)
        for step in np.geomspace(1e-6, 1, 13):
            one_sided = product(policy, *problem, config, hvp="finite-difference",
                                fd_step=float(step))
            yield dtype, "one-sided", step, error(one_sided(v))
            # H·v ≈ (∇k(θ + εv) − ∇k(θ − εv)) / 2ε
            yield dtype, "symmetric", step, error((one_sided(v) - one_sided(-v)) / 2)
    p, r_before = 0 * g, g                  # CG's direction p and its residual
    for n in range(10):
        _, r = mt.conjugate_gradient(exact, g, n, 0.0)
        p, r_before = r + (r @ r) / (r_before @ r_before) * p, r
        yield "", "authors", float(p.norm() / theta.norm()), ""


def draw_fd_error(ax, activation: str, after: int, rows: list) -> None:
    """One panel; float64 is drawn over float32."""
    moves = [step for _, name, step, _ in rows if name == "authors"]
    ax.axvspan(min(moves), max(moves), color="#f2c94c", alpha=0.35, linewidth=0,
               label="authors' moves, ‖v‖/‖θ‖ during one CG")
    ax.axvline(mt.Config().fd_step, color="black", linestyle=":", linewidth=1.5,
               label=f"our step, {mt.Config().fd_step}")
    for dtype, color, width in (("float32", "#f0a868", 4.5),
                                ("float64", "#1f4f8f", 1.4)):
        for name, style in (("one-sided", "-"), ("symmetric", "--")):
            points = [row[2:] for row in rows if row[:2] == (dtype, name)]
            ax.plot(*zip(*points), style, color=color, linewidth=width,
                    label=f"{dtype}, {name}")
    ax.set(xscale="log", yscale="log", ylim=(1e-9, 1e3))
    ax.grid(alpha=0.25)
    where = f"after {after} meta-iterations" if after else "at initialisation"
    ax.set_title(f"{dict(relu='ReLU', tanh='tanh')[activation]}, {where}", fontsize=10)


# %% cg: what more iterations of conjugate gradient are worth

CG_CURVES = {"differences": ("finite-difference", torch.float32),
             "exact": ("gauss-newton", torch.float32),
             "exact, float64": ("gauss-newton", torch.float64)}


def cg(words, out, tasks=20, most=15, name="cg", **settings):
    """True progress of a step against CG's iterations (5 minutes; PNG, CSV).

    Word: a checkpoint (default: figures/point2d-seed0/checkpoint.pt). Progress is the
    predicted fall of the surrogate at a given KL, gᵀx/√(xᵀHx), with the exact H in
    float64, whichever product CG used: of the tasks whose g and H made x, and of other
    tasks. Two panels: the run's first θ and its last. `name` names the files.
    """
    start, *_ = words or [HERE / "point2d-seed0" / "checkpoint.pt"]
    config, _, policy, state = loaded(start, **settings)
    thetas = {"the first θ": mt.TrainState.initial(policy, config).theta,
              f"θ after {state.iteration} meta-iterations": state.theta}
    rows = []
    for title, theta in thetas.items():
        rows += [(title, *row) for row in cg_progress(config, theta, tasks, most)]
    mt.write_csv(out / f"{name}.csv", ("theta", "product", "judged_on", "iterations",
                                       "progress"), rows)
    figure, axes = mt.new_figure(2, 8.6, 4.2)
    for ax, title in zip(axes, thetas):
        for k, label in enumerate(CG_CURVES):
            for tasks, style in (("the same tasks", "o-"), ("other tasks", "^--")):
                points = [row[3:] for row in rows if row[:3] == (title, label, tasks)]
                ax.plot(*zip(*points), style, color=f"C{k}", markersize=4,
                        label=f"{label}; judged on {tasks}")
        ax.set(ylim=(0, None), xlabel="iterations of conjugate gradient", title=title)
    axes[0].set_ylabel("true progress, gᵀx / √(xᵀHx)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center",
                  ncols=3, frameon=False, fontsize=8)
    figure.savefig(out / f"{name}.png")


def cg_progress(config: mt.Config, theta: torch.Tensor, tasks: int, most: int):
    """Yields (product, tasks it is judged on, iterations of CG, progress)."""
    policy, data = sampled(config, theta, tasks)
    _, others = sampled(replace(config, seed=config.seed + 1000), theta, tasks)
    in_64, exact, g = in_float64(policy, theta, data, config)
    _, *others_judge = in_float64(policy, theta, others, config)
    judges = {"the same tasks": (exact, g), "other tasks": others_judge}
    for label, (hvp, dtype) in CG_CURVES.items():
        problem = in_64 if dtype == torch.float64 else (theta, data)
        multiply = product(policy, *problem, config, hvp=hvp)
        for n in range(1, most + 1):
            x, _ = mt.conjugate_gradient(lambda v: multiply(v) + config.damping * v,
                                         g.to(dtype), n, config.cg_tolerance)
            x = x.double()
            for name, (exact, its_g) in judges.items():
                xHx = x @ (exact(x) + config.damping * x)
                yield label, name, n, float(its_g @ x / xHx.sqrt())


# %% costs and benchmark: where the time goes


def costs(words, out, repeats=40, **settings):
    """What each Hessian-vector product costs on one task (1 minute; printed)."""
    config = mt.complete(mt.Config(**dict(iterations=0, workers=1) | settings))
    theta, _ = mt.train_maml(config)
    policy, data = sampled(config, theta, 1)
    one = policy, theta, data[0], config.alpha
    v = mt.meta_gradient(*one)
    functions = {}
    for name, hvp in (("difference", "finite-difference"),
                      ("double backprop", "double-backprop"),
                      ("Gauss–Newton, graphs kept", "gauss-newton")):
        multiply = mt.kl_hessian_product(policy, theta, data, replace(config, hvp=hvp))
        functions[name] = partial(multiply, v)
    functions["making these graphs, once for all of CG"] = partial(mt.keep_graphs, *one)
    times = interleaved(functions, repeats)
    print(f"| one task, {int(data[0].outer.mask.sum()):,} samples, {theta.dtype}, one "
          "thread | ms | over one difference |\n|---|---|---|")
    for name, t in times.items():
        print(f"| {name} | {1e3 * t:.1f} | {t / times['difference']:.2f} |")


def interleaved(functions: dict, repeats: int, warm_up: int = 3) -> dict[str, float]:
    """Median seconds of each function; they take turns, so they share the machine."""
    times = {name: [] for name in functions}
    for _ in range(warm_up + repeats):
        for name, function in functions.items():
            watch = mt.Stopwatch()
            function()
            times[name].append(watch.lap())
    return {name: float(np.median(laps[warm_up:])) for name, laps in times.items()}


def one_process(words, out, **settings):
    """Called by `benchmark`: one process's seconds and memory (printed as JSON)."""
    with mt.process_group():
        _, rows = mt.train_maml(mt.Config(**settings))
    peak = 1.024e-6 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # Linux: KiB
    medians = {name: float(np.median([row[name] for row in rows[1:]]))
               for name in rows[0]}
    print(json.dumps(medians | {"gigabytes": peak}), flush=True)


def print_iterations(title: str, ways=("1 worker", "2 workers", "2 ranks"), **settings):
    """A meta-iteration by part, each way in fresh processes, the ranks by torchrun."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    for way in ways:
        given = settings | dict(workers=2 if way == "2 workers" else 1)
        printed = subprocess.run(
            [sys.executable, *(torchrun if way == "2 ranks" else []), __file__,
             "one-process", *(f"{name}={x}" for name, x in given.items())],
            stdout=subprocess.PIPE, check=True, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"}).stdout
        found = [json.loads(one) for one in re.findall(r"{.*?}", printed)]  # of ranks
        parts = " + ".join(f"{part} {found[0]['seconds_' + part]:.2f}" for part in
                           ("sampling", "gradient", "cg", "line_search"))
        peak = " + ".join(f"{one['gigabytes']:.2f}" for one in found)
        print(f"  {title:17} {way:9} {found[0]['seconds_total']:6.2f} s = {parts}; "
              f"at most {peak} GB", flush=True)


def benchmark(words, out, **settings):
    """Seconds of a meta-iteration by part, and of products (6 minutes; printed).

    With settings, such as `task=cheetah-dir iterations=3 meta_batch_size=40`, only a
    meta-iteration of these. Nothing else may run meanwhile.
    """
    print(f"{mt.available_cores()} cores. Seconds of a meta-iteration, medians:")
    if settings:
        return print_iterations("as given", **settings)
    print_iterations("point2d", task="point2d", iterations=10)
    print_iterations("exact products", ("2 workers",), task="point2d", iterations=4,
                     hvp="gauss-newton")
    print_iterations("cheetah-dir", task="cheetah-dir", iterations=4, horizon=100,
                     meta_batch_size=20)
    a, b = torch.randn(2000, 100), torch.randn(100, 100)
    seconds = interleaved({"product": lambda: [a @ b for _ in range(20)]}, 50)
    print("A product (2000×100)·(100×100) in float32, one core: "
          f"{20 * 2 * 2000 * 100 * 100 / seconds['product'] / 1e9:.0f} GFLOP/s")
    costs([], out)


# %% what-matters: what a choice does to the result


CHOICES = {       # name → settings, and functions that take the place of maml_trpo's
    "the defaults": {},
    "first order": dict(first_order=True),
    "ratio inner loss": dict(inner_loss="ratio"),
    "exact products": dict(hvp="gauss-newton"),
    "λ 1 (authors' code)": dict(lam=1.0),
    "10 iterations of CG": dict(cg_iterations=10),
    "two inner steps": dict(inner_steps=2),
    "reward: squared distance (paper)": dict(TASKS=mt.TASKS | {"point2d": replace(
        mt.TASKS["point2d"], make_envs=lambda K: TransformReward(
            mt.Point2D(K), lambda reward: -reward**2))}),
    "α 0.5 (authors' run)": dict(alpha=0.5),
    "baseline 0 (fit after use)": dict(     # a new task has no earlier episodes to fit
        gae=lambda rew, values, mask, gamma, lam: mt.discounted_returns(
            rew * mask, gamma * lam) * mask),
    "raw advantages, α 0.02": dict(alpha=0.02, standardise=lambda adv, mask: adv),
}
CHOICE_COLUMNS = ("choice", "seed", "return_0", "return_1", "return_2", "return_3",
                  "skipped", "std", "seconds_per_iteration", "settings")


def what_matters(words, out, seeds=(0, 1, 2), **settings):
    """Training with one choice changed, three seeds each (hours; CSV, resumable).

    Words: some of the choices (default: all). A row that stands in the CSV with the
    same settings is not computed again; `seeds=3,4` takes other seeds.
    """
    path, shown = out / "what-matters.csv", {}
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    known = {(row[0], row[1], row[-1]): row
             for row in list(csv.reader(text.splitlines()))[1:]}
    for name in words or CHOICES:
        if name not in CHOICES:
            raise mt.BadInput(f"unknown choice {name!r}: take {', '.join(CHOICES)}")
        changes = dict(CHOICES[name])
        replaced = {key: changes.pop(key) for key in list(changes)
                    if not hasattr(mt.Config, key)}
        for seed in seeds:
            config = mt.complete(mt.Config(**settings | changes | dict(seed=seed)))
            key = (name, str(seed), json.dumps(mt.settings_of(config)))
            if key not in known:
                numbers = [f"{x:.4g}" for x in train_with(config, replaced)]
                print(name, seed, *numbers, flush=True)
                known[key] = [*key[:2], *numbers, key[2]]
                mt.write_csv(path, CHOICE_COLUMNS, list(known.values()))
            shown.setdefault(name, []).append(known[key])
    print_choices(shown)


def train_with(config: mt.Config, replaced: dict) -> tuple[float, ...]:
    """Returns after 0 to 3 steps, steps skipped, last std, seconds an iteration."""
    family = mt.TASKS[config.task]            # evaluation keeps the reward as it was
    with mock.patch.dict(vars(mt), replaced):
        try:
            theta, rows = mt.train_maml(config)
            returns = mt.evaluate(config, theta, family).mean(0)
        except mt.Diverged:
            return (np.nan,) * 7
    skipped = sum(row["line_search_steps"] == 0 for row in rows)
    seconds = np.median([row["seconds_total"] for row in rows])
    return (*returns, skipped, rows[-1]["std_mean"], seconds)


def print_choices(shown: dict[str, list]) -> None:
    """The table for README.md: means over the seeds, and each seed after one step."""
    print("\n| choice | seeds | 0 steps | 1 | 2 | 3 | after 1 step, seed by seed "
          "| skipped |\n" + "|---" * 8 + "|")
    for name, rows in shown.items():
        numbers = np.array([row[2:7] for row in rows], float)
        means = " | ".join(f"{x:.2f}" for x in numbers[:, :4].mean(0))
        print(f"| {name} | {', '.join(row[1] for row in rows)} | {means} | "
              + ", ".join(f"{x:.2f}" for x in numbers[:, 1])
              + f" | {numbers[:, 4].sum():.0f} |")


# %% seeds, time-to-result, finetune: how sure, how fast, with which step size


def seeds(words, out, name=None):
    """Several seeds of one task: mean, interval, every seed (seconds; PNG, printed).

    Words: the runs' folders. The 95 % interval is a bootstrap over seeds with 10,000
    resamples; of two or three seeds it is their range. `name` names the file.
    """
    if not words:
        raise mt.BadInput("name the runs' folders, such as figures/point2d-seed*")
    task = json.loads((Path(words[0]) / "config.json").read_text("utf-8"))["task"]
    methods, tables = zip(*[mt.read_evaluation(Path(word), task) for word in words])
    if len(set(methods)) > 1:
        raise mt.BadInput(f"these runs are of several methods: {', '.join(methods)}")
    per_seed = np.mean(tables, axis=1)                                 # (seeds, steps)
    drawn = np.random.default_rng(0).integers(len(words), size=(10_000, len(words)))
    interval = np.percentile(per_seed[drawn].mean(axis=1), [2.5, 97.5], axis=0)
    paper, steps = mt.PAPER[task][methods[0]], range(per_seed.shape[1])
    print("| run | " + " | ".join(map(str, steps)) + " |\n|---" + "|---" * len(steps)
          + "|")
    for label, row in [*zip([Path(word).name for word in words], per_seed),
                       ("mean", per_seed.mean(0)), *zip(("2.5 %", "97.5 %"), interval),
                       ("paper", paper)]:
        print(f"| {label} | " + " | ".join(f"{x:.2f}" for x in row) + " |")
    figure, axes = mt.new_figure(len(steps), 2.3 * len(steps), 3.4)
    for k, ax in enumerate(axes):
        returns, mean = per_seed[:, k], per_seed[:, k].mean()
        ax.plot(np.linspace(-0.25, 0.25, len(returns)), returns, "o", alpha=0.45,
                label="a seed")
        ax.errorbar(0, mean, yerr=np.abs(interval[:, [k]] - mean), capsize=5,
                    marker="_", markersize=18, color="black", label="mean, 95 %")
        if k < len(paper):
            ax.axhline(paper[k], color="#c00000", linestyle="--", label="paper")
        ax.set(xticks=[], xlim=(-0.5, 0.5), title=f"{k} step" + "s" * (k != 1))
    axes[0].set_ylabel(f"return, {task}")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center",
                  ncols=3, frameon=False, fontsize=9)
    figure.savefig(out / f"{name or task + '-seeds'}.png")


def time_to_result(words, out, every=2, first=10, **settings):
    """Seconds until the return after one step passes -15, -13, -12 (minutes; printed).

    Words: seeds (default: 0 1 2). On the paper's goals, every second iteration after
    the tenth, outside of progress.csv's clock. Nothing else may run meanwhile.
    """
    for seed in [int(word) for word in words] or range(3):
        config = mt.complete(mt.Config(**settings | dict(seed=seed)))
        marks = [-15, -13, -12]

        def look(state):
            if state.iteration > first and (state.iteration - first) % every == 0:
                returns = mt.evaluate(replace(config, eval_steps=1), state.theta)
                seconds = sum(row["seconds_total"] for row in state.rows)
                while marks and returns.mean(0)[-1] > marks[0]:
                    print(f"seed {seed}: {marks.pop(0)} passed after {seconds:.0f} s, "
                          f"in iteration {state.iteration}", flush=True)

        mt.train_maml(config, after_iteration=look)
        for mark in marks:
            print(f"seed {seed}: {mark} passed never", flush=True)


def finetune(words, out, tasks=20, **settings):
    """The search for a baseline's step size of fine-tuning (minutes; printed).

    Words: a checkpoint, then first steps α to try; the later steps are α/2. The tasks
    are not the held-out ones (of the two directions: other episodes).
    """
    if not words:
        raise mt.BadInput("name a checkpoint, such as runs/NAME/checkpoint.pt")
    config, family, policy, state = loaded(
        words[0], **dict(eval_episodes=20, seed=2025) | settings)
    drawn = family.sample_tasks(mt.random_stream(2025), tasks)
    for alpha in words[1:] or "0.002 0.005 0.01 0.02 0.05 0.1 0.2 0.5 1 2 5".split():
        once = replace(config, eval_alpha=float(alpha))
        try:
            table = mt.adaptation_returns(policy, state.theta, family, drawn, once)
            text = " ".join(f"{x:9.2f}" for x in table.mean(0))
        except mt.Diverged:
            text = "diverged"
        print(f"α {alpha:>5}: {text}", flush=True)


def signal(words, out, batches=8, **settings):
    """How much of the inner gradient is signal, by γ and λ (minutes; printed).

    Words: a checkpoint or a task's name (its first θ), then pairs such as 0.95,1. Two
    batches of `rollouts` episodes of one task give two gradients of the inner loss: the
    number is the mean cosine between them, over pairs of batches and two tasks.
    """
    start, *pairs = words or ["point2d"]
    config, family, policy, state = loaded(start, **settings)
    theta = state.theta
    data = [[mt.task_rollout(family.envs(config.rollouts), policy, theta, task,
                             config.horizon, (99, m, b)) for b in range(batches)]
            for m, task in enumerate(family.test_tasks(2))]
    for pair in pairs or ["0.99,1", "0.95,1", "0.95,0.8", "0.9,0.8", "0.8,1"]:
        gamma, lam = map(float, pair.split(","))
        steps = torch.stack([theta - mt.adapt(policy, theta, [mt.assign_credit(
            one, gamma, lam)], 1.0, False) for episodes in data for one in episodes])
        unit = (steps / steps.norm(dim=1, keepdim=True)).unflatten(0, (2, batches))
        cosines = ((unit @ unit.mT).sum((1, 2)) - batches) / (batches**2 - batches)
        print(f"γ {gamma:g}, λ {lam:g}: {float(cosines.mean()):5.2f}", flush=True)


def upright(words, out):
    """How long half-cheetah runs on its feet, by direction (half a minute; printed).

    Words: the runs' folders. The share of all steps in which its back points upwards.
    """
    for word in words:
        config, family, policy, state = loaded(Path(word) / "checkpoint.pt")
        for m, task in enumerate(family.test_tasks(2)):
            for step, (_, data) in zip(range(2), mt.adaptation(
                    policy, state.theta, family, task, config, m)):
                share = float((data.obs[..., 1].cos() > 0).float().mean())
                print(f"{word}, task {task[0]:+g}, after {step} steps: upright in "
                      f"{share:.0%} of the steps, return {data.mean_return():.1f}")


# %% graph: a drawing of one meta-step

INK = dict(first="#1f6fb4", second="#d95f02", third="#7b3fa0", cut="#c00000",
           number="#777777", plain="black")
OLD = "$_\\mathrm{old}$"
BOXES = (                                                  # x, y, text, edge
    (4, 66, " θ ", "plain"), (25, 66, "L(θ)\non D, with Â", "plain"),
    (47, 66, "∇L(θ)", "plain"), (68, 66, "θ′ =\nθ − α∇L(θ)", "plain"),
    (91, 76, "surrogate\non D′ with Â′", "plain"),
    (91, 57, f"k = KL(π{OLD} ‖ π$_{{θ′}}$)\non D′", "plain"),
    (25, 45, "D, Â: numbers,\nsampled with θ", "number"),
    (66, 42, f"D′, Â′: numbers,\nsampled with θ′(θ{OLD})", "number"),
    (91, 38, f"π{OLD}: θ′(θ{OLD}),\ndetached", "number"))
ARROWS = (                                                 # from, to, ink, bend
    (4, 70, 63, 71, "first", -0.3), (7, 66, 18.5, 66, "second", 0),
    (31.5, 66, 43, 66, "second", 0), (51, 66, 61.5, 66, "second", 0),
    (74.5, 69, 84.3, 75, "plain", 0), (74.5, 63, 82.7, 58.5, "plain", 0),
    (68, 61, 48, 63, "third", -0.3), (25, 50, 25, 61, "number", 0),
    (91, 43, 91, 52.3, "number", 0), (76, 46, 84, 52.3, "number", 0),
    (70, 47, 86, 71.5, "number", 0.1))
TEXTS = (                                                  # x, y, ink, text
    (35, 81.5, "first", "θ → θ′ with derivative I"), (37, 68.4, "second", "∇"),
    (56, 63, "second", "−α"), (58, 54.5, "third", f"× ∂ⱼκ, which is 0 at θ{OLD}"),
    (12, 66, "cut", "✂1"), (12, 74.8, "cut", "✂1"), (55.5, 66, "cut", "✂2"),
    (79, 71.7, "cut", "✂3"))


def graph(words, out):
    """The computational graph of one meta-step, a drawing (seconds; PNG)."""
    figure, (ax,) = mt.new_figure(1, 8.0, 3.8)
    ax.set(xlim=(0, 100), ylim=(33, 83))
    ax.axis("off")
    for *ends, ink, bend in ARROWS:
        ax.annotate("", ends[2:], ends[:2], arrowprops=dict(
            arrowstyle="-|>", mutation_scale=13, color=INK[ink], shrinkA=0, shrinkB=0,
            linewidth=1.2 if ink == "number" else 1.8,
            linestyle="--" if ink == "number" else "-",
            connectionstyle=f"arc3,rad={bend}"))
    for x, y, text, edge in BOXES:
        ax.text(x, y, text, ha="center", va="center", fontsize=9, bbox=dict(
            boxstyle="round,pad=0.8", linewidth=1.4, edgecolor=INK[edge],
            facecolor="#eeeeee" if edge == "number" else "white",
            linestyle="--" if edge == "number" else "-"))
    for x, y, ink, text in TEXTS:
        circle = dict(boxstyle="circle,pad=0.15", facecolor="white", edgecolor=INK[ink])
        ax.text(x, y, text, color=INK[ink], fontsize=9, ha="center", va="center",
                bbox=circle if ink == "cut" else None)
    figure.savefig(out / "graph.png")


# %% The command line

COMMANDS = {function.__name__.replace("_", "-"): function for function in (
    benchmark, one_process, costs, fd_error, cg, what_matters, seeds, time_to_result,
    finetune, signal, upright, graph)}


def value_of(text: str):
    """A number, a tuple or True as Python writes them; everything else is a name."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def main(argv: list[str]) -> int:
    """Run one command; 2 with a sentence for a call that cannot be carried out."""
    name, *rest = argv or ["none"]
    if name not in COMMANDS:
        print("python figures/measure.py COMMAND [word …] [setting=value …]\n")
        for known, function in COMMANDS.items():
            print(f"  {known:15} {function.__doc__.splitlines()[0]}")
        return 2 if argv else 0
    given = dict(word.split("=", 1) for word in rest if "=" in word)
    out = Path(given.pop("out", HERE))
    try:
        out.mkdir(parents=True, exist_ok=True)
        with mt.one_thread_each(), np.errstate(all="ignore"):
            COMMANDS[name]([word for word in rest if "=" not in word], out,
                           **{key: value_of(text) for key, text in given.items()})
    except mt.BadInput as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
