"""One list of wrong changes to maml_trpo.py, and the mutation run.

    python classroom/mistakes.py            make each change in a copy and test the copy
    python classroom/mistakes.py NAME...    only those with NAME in function or words

Three things are made from the list. The mutation run: each change must be caught by a
test that runs the program (tests marked `text` only read it, and are left out). The
exercises: in their functions a grader must see each change and say its words, which
also tell a student what was done instead. Find-the-bug: `exercises.py bug 3 FILE`
plants one of those that BUGS names.
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
# line that is indented further goes on with the one before; \n ends a line of code.
LIST = r"""
Config
    max_kl: float = setting(0.05 => max_kl: float = setting(1.05 :: δ of point2d
complete_settings
    if "alpha" in given => if "eval_steps" in given :: 
        α of evaluation stays the preset's
    values |= {"task": task} | given => values = {"task": task} | given | values ::
        the preset goes before what was given
one_form
    tuple(convert(x) for => tuple(x for ::
        numpy's numbers and lists stay as they are
known_modes
    torch.enable_grad() => torch.set_grad_enabled(torch.is_grad_enabled()) ::
        a caller's no_grad reaches the inner step
Point2D.step
    offset[:, 1]) => offset[:, 1]) ** 2 :: the squared distance
    self._position.astype(np.float32), reward =>
        (self._position + 1e-3 * self.goal).astype(np.float32), reward ::
        the goal leaks into the observation
    all(1) => any(1) :: it ends where one coordinate is right
Point2D.reset
    self.goal = task_in(options, self.goal) => task_in(options, self.goal) ::
        reset ignores the task: the same goals are trained on for ever
Lockstep.step
    np.flatnonzero(~self.ended) => range(self.num_envs) :: ended copies are stepped
GaussianPolicy.init
    math.log(self.init_std) => self.init_std :: σ for log σ
GaussianPolicy.distribution
    log_std.clamp( => log_std.detach().clamp( :: log σ is left out of every update
GaussianPolicy.sampler
    mean + std * rng.standard_normal(mean.shape, std.dtype) => mean ::
        episodes of the mode, not of samples
DiagonalGaussian.log_prob
    (z * z).sum(-1) => (z * z).mean(-1) && math.pi)).sum() => math.pi)).mean() ::
        with a mean over A, not a sum
    (z * z).sum(-1) => (z * z) && math.pi)).sum()) => math.pi))) ::
        before the sum over the action's dimensions
    (self.log_std + 0.5 * math.log(2 * math.pi)).sum() => self.log_std.sum() ::
        without −½ log 2π
    self.log_std.exp() => (0.5 * self.log_std).exp() && (self.log_std + =>
        (0.5 * self.log_std + :: with exp(log_std) taken for the variance
    - (self.log_std => + (self.log_std :: with log σ added, not subtracted
    self.log_std + 0.5 * => 0 * self.log_std + 0.5 * :: without −log σ
    -0.5 * (z * z) => -(z * z) :: without the ½ before the square
kl_old_new
    log_ratio = new => old, new = new, old\n    log_ratio = new :: with the KL swapped
    ((log_ratio + 0.5 * torch.exp(-2 * log_ratio) - 0.5).sum()\n            + 0.5 * =>
        (0.5 * :: without the part of the two σ
    / new.log_std => / old.log_std :: with σ_o under the distance of the means
    - 0.5).sum() => - 0.5).mean() && .sum(-1)) => .mean(-1)) ::
        with a mean over A, not a sum
    exp(-2 * log_ratio) => exp(2 * log_ratio) :: with σ_n²/σ_o², where σ_o²/σ_n² belongs
    exp(-2 * log_ratio) => exp(-log_ratio) :: with σ_o/σ_n, where its square belongs
    + 0.5 * (z * z) => + (z * z) :: without the ½ before the square
random_stream
    [len(key), * => [* :: keys of two lengths can mean the same numbers
task_rollout
    random_stream(*key) => random_stream(0) :: always the same noise
    rng.integers(2**31, size=K).tolist() => [0] * K :: all copies have one seed
    options={"task": task} => options={} :: the task is never used
    all_rew[:, t] = np.asarray(reward) => all_rew[:, t] = np.asarray(reward)
        \n        mask[:, t] *= ~np.asarray(terminated, bool) ::
        the step that ends an episode is masked
    (np.asarray(terminated, bool) | np.asarray(truncated, bool)) =>
        np.asarray(terminated, bool) :: truncated episodes go on
    all_obs[:, t], all_act[:, t], mask[:, t] = obs, action, running =>
        all_act[:, t], mask[:, t], before = action, running, obs && all_rew[:, t] = =>
        all_obs[:, t] = before\n        all_rew[:, t] = ::
        stored after the step, when a buffer may have changed
    all_obs[:, t], all_act[:, t], mask[:, t] = obs, action, running =>
        all_act[:, t], mask[:, t] = action, running && all_rew[:, t] = =>
        all_obs[:, t] = obs\n        all_rew[:, t] = ::
        an action stands beside the observation that follows it
    (all_obs, all_act, all_rew):\n => (all_obs, all_act):\n ::
        rewards after an episode's end are kept
masked_mean
    (x * mask).sum() / mask.sum() => (x * mask).mean() :: the mean over all steps
discounted_returns
    gamma * out => out :: without the discount
    from_numpy(out) => from_numpy(out) * gamma ** torch.arange(rew.shape[1]) ::
        with the discount counted from the episode's start, not from t
    reversed(range(rew.shape[1] - 1)) => range(1, rew.shape[1]) && t + 1] => t - 1] ::
        with the rewards before t, where those after it belong
    reversed(range(rew.shape[1] - 1)) => range(rew.shape[1] - 1) ::
        with t running forward, when R_{t+1} is not known yet
    rew.numpy().copy() => rew.numpy().T.copy() && rew.shape[1] => rew.shape[0] &&
        from_numpy(out) => from_numpy(out.T) ::
        along axis 0, over the episodes: time is axis 1
    from_numpy(out) => from_numpy(out) - rew :: without r_t itself: it starts at t + 1
    from_numpy(out) => from_numpy(out[:, :1].repeat(rew.shape[1], 1)) ::
        with the return of the whole episode at every t
    .copy() =>  :: changes its argument rew in place
gae
    values = values * mask => mask = torch.ones_like(mask) :: with the mask forgotten
    values = values * mask => keep, mask = mask, torch.ones_like(mask) && lam) * mask =>
        lam) * keep :: with the mask put on at the end only: later V leak in
    values = values * mask\n     =>  :: with a V from after the end in the last step's δ
    torch.zeros_like(values[:, :1]) => values[:, -1:] :: with V_{H-1} taken for V_H
    gamma * lam) => gamma) ::
        with λ = 1: γ in place of γλ, or G_t − V_t in place of the sum
    gamma * lam) => lam) :: with λ in place of γλ in the sum
    gamma * next_values => next_values :: with γ forgotten in δ
    values[:, 1:], torch.zeros_like(values[:, :1]) =>
        torch.zeros_like(values[:, :1]), values[:, :-1] ::
        with V_{t-1} in place of V_{t+1}
    next_values - values) => next_values + values) :: with V_t added, not subtracted
    next_values - values) => next_values) :: without −V_t
LinearBaseline.features
    .clamp(-self.CLIP, self.CLIP) =>  :: without the clip to ±10
    arange(H, => arange(K * H, && .expand(K, H) => .view(K, H) :: with time running on
    (torch.arange(H, dtype=torch.float64) / 100) =>
        torch.arange(H, dtype=torch.float64) :: with time not divided by 100
    arange(H, => arange(1, H + 1, :: with time counted from 1, where it starts at 0
LinearBaseline.fit
    phi = self => mask = torch.ones_like(mask)\n        phi = self ::
        with the mask forgotten
    self.RIDGE => 1e-14 :: without the ridge
    phi.T @ phi + => phi.T @ phi / len(phi) + && .double()) => .double() / len(phi)) ::
        with means for sums: the ridge then weighs more
    return self => return None :: returns None: is a `return` missing?
LinearBaseline.predict
    .to(obs.dtype) =>  :: torch.float32 is right
standardise
    (std + 1e-8) => (std**2 + 1e-8) :: divided by the variance
    (adv - mean) / ( => adv / ( :: the mean is not subtracted
assign_credit
    fit(data.obs, returns, => fit(data.obs, data.rew, ::
        the baseline is fitted to rewards, not to returns
    values, data.mask, gamma => 0 * values, data.mask, gamma :: there is no baseline
inner_loss
    trajectories.mask) => torch.ones_like(trajectories.mask)) ::
        with the mask forgotten
    return - => return  :: with the sign flipped: a loss falls where the return rises
    trajectories.adv => trajectories.rew :: with rewards, where advantages belong
    masked_mean(log_prob * trajectories.adv, trajectories.mask) =>
        (log_prob * trajectories.adv * trajectories.mask).sum(1).mean() ::
        with a sum over each episode, where a mean over all steps belongs
    masked_mean(log_prob * trajectories.adv, trajectories.mask) =>
        ((log_prob * trajectories.adv * trajectories.mask).sum(1)
        / trajectories.mask.sum(1)).mean() ::
        with a mean of each episode, and then over episodes
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
    start = theta_prime => create_graph = theta.requires_grad
        \n        start = theta_prime ::
        with create_graph ignored: --first-order would change nothing
    trajectories, estimator) => trajectories) ::
        with the estimator ignored: this is log π's J
    = theta\n => = theta.detach().requires_grad_()\n :: no gradient can reach θ
    theta_prime = theta_prime - => theta_prime.data -= :: changes its argument theta
    (grad,) = torch.autograd.grad(loss, start, => loss.backward( && =create_graph)\n =>
        =create_graph)\n        grad = start.grad\n :: is no leaf and has no .grad
    return theta_prime => return theta_prime.requires_grad_() :: it still has a graph
mean_over_tasks
    (total / M) => total :: a sum over tasks
    total, M = sum_over_processes(total, len(tasks)) => M = len(tasks) ::
        every process has its own mean
surrogate_and_kl
    distribution(theta_prime, => distribution(theta, :: with π_θ for the adapted policy
    outer.adv, outer.mask) => outer.adv, torch.ones_like(outer.mask)) ::
        with the mask forgotten
    masked_mean(kl_old_new(old, new), outer.mask) => kl_old_new(old, new).mean() ::
        with the mask forgotten in the KL
    masked_mean(ratio * outer.adv, outer.mask) =>
        ((ratio * outer.adv * outer.mask).sum(1) / outer.mask.sum(1)).mean() ::
        with a mean of each episode, and then over episodes
    surrogate = -masked => surrogate = masked ::
        with the sign flipped: a loss falls where the return rises
    (new.log_prob(outer.act) - old.log_prob(outer.act)).exp() =>
        new.log_prob(outer.act) :: with log π in place of the ratio
    (new.log_prob(outer.act) - old.log_prob(outer.act)).exp() =>
        new.log_prob(outer.act) - old.log_prob(outer.act) ::
        with the logarithm of the ratio: exp is missing
    old.log_prob(outer.act) => new.log_prob(outer.act).detach() ::
        with a ratio of 1 always
    (new.log_prob(outer.act) - old.log_prob(outer.act)) =>
        (old.log_prob(outer.act) - new.log_prob(outer.act)) ::
        with the ratio upside down
    outer, old = task_data.outer, => outer, old = task_data.inner[0], ::
        with D in place of D′
    outer, old = task_data.outer, => outer, old = task_data.inner[-1], ::
        with the last D in place of D′
    (old, new) => (new, old) :: with the two policies of the KL swapped
    (old, new) => (new, policy.distribution(theta, outer.obs)) ::
        for the KL of adapted and meta-policy: that bounds the inner step
    (old, new) => (policy.distribution(theta, outer.obs), new) ::
        for the KL of meta- and adapted policy: that bounds the inner step
    (old, new) => (old, policy.distribution(theta, outer.obs)) ::
        for the KL of the old and the meta-policy
    theta.requires_grad and not first_order => False :: with the inner gradient detached
    theta.requires_grad and not first_order => theta.requires_grad ::
        with first_order ignored
    theta.requires_grad and not first_order => not first_order ::
        θ requires no gradient in this call
    create_graph, estimator) => create_graph) :: with the estimator ignored
    theta_prime = adapt(policy, theta, task_data.inner, alpha, =>
        log_std = policy.unpack(theta)[-1].mean()\n    alpha = alpha * (
        2 * (log_std - log_std.detach())).exp()\n    theta_prime = adapt(policy, theta,
        task_data.inner, alpha, :: with α differentiated as if it followed this σ
meta_gradient
    config.alpha, config.first_order, config.inner_loss)[0] => config.alpha)[0] ::
        --first-order and --inner-loss change nothing
hessian_vector_product
    grad_fn(theta + eps * v) / eps => (grad_fn(theta + eps * v)
        - grad_fn(theta - eps * v)) / (2 * eps) ::
        with the symmetric difference, where one gradient will do
    return grad_fn => return -grad_fn :: with the sign flipped
    step / v.norm() => step :: with ε = step: θ then moves by step·‖v‖, not by step
    step / v.norm() => step / (v @ v) :: with ε = step/‖v‖²: the move is then step/‖v‖
    step / v.norm() => step * v.norm() :: with ε = step·‖v‖, where step/‖v‖ belongs
    step / v.norm() => 0.01 / v.norm() :: with a fixed 0.01 in place of `step`
    step / v.norm() => 0.01 :: with a fixed ε of 0.01
    step / v.norm() => 1e-5 :: with a fixed ε of 1e-5: float32 has no digits left
    step / v.norm() => 1 / theta.norm() :: with ε = 1/‖θ‖, as in the authors' code
    step / v.norm() => step / theta.norm() :: with ‖θ‖ in place of ‖v‖
    eps * v) / eps => eps * v) / step :: divided by step, not by ε: this is H·v/‖v‖
    eps * v) / eps => eps * v) :: without the division by ε
    return grad_fn(theta + eps * v) / eps => product = grad_fn(theta.add_(eps * v))
        / eps\n    theta.sub_(eps * v)\n    return product ::
        changes its argument theta in place
    eps * v) / eps => eps * v) / eps - grad_fn(theta) / eps :: calls grad_fn 2 times
    return grad_fn => with torch.no_grad():\n        return grad_fn ::
        inside torch.no_grad()
kl_hessian_product
    config.alpha)[1] => config.alpha, config.first_order, config.inner_loss)[1] ::
        the metric's J is the estimator's
    if config.first_order => if False :: first order's metric keeps J
    products, like=v) => products[:1], like=v) :: products of the first task only
conjugate_gradient
    p = r + (rr / rr_before) * p => p = r :: with p = r always: steepest descent
    p = r + (rr => p = r - (rr :: with p = r − β·p
    rr / rr_before => rr_before / rr :: with β upside down
    rr, rr_before = r @ r, rr => rr = rr_before = r @ r ::
        with β = 1: the old r·r is overwritten before it is used
    x, r, p = torch.zeros_like(b), b, b\n => x, r = torch.zeros_like(b), b.clone()
        \n    p = r\n && r = r - => r -= ::
        with r and p one tensor, changed in place: copy it
    r = r - => r -= :: changes its argument b in place
    range(iterations) => range(iterations + 1) :: with one iteration too many
    range(iterations) => range(iterations - 1) :: with one iteration too few
    if rr < tolerance:\n            break\n        Hp => Hp ::
        without the test of the tolerance
    rr < tolerance => rr.sqrt() < tolerance :: with ‖r‖ compared in place of r·r
    if not pHp > 0:\n            break\n        x = x => x = x ::
        with a step along p though pᵀHp is not positive
    not pHp > 0 => pHp <= 0 :: has NaN or infinity in it
    r = r - (rr / pHp) * Hp => r = b - hvp(x) :: calls hvp 2 times, where 1 will do
    Hp = hvp(p) => with torch.no_grad():\n            Hp = hvp(p) ::
        inside torch.no_grad()
step_scale
    math.sqrt(2 * max_kl / xHx) => 2 * max_kl / xHx :: with the square root missing
    2 * max_kl => max_kl :: with the 2 missing
    2 * max_kl / xHx => xHx / (2 * max_kl) :: upside down
    2 * max_kl / xHx => max_kl / (2 * xHx) :: with the 2 under xᵀHx: half of the scale
backtrack_line_search
    surrogate < surrogate_before and kl <= max_kl => surrogate < surrogate_before ::
        without the check of the KL
    surrogate < surrogate_before and kl <= max_kl => kl <= max_kl ::
        without the check of the surrogate
    kl <= max_kl => kl <= 1.5 * max_kl :: with a bound on the KL that is larger than δ
    kl <= max_kl => kl < max_kl :: with kl < max_kl, where a KL of δ itself is allowed
    surrogate < surrogate => surrogate <= surrogate ::
        with a surrogate accepted that has not fallen
    < surrogate_before and => < surrogate_before - 1e-3 and ::
        with a fall demanded of some size, where any fall will do
    return theta, => return candidate, :: with θ not restored: this is the last trial
    theta + ratio => theta - ratio :: with the step's sign flipped: it points downhill
    ratio**trial => ratio**(trial + 1) :: with the full step left out: j starts at 0
    ratio**trial => ratio * trial :: with ratio·j in place of ratioʲ
    range(trials) => range(trials - 1) :: with the last trial left out
    trial + 1\n => trial\n :: with the trials counted from 0
    surrogate < surrogate_before and kl <= max_kl =>
        not surrogate >= surrogate_before and not kl > max_kl :: with a NaN accepted
    surrogate, kl = evaluate(candidate) => with torch.no_grad():
        \n            surrogate, kl = evaluate(candidate) :: inside torch.no_grad()
trpo_meta_step
    task_data[:len(own_tasks(config.curvature_tasks))] => task_data ::
        H is made with all tasks, not with the first n
    [:len(own_tasks(config.curvature_tasks))] =>
        [-len(own_tasks(config.curvature_tasks)):] :: H is made with the last n tasks
    mean_over_tasks(one_task, task_data, => mean_over_tasks(one_task, few, ::
        the line search looks at the first n tasks only
    theta, few, config) =>
        theta, few, dataclasses.replace(config, alpha=config.eval_alpha)) ::
        the α rule is not used in H
    lambda v: hvp(v) + config.damping * v => hvp :: without damping
    if config.first_order => if False :: first order's step is as long as F says
    full_step = -step => full_step = step :: the step goes uphill
    0 < xHx < math.inf => xHx != 0 :: a negative xᵀHx is not skipped
sample_task_data
    outer = sample(theta_prime, => outer = sample(theta, :: D′ is sampled with θ
    sample(theta_prime, config.inner_updates) => sample(theta_prime, 0) ::
        one noise for D and D′
    sample(theta_prime, step) => sample(theta, step) :: every D is played with θ
    distribution(theta_prime, => distribution(theta, :: π_old is the policy with θ
meta_iteration
    stream(config.seed, i) => stream(config.seed, 0) :: always the same tasks
    stream(config.seed, i) => stream(0, i) :: the seed does not reach the tasks
    config.seed, i, m => config.seed, i, 0 :: all tasks share their random numbers
    config.seed, i, m => config.seed, 0, m :: every iteration has the same noise
    config = dataclasses => given, config = config, dataclasses &&
        data, config) => data, given) :: the α rule reaches the sampling only
    std(new_theta).mean() => std(new_theta).max() :: the logged σ is the largest
    (theta, post) => (new_theta, post) :: the best θ is the one after the step
step_size
    / config.init_std) ** 2 => / config.init_std) :: α follows σ, not σ²
    std.log().mean().exp() => std.mean() :: the arithmetic mean of σ
train_maml
    manual_seed(config.seed) => manual_seed(0) ::
        the first θ does not depend on the seed
family_of
    != "oracle" => != "oracle" or family.name not in TASKS :: one's own has no oracle
walkers
    np.resize([first, -first], (M => rng.choice([1.0, -1.0], (M :: directions are drawn
TASKS
    (n, 2)), 100) => (n, 2)), 50) :: point2d ends at half its horizon
double_backprop_product
    torch.autograd.grad(grad @ v, t)[0] => grad.detach() :: for ∇k alone
    grad @ v => grad.sum() :: with v left out: these are the sums of H's rows
    t, task_data, alpha) => t, task_data, alpha, True) :: with J left out: this is F·v
    _, kl = => kl, _ = :: with the surrogate in place of the KL
    , create_graph=True) => ) :: create_graph=True is missing
gauss_newton_product
    in steps: => in []: :: with J left out: this is Jᵀ(F·v)
    reversed(steps) => [] :: with Jᵀ left out: this is F(J·v)
    reversed(steps) => steps :: with J for Jᵀ, where the steps come in reverse order
    u - alpha => u + alpha :: with J = I + α∇²L
    mask / mask.sum() => 1 / mask.numel() :: with the mask forgotten in F
    2.0 * G_log_std => G_log_std :: with 1 in place of 2 in W, for log σ
    functools.partial(torch.autograd.grad, retain_graph=True) => torch.autograd.grad ::
        several products share one graph
own_tasks
    range(PROCESSES.number, => range(0, :: every process has the first one's tasks
sum_over_processes
    float(both[-1]) => count :: sums over processes are divided by one's own count
    all_reduce(both) => is_available() :: nothing is added up
end_with_first_process
    os._exit(1) => pass :: a process stays when the first one is killed
adaptation
    alpha if step == 0 else alpha / 2 => alpha :: α for every step
    config.eval_alpha => config.alpha :: evaluation with α of training
    yield phi, data => seen = seen if step else data\n        yield phi, seen ::
        the returns are of the episodes before adaptation
    EVALUATION, m, step) => EVALUATION, m, 0) :: all steps have one noise
    0 if config.method == "oracle" else config => config :: the oracle is adapted
EVALUATION
    2**31 => 0 :: evaluation shares its numbers with training
evaluate
    with known_modes():\n => with known_modes():
        \n        tasks = family.sample_tasks(random_stream(config.seed, 0),
        \n                                    config.eval_tasks)\n &&
        family,\n                                  family.test_tasks(config.eval_tasks),
        => family, tasks, :: training tasks
PAPER_TABLE
    -11.68 => -11.86 :: two digits of the paper's table exchanged
load_checkpoint
    archive.testzip() => False :: a damaged checkpoint is read
write_atomically
    os.replace(beside, path) => path.write_bytes(content) :: files are written in place
settings_of
    \n            if name != "workers" =>  :: workers are kept with a run
read_evaluation
    theirs != task => False :: another task's table is compared
draw_learning_curve
    row[name] for row => row["return_post"] for row :: both lines are the return after
draw_trajectories
    family, goal, config => family, family.test_tasks(1)[0], config ::
        all to the first goal
standard_error
    (sum(variances)) / sum(map(len, groups)) => (sum(variances) / sum(map(len, groups)))
        :: the standard deviation, where the words say error
comparison_rows
    *(directions.values() or [table]) => table :: the directions' difference is error
progress_line
    (iterations - 1 - => (iterations - :: time left for one iteration too many
    ['surrogate_after'] => ['surrogate_before'] :: the old surrogate is printed
plan
    TrainState(0, state.theta, => TrainState(0, state.best_theta, ::
        --init takes the best θ
    ("iterations", "workers"), out) => ("iterations", "workers", "seed"), out) ::
        --resume takes another seed
    state.best_theta if "best" => state.theta if "best" :: --best shows the last θ
report_evaluation
    *place, value) => *place[::-1], value) :: tasks and steps exchanged
"""

# Bugs to find: what one sees in ten iterations of point2d, then stars for difficulty
# and the beginning of a mistake's name. Their order gives them their numbers.
BUGS_TEXT = """
In most iterations no trial of the line search passes (the log says none).
    ★ surrogate_and_kl: with a ratio of 1
    ★ GaussianPolicy.sampler: episodes of the mode
    ★★ surrogate_and_kl: with D in place
    ★★ surrogate_and_kl: with π_θ for
    ★★★ sample_task_data: π_old
The return after the step is hardly better than the one before, or worse.
    ★ adapt: with a step up
    ★★ discounted_returns: without the discount
    ★★ sample_task_data: D′
Both returns fall to −150 and below.
    ★★ task_rollout: an action stands
    ★★★ LinearBaseline.features: with time running
The return before the step is far above −40, which no policy earns that knows no goal.
    ★ Point2D.reset
    ★★ Point2D.step: the squared
    ★★ task_rollout: the task is never
A column stands still, or the KL passes δ = 0.05, or trial 1 nearly always passes.
    ★ GaussianPolicy.distribution
    ★ backtrack_line_search: without the check of the KL
    ★★ hessian_vector_product: divided by step
    ★★★ step_scale: with the 2 missing
`figures/measure.py orders` finds no difference between the orders, at a trained θ, too.
    ★ surrogate_and_kl: with first_order ignored
    ★★ adapt: with create_graph ignored
    ★★ meta_gradient: --first-order
It learns, but the return after the step rises more slowly.
    ★★ conjugate_gradient: with p = r −
    ★★ gae: with λ = 1
    ★★ DiagonalGaussian.log_prob: with a mean
    ★★ assign_credit: the baseline
    ★★★ conjugate_gradient: with β = 1
    ★★★ surrogate_and_kl: with the inner gradient detached
    ★★★ standardise: divided
The log looks healthy, and yet something is wrong.
    ★★ meta_iteration: always the same tasks
    ★★ adaptation: α for every step
    ★★ gae: with a V from after
    ★★★ evaluate: training tasks
    ★★★ surrogate_and_kl: with log π
    ★★★ surrogate_and_kl: with the two policies
    ★★★ sample_task_data: one noise
    ★★★ hessian_vector_product: with ε = step:
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
    joined = re.sub(r" *\n {8,}", " ", text).replace(r" \n", r"\n")
    for line in joined.splitlines():
        if line.startswith(" "):
            changes, words = line.strip().replace("\\n", "\n").split(" :: ")
            pairs = [tuple(change.split(" => ")) for change in changes.split(" && ")]
            found.append(Mistake(function, tuple(pairs), words))
        else:
            function = line
    return found


MISTAKES = read(LIST)
SYMPTOMS: dict[str, list[tuple[str, Mistake]]] = {}
for line in BUGS_TEXT.strip().splitlines():
    if line.startswith(" "):
        stars, name = line.split(maxsplit=1)
        (bug,) = (mistake for mistake in MISTAKES if mistake.name.startswith(name))
        SYMPTOMS[symptom].append((stars, bug))
    else:
        symptom = line
        SYMPTOMS[symptom] = []
BUGS = [bug for bugs in SYMPTOMS.values() for _, bug in bugs]


def pytest_collection_modifyitems(items) -> None:
    """This file is a plugin of the tests: those that name the function go first."""
    name = re.compile(rf"\b{os.environ['MISTAKE'].split('.')[0]}\b")
    items.sort(key=lambda item: not name.search(inspect.getsource(item.function)))


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
