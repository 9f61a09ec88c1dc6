"""Draws the figures and makes the measurements that README.md in this folder reports.

    python figures/measure.py                                       lists the commands
    python figures/measure.py cg RUN/checkpoint.pt tasks=8 out=DIR  runs one of them

A word with an equals sign is a setting: `out` is the folder to write to (default: this
one), every other name is an argument of the command or a field of `Config`. Everything
runs in one process, except for `benchmark`. The program itself never imports this file.
"""
import ast
import csv
import io
import json
import os
import resource
import subprocess
import sys
import time
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import gymnasium as gym
import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import maml_trpo as mt  # noqa: E402  (found only now that the folder above is searched)

# %% What several commands need


def loaded(start, **settings):
    """Config, family, policy and θ of a checkpoint, or of a task before training.

    `start` is a file or a task's name; the settings take the place of the config's.
    """
    if start in mt.TASKS:
        config = mt.Config(task=start, **settings)
        theta = first_theta(config)
    else:
        config, state = mt.load_checkpoint(Path(start))
        config, theta = replace(config, **settings), state.theta
    family = mt.family_of(config)
    return config, family, mt.make_policy(family, config), theta


def first_theta(config: mt.Config) -> torch.Tensor:
    """The θ that a training with these settings begins with."""
    return mt.train_maml(replace(config, iterations=0))[0]


class Problem(NamedTuple):
    """The arguments of mt.meta_gradient and mt.kl_hessian_product, in their order."""
    policy: mt.GaussianPolicy
    theta: torch.Tensor
    data: list[mt.TaskData]
    config: mt.Config

    def change(self, **settings):
        """The same data, with other settings."""
        return self._replace(config=replace(self.config, **settings))


def sampled(config: mt.Config, theta: torch.Tensor, tasks: int, draw=0) -> Problem:
    """Episodes of new tasks with θ and with θ′; another `draw` gives other tasks."""
    family = mt.family_of(config)
    policy = mt.make_policy(family, config)
    alpha = mt.step_size(config.alpha, policy.std(theta), config)
    config = replace(config, alpha=alpha)
    key = config.seed, 10**6 + draw                           # no iteration's own key
    drawn = family.sample_tasks(mt.random_stream(*key), tasks)
    data = [mt.sample_task_data(policy, theta, family, task, config, (*key, m))
            for m, task in enumerate(drawn)]
    return Problem(policy, theta, data, config)


def in_float64(problem: Problem) -> Problem:
    """The same θ and data in float64; each task's old policy is computed again."""
    policy, theta, data, config = problem
    theta, converted = theta.double(), []
    for one in data:
        *inner, outer = [mt.Trajectories(*(x.double() for x in vars(step).values()))
                         for step in (*one.inner, one.outer)]
        theta_prime = mt.adapt(policy, theta, inner, config.alpha, False).detach()
        old = policy.distribution(theta_prime, outer.obs)
        converted.append(mt.TaskData(inner, outer, old))
    return Problem(policy, theta, converted, config)


def product(problem: Problem, hvp: str, **settings):
    """v ↦ H·v by the named product, computed once for each v."""
    multiply = mt.kl_hessian_product(*problem.change(hvp=hvp, **settings))
    known = {}

    def look_up(v):
        key = v.numpy().tobytes()
        if key not in known:
            known[key] = multiply(v)
        return known[key]
    return look_up


@contextmanager
def four_panels(path: Path, width: float, height: float, x: str, y: str):
    """Axes (2, 2) that share their scales and have one legend, written to `path`."""
    with mt.new_figure(path, 1, width, height) as (ax,):
        figure = ax.figure
        figure.clear()
        axes = figure.subplots(2, 2, sharex=True, sharey=True)
        yield axes
        for ax in axes.flat:
            ax.grid(alpha=0.25)
        figure.supxlabel(x, fontsize=10)
        figure.supylabel(y, fontsize=10)
        figure.legend(*axes[0, 0].get_legend_handles_labels(), frameon=False,
                      loc="outside upper center", ncols=3, fontsize=9)


def print_table(header, rows) -> None:
    """A table in Markdown; numbers have two digits after the point."""
    print("| " + " | ".join(header) + " |\n" + "|---" * len(header) + "|")
    for row in rows:
        cells = [cell if isinstance(cell, str) else f"{cell:.2f}" for cell in row]
        print("| " + " | ".join(cells) + " |")


# %% fd-error: how wrong a finite difference is


def fd_error(words, out, iterations=12, tasks=4, **settings):
    """Error of the difference product against its step (1 minute; PNG, CSV).

    ReLU and tanh, the first θ and one trained for `iterations` with 10 tasks an
    iteration, float32 and float64, one-sided and symmetric; the product with g.
    """
    panels = [("relu", 0), ("tanh", 0), ("relu", iterations), ("tanh", iterations)]
    rows, settings = [], dict(meta_batch_size=10) | settings
    for activation, after in panels:
        config = mt.Config(**settings, activation=activation, iterations=after)
        theta, _ = mt.train_maml(config)
        rows += [(activation, after, *row)
                 for row in fd_errors(sampled(config, theta, tasks))]
    mt.write_csv(out / "fd-error.csv", (
        "activation", "iterations", "dtype", "difference", "step", "error"), rows)
    with four_panels(out / "fd-error.png", 8.0, 6.4, "length of the move in θ, ‖εv‖",
                     "relative error of H·v") as axes:
        for ax, panel in zip(axes.flat, panels):
            draw_fd_error(ax, *panel, [row[2:] for row in rows if row[:2] == panel])


def fd_errors(problem: Problem):
    """Yields (dtype, difference, step, error), and the authors' moves in one CG."""
    in_64 = in_float64(problem)
    g, exact = mt.meta_gradient(*in_64), product(in_64, "gauss-newton")

    def error(x):
        return float((x.double() - exact(g)).norm() / exact(g).norm())

    for dtype, one in (("float32", problem), ("float64", in_64)):
        v = g.to(one.theta.dtype)
        for step in np.geomspace(1e-6, 1, 13):
            one_sided = product(one, "finite-difference", fd_step=step)
            yield dtype, "one-sided", step, error(one_sided(v))
            # H·v ≈ (∇k(θ + εv) − ∇k(θ − εv)) / 2ε
            yield dtype, "symmetric", step, error((one_sided(v) - one_sided(-v)) / 2)
    p, r_before = 0 * g, g                  # CG's direction p and its residual
    for n in range(10):
        _, r = mt.conjugate_gradient(exact, g, n, 0.0)
        p, r_before = r + (r @ r) / (r_before @ r_before) * p, r
        yield "", "authors", float(p.norm() / in_64.theta.norm()), ""


def draw_fd_error(ax, activation: str, after: int, rows: list) -> None:
    """One panel; float64 is drawn over float32."""
    moves = [step for _, name, step, _ in rows if name == "authors"]
    ax.axvspan(min(moves), max(moves), color="#f2c94c", alpha=0.35, linewidth=0,
               label="authors' moves, ‖v‖/‖θ‖ during one CG")
    ours = mt.Config().fd_step
    ax.axvline(ours, color="black", linestyle=":", label=f"our step, {ours}")
    for dtype, color, width in (("float32", "#f0a868", 4.5),
                                ("float64", "#1f4f8f", 1.4)):
        for name, style in (("one-sided", "-"), ("symmetric", "--")):
            points = [row[2:] for row in rows if row[:2] == (dtype, name)]
            ax.plot(*zip(*points), style, color=color, linewidth=width,
                    label=f"{dtype}, {name}")
    ax.set(xscale="log", yscale="log", ylim=(1e-9, 1e3))
    where = f"after {after} meta-iterations" if after else "at initialisation"
    ax.set_title(f"{dict(relu='ReLU', tanh='tanh')[activation]}, {where}", fontsize=10)


# %% cg: what more iterations of conjugate gradient are worth

CG_CURVES = {       # name → product, dtype, colour, width: a later one lies on top
    "exact, float64": ("gauss-newton", torch.float64, "#9fd6a8", 7.0),
    "exact, float32": ("gauss-newton", torch.float32, "#d95f02", 3.0),
    "differences, float32": ("finite-difference", torch.float32, "#1f4f8f", 1.2)}
JUDGES = ("the same tasks", "other tasks")


def cg(words, out, tasks=20, draws=3, most=15, **settings):
    """True progress of a step against CG's iterations (15 minutes; PNG, CSV).

    Word: a checkpoint (default: figures/point2d-seed0/checkpoint.pt). Progress is the
    predicted fall of the surrogate at a given KL, gᵀx/√(xᵀHx), with the exact H in
    float64, whichever product CG used. It is judged with g and H of the tasks that made
    x, and with those of as many other tasks. The means over `draws` sets of tasks are
    drawn, for the run's first θ and for its last.
    """
    start, *_ = words or [HERE / "point2d-seed0" / "checkpoint.pt"]
    config, *_, theta = loaded(start, **settings)
    thetas = {"the first θ": first_theta(config),
              f"θ after {config.iterations} meta-iterations": theta}
    rows = []
    for title, theta in thetas.items():
        for draw in range(draws):
            problem = sampled(config, theta, tasks, draw)
            others = sampled(config, theta, tasks, draw + 1000)
            rows += [(title, *row[:2], draw, *row[2:])
                     for row in cg_progress(problem, others, most)]
    mt.write_csv(out / "cg.csv", ("theta", "judged_on", "product", "draw", "iterations",
                                  "progress"), rows)
    panels = [(title, judge) for judge in JUDGES for title in thetas]
    with four_panels(out / "cg.png", 8.6, 6.4, "iterations of conjugate gradient",
                     "true progress, gᵀx / √(xᵀHx)") as axes:
        for ax, panel in zip(axes.flat, panels):
            for label, (_, _, color, width) in CG_CURVES.items():
                progress = [row[-1] for row in rows if row[:3] == (*panel, label)]
                mean = np.reshape(progress, (draws, most)).mean(0)
                ax.plot(range(1, most + 1), mean, color=color, linewidth=width,
                        label=label)
            ax.axhline(0, color="black", linewidth=0.8)
            ax.set_title(", judged on ".join(panel), fontsize=10)
            ax.xaxis.get_major_locator().set_params(integer=True)


def cg_progress(problem: Problem, others: Problem, most: int):
    """Yields (tasks it is judged on, product, iterations of CG, progress)."""
    in_64, damping = in_float64(problem), problem.config.damping
    judges = [(name, mt.meta_gradient(*one), product(one, "gauss-newton"))
              for name, one in zip(JUDGES, (in_64, in_float64(others)))]
    g = judges[0][1]
    for label, (hvp, dtype, *_) in CG_CURVES.items():
        multiply = product(in_64 if dtype == torch.float64 else problem, hvp)
        steps = [mt.conjugate_gradient(lambda v: multiply(v) + damping * v, g.to(dtype),
                                       n, problem.config.cg_tolerance)[0].double()
                 for n in range(1, most + 1)]
        for name, its_g, exact in judges:
            for n, x in enumerate(steps, 1):
                xHx = x @ (exact(x) + damping * x)
                yield name, label, n, float(its_g @ x / xHx.sqrt())


# %% costs and benchmark: where the time goes


def costs(words, out, repeats=40, **settings):
    """What each Hessian-vector product costs on one task (1 minute; printed)."""
    config = mt.Config(**settings)
    theta = first_theta(config)
    problem = sampled(config, theta, 1)
    one_task = problem.policy, theta, problem.data[0], config.alpha
    functions = {"making Gauss–Newton's graphs, once for all of CG":
                 partial(mt.gauss_newton_product, *one_task)}
    g = mt.meta_gradient(*problem)
    for hvp in ("gauss-newton", "double-backprop", "finite-difference"):
        functions[hvp] = partial(mt.kl_hessian_product(*problem.change(hvp=hvp)), g)
    times = interleaved(functions, repeats)
    steps = int(problem.data[0].outer.mask.sum())
    print_table((f"one task, {steps:,} samples, one thread", "ms", "differences"), [
        (name, 1e3 * seconds, seconds / times["finite-difference"])
        for name, seconds in times.items()])


def interleaved(functions: dict, repeats: int, warm_up: int = 3) -> dict[str, float]:
    """Median seconds of each function; they take turns, so they share the machine."""
    times = {name: [] for name in functions}
    for _ in range(warm_up + repeats):
        for name, function in functions.items():
            started = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - started)
    return {name: float(np.median(laps[warm_up:])) for name, laps in times.items()}


CLOCKED = (                                        # part of an iteration, its functions
    ("sampling", mt, "map_over_tasks"), ("gradient", mt, "meta_gradient"),
    ("CG", mt, "kl_hessian_product"), ("CG", mt, "conjugate_gradient"),
    ("line search", mt, "backtrack_line_search"),
    ("waiting", torch.distributed, "all_reduce"),
    ("waiting", torch.distributed, "all_gather_object"))


def clocked(function, part: str, laps: list):
    """The same function; its seconds are added to `part` of the last lap."""
    def run(*values, **named):
        started = time.perf_counter()
        try:
            return function(*values, **named)
        finally:
            laps[-1][part] += time.perf_counter() - started
    return run


def one_run(words, out, processes=1, **settings):
    """Called by `benchmark`: an iteration's seconds and the memory (printed as JSON).

    The first process is clocked; the others are the plain program.
    """
    laps = [defaultdict(float)]          # before the first iteration, then one for each
    for part, module, name in CLOCKED:
        setattr(module, name, clocked(getattr(module, name), part, laps))

    def report(state):
        if state.rows:
            laps[-1]["iteration"] = state.rows[-1]["seconds"]
        laps.append(defaultdict(float))

    config = mt.Config(**settings)
    with mt.processes(processes):
        mt.exchange_job(config)
        mt.train_maml(config, report=report)
    found = {part: np.median([lap[part] for lap in laps[2:-1]])
             for part in ("iteration", *(part for part, *_ in CLOCKED))}
    found["gigabytes"] = [1.024e-6 * resource.getrusage(who).ru_maxrss   # Linux: KiB
                          for who in (resource.RUSAGE_SELF,
                                      resource.RUSAGE_CHILDREN)[:processes]]
    print(json.dumps(found))


def benchmark(words, out, **settings):
    """Seconds of a meta-iteration and of its parts (half a minute; printed).

    Medians over the iterations after the first, in one process and in two. Settings are
    those of the training, such as `task=cheetah-dir iterations=3`. What is waited for
    the other process is a share of the parts. Nothing else may run meanwhile.
    """
    settings = dict(task="point2d", iterations=10) | settings
    mt.Config(**settings)                                    # complains, if it must
    a, b = torch.randn(2000, 100), torch.randn(100, 100)
    seconds = interleaved({"product": lambda: [a @ b for _ in range(20)]}, 50)
    speed = 20 * 2 * 2000 * 100 * 100 / seconds["product"] / 1e9
    print(f"{mt.available_cores()} cores; a product (2000×100)·(100×100) in float32 "
          f"runs at {speed:.0f} GFLOP/s on one of them")
    words = [f"{name}={value}" for name, value in settings.items()]
    print(*words)
    for processes in (1, 2):
        printed = subprocess.run(
            [sys.executable, __file__, "one-run", f"processes={processes}", *words],
            stdout=subprocess.PIPE, text=True, check=True).stdout
        found = json.loads(printed)
        memory = " + ".join(f"{x:.2f}" for x in found.pop("gigabytes"))
        whole, waiting = found.pop("iteration"), found.pop("waiting")
        parts = " + ".join(f"{part} {x:.2f}" for part, x in found.items())
        print(f"  {processes} process{'es' * (processes > 1):2} {whole:6.2f} s = "
              f"{parts}; of it {waiting:.2f} waiting; at most {memory} GB", flush=True)


# %% what-matters: what a choice does to the result

CHOICES = {
    "the defaults": {},
    "first order": dict(first_order=True),
    "ratio inner loss": dict(inner_loss="ratio"),
    "exact products": dict(hvp="gauss-newton"),
    "products with all tasks": dict(curvature_tasks=20),
    "λ 1 (authors' code)": dict(lam=1.0),
    "10 iterations of CG": dict(cg_iterations=10),
    "two inner steps": dict(inner_steps=2),
    "α 0.5 (authors' run)": dict(alpha=0.5)}
CHOICE_COLUMNS = ("choice", "seed", "return_0", "return_1", "return_2", "return_3",
                  "skipped", "std", "seconds_per_iteration", "settings")


def what_matters(words, out, seeds=(0, 1, 2), **settings):
    """Training with one choice changed, three seeds each (hours; CSV, resumable).

    Words: some of the choices (default: all). A row that stands in the CSV with the
    same settings is not computed again; `seeds=3,4` takes other seeds.
    """
    path, shown = out / "what-matters.csv", []
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    known = {(row[0], row[1], row[-1]): row
             for row in list(csv.reader(text.splitlines()))[1:]}
    for name in words or CHOICES:
        if name not in CHOICES:
            raise mt.BadInput(f"unknown choice {name!r}: take {', '.join(CHOICES)}")
        rows = []
        for seed in np.atleast_1d(seeds).tolist():
            config = mt.Config(**settings | CHOICES[name] | dict(seed=seed))
            key = (name, str(seed), json.dumps(mt.settings_of(config)))
            if key not in known:
                numbers = [f"{x:.4g}" for x in outcome(config)]
                print(name, seed, *numbers, flush=True)
                known[key] = [*key[:2], *numbers, key[2]]
                mt.write_csv(path, CHOICE_COLUMNS, list(known.values()))
            rows.append(known[key])
        numbers = np.array([row[2:8] for row in rows], float)
        shown.append((name, ", ".join(row[1] for row in rows), *numbers.mean(0),
                      ", ".join(row[3] for row in rows)))
    print_table(("choice", "seeds", "0 steps", "1", "2", "3", "skipped", "last std",
                 "after 1 step, seed by seed"), shown)


def outcome(config: mt.Config) -> tuple[float, ...]:
    """Returns after 0 to 3 steps, steps skipped, last std, seconds an iteration."""
    try:
        theta, rows = mt.train_maml(config)
        returns = mt.evaluate(config, theta).mean(0)
    except mt.Diverged:
        return (np.nan,) * 7
    skipped = sum(row["line_search_steps"] == 0 for row in rows)
    seconds = np.median([row["seconds"] for row in rows])
    return (*returns, skipped, rows[-1]["std_mean"], seconds)


# %% seeds and share: what finished runs amount to


def evaluations(words):
    """The runs' task, their methods, and their tables (tasks, steps + 1)."""
    if not words:
        raise mt.BadInput("name the runs' folders, such as figures/point2d-seed*")
    task = mt.read_config(Path(words[0])).task
    return task, *zip(*[mt.read_evaluation(Path(word), task) for word in words])


def seeds(words, out, name=None):
    """Several seeds of one task: mean, interval, every seed (seconds; PNG, printed).

    Words: the runs' folders. The 95 % interval is a bootstrap over seeds with 10,000
    resamples; of two or three seeds it is their range. The picture shows returns minus
    the paper's, which makes one scale serve all steps. `name` names the file.
    """
    task, methods, tables = evaluations(words)
    if len(set(methods)) > 1:
        raise mt.BadInput(f"these runs are of several methods: {', '.join(methods)}")
    paper = mt.paper_rows(task)[methods[0]]
    per_seed = np.mean(tables, axis=1)[:, :len(paper)]                 # (seeds, steps)
    drawn = np.random.default_rng(0).integers(len(words), size=(10_000, len(words)))
    interval = np.percentile(per_seed[drawn].mean(axis=1), [2.5, 97.5], axis=0)
    mean, steps = per_seed.mean(0), np.arange(per_seed.shape[1])
    print_table(("run", *map(str, steps)), [(label, *row) for label, row in [
        *zip([Path(word).name for word in words], per_seed), ("mean", mean),
        *zip(("2.5 %", "97.5 %"), interval), ("paper", paper)]])
    path = out / f"{name or task + '-seeds'}.png"
    with mt.new_figure(path, width=7.0) as (ax,):
        ax.axhline(0, color="#c00000", linestyle="--", label="paper")
        beside = np.linspace(-0.2, 0.2, len(words))[:, None]
        ax.plot((steps + beside).ravel(), (per_seed - paper[steps]).ravel(), "o",
                color="C0", alpha=0.5, label="a seed")
        ax.errorbar(steps, mean - paper[steps], np.abs(interval - mean), fmt="_",
                    color="black", markersize=20, capsize=5, label="mean, 95 %")
        ax.set(xlabel="gradient steps", ylabel=f"{task}: return minus the paper's",
               xticks=steps,
               xticklabels=[f"{k}\npaper {paper[k]:.2f}" for k in steps])
        ax.legend(frameon=False, fontsize=9)


def share(words, out, oracle=None):
    """How far towards the oracle one gradient step goes (seconds; printed).

    Words: the runs' folders; `oracle=` is the oracle's. The share is (after one step −
    before) / (oracle − before), of the two directions also for each.
    """
    if oracle is None:
        raise mt.BadInput("oracle= names the folder of the oracle's run")
    task, (method, *_), (*tables, goal) = evaluations([*words, oracle])
    parts = {"all tasks": slice(None)}
    if task.endswith("-dir"):                                        # they alternate
        parts |= dict(forward=slice(0, None, 2), backward=slice(1, None, 2))

    def way(before, after, best):
        return (after - before) / (best - before)

    shares = [[way(*table[part, :2].mean(0), goal[part, 0].mean())
               for part in parts.values()] for table in tables]
    print_table(("run", *parts), [
        *([word, *row] for word, row in zip(words, shares)),
        ["mean", *np.mean(shares, axis=0)]])
    paper = mt.paper_rows(task)
    print(f"paper: {way(*paper[method][:2], *paper['oracle']):.2f}")


# %% finetune, signal, orders, upright: what one θ does


def finetune(words, out, tasks=20, **settings):
    """The search for a baseline's step size of fine-tuning (minutes; printed).

    Words: a checkpoint, then first steps α to try; the later steps are α/2. The tasks
    are not the held-out ones (of the two directions: other episodes).
    """
    if not words:
        raise mt.BadInput("name a checkpoint, such as runs/NAME/checkpoint.pt")
    config, family, policy, theta = loaded(
        words[0], **dict(eval_episodes=20, seed=2025) | settings)
    drawn = family.sample_tasks(mt.random_stream(2025), tasks)
    for alpha in words[1:] or "0.002 0.005 0.01 0.02 0.05 0.1 0.2 0.5 1 2 5".split():
        once = replace(config, eval_alpha=float(alpha))
        try:
            table = mt.adaptation_returns(policy, theta, family, drawn, once)
            text = " ".join(f"{x:9.2f}" for x in table.mean(0))
        except mt.Diverged:
            text = "diverged"
        print(f"α {alpha:>5}: {text}", flush=True)


def signal(words, out, batches=8, **settings):
    """How much of the inner gradient is signal, for each of two tasks (printed).

    Words: checkpoints, or tasks' names (their first θ). Two batches of `rollouts`
    episodes of one task give two gradients of the inner loss: the number is the mean
    cosine between them, over pairs of batches. `gamma=0.95 lam=1` tries other credit.
    """
    for word in words:
        config, family, policy, theta = loaded(word, **settings)
        for m, task in enumerate(family.test_tasks(2)):
            gradients = []
            for batch in range(batches):
                data = mt.sample_trajectories(
                    family, task, policy, theta, config.rollouts, key=(99, m, batch),
                    horizon=config.horizon, gamma=config.gamma, lam=config.lam)
                gradients.append(mt.gradient(
                    lambda t: mt.inner_loss(policy, t, data), theta))
            unit = torch.nn.functional.normalize(torch.stack(gradients))
            cosines = float((unit @ unit.T).sum() - batches) / (batches**2 - batches)
            print(f"{word}, task {task}: {cosines:.2f}", flush=True)


def orders(words, out, tasks=20, **settings):
    """Cosine between second-order and first-order g on new tasks (seconds; printed).

    Words: checkpoints, or tasks' names (their first θ).
    """
    for word in words:
        config, *_, theta = loaded(word, **settings)
        problem = sampled(config, theta, tasks)
        second, first = [mt.meta_gradient(*problem.change(first_order=first_order))
                         for first_order in (False, True)]
        cosine = float(torch.cosine_similarity(second, first, dim=0))
        print(f"{word}: {cosine:.3f} ({tasks} tasks)", flush=True)


def upright(words, out):
    """How long half-cheetah runs on its feet, by direction (half a minute; printed).

    Words: the runs' folders. The share of all steps in which its back points upwards.
    """
    for word in words:
        config, family, policy, theta = loaded(Path(word) / "checkpoint.pt")
        for m, task in enumerate(family.test_tasks(2)):
            for step, (_, data) in zip(range(2), mt.adaptation(
                    policy, theta, family, task, config, m)):
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
    (91, 76, "surrogate Uᵢ\non D′ with Â′", "plain"),
    (91, 57, f"kᵢ = KL(π{OLD} ‖ π)\non D′", "plain"),
    (25, 45, "D, Â: numbers,\nsampled with θ", "number"),
    (66, 42, f"D′, Â′: numbers,\nsampled with θ′(θ{OLD})", "number"),
    (91, 38, f"π{OLD}: θ′(θ{OLD}),\nwithout a graph", "number"))
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
LEGEND = (                                                 # ink, text
    ("first", "Blue: the only way from θ to θ′ that first-order MAML knows. It takes J "
     "to be I."),
    ("second", "Orange: the way through ∇L. Blue and orange together make "
     "J = I − α∇²L, in g and in the ∇k inside H·v."),
    ("third", "Purple: a second crossing of the orange way, with the third derivative "
     "of L. Only ∇²k has it."),
    ("number", "Grey: numbers. Where D′ is sampled, and in the line search, θ and θ′ "
     "are numbers, too."),
    ("cut", "✂1: the pseudocode's copy.deepcopy makes parameters that do not know θ."),
    ("cut", "✂2: its backward() and optim.step() let ∇L enter as numbers, outside of "
     "any graph."),
    ("cut", "✂3: no cut of its own. Its rewards are numbers, and its log π leads "
     "back to the copy only."))


def graph(words, out):
    """The computational graph of one meta-step, a drawing (seconds; PNG)."""
    with mt.new_figure(out / "graph.png", 1, 8.0, 5.4) as (ax,):
        ax.set(xlim=(0, 100), ylim=(12, 83))
        ax.axis("off")
        for *ends, ink, bend in ARROWS:
            dashed = ink == "number"
            ax.annotate("", ends[2:], ends[:2], arrowprops=dict(
                arrowstyle="-|>", mutation_scale=13, shrinkA=0, shrinkB=0,
                color=INK[ink], linewidth=1.2 if dashed else 1.8,
                linestyle="--" if dashed else "-",
                connectionstyle=f"arc3,rad={bend}"))
        for x, y, text, edge in BOXES:
            dashed = edge == "number"
            ax.text(x, y, text, ha="center", va="center", fontsize=9, bbox=dict(
                boxstyle="round,pad=0.8", linewidth=1.4, edgecolor=INK[edge],
                facecolor="#eeeeee" if dashed else "white",
                linestyle="--" if dashed else "-"))
        for x, y, ink, text in TEXTS:
            circle = dict(boxstyle="circle,pad=0.15", facecolor="white",
                          edgecolor=INK[ink])
            ax.text(x, y, text, color=INK[ink], fontsize=9, ha="center", va="center",
                    bbox=circle if ink == "cut" else None)
        for line, (ink, text) in enumerate(LEGEND):
            ax.text(1, 29 - 2.8 * line, text, color=INK[ink], fontsize=8)


# %% film: a walker before and after one gradient step


def filmed(name: str) -> gym.Env:
    """A walker that keeps a picture of each step, on a floor that is large enough."""
    env = mt.Walker(name, render_mode="rgb_array", camera_name="track", width=224,
                    height=168)
    model = env.unwrapped.model
    floor = model.geom("floor")
    model.geom_size[floor.id, :2] *= 5        # a half-cheetah runs further than 40 m
    model.mat_texrepeat[floor.matid] *= 5
    try:
        env.render()
    except Exception as error:                # of which type depends on what lacks
        raise mt.BadInput(f"MuJoCo cannot draw here ({error!s:.80}): install EGL "
                          f"(Debian: libegl1)") from None
    return gym.wrappers.RenderCollection(env)


def film(words, out, every=4, **settings):
    """A walker before and after one gradient step (two minutes; GIF).

    Words: a checkpoint, and the file to write. Of each of two held-out tasks one
    episode with θ and one with θ′, side by side; a picture for every fourth step.
    """
    from matplotlib.animation import ArtistAnimation, PillowWriter
    if len(words) != 2 or not words[1].endswith(".gif"):
        raise mt.BadInput("name a checkpoint and a .gif, such as RUN/checkpoint.pt "
                          "film.gif")
    if sys.platform == "linux" and "DISPLAY" not in os.environ:
        os.environ.setdefault("MUJOCO_GL", "egl")              # draws without a window
    config, _, policy, theta = loaded(words[0], **settings)
    if config.task not in mt.WALKERS:
        raise mt.BadInput(f"{config.task} is no walker: see its trajectories.png")

    def make_envs(K):
        first, others = partial(filmed, config.task), partial(mt.Walker, config.task)
        return mt.Lockstep([first] + [others] * (K - 1))

    family = mt.family_of(config, replace(mt.TASKS[config.task], make_envs=make_envs))
    films = []                                                    # (title, its frames)
    for m, task in enumerate(family.test_tasks(2)):
        name = f"{task[0]:.2f} m/s"
        if config.task.endswith("-dir"):
            name = "forward" if task[0] > 0 else "backward"
        for when, (_, data) in zip(("before", "after one step"), mt.adaptation(
                policy, theta, family, task, config, m)):
            title = f"{name}, {when}: return {data.rew[0].sum():.0f}"
            first, *_ = family.make_envs(config.eval_episodes).unwrapped.envs
            films.append((title, first.render()[::every]))
    with mt.new_figure(io.BytesIO(), len(films), 3.2 * len(films), 2.8) as axes:
        pictures = [[] for _ in range(max(len(frames) for _, frames in films))]
        for ax, (title, frames) in zip(axes, films):
            ax.set_title(title, fontsize=11)
            ax.axis("off")
            for t, artists in enumerate(pictures):
                artists.append(ax.imshow(frames[min(t, len(frames) - 1)]))
        ArtistAnimation(axes[0].figure, pictures).save(
            words[1], PillowWriter(fps=20 / every), dpi=72)     # as fast as in life


# %% The command line

COMMANDS = {function.__name__.replace("_", "-"): function for function in (
    benchmark, one_run, costs, fd_error, cg, what_matters, seeds, share, finetune,
    signal, orders, upright, graph, film)}


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
        with mt.known_modes():
            COMMANDS[name]([word for word in rest if "=" not in word], out,
                           **{key: value_of(text) for key, text in given.items()})
    except mt.BadInput as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
