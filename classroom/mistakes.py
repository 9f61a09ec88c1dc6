"""One list of wrong changes to maml_trpo.py, and the mutation run.

    python classroom/mistakes.py            make each change in a copy and test the copy
    python classroom/mistakes.py NAME...    only those with NAME in function or words

Three things are made from the list. The mutation run: each change must be caught by a
test that runs the program (tests marked `text` only read it, and are left out).
Find-the-bug: `exercises.py bug 3 FILE`. The exercises: of their functions a grader must
see each change and say its words, which tell a student, too, what was done instead.
"""
import ast
import functools
import inspect
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

TOP = Path(__file__).resolve().parent.parent

# The function, method, class or table of maml_trpo.py, then its mistakes, one a line:
# old text => new text :: in words. Another old => new after &&, where it takes two. A
# line that ends in =>, && or :: goes on in the next; \n is the end of a line of code.
LIST = r"""
complete
    if config.alpha is None else config.alpha =>  :: α of evaluation stays the preset's
    if getattr(config, name) is None =>  :: the preset goes before what was given
POINT2D
    max_kl=(0. => max_kl=(1. :: δ of point2d
TaskFamily
    =threading.local, => =lambda: type('', (), {})(), :: environments shared by threads
Point2D.step
    offset[:, 1])   => offset[:, 1]) ** 2   :: the squared distance
    32), reward => 32) + 1e-3 * self.goal, reward :: the goal leaks into the observation
Point2D.reset
    = task_in(options, self.goal) => = self.goal :: reset ignores the task
GaussianPolicy.distribution
    log_std.clamp( => log_std.detach().clamp( :: log σ is frozen
DiagonalGaussian.log_prob
    .sum(-1) => .mean(-1) && i)).sum() => i)).mean() :: with a mean over A, not a sum
    .sum(-1) =>  && i)).sum() => i)) :: before the sum over the action's dimensions
    + 0.5 * math.log(2 * math.pi) =>  :: without −½ log 2π
    / self.log_std.exp() => / (0.5 * self.log_std).exp() && (self.log_std + =>
        (0.5 * self.log_std + :: with exp(log_std) taken for the variance
_kl_gaussian
    log_ratio = new => old, new = new, old\n    log_ratio = new :: with the KL swapped
    log_ratio + => 0 * log_ratio + && - 0.5 => - 0.5 * torch.exp(-2 * log_ratio) ::
        without the part of the two σ
    / new.log_std => / old.log_std :: with σ_o under the distance of the means
numpy_sampler
    mean + std => mean + 0 * std :: episodes of the mode, not of samples
task_rollout
    sampler(theta, rng) => sampler(theta, random_stream(0)) :: always the same noise
    rng.integers(2**31, size=K).tolist() => [0] * K :: all copies have one seed
    running = running & ~( => mask[t] &= ~terminated\n        running = running & ~( ::
        the step that ends an episode is masked
    terminated | truncated => terminated :: truncated episodes go on
    all_obs[t], all_act => old, all_act &&
        .step(action) => .step(action)\n        all_obs[t] = old ::
        stored after the step, when a buffer may have changed
masked_mean
    (x * mask).sum() / mask.sum() => (x * mask).mean() :: the mean over all steps
discounted_returns
    gamma * out => out :: without the discount
    from_numpy(out) => from_numpy(out) * gamma ** torch.arange(rew.shape[1]) ::
        with the discount counted from the episode's start, not from t
    reversed(range(rew.shape[1] - 1)) => range(1, rew.shape[1]) && t + 1] => t - 1] ::
        with the rewards before t, where those after it belong
    .copy() =>  :: changes its argument rew in place
gae
    values = values * mask => mask = torch.ones_like(mask) :: with the mask forgotten
    values = values * mask => keep, mask = mask, mask * 0 + 1 && lam) * mask =>
        lam) * keep :: with the mask put on at the end only: later V leak in
    values = values * mask =>  :: with a V from after the end in the last step's δ
    torch.zeros_like(values[:, :1]) => values[:, -1:] :: with V_{H-1} taken for V_H
    gamma * lam) => gamma) :: with γ in place of γλ in the sum
    gamma * next_values => next_values :: with γ forgotten in δ
LinearBaseline.features
    .clamp(-self.CLIP, self.CLIP) =>  :: without the clip to ±10
    H, dtype => K * H, dtype && .expand(K, H) => .view(K, H) :: with time running on
    / 100) => ) :: with time not divided by 100
LinearBaseline.fit
    phi = self => mask = mask >= 0\n        phi = self :: with the mask forgotten
    self.RIDGE => 1e-14 :: without the ridge
    return self => return None :: must return self
LinearBaseline.predict
    .to(obs.dtype) =>  :: torch.float32 is right
standardise
    (std + 1e-8) => (std ** 2 + 1e-8) :: divided by the variance
inner_loss
    trajectories.mask) => trajectories.mask * 0 + 1) :: with the mask forgotten
    return - => return  :: with the sign flipped: a loss falls where the return rises
    trajectories.adv => trajectories.rew :: with rewards, where advantages belong
    estimator == "ratio" => False :: for log π: the estimator is not looked at
    (log_prob - log_prob.detach()) => log_prob :: with π in place of π/stop_grad(π)
    log_prob.detach()).exp => log_prob.detach()).cumsum(1).exp ::
        with the ratio of all steps so far (DiCE), not each step's own
    (log_prob - log_prob.detach()).exp() => 1 + log_prob - log_prob.detach() ::
        for log π, which differs from the ratio just here
adapt
    theta_prime - alpha => theta_prime + alpha :: with a step up the loss, θ + α∇L
    = theta_prime - => = theta - :: with every step starting from θ: the last one counts
    = theta_prime if => = theta if && else theta_prime => else theta ::
        with every step's gradient taken at the first θ
    alpha * grad\n => alpha * grad\n        break\n :: after the first inner step only
    alpha * grad\n => alpha * grad.detach()\n ::
        with the inner gradient detached: J = I, first-order MAML
    at = theta_prime => create_graph = theta.requires_grad\n        at = theta_prime ::
        with create_graph ignored: --first-order would change nothing
    , estimator)\n => )\n :: with the estimator ignored: this is log π's J
    = theta\n => = theta.detach().requires_grad_()\n :: no gradient can reach θ
    theta_prime = theta_prime - => theta_prime.data -= :: changes its argument theta
    (grad,) = torch.autograd.grad(loss, at, => loss.backward( && =create_graph)\n =>
        =create_graph)\n        grad = at.grad\n :: is no leaf and has no .grad
    return theta_prime => return theta_prime.requires_grad_() :: it still has a graph
mean_over_tasks
    total[:-1] / total[-1] => total[:-1] :: a sum over tasks
    torch.distributed.all_reduce(total) => pass :: every rank has its own mean
surrogate_and_kl
    distribution(theta_prime, => distribution(theta, :: with π_θ for the adapted policy
    outer.adv, outer.mask) => outer.adv, outer.mask * 0 + 1) :: with the mask forgotten
    - old.log_prob(outer.act)).exp() => ) :: with log π in place of the ratio
    - old => - new && act)).exp() => act).detach()).exp() :: with a ratio of 1 always
    ratio = (new => ratio = -(-new && act)).exp() => act)).neg().exp() ::
        with the ratio upside down
    (old, new) => (new, old) :: with the two policies of the KL swapped
    (old, new) => (new, policy.distribution(theta, outer.obs)) ::
        for the KL of adapted and meta-policy: that bounds the inner step
    theta.requires_grad and not first_order => False :: with the inner gradient detached
    and not first_order =>  :: with first_order ignored
    , estimator)\n => )\n :: with the estimator ignored
hessian_vector_product
    eps * v) / eps => eps * v) / (2 * eps) - grad_fn(theta - eps * v) / (2 * eps) ::
        with the symmetric difference, where one gradient will do
    step / v.norm() => step :: with ε = step: θ then moves by step·‖v‖, not by step
    eps * v) / eps => eps * v) / step :: divided by step, not by ε: this is H·v/‖v‖
    (theta + eps * v) => (theta.add_(eps * v)) && / eps =>
        / eps + 0 * theta.sub_(eps * v) :: changes its argument theta in place
    eps * v) / eps => eps * v) / eps - grad_fn(theta) / eps :: calls grad_fn 2 times
double_backprop_product
    torch.autograd.grad(grad @ v, theta)[0] => grad.detach() :: for ∇k alone
    grad @ v => grad.sum() :: with v left out: these are the sums of H's rows
gauss_newton_product
    for step in steps: => for step in []: :: with J left out: this is Jᵀ(F·v)
    reversed(steps) => [] :: with Jᵀ left out: this is F(J·v)
    reversed(steps) => steps :: with J for Jᵀ, where the steps come in reverse order
    u - alpha => u + alpha :: with J = I + α∇²L
keep_graphs
    mask / mask.sum() => 1 / mask.numel() :: F forgets the mask
kl_hessian_product
    config.alpha)[1] => config.alpha, config.first_order, config.inner_loss)[1] ::
        the metric's J is the estimator's
conjugate_gradient
    p = r + (rr / rr_before) * p => p = r :: with p = r always: steepest descent
    rr / rr_before => rr_before / rr :: with β upside down
    ), b, b\n => ), b.clone(), b\n    p = r\n && r = r - => r -= ::
        with r and p one tensor, changed in place: copy it
    rr < tolerance => rr.sqrt() < tolerance :: with ‖r‖ compared in place of r·r
    not pHp > 0 => pHp != pHp :: with a step along p though pᵀHp is not positive
step_scale
    math.sqrt(2 * max_kl / xHx) => 2 * max_kl / xHx :: with the square root missing
    2 * max_kl => max_kl :: with the 2 missing
backtrack_line_search
    and kl <= max_kl =>  :: without the check of the KL
    surrogate < surrogate_before and =>  :: without the check of the surrogate
    kl <= max_kl => kl <= 1.5 * max_kl :: with a bound on the KL that is larger than δ
    kl <= max_kl => kl < max_kl :: with kl < max_kl, where a KL of δ itself is allowed
    return theta, => return candidate, :: with θ not restored: this is the last trial
    theta + ratio => theta - ratio :: with the step's sign flipped: it points downhill
    ratio**trial => ratio**(trial + 1) :: with the full step left out: j starts at 0
    if surrogate < => if not surrogate >= && kl <= max_kl => not kl > max_kl ::
        with a NaN accepted
sample_task_data
    outer = sample(theta_prime, => outer = sample(theta, :: D′ sampled with θ
    theta_prime, config.inner_updates) => theta_prime, 0) :: one noise for D and D′
meta_iteration
    stream(config.seed, i) => stream(config.seed, 0) :: always the same tasks
    config.seed, i, m => config.seed, i, 0 :: all tasks share their random numbers
    std(new_theta).mean() => std(new_theta).max() :: the logged σ is the largest
TrainState.initial
    config.seed => 0 :: the first θ does not depend on the seed
TrainState.after
    self.theta if better => theta if better :: the best θ is the one after the step
family_of
    != "oracle" => != "oracle" or family.name not in TASKS :: one's own has no oracle
gather_over_tasks
    sorted( => list( :: ranks return their tasks in their own order
first_rank
    .get_rank() == 0 => .get_rank() >= 0 :: every rank writes and prints
walkers
    np.resize([first, -first], (M => rng.choice([1.0, -1.0], (M :: directions are drawn
TASKS
    (n, 2)), 100) => (n, 2)), 50) :: point2d ends at half its horizon
adaptation
    alpha if step == 0 else alpha / 2 => alpha :: α for every step
    config.eval_alpha => config.alpha :: evaluation with α of training
    yield phi, data => seen = seen if step else data\n        yield phi, seen ::
        the returns are of the episodes before adaptation
    0 if config.method == "oracle" else config => config :: the oracle is adapted
EVALUATION
    2**31 => 0 :: evaluation shares its numbers with training
evaluate
    test_tasks( => sample_tasks(random_stream(config.seed, 0), :: training tasks
PAPER
    -11.68 => -11.86 :: two digits of the paper's table exchanged
load_checkpoint
    archive.testzip() => False :: a damaged checkpoint is read
write_atomically
    path.with_name( => (lambda name: path)( :: files are written in place
settings_of
    if name != "workers" =>  :: workers are kept with a run
read_evaluation
    other != task => False :: another task's table is compared
locked
    LOCK_EX | => LOCK_SH | :: two runs in one folder
draw_learning_curve
    2 * k + 1] => 3 - 2 * k] :: from one return's quartile to the other's
draw_trajectories
    goal, config, => family.test_tasks(1)[0], config, :: all to the first goal
standard_error
    (sum(variances)) / sum( => (sum(variances) / sum( && groups)) => groups))) ::
        the standard deviation, where the words say error
comparison_rows
    *directions.values() or [table] => table :: the directions' difference is error
progress_line
    (iterations - 1 - => (iterations - :: time left for one iteration too many
    ['surrogate_after'] => ['surrogate_before'] :: the old surrogate is printed
first_state
    theta=other.theta, => theta=other.best_theta, :: --init takes the best θ
    ("iterations", "workers")) => ("iterations", "workers", "seed")) ::
        --resume takes another seed
report
    *place, value) => *place[::-1], value) :: tasks and steps exchanged
run
    state.best_theta, => state.theta, :: --best shows the last θ
    theta = state.theta\n => theta = state.best_theta\n :: the best θ, called the last
"""


@dataclass(frozen=True)
class Mistake:
    function: str
    changes: tuple[tuple[str, str], ...]         # old (once in the function), new
    words: str

    @property
    def name(self) -> str:
        return f"{self.function}: {self.words}"

    def applied_to(self, source: str) -> str:
        """The text of maml_trpo.py with this mistake; ValueError if it does not fit."""
        node, lines = parts(source)[self.function], source.splitlines(keepends=True)
        text = "".join(lines[node.lineno - 1:node.end_lineno])
        for old, new in self.changes:
            if text.count(old) != 1:
                raise ValueError(f"{self.name}: {old!r} is there {text.count(old)}"
                                 f" times")
            text = text.replace(old, new)
        return "".join([*lines[:node.lineno - 1], text, *lines[node.end_lineno:]])


@functools.cache
def parts(source: str) -> dict[str, ast.stmt]:
    """Name → the function, class or table of that name; "Class.method", too."""
    found: dict[str, ast.stmt] = {}
    for node in ast.parse(source).body:
        target = getattr(node, "targets", [getattr(node, "target", node)])[0]
        name = getattr(target, "id", getattr(target, "name", ""))
        found.setdefault(name, node)
        for item in node.body if isinstance(node, ast.ClassDef) else []:
            found[f"{name}.{getattr(item, 'name', '')}"] = item
    return found


def read(text: str) -> list[Mistake]:
    """The list, from its text."""
    found, function = [], ""
    for line in re.sub(r"(=>|&&|::)\n +", r"\1 ", text).splitlines():
        if line.startswith(" "):
            changes, words = line.strip().replace("\\n", "\n").split(" :: ")
            pairs = [tuple(change.split(" => ")) for change in changes.split(" && ")]
            found.append(Mistake(function, tuple(pairs), words))
        elif not line.startswith("#"):
            function = line
    return found


MISTAKES = read(LIST)


def pytest_collection_modifyitems(items) -> None:
    """This file is a plugin of the tests: those that are likely to fail go first.

    They name the function, or stand in the section that has the number of its section.
    """
    function = os.environ["MISTAKE"]
    name = re.compile(rf"\b{function.split('.')[0]}\b")

    def section(file: Path, line: int) -> list[str]:
        above = "\n".join(file.read_text("utf-8").split("\n")[:line])
        return re.findall(r"^# %% \D*(\d+)", above, re.MULTILINE)[-1:]
    program = Path("maml_trpo.py")
    here = section(program, parts(program.read_text("utf-8"))[function].lineno)
    items.sort(key=lambda item: (not name.search(inspect.getsource(item.function))) + (
        section(item.path, item.function.__code__.co_firstlineno) != here))


def first_failure(folder: Path, function: str, seconds: float) -> str:
    """Run the tests of a copy until one fails: its name, or "" if all pass."""
    tests = [sys.executable, "-m", "pytest", "-x", "-q", "-m", "not text", "-p",
             "no:cacheprovider", "-W", "ignore", *["-p", "mistakes"] * bool(function)]
    try:
        out = subprocess.run(
            tests + [file.name for file in folder.glob("test_*.py")], cwd=folder,
            text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            timeout=seconds, env={**os.environ, "MISTAKE": function, "MAML_SLOW": "0",
                                  "PYTHONPATH": str(Path(__file__).parent),
                                  "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"})
    except subprocess.TimeoutExpired:
        return f"not done after {seconds:g} s"
    failed = re.search(r"^(?:FAILED|ERROR) \S+?::(\S+)", out.stdout, re.MULTILINE)
    if out.returncode and not failed:
        raise RuntimeError(f"the tests could not be run:\n{out.stdout[-2000:]}")
    return failed[1] if failed else ""


def verdict(mistake: Mistake | None, tree: Path, seconds: float) -> str:
    """Who catches a mistake (None: the program as it is)."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(shutil.copytree(tree, Path(folder) / "copy", ignore=(
            shutil.ignore_patterns(".*", "runs", "__pycache__", "classroom"))))
        file = copy / "maml_trpo.py"
        if mistake:
            file.write_text(mistake.applied_to(file.read_text("utf-8")), "utf-8")
        return first_failure(copy, mistake.function if mistake else "", seconds)


def run(chosen: list[Mistake], tree: Path = TOP, side_by_side: int = 2,
        seconds: float = 900) -> list[Mistake]:
    """Print who catches each mistake: → those that nobody catches."""
    started, survivors = time.monotonic(), []
    if unchanged := verdict(None, tree, seconds):
        raise RuntimeError(f"the program as it is fails {unchanged}")

    def judge(mistake: Mistake) -> tuple[str, str]:
        try:
            caught = verdict(mistake, tree, seconds)
            return "caught" if caught else "SURVIVED", caught
        except (KeyError, ValueError, RuntimeError) as error:
            return "NOT RUN", str(error)
    with ThreadPoolExecutor(side_by_side) as pool:
        for mistake, (how, what) in zip(chosen, pool.map(judge, chosen)):
            print(f"{how}  {mistake.name}  [{what}]", flush=True)
            survivors += [] if how == "caught" else [mistake]
    print(f"{len(chosen)} mistakes, {len(survivors)} survived, "
          f"{(time.monotonic() - started) / 60:.0f} minutes")
    return survivors


if __name__ == "__main__":
    sys.exit(bool(run([m for m in MISTAKES if not sys.argv[1:] or any(
        name in m.name for name in sys.argv[1:])])))
