"""MAML-TRPO for reinforcement learning, in one file that is read beside the paper.

What this is
    MAML (C. Finn, P. Abbeel, S. Levine, "Model-Agnostic Meta-Learning for Fast
    Adaptation of Deep Networks", ICML 2017, arXiv 1703.03400v3) looks for parameters θ
    from which ONE gradient step on a few episodes of a new task gives a good policy
    for that task. This file is the reinforcement-learning half of the paper: the inner
    step is a plain policy gradient, and θ itself is improved by TRPO.
    Run it with `python maml_trpo.py --task point2d`; `--help` lists every setting.

One meta-iteration, and the function that does each line
    for each of M tasks:                                        sample_task_data
        D  = K episodes with θ                                  sample_trajectories
        θ′ = θ − α∇L(θ), L from D                               adapt
        D′ = K episodes with θ′                                 sample_trajectories
    Sampling ends here. This θ′ was only numbers, needed to play D′. The step on θ
    needs θ′ as a function of θ. So from here on every function of θ runs the inner
    step AGAIN, from the stored D, with its graph where a derivative is wanted.
    π is the policy with θ′(θ), π_old the one with θ′(θ_old), and ratio = π/π_old:
    U(θ) = −mean of ratio·Â′ on D′, k(θ) = mean KL of the two   surrogate_and_kl
    g    = ∇U                                                   meta_gradient
    H·v  ≈ ∇k(θ + εv)/ε, with H the Hessian of k                hessian_vector_product
    x    ≈ H⁻¹g                                                 conjugate_gradient
    θ   ← θ − c·x, the first of 15 shrinking c that passes      backtrack_line_search

Which function holds which line of the paper's Algorithm 3, and of the listing, the
reader's pseudocode that this file answers (its line 1 is `def task_rollout(task):`)
    [MAML Alg.3 l.1]    [listing l.67]       initialise θ          GaussianPolicy.init
    [MAML Alg.3 l.2,11] [listing l.27,33,69] while not done        train_maml
    [MAML Alg.3 l.3]    [listing l.28]       draw tasks ~ p(T)     meta_iteration
    [MAML Alg.3 l.4,9]  [listing l.34]       for all tasks         meta_iteration
                        [listing l.1-14]     one task's episodes   task_rollout
    [MAML Alg.3 l.5,8]  [listing l.17-24,37] K episodes D (or D′)  sample_trajectories
                        [listing l.11]       credit for rewards    assign_credit
    [MAML Alg.3 l.6]    [listing l.40]       L from D, Eq. 4       inner_loss
    [MAML Alg.3 l.6,7]  [listing l.36-42,68] ∇L, θ′ = θ − α∇L      adapt
    [MAML Alg.3 l.5-8]  [listing l.31,44-45] D, θ′, D′ of a task   sample_task_data
    [MAML Alg.3 l.10]   [listing l.54]       L(θ′) using D′        surrogate_and_kl
    [MAML Alg.3 l.10]   [listing l.55-57]    its gradient, g_k     meta_gradient
    with TRPO in place of a gradient step:
                        [listing l.30,47,49] KL, old ‖ new         kl_old_new
                        [listing l.48]       … of which policies?  surrogate_and_kl
                        [listing l.59]       … no closed form?     kl_old_new
                        [listing l.52,53,60] mean over tasks       mean_over_tasks
                        [listing l.61,77-78] H·v                  hessian_vector_product
                        [listing l.62,63]    x ≈ H⁻¹g              conjugate_gradient
                        [listing l.65]       line search           backtrack_line_search
                        [listing l.51,66]    the new θ             trpo_meta_step
                        [listing l.29]       K, a setting          Config

Symbols (shapes stand at line ends)
    M tasks · K trajectories a task · H steps · S observation · A action · P parameters
    θ   theta         (P,)      meta-parameters, one flat vector; θ_old: before a step
    θ′  theta_prime   (P,)      one task's adapted parameters, a function of θ
    α   alpha         ()        inner step size; γ gamma, λ lam: discount, GAE
    δ   max_kl        ()        trust region, in place of Alg. 3's β: mean KL ≤ δ
    D   inner         (K,H,..)  episodes played with θ      D′  outer, played with θ′
    Â   adv           (K,H)     advantages of D (Â′: of D′), standardised
    L   inner_loss    ()        the loss of the inner step (the paper's Eq. 4)
    U k surrogate, KL ()        of one task; the step uses their mean over tasks
    J   ∂θ′/∂θ        (P,P)     I − α∇²L for one inner step, never formed
    F   Fisher matrix (P,P)     Hessian of the KL in θ′, at the adapted policy
    g   gradient      (P,)      of the meta-objective U; in the step also a mean
    Two meanings: H is the number of steps in a shape, and in H·v, H⁻¹g and xᵀHx the
    Hessian of the mean KL in θ (the mean over tasks of JᵀFJ, never formed). x is a
    state, and in section 7 the step's direction. σ is the std of the actions, with an
    index (σᵢ) that of task i's advantages.

Three voices in the comments: `Paper:`; `Authors' code:`, where their repository
(cbfinn/maml_rl) does otherwise; `Here:`, our choice. notes.md has a table of them, the
derivations and a key to the [tags]. Part I is sections 0 to 8, the algorithm. What it
uses of Part II says by its name what it does (checks, threads, random numbers, files).
"""
from __future__ import annotations

import argparse
import csv
import dataclasses
import functools
import io
import json
import math
import os
import sys
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Iterator, Sequence

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv
from torch import Tensor
from torch.distributions import Distribution, Independent, Normal, register_kl

# %% 0. Configuration (MAML §5.3, App. A.2)

def setting(default, help: str, choices=None) -> Any:
    """One field of Config: default, help text with its source, and the choices."""
    return field(default=default, metadata=dict(help=help, choices=choices))


@dataclass(frozen=True)
class Config:
    """Every setting of a run. A field that is None was not given: `complete`, beside
    the tasks' PRESETS in Part II, fills it in. Raises BadInput for an unusable value.
    point2d has M = K = 20, H = 100, α 0.1, γ 0.99, λ 0.9, δ 0.05 and 5 steps of CG.
    """
    task: str = setting("point2d", "task family [MAML §5.3]")
    method: str = setting("maml", "MAML, or one of the paper's baselines [MAML §5.3]",
                          ("maml", "pretrained", "random", "oracle"))
    seed: int = setting(0, "seed of everything random")
    iterations: int | None = setting(None, "meta-iterations [MAML Alg.3 l.2]")
    meta_batch_size: int | None = setting(None, "M, tasks a meta-iteration")
    rollouts: int | None = setting(None, "K, episodes a task and policy")
    horizon: int | None = setting(None, "H, steps an episode at most")
    alpha: float | None = setting(None, "α, inner step size")
    inner_steps: int = setting(1, "inner steps in training (paper: 1)")
    first_order: bool = setting(False, "drop the second derivatives from g")
    inner_loss: str = setting("log-prob", "inner loss inside g: log π·Â (authors' code)"
                              ", or π/stop_grad(π)·Â", ("log-prob", "ratio"))
    gamma: float | None = setting(None, "γ, discount")
    lam: float | None = setting(None, "λ of GAE")
    hidden: tuple = setting((100, 100), "hidden layer sizes (paper)")
    activation: str = setting("relu", "hidden units (paper: relu)", ("relu", "tanh"))
    init_std: float | None = setting(None, "initial std of the actions")
    max_kl: float | None = setting(None, "δ, trust region on the adapted policies")
    damping: float = setting(1e-5, "added to H's diagonal (authors' code)")
    cg_iterations: int | None = setting(None, "steps of conjugate gradient")
    cg_tolerance: float = setting(1e-10, "CG ends at r·r below this (authors' code)")
    hvp: str | None = setting(None, "Hessian-vector product", (
        "finite-difference", "double-backprop", "gauss-newton"))
    fd_step: float = setting(0.01, "length of a difference's move in θ (ours)")
    backtrack_ratio: float = setting(0.8, "line search: shrinking (authors' code)")
    backtrack_steps: int = setting(15, "trials, full step included (authors' code)")
    eval_tasks: int = setting(40, "held-out tasks (authors' code)")
    eval_episodes: int | None = setting(None, "episodes a task and step at evaluation; "
                                        "each step learns from them")
    eval_steps: int = setting(3, "adaptation steps at evaluation")
    eval_alpha: float | None = setting(None, "α of the first step at evaluation, then "
                                       "half of it (paper); default: --alpha")
    workers: int | None = setting(None, "threads over tasks; default: the cores")

    def __post_init__(self):
        check_config(self)

    @property
    def inner_updates(self) -> int:
        """Inner steps in training: the baselines have none, θ′ = θ."""
        return self.inner_steps if self.method == "maml" else 0


# %% 1. Tasks (MAML §3, §5.3)

@dataclass(frozen=True)
class TaskFamily:
    """p(T): environments that share their spaces, and a way to draw tasks.

    A task is a row of numbers that `envs.reset(seed=…, options={"task": task})` knows.
    Actions reach the environment as drawn, unclipped. notes.md has an example.
    """
    name: str
    make_envs: Callable[[int], VectorEnv]      # K → K copies, stepped in lockstep
    sample_tasks: Callable[[np.random.Generator, int], np.ndarray]   # → (M, task)
    test_tasks: Callable[[int], np.ndarray]    # n → (n, task), held out and fixed
    horizon: int                               # H, part of the task: see `gae`
    threads: bool = False       # does sampling on several threads pay? (MuJoCo: yes)
    _made: threading.local = field(default_factory=threading.local, init=False,
                                   repr=False, compare=False)

    def envs(self, K: int) -> VectorEnv:
        """K copies, made once for each K and thread: threads must not share them."""
        if K not in vars(self._made):
            vars(self._made)[K] = self.make_envs(K)
        return vars(self._made)[K]


class Point2D(VectorEnv):
    """2D navigation: K points walk from the origin to one unseen goal [MAML §5.3].

    Observation (K, 2): position. Action (K, 2): in [−1, 1], clipped, times MAX_STEP.
    Reward (K,): −distance to the goal after the move. Nothing else tells the goal.

    Paper:         the negative *squared* distance; it ends within 0.01 of the goal.
    Authors' code: −distance; it ends in the box |dx|, |dy| < 0.01
                   [maml_rl point_env_randgoal.py]. The paper's curve begins at −40.41;
                   never moving scores −40.08 here, and −17.8 in squared distance.
    Here:          as the authors' code.
    """
    MAX_STEP, GOAL_BOX = 0.1, 0.01
    metadata = {"autoreset_mode": AutoresetMode.DISABLED}  # `task_rollout` masks ends

    def __init__(self, num_envs: int):
        self.num_envs = num_envs
        set_spaces(self, gym.spaces.Box(-np.inf, np.inf, (2,), np.float32),
                   gym.spaces.Box(-1.0, 1.0, (2,), np.float32))
        self.goal = np.zeros(2)

    def reset(self, *, seed=None, options=None):
        """All points to the origin; `options={"task": goal}` sets the goal, (2,)."""
        self.goal = task_in(options, self.goal)
        self._position = np.zeros((self.num_envs, 2))
        return self._position.astype(np.float32), {}

    def step(self, actions):
        """One move of every point: actions (K, 2) → Gymnasium's five results."""
        self._position += self.MAX_STEP * np.minimum(np.maximum(actions, -1.0), 1.0)
        offset = self._position - self.goal                                    # (K, 2)
        reward = -np.hypot(offset[:, 0], offset[:, 1])                         # (K,)
        terminated = (np.abs(offset) < self.GOAL_BOX).all(1)
        return (self._position.astype(np.float32), reward, terminated,
                np.zeros(self.num_envs, bool), {})


# %% 2. The policy f_θ, a pure function of one flat vector (MAML §5.3)

class GaussianPolicy:
    """π_θ(a|x) = N(a; μ_θ(x), diag σ²), with θ one flat vector (P,).

    Paper:         two hidden layers of 100 ReLU units.
    Authors' code: Xavier weights, zero biases. log σ is a parameter that does not
                   depend on the state; σ is 1 at first and never below 1e-6. The inner
                   step adapts log σ too [maml_rl maml_minimal_gauss_mlp_policy.py].

    With θ a plain vector and the network a function of it, an adapted policy is just
    another vector, θ′ = θ − α∇L, and nothing cuts the graph from θ′ back to θ.
    """
    MIN_STD = 1e-6

    def __init__(self, obs_dim: int, act_dim: int, hidden: Sequence[int] = (100, 100),
                 activation: str = "relu", init_std: float = 1.0):
        sizes = [obs_dim, *hidden, act_dim]
        layers = [((n_out, n_in), (n_out,)) for n_in, n_out in zip(sizes, sizes[1:])]
        self.shapes = [shape for layer in layers for shape in layer] + [(act_dim,)]
        self.numels = [math.prod(shape) for shape in self.shapes]
        self.num_params = sum(self.numels)                                     # P
        self.activation = activation
        self.init_std = init_std

    def init(self, generator: torch.Generator, dtype=torch.float32) -> Tensor:
        """A random θ (P,): Xavier-uniform weights, zero biases [MAML Alg.3 l.1]."""
        theta = torch.zeros(self.num_params, dtype=dtype)
        *layers, log_std = self.unpack(theta)                # views: they write into θ
        for weight in layers[::2]:
            bound = math.sqrt(6.0 / sum(weight.shape))
            weight.uniform_(-bound, bound, generator=generator)
        log_std.fill_(math.log(self.init_std))
        return theta

    def unpack(self, theta: Tensor) -> list[Tensor]:
        """θ (P,) → views [W₁ (100, S), b₁ (100,), W₂, b₂, W₃, b₃, log σ (A,)]."""
        return [piece.view(shape)
                for piece, shape in zip(theta.split(self.numels), self.shapes)]

    def mean(self, layers: list[Tensor], obs: Tensor) -> Tensor:
        """μ(x): obs (..., S) → (..., A). Samples are columns, which is faster."""
        activate = {"relu": torch.relu, "tanh": torch.tanh}[self.activation]
        x = obs.reshape(-1, obs.shape[-1]).T                                   # (S, N)
        *hidden, last_weight, last_bias = layers
        for weight, bias in zip(hidden[::2], hidden[1::2]):
            x = activate(torch.addmm(bias[:, None], weight, x))              # (100, N)
        mean = torch.addmm(last_bias[:, None], last_weight, x)                 # (A, N)
        return mean.T.reshape(*obs.shape[:-1], -1)

    def distribution(self, theta: Tensor, obs: Tensor) -> DiagonalGaussian:
        """π_θ(·|x) for obs (..., S). Its log_prob: actions (..., A) → (...).

        log π is a *sum* over A, never a mean: densities of independent parts multiply.
        """
        *layers, log_std = self.unpack(theta)
        return DiagonalGaussian(self.mean(layers, obs),
                                log_std.clamp(min=math.log(self.MIN_STD)))

    def std(self, theta: Tensor) -> Tensor:
        """σ (A,), for the log and `check_std`."""
        return self.unpack(theta.detach())[-1].exp().clamp(min=self.MIN_STD)

    def sampler(self, theta: Tensor, rng: np.random.Generator) -> Callable:
        """A function obs (K, S) → actions (K, A) drawn from π_θ, both numpy arrays."""
        return numpy_sampler(self, theta, rng)


# %% 3. Rollouts (MAML Alg. 3 lines 5 and 8; listing l.1-24)

@dataclass
class Trajectories:
    """K episodes of one task under one policy, padded to H steps."""
    obs: Tensor                    # (K, H, S)
    act: Tensor                    # (K, H, A) as drawn, before any clipping
    rew: Tensor                    # (K, H)
    mask: Tensor                   # (K, H) 1 where the step happened, 0 after the end
    adv: Tensor | None = None      # (K, H) standardised advantages, by `assign_credit`

    def mean_return(self) -> float:
        """Undiscounted sum of rewards of an episode, averaged over the K episodes."""
        return (self.rew * self.mask).sum(1).mean().item()


def task_rollout(envs: VectorEnv, policy, theta: Tensor, task, horizon: int,
                 seed: Sequence[int]) -> Trajectories:
    """K = envs.num_envs episodes of `task` with π_θ, in lockstep [listing l.1-14].

    `seed` names these episodes: (seed, iteration, task, phase), phase 0 for D, 1 for
    D′. The draws depend on nothing else: not on earlier ones, not on the workers.

    Q: `cumulative_disc_rew += disc_reward * log_prob`, is that right? [listing l.11]
    A: No. It credits each reward to the action of the same step only, so it never
       learns that an action pays off later. The policy gradient is
       E[Σ_t ∇log π(a_t|x_t)·G_t], where G_t = r_t + r_{t+1} + … is the reward-to-go.
       So this function only records numbers. `assign_credit` makes advantages of them,
       and `inner_loss` computes log π again and takes −mean(log π·Â).
    """
    K, H, rng = envs.num_envs, horizon, random_stream(*seed)
    S, A = envs.single_observation_space.shape[0], envs.single_action_space.shape[0]
    act_on = policy.sampler(theta, rng)
    obs, _ = envs.reset(seed=rng.integers(2**31, size=K).tolist(),
                        options={"task": task})
    dtype = np.float64 if theta.dtype == torch.float64 else np.float32
    all_obs, all_act = np.zeros((H, K, S), dtype), np.zeros((H, K, A), dtype)
    all_rew, mask = np.zeros((H, K), dtype), np.zeros((H, K), bool)
    running = np.ones(K, bool)
    for t in range(H):
        action = act_on(obs)                                   # a_t ~ π_θ(·|x_t) (K, A)
        all_obs[t], all_act[t], mask[t] = obs, action, running
        obs, all_rew[t], terminated, truncated, _ = envs.step(action)
        running = running & ~(terminated | truncated)
        if not running.any():
            break
    for x in (all_obs, all_act, all_rew):
        x[~mask] = 0                           # what came after an episode's end
    check_rollout(task, all_obs, all_act, all_rew[..., None])
    return Trajectories(*map(episodes_first, (all_obs, all_act, all_rew)),
                        episodes_first(mask.astype(dtype)))


def sample_trajectories(family: TaskFamily, task, policy, theta: Tensor, K: int, *,
                        seed: Sequence[int], horizon: int | None = None,
                        gamma: float = 0.99, lam: float = 1.0) -> Trajectories:
    """K episodes of `task` with π_θ, and their advantages [MAML Alg.3 l.5,8].

    The loop over K of the pseudocode [listing l.17-24] runs as K copies side by side.
    "K rollouts" are K episodes, so at most K·H timesteps.
    """
    data = assign_credit(task_rollout(family.envs(K), policy, theta, task,
                                      horizon or family.horizon, seed), gamma, lam)
    check_finite(f"task {task}: the advantage", data.adv)
    return data


# %% 4. Credit: returns, baseline, advantages (MAML §5.3; GAE; Duan et al. 2016)

def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x over the steps that happened: x, mask (K, H) → ()."""
    if x.shape != mask.shape:
        raise ValueError(f"masked_mean: shapes {tuple(x.shape)}, {tuple(mask.shape)}")
    return (x * mask).sum() / mask.sum()


def discounted_returns(rew: Tensor, gamma: float) -> Tensor:
    """Discounted rewards-to-go G_t = r_t + γ·G_{t+1} [SpinUp VPG l.4]; (K, H)."""
    out = rew.numpy().copy()
    for t in reversed(range(rew.shape[1] - 1)):
        out[:, t] += gamma * out[:, t + 1]
    return torch.from_numpy(out)


class LinearBaseline:
    """V(x, t) = w·φ(x, t), ridge regression on the returns (Duan et al. 2016, App.).

    φ = (x, x², t/100, (t/100)², (t/100)³, 1) with x clipped to ±10, ridge 1e-5, time
    counted from the start of the episode. In float64 inside, whatever θ's dtype.

    It is fitted on the very episodes whose advantages it then gives, afresh for every
    task and every inner step [maml_rl]. Spinning Up uses the last iteration's fit
    [SpinUp VPG l.8], but a new task has none. The price is a bias that falls with K.
    """
    RIDGE, CLIP = 1e-5, 10.0

    def features(self, obs: Tensor) -> Tensor:
        """obs (K, H, S) → φ (K, H, 2S+4), float64."""
        K, H, _ = obs.shape
        x = obs.double().clamp(-self.CLIP, self.CLIP)
        t = (torch.arange(H, dtype=torch.float64) / 100).expand(K, H)[..., None]
        return torch.cat([x, x**2, t, t**2, t**3, torch.ones_like(t)], dim=-1)

    def fit(self, obs: Tensor, returns: Tensor, mask: Tensor) -> LinearBaseline:
        """Least squares on the steps that happened: returns, mask (K, H)."""
        phi = self.features(obs)[mask.bool()]                               # (N, 2S+4)
        gram = phi.T @ phi + self.RIDGE * torch.eye(phi.shape[1], dtype=phi.dtype)
        self.weights = torch.linalg.solve(gram, phi.T @ returns[mask.bool()].double())
        return self

    def predict(self, obs: Tensor) -> Tensor:
        """V (K, H) for obs (K, H, S), in obs's dtype."""
        return (self.features(obs) @ self.weights).to(obs.dtype)


def gae(rew: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> Tensor:
    """Â_t = Σ_{l≥0} (γλ)^l δ_{t+l},  δ_t = r_t + γV_{t+1} − V_t [GAE Eq.16].

    All (K, H). With λ = 1, the authors' value, Â_t = G_t − V_t. (This δ_t is no KL.)

    V after step H is 0, as after termination, because H is part of the MDP. If an
    environment says `truncated` before step H, that counts as an end as well.
    """
    values = values * mask
    next_values = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)
    deltas = (rew + gamma * next_values - values) * mask
    return discounted_returns(deltas, gamma * lam) * mask


def standardise(adv: Tensor, mask: Tensor) -> Tensor:
    """(Â − mean)/(σᵢ + 1e-8) over one task's samples, (K, H) [maml_rl].

    Then the inner step does not depend on the rewards' scale. Each task is divided by
    the std σᵢ of its own samples. The paper does not mention it.
    """
    mean = masked_mean(adv, mask)
    std = masked_mean((adv - mean) ** 2, mask).sqrt()
    return (adv - mean) / (std + 1e-8) * mask


def assign_credit(data: Trajectories, gamma: float, lam: float) -> Trajectories:
    """Fill in `data.adv`: fit the baseline on these episodes, GAE, standardise."""
    returns = discounted_returns(data.rew, gamma)
    values = LinearBaseline().fit(data.obs, returns, data.mask).predict(data.obs)
    data.adv = standardise(gae(data.rew, values, data.mask, gamma, lam), data.mask)
    return data


# %% 5. The inner update (MAML Eq. 4; Alg. 3 lines 6 and 7; listing l.36-42)

def inner_loss(policy, theta: Tensor, trajectories: Trajectories,
               estimator: str = "log-prob") -> Tensor:
    """L(θ) = −mean over timesteps of log π_θ(a|x)·Â: () [SpinUp VPG l.6].

    Only its gradient is used. It estimates that of the paper's loss [MAML Eq.4] up to
    a positive factor; without bias only if γ = λ = 1, no episode ends early, and
    baseline, mean and std come from other episodes than D (notes.md).

    Paper:         Eq. 4 is −E[Σ_t R], a sum over the H steps.
    Authors' code: a mean over timesteps, of standardised Â [maml_rl maml_npo.py].
                   A step of size α here equals one of size α/(Tσᵢ) on Eq. 4's loss,
                   with T the episodes' mean length and σᵢ the std of the raw Â.
    Here:          as the authors' code. With estimator "ratio" (ProMP's LVC) log π
                   becomes π/stop_grad(π). The step is the same, but autograd finds a
                   different Hessian, hence a different J, in it.
    """
    log_prob = policy.distribution(theta, trajectories.obs).log_prob(trajectories.act)
    if estimator == "ratio":
        log_prob = (log_prob - log_prob.detach()).exp()      # 1, with gradient ∇log π
    return -masked_mean(log_prob * trajectories.adv, trajectories.mask)


def adapt(policy, theta: Tensor, inner_data: Sequence[Trajectories], alpha: float,
          create_graph: bool, estimator: str = "log-prob") -> Tensor:
    """θ′ = θ − α∇L(θ), once for each element of `inner_data` [MAML Alg.3 l.7].

    theta, result (P,). Element i was played with the parameters where step i starts.

    Q: `copy.deepcopy`, `loss.backward()`, `optim.step()`? [listing l.36,41,42]
    A: Even with the right loss they make new parameters that do not know θ: no gradient
       flows from them to θ. Here θ′ is computed from θ, and for any function f
       ∇_θ f(θ′(θ)) = Jᵀ∇f(θ′) with J = ∂θ′/∂θ = I − α∇²L. `create_graph=True` (for a θ
       that requires grad) records the computation of ∇L itself, so that autograd finds
       this J. With False it sees θ′ = θ − a constant, J = I: first-order MAML.
    """
    theta_prime = theta
    for trajectories in inner_data:
        at = theta_prime if create_graph else theta_prime.detach().requires_grad_()
        loss = inner_loss(policy, at, trajectories, estimator)
        (grad,) = torch.autograd.grad(loss, at, create_graph=create_graph)
        theta_prime = theta_prime - alpha * grad
    return theta_prime


# %% 6. The meta-objective and the KL (MAML Alg. 3 line 10; listing l.44-54, 60)
#
# What is approximated, and what to keep in mind:
# 1. D is held fixed. θ also decides which D is played, and a whole gradient would have
#    a term for that. Paper and authors' code drop it, and so does this file.
# 2. J contains ∇² of −mean(log π·Â), which is not the Hessian of Eq. 4's loss.
# 3. U is a mean over timesteps, of advantages divided by the task's own σᵢ. So g is not
#    the plain mean over tasks of Eq. 4's gradients: task i has a factor 1/(Tᵢσᵢ), with
#    Tᵢ the mean length of D′'s episodes. The authors' code does the same.
# notes.md derives them, and says what other papers do about 1 and 2.

@dataclass
class TaskData:
    """What one task gives to the meta-step."""
    inner: list[Trajectories]        # D, one for each inner step, played with θ, …
    outer: Trajectories              # D′, played with θ′
    old: Distribution                # π_{θ′(θ_old)} on D′'s observations, detached


def mean_over_tasks(function: Callable[[Any], Tensor], tasks: Sequence,
                    workers: int = 1) -> Tensor:
    """(1/M) Σᵢ function(task i): every mean of the outer loop [MAML Alg.3 l.10].

    Summed in task order in float64, so the result does not depend on the number of
    threads. Under torchrun the processes share the tasks. (Algorithm 3 has a sum.)
    """
    results = map_over_tasks(function, tasks, workers)
    total = torch.stack([result.detach().double() for result in results]).sum(0)
    total = torch.cat([total.flatten(), total.new_tensor([len(results)])])  # and M
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(total)
    return (total[:-1] / total[-1]).reshape(results[0].shape).to(results[0].dtype)


def kl_old_new(old: Distribution, new: Distribution) -> Tensor:
    """KL(π_old ‖ π_new) of each sample, in closed form (Part II): (...) [TRPO Eq.12].

    At θ_old the two policies are the same, so the KL is 0 and its gradient is 0. That
    is no bug: TRPO uses its *Hessian* there. Exactly 0 after an accepted step would be
    a bug. Old comes first, as in TRPO; the other direction has the same Hessian there.

    Q: Can it be had for a distribution without closed form? [listing l.59]
    A: Yes, as the mean of log π_old(a) − log π_new(a) over actions drawn from π_old. At
       θ_old its value is exactly 0. But its gradient, −mean ∇log π, is 0 only in
       expectation, so that H·v would have to subtract ∇k(θ_old), and its Hessian,
       −mean ∇²log π, is F only in expectation.
    """
    return torch.distributions.kl_divergence(old, new)


def surrogate_and_kl(policy, theta: Tensor, task_data: TaskData, alpha: float,
                     first_order: bool = False, estimator: str = "log-prob",
                     ) -> tuple[Tensor, Tensor]:
    """One task's meta-objective U and KL k at θ; both () [MAML Alg.3 l.10].

    U = −mean over D′ of π_{θ′(θ)}(a|x) / π_{θ′(θ_old)}(a|x) · Â′  (− [TRPO Eq.14])
    k =  mean over D′ of KL(π_{θ′(θ_old)}(·|x) ‖ π_{θ′(θ)}(·|x))

    TRPO's surrogate U stands in for minus the return. `first_order` and `estimator`
    change derivatives through the inner step, never the values.

    Q: KL of adapted and meta-policy, and returns as the loss? [listing l.48,54]
    A: Both policies must be *adapted* ones. The listing's KL bounds the inner step, not
       the meta-step. The listing also has no importance ratio. Only with it does the
       loss on D′ say, for θ near θ_old, how much the return changes, which is what the
       line search compares. The ratio is 1 at θ_old; its gradient is what counts there.
    """
    theta_prime = adapt(policy, theta, task_data.inner, alpha,
                        theta.requires_grad and not first_order, estimator)
    outer, old = task_data.outer, task_data.old
    new = policy.distribution(theta_prime, outer.obs)
    ratio = (new.log_prob(outer.act) - old.log_prob(outer.act)).exp()          # (K, H)
    surrogate = -masked_mean(ratio * outer.adv, outer.mask)
    return surrogate, masked_mean(kl_old_new(old, new), outer.mask)


# %% 7. The TRPO step (TRPO §6, App. C; SpinUp TRPO lines 7-9; listing l.55-66)
#
# It takes the place of Algorithm 3's line 10, with the means of U and k over tasks:
#     θ = θ_old − 0.8ʲ·√(2δ / xᵀHx)·x, with x ≈ H⁻¹g and the first j that passes
# The minus is there because U is a loss. (Spinning Up's ĝ is the gradient of a return.)

def gradient(function: Callable[[Tensor], Tensor], theta: Tensor) -> Tensor:
    """∇function at θ, as a new vector (P,) without a graph."""
    theta = theta.detach().requires_grad_()
    return torch.autograd.grad(function(theta), theta)[0]


def meta_gradient(policy, theta: Tensor, task_data: TaskData, alpha: float,
                  first_order: bool = False, estimator: str = "log-prob") -> Tensor:
    """One task's g = ∇_θ U, (P,) [MAML Alg.3 l.10] [SpinUp TRPO l.7].

    Q: What must `meta_grad.backward()` reach, and what is g_k? [listing l.55-57]
    A: It must reach the *meta*-parameters θ, through θ′ = θ − α∇L(θ) and the gradient
       inside it: g = Jᵀ∇_θ′ U. g_k is the mean of g over tasks, P numbers. The
       listing's path is cut twice: `copy.deepcopy` makes parameters that do not know θ,
       and `optim.step()` changes them outside the graph. θ is left without a gradient.
    """
    return gradient(lambda t: surrogate_and_kl(
        policy, t, task_data, alpha, first_order, estimator)[0], theta)


def hessian_vector_product(grad_fn: Callable[[Tensor], Tensor], theta: Tensor,
                           v: Tensor, step: float = 0.01) -> Tensor:
    """H·v ≈ ∇k(θ + εv)/ε, a finite difference of ∇k = grad_fn; all (P,) [MAML §5.3].

    ε = step/‖v‖: the move in θ has length `step` whatever v's length. A difference
    would be (∇k(θ + εv) − ∇k(θ))/ε, but at θ_old ∇k is exactly 0. So it costs ONE
    gradient; its error is O(ε), plus what ReLU's kinks add (figures/README.md, 5).

    Q: Where is the third derivative that the paper avoids? [listing l.77-78]
    A: Not in the line search, which differentiates L only. One task's KL is a function
       κ of θ′, so k(θ) = κ(θ′(θ)), and the chain rule gives
           ∇²k = Jᵀ (∇²κ) J + Σ_j (∂κ/∂θ′_j) ∇²θ′_j,
       and for one inner step ∇²θ′_j = −α ∂_j∇²L. That ∂_j∇²L is the third derivative.
       At θ_old each ∂κ/∂θ′_j is 0 and ∇²κ is the Fisher matrix F, so the task's ∇²k is
       JᵀFJ, and H the mean of these. Differentiating ∇k by autograd would build the
       third-order graph and multiply it by 0. A difference needs second ones only.

    Authors' code: symmetric, ε = 1/‖θ‖ by mistake: θ moves by ‖v‖/‖θ‖
                   [maml_rl conjugate_gradient_optimizer.py].
    Here:          one-sided, step 0.01. The ants use an exact product of Part II.
    """
    eps = step / v.norm()
    return grad_fn(theta + eps * v) / eps


def conjugate_gradient(hvp: Callable[[Tensor], Tensor], b: Tensor, iterations: int = 10,
                       tolerance: float = 1e-10) -> tuple[Tensor, Tensor]:
    """x ≈ H⁻¹b from products H·p alone: → (x, r = b − Hx), all (P,) [SpinUp TRPO l.8].

    Ends at r·r < `tolerance`, or keeps the x so far if pᵀHp is not positive.

    Q: The size of H? Is `inverse(kl_hessian) * meta_grad` right? [listing l.60-63]
    A: The mean KL is one number, so H is P × P, here 10,604², and need not have an
       inverse. H⁻¹g is wanted. (meta_grad is a loss, not g.) Conjugate gradient
       needs products H·p only. With exact ones its n-th x minimises
       ½xᵀHx − gᵀx over the span of g, Hg, …, Hⁿ⁻¹g. That x is far from H⁻¹g, yet a good
       direction: more steps mostly fit the samples' noise (figures/README.md, 5).
       Damping (1e-5·I is added to H) keeps steps finite where the KL is flat.
    """
    x, r, p = torch.zeros_like(b), b, b
    rr = r @ r                             # r = b − Hx; p: direction of the next step
    for _ in range(iterations):
        if rr < tolerance:
            break
        Hp = hvp(p)
        pHp = p @ Hp
        if not pHp > 0:
            break
        x = x + (rr / pHp) * p
        r = r - (rr / pHp) * Hp
        rr, rr_before = r @ r, rr
        p = r + (rr / rr_before) * p
    return x, r


def step_scale(xHx: float, max_kl: float) -> float:
    """√(2δ / xᵀHx): with s = scale·x, ½sᵀHs = δ [TRPO App.C] [SpinUp TRPO l.9].

    k and ∇k are 0 at θ_old, so ½sᵀHs is the KL of a short step s. Among all s with this
    KL, −scale·H⁻¹g makes gᵀs, and so U, smallest (notes.md, 6.3).
    """
    return math.sqrt(2 * max_kl / xHx)


def backtrack_line_search(evaluate: Callable[[Tensor], tuple[float, float]],
                          theta: Tensor, full_step: Tensor, surrogate_before: float,
                          max_kl: float, ratio: float = 0.8, trials: int = 15,
                          ) -> tuple[Tensor, float, float, int]:
    """θ + ratioʲ·full_step, smallest j that passes [SpinUp TRPO l.9] [listing l.65].

    `evaluate(θ)` → (surrogate, KL). → (θ_new, its surrogate, its KL, trials made), or θ
    itself, `surrogate_before`, 0.0 and 0 if none passes. To pass, the surrogate must
    fall AND the KL be at most δ: the model behind the step's scale holds only near θ.

    Q: `backtrack_line_search(kl_hessian, x)`? [listing l.65]
    A: The Hessian has done its work once the step has its scale (xᵀHx). The search
       itself needs the loss, the KL and δ. It takes no derivative of either, but each
       trial θ has adapted policies of its own, so `evaluate` runs the inner step again.
    """
    for trial in range(trials):
        candidate = theta + ratio**trial * full_step
        surrogate, kl = evaluate(candidate)
        if surrogate < surrogate_before and kl <= max_kl:      # False for NaN
            return candidate, surrogate, kl, trial + 1
    return theta, surrogate_before, 0.0, 0


def kl_hessian_product(policy, theta: Tensor, task_data: Sequence[TaskData],
                       config: Config) -> Callable[[Tensor], Tensor]:
    """v ↦ H·v, H the Hessian of the mean KL at θ_old, by the product `--hvp` names.

    The line search measures the KL through the inner step that is really taken. So H
    has the true J, and `--first-order` and `--inner-loss` change only g.
    """
    def product_of(data: TaskData) -> Callable[[Tensor], Tensor]:
        def kl(t: Tensor) -> Tensor:
            return surrogate_and_kl(policy, t, data, config.alpha)[1]

        if config.hvp != "finite-difference":
            return exact_product(policy, theta, data, kl, config)           # Part II
        return lambda v: hessian_vector_product(
            lambda t: gradient(kl, t), theta, v, config.fd_step)

    products = map_over_tasks(product_of, task_data, config.workers)
    return lambda v: mean_over_tasks(lambda product: product(v), products,
                                     config.workers)


def trpo_meta_step(policy, theta: Tensor, task_data: Sequence[TaskData], config: Config,
                   ) -> tuple[Tensor, dict[str, float]]:
    """One TRPO step on the meta-objective: θ → (θ_new, the log's numbers)."""
    clock = Stopwatch()

    def evaluate(t: Tensor) -> tuple[float, float]:
        return tuple(mean_over_tasks(lambda data: torch.stack(surrogate_and_kl(
            policy, t, data, config.alpha)), task_data, config.workers).tolist())

    # At θ_old every ratio is 1, so U is −mean Â′: 0 but for rounding.
    before = float(mean_over_tasks(lambda data: -masked_mean(
        data.outer.adv, data.outer.mask), task_data))
    g = mean_over_tasks(lambda data: meta_gradient(
        policy, theta, data, config.alpha, config.first_order, config.inner_loss),
        task_data, config.workers)                                             # (P,)
    check_finite("the meta-gradient", g)
    stats = dict(surrogate_before=before, seconds_gradient=clock.lap())

    hvp = kl_hessian_product(policy, theta, task_data, config)
    x, residual = conjugate_gradient(lambda v: hvp(v) + config.damping * v, g,
                                     config.cg_iterations, config.cg_tolerance)
    xHx = float(x @ (g - residual))     # g − r = Hx + damping·x: damping counts, too
    stats.update(cg_residual=float(residual.norm() / g.norm().clamp(min=1e-30)),
                 seconds_cg=clock.lap())

    after, kl, trials = before, 0.0, 0
    if 0 < xHx < math.inf:                   # otherwise the step is skipped, θ kept
        full_step = -step_scale(xHx, config.max_kl) * x
        theta, after, kl, trials = backtrack_line_search(
            evaluate, theta, full_step, before, config.max_kl, config.backtrack_ratio,
            config.backtrack_steps)
    stats.update(surrogate_after=after, kl=kl, line_search_steps=trials,
                 seconds_line_search=clock.lap())
    return theta, stats


# %% 8. Meta-training (MAML Alg. 3; listing l.27-69)

def sample_task_data(policy, theta: Tensor, family: TaskFamily, task, config: Config,
                     seed: Sequence[int]) -> TaskData:
    """One task's D, θ′ (as numbers) and D′ [MAML Alg.3 l.5-8] [listing l.36-45]."""
    def sample(t: Tensor, phase: int) -> Trajectories:
        return sample_trajectories(
            family, task, policy, t, config.rollouts, seed=(*seed, phase),
            horizon=config.horizon, gamma=config.gamma, lam=config.lam)

    theta_prime, inner = theta.detach(), []
    for step in range(config.inner_updates):
        inner.append(sample(theta_prime, step))                             # l.5
        theta_prime = adapt(policy, theta_prime, inner[-1:], config.alpha,  # l.6, l.7
                            create_graph=False)
    outer = sample(theta_prime, config.inner_updates)                       # l.8
    # `old` by the same operations as in `surrogate_and_kl`: ∇k(θ_old) is 0 to the bit.
    return TaskData(inner, outer, policy.distribution(theta_prime, outer.obs))


def train_maml(config: Config, family: TaskFamily | None = None,
               start: TrainState | None = None,
               after_iteration: Callable[[TrainState], None] = lambda state: None,
               ) -> tuple[Tensor, list[dict[str, float]]]:
    """Algorithm 3 with TRPO outside: → (θ (P,), one dict of numbers an iteration).

    `family` defaults to that of `config.task`; `start` is an earlier state to go on
    from; `after_iteration(state)` may print and save. Raises Diverged (NaN, infinity).

    Q: What else is wrong with the listing's loop? [listing l.27-69]
    A: Some lines fail loudly: see notes.md, chapter 7. Others are wrong in silence. The
       task list is fixed [listing l.28], and `task_rollout` never uses its task
       [listing l.1-14]. The outer `backward` adds to the inner gradient of each copy,
       and `self.optim` holds a model that `deepcopy` replaced.
    """
    config = complete(config)
    family = family_of(config, family)
    policy = make_policy(family, config)
    state = start or TrainState.initial(policy, config)                        # l.1
    with one_thread_each():
        while state.iteration < config.iterations:                             # l.2
            try:
                state = meta_iteration(policy, family, state, config)          # l.3-10
            except (BadInput, Diverged) as e:
                raise type(e)(f"iteration {state.iteration + 1}: {e}") from e
            after_iteration(state)
    return state.theta, state.rows


def meta_iteration(policy, family: TaskFamily, state: TrainState, config: Config,
                   ) -> TrainState:
    """Lines 3 to 10 of Algorithm 3: state → the next state."""
    watch, clock = Stopwatch(), Stopwatch()
    i, theta = state.iteration, state.theta
    tasks = family.sample_tasks(random_stream(config.seed, i),                 # l.3
                                config.meta_batch_size)
    mine = share_of_tasks(len(tasks))
    data = map_over_tasks(                                                     # l.4-9
        lambda m: sample_task_data(policy, theta, family, tasks[m], config,
                                   (config.seed, i, m)),
        mine, config.workers if family.threads else 1)
    returns = returns_of_tasks(data, mine)                                     # (M, 2)
    stats = dict(seconds_sampling=clock.lap())
    new_theta, step = trpo_meta_step(policy, theta, data, config)              # l.10
    check_finite("θ", new_theta)
    check_std(policy.std(new_theta))
    stats.update(step, std_mean=float(policy.std(new_theta).mean()),
                 seconds_total=watch.lap())
    return state.after(new_theta, returns, stats)


# =====================================================================================
#   You can stop reading here. What follows surrounds the algorithm: two exact products,
#   settings, other tasks, evaluation, baselines, files, figures, the command line.
# =====================================================================================

# %% Part II: the two exact Hessian-vector products (--hvp), beside section 7's

def double_backprop_product(function: Callable[[Tensor], Tensor], theta: Tensor,
                            v: Tensor) -> Tensor:
    """H·v = ∇(∇k·v), exactly; theta, v, result (P,). Third-order graph included."""
    theta = theta.detach().requires_grad_()
    (grad,) = torch.autograd.grad(function(theta), theta, create_graph=True)
    return torch.autograd.grad(grad @ v, theta)[0]


def keep_graphs(policy, theta: Tensor, task_data: TaskData, alpha: float) -> tuple:
    """What all products with one task's JᵀFJ share, made once for all of CG.

    → (inner steps, θ′, network's outputs, w, Gᵀw with its graph, W's diagonal)
    """
    steps, theta_prime = [], theta.detach()    # steps: θᵢ and ∇L, with its graph
    for trajectories in task_data.inner:
        theta_i = theta_prime.detach().requires_grad_()
        (grad,) = torch.autograd.grad(inner_loss(policy, theta_i, trajectories),
                                      theta_i, create_graph=True)
        steps.append((theta_i, grad))
        theta_prime = theta_i - alpha * grad
    theta_prime = theta_prime.detach().requires_grad_()
    new = policy.distribution(theta_prime, task_data.outer.obs)
    outputs = new.mean, new.log_std                                # (K, H, A) and (A,)
    w = tuple(torch.zeros_like(x).requires_grad_() for x in outputs)
    (Gtw,) = torch.autograd.grad(outputs, theta_prime, w, create_graph=True)
    mask = task_data.outer.mask[..., None]
    metric = mask / mask.sum() * (-2 * new.log_std.detach()).exp(), 2.0
    return steps, theta_prime, outputs, w, Gtw, metric


def gauss_newton_product(policy, theta: Tensor, task_data: TaskData, v: Tensor,
                         alpha: float, graphs: tuple | None = None) -> Tensor:
    """One task's Jᵀ(F(J·v)): exactly H·v at θ_old, with second derivatives only; (P,).

    J = J_n···J_1, one factor I − α∇²L for each inner step. A factor is symmetric, so
    one reverse-mode product serves J (steps in order) and Jᵀ (in reverse order).

    F = GᵀWG: G = ∂(μ, log σ)/∂θ′, the outputs of the adapted network on D′; W, the
    Hessian of the Gaussians' mean KL in its outputs, is diagonal: 1/σ² over the number
    of steps for each μ, 2 for each log σ. Gᵀ is one backward pass. Gᵀw is linear in w,
    so G is the backward pass of that backward pass. For DiagonalGaussians only.
    """
    steps, theta_prime, outputs, w, Gtw, metric = graphs or keep_graphs(
        policy, theta, task_data, alpha)
    backward = functools.partial(torch.autograd.grad, retain_graph=True)

    def factor(step: tuple[Tensor, Tensor], u: Tensor) -> Tensor:
        theta_i, grad = step
        return u - alpha * backward(grad, theta_i, u)[0]        # (I − α∇²L)·u

    for step in steps:
        v = factor(step, v)                                                 # J·v
    Gv = backward(Gtw, w, v)
    (v,) = backward(outputs, theta_prime, [m * x for m, x in zip(metric, Gv)])  # F(J·v)
    for step in reversed(steps):
        v = factor(step, v)                                                 # Jᵀ(F(J·v))
    return v


def exact_product(policy, theta: Tensor, data: TaskData, kl: Callable, config: Config,
                  ) -> Callable[[Tensor], Tensor]:
    """One task's v ↦ H·v for `kl_hessian_product`, by the product that --hvp names."""
    if config.hvp == "double-backprop":
        return lambda v: double_backprop_product(kl, theta, v)
    graphs = keep_graphs(policy, theta, data, config.alpha)
    return lambda v: gauss_newton_product(policy, theta, data, v, config.alpha, graphs)


# %% Part II: the Gaussian and the sampler, rewritten to be fast

class DiagonalGaussian(Independent):
    """N(mean, diag exp(log_std)²): mean (..., A), log_std (A,).

    With torch's own log_prob and KL a meta-gradient takes up to a fifth longer.
    """

    def __init__(self, mean: Tensor, log_std: Tensor):
        super().__init__(Normal(mean, log_std.exp(), validate_args=False), 1,
                         validate_args=False)
        self.log_std = log_std

    def log_prob(self, act: Tensor) -> Tensor:
        """Σ_A [ −½((a − μ)/σ)² − log σ − ½ log 2π ]: act (..., A) → (...)."""
        z = (act - self.mean) / self.log_std.exp()
        return (-0.5 * (z * z).sum(-1)
                - (self.log_std + 0.5 * math.log(2 * math.pi)).sum())


@register_kl(DiagonalGaussian, DiagonalGaussian)
def _kl_gaussian(old: DiagonalGaussian, new: DiagonalGaussian) -> Tensor:
    """Σ_A [ log σ_n − log σ_o + (σ_o² + (μ_o − μ_n)²)/(2σ_n²) − ½ ]: (...)."""
    log_ratio = new.log_std - old.log_std                                      # (A,)
    z = (old.mean - new.mean) / new.log_std.exp()                           # (..., A)
    return ((log_ratio + 0.5 * torch.exp(-2 * log_ratio) - 0.5).sum()
            + 0.5 * (z * z).sum(-1))


def numpy_sampler(policy: GaussianPolicy, theta: Tensor, rng: np.random.Generator,
                  ) -> Callable[[np.ndarray], np.ndarray]:
    """`GaussianPolicy.sampler`: `distribution` once more, without a graph.

    Rollouts call it 4,000 times an iteration on K rows, where numpy's calls cost a
    third of torch's.
    """
    *layers, log_std = [x.detach().numpy() for x in policy.unpack(theta)]
    std = np.exp(np.maximum(log_std, math.log(policy.MIN_STD)))
    zero = np.zeros(1, std.dtype)
    activate = {"relu": lambda x: np.maximum(x, zero, out=x),
                "tanh": np.tanh}[policy.activation]
    weights, biases = [np.ascontiguousarray(w.T) for w in layers[::2]], layers[1::2]

    def act(obs: np.ndarray) -> np.ndarray:
        x = obs.astype(std.dtype, copy=False)
        for weight, bias in zip(weights[:-1], biases[:-1]):
            x = activate(x.dot(weight) + bias)                               # (K, 100)
        mean = x.dot(weights[-1]) + biases[-1]                                 # (K, A)
        return mean + std * rng.standard_normal(mean.shape, std.dtype)
    return act


# %% Part II: checks, each of which ends in one sentence

class BadInput(ValueError):
    """Unusable input; the message says what, where, and what to do."""


class Diverged(RuntimeError):
    """Training produced numbers that are not finite; the message says which, when."""


KINDS = {       # kind of a field → its types, in words, its least and greatest value …
    "int": ((int,), "a whole number (int)", (1, 10**4)),
    "float": ((int, float), "a number (float)", (0, 10**6)),
    "tuple": ((int,), "whole numbers such as 100,100, each", (1, 10**4))}
LIMITS = {                                                # … but for these fields
    "seed": (0, 10**9), "iterations": (0, 10**9), "eval_steps": (0, 10**4),
    "gamma": (0, 1), "lam": (0, 1), "backtrack_ratio": (0.01, 0.99),
    "init_std": (1e-5, 1e5), "max_kl": (1e-12, 10**6), "fd_step": (1e-12, 10**6)}


def check_config(config: Config) -> None:
    """Raise BadInput, naming the field, for a value of a wrong type or size."""
    for f in dataclasses.fields(config):
        value, kind = getattr(config, f.name), f.type.split()[0]
        choices = tuple(PRESETS) if f.name == "task" else f.metadata["choices"]
        if value is None and f.default is None:
            continue                                        # not given: see `complete`
        if kind == "bool":
            good, must = type(value) is bool, "True or False"
        elif choices:
            good, must = value in choices, f"one of {', '.join(choices)}"
        else:
            types, what, limits = KINDS[kind]
            low, high = LIMITS.get(f.name, limits)
            must = f"{what} from {low:g} to {high:g}"
            numbers = value if kind == "tuple" else (value,)
            good = type(numbers) is tuple and numbers and all(
                type(x) in types and low <= x <= high for x in numbers)
        if not good:
            raise BadInput(f"{f.name} must be {must}, not {value!r}")
    if config.method == "random" and config.iterations:
        raise BadInput(f"method random does not train: leave out iterations "
                       f"{config.iterations}")


SMALLER = "try a smaller --alpha, --eval-alpha or --max-kl"


def check_finite(what: str, x: Tensor) -> None:
    """Raise Diverged, naming the quantity, if x holds NaN or infinity."""
    if not torch.isfinite(x).all():
        raise Diverged(f"{what} is not finite: {SMALLER}")


def check_std(std: Tensor) -> None:
    """Raise Diverged if σ (A,) is at its floor, where log σ has no gradient, or 1e6."""
    if not (std.log().abs() < 0.999 * -math.log(GaussianPolicy.MIN_STD)).all():
        raise Diverged(f"std {std.tolist()} is not between 1e-6 and 1e6: {SMALLER}")


def check_rollout(task, *recorded: np.ndarray) -> None:
    """Name the first number that is not finite: obs (H,K,S), act (H,K,A), rew (H,K,1).

    A bad action is the policy's fault, the others are the environment's.
    """
    finite = np.stack([np.isfinite(x).all(-1) for x in recorded], -1)          # (H,K,3)
    if not finite.all():
        step, _, which = np.argwhere(~finite)[0]
        name = ("observation", "action", "reward")[which]
        error, advice = ((Diverged, SMALLER) if name == "action" else
                         (BadInput, "check the environment's reset() and step()"))
        raise error(f"task {task}: the {name} at step {step} is not finite: {advice}")


def task_in(options: dict | None, last: np.ndarray) -> np.ndarray:
    """The task in `reset`'s options, or else the last one; BadInput if it is none."""
    task = np.asarray((options or {}).get("task", last), float)
    if task.shape != last.shape or not np.isfinite(task).all():
        raise BadInput(f"a task here is a row of {len(last)} finite numbers, not "
                       f"{task}")
    return task


def check_environment(family: TaskFamily, config: Config) -> None:
    """Raise BadInput unless the family keeps to what `TaskFamily` says of it.

    Whether `reset` heeds the task cannot be seen from outside.
    """
    def must(fact: bool, what: str) -> None:
        if not fact:
            raise BadInput(f"{family.name}: {what}")

    K, envs = config.rollouts, family.envs(config.rollouts)
    must(isinstance(envs, VectorEnv) and envs.num_envs == K,
         f"make_envs({K}) must return a Gymnasium VectorEnv of {K} copies")
    copies = getattr(envs.unwrapped, "envs", [])
    must(len({id(copy) for copy in copies}) == len(copies),
         "make_envs gave one environment twice: make a new one for each copy")
    for space in (envs.single_observation_space, envs.single_action_space):
        must(isinstance(space, gym.spaces.Box) and space.shape != (0,) and (
            len(space.shape) == 1), f"a space must be a Box of one row of numbers, not "
            f"{space}: wrap the environment")
    must(family.name in TASKS or config.horizon == family.horizon,
         f"its horizon is {family.horizon}, the settings' {config.horizon}: give both "
         f"the same")
    for draw in (family.test_tasks, functools.partial(family.sample_tasks,
                                                      np.random.default_rng(0))):
        shape = np.shape(draw(2))
        must(len(shape) == 2 == shape[0],
             f"tasks must be rows of numbers, (2, n) for two, not {shape}")
    try:
        first, _ = envs.reset(seed=[0] * K, options={"task": family.test_tasks(1)[0]})
        results = first, *envs.step(np.zeros(envs.action_space.shape, np.float32))[:4]
    except (TypeError, ValueError, AttributeError, LookupError) as error:
        raise BadInput(f"{family.name}: reset() and step() must take and return what "
                       f"Gymnasium says: {error}") from error
    shapes, shape = [np.shape(x) for x in results], envs.observation_space.shape
    must(shapes == [shape, shape, (K,), (K,), (K,)],
         f"reset() and step() returned shapes {shapes}, not those of its spaces")


# %% Part II: threads and processes

def random_stream(*key: int) -> np.random.Generator:
    """Random numbers as a function of `key`, such as (seed, iteration, task, phase).

    The key's length goes in too: numpy takes (a, b) and (a, b, 0, 0) for the same seed.
    """
    return np.random.default_rng([len(key), *(int(k) for k in key)])


def episodes_first(x: np.ndarray) -> Tensor:
    """(H, K, …) → (K, H, …), laid out in memory as `GaussianPolicy.mean` wants it."""
    columns = torch.from_numpy(np.ascontiguousarray(x.T))              # (…, K, H)
    return columns.movedim(0, -1) if x.ndim == 3 else columns


def map_over_tasks(function: Callable, tasks: Sequence, workers: int = 1) -> list:
    """[function(task) for task in tasks], on `workers` threads, in order.

    Threads are enough: torch and MuJoCo let go of Python's lock inside their kernels.
    """
    if workers == 1:
        return [function(task) for task in tasks]
    return list(thread_pool(workers).map(function, tasks))


@functools.lru_cache
def thread_pool(workers: int) -> ThreadPoolExecutor:
    """One pool for each number of threads, kept for the life of the process."""
    def start() -> None:
        torch.set_num_threads(1)
        np.seterr(all="ignore")                # check_finite and its like name them
    return ThreadPoolExecutor(workers, initializer=start)


@contextmanager
def one_thread_each():
    """One thread per kernel, since the parallelism is over tasks.

    glibc hands every freed megabyte back to the system until a block of 30 MB has been
    freed once: 10-20 % of an iteration. Without glibc the block does nothing.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.ones(30 * 2**18)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def process_group():
    """Join the other processes that torchrun started; alone, do nothing."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield
        return
    if not {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= set(os.environ):
        raise BadInput("WORLD_SIZE is set, but not by torchrun: unset it")
    torch.distributed.init_process_group("gloo")
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def first_rank() -> bool:
    """Whether this process prints and writes: alone, or number 0 under torchrun."""
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def from_first_rank(function: Callable[[], Any]) -> Any:
    """function() as process 0 computes it, on every process; its BadInput ends all."""
    outcome = [None]
    if first_rank():
        try:
            outcome = [function()]
        except BadInput as error:
            outcome = [error]
        except OSError as error:                     # a path that no system can take
            outcome = [BadInput(f"{error}: choose another path")]
    if torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(outcome)
    if isinstance(outcome[0], BadInput):                           # said once is enough
        raise outcome[0] if first_rank() else SystemExit(2)
    return outcome[0]


def share_of_tasks(M: int) -> range:
    """The task numbers that this process works on: all, or under torchrun a share."""
    if not torch.distributed.is_initialized():
        return range(M)
    return range(torch.distributed.get_rank(), M, torch.distributed.get_world_size())


def gather_over_tasks(values: Sequence, mine: Sequence[int]) -> np.ndarray:
    """Rows of numbers of this process's tasks → the rows of all M tasks, (M, ...)."""
    if not torch.distributed.is_initialized():
        return np.array(values)
    everyone: list = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, list(zip(mine, values)))
    return np.array([row for _, row in sorted(sum(everyone, []))])


def returns_of_tasks(data: Sequence[TaskData], mine: Sequence[int]) -> np.ndarray:
    """Mean returns with θ and with θ′ of all M tasks, for the log: (M, 2)."""
    return gather_over_tasks([[(d.inner or [d.outer])[0].mean_return(),
                               d.outer.mean_return()] for d in data], mine)


def available_cores() -> int:
    """Processors for this process: a share of them where torchrun starts several."""
    cores = (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity")
             else os.cpu_count() or 1)
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


class Stopwatch:
    """Seconds between calls of `lap`."""

    def __init__(self):
        self.started = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last call."""
        now = time.perf_counter()
        seconds, self.started = now - self.started, now
        return seconds


# %% Part II: the paper's locomotion tasks (MAML §5.3)
#
# Authors' code: rllab's bodies. A step of the cheetah is 0.01 s, of the ant 0.02 s.
# Here:          Gymnasium's HalfCheetah-v5 and Ant-v5. A step is 0.05 s for both, so
#                200 steps are 10 s, not 2 s or 4 s: compare returns in shape only.

CHEETAH = dict(id="HalfCheetah-v5", forward_reward_weight=0, ctrl_cost_weight=0.05)
ANT = dict(id="Ant-v5", forward_reward_weight=0, ctrl_cost_weight=0.005,
           contact_cost_weight=0.0005, healthy_reward=0)

# Task → the body with its costs, and what the velocity v earns in a step besides:
# [maml_rl half_cheetah_env_rand.py] [maml_rl ant_env_rand.py]. The ant's 1 for velocity
# is the paper's bonus (its size is the authors'), its 0.05 their survival reward.
WALKERS: dict[str, tuple[dict, Callable[[float, float], float]]] = {
    "cheetah-vel": (CHEETAH, lambda v, task: -abs(v - task)),
    "cheetah-dir": (CHEETAH, lambda v, task: task * v),
    "ant-vel": (ANT, lambda v, task: 1.0 - abs(v - task) + 0.05),
    "ant-dir": (ANT, lambda v, task: task * v + 0.05),
}


class Walkers(SyncVectorEnv):
    """K copies of one of Gymnasium's walkers, with one unseen task in the reward.

    The task is one number: a speed in m/s, or a direction, 1 or −1. Actions are clipped
    to [−1, 1]. The policy sees velocities (m/s, rad/s) divided by 10. A copy whose
    episode has ended is not stepped any more. Raises BadInput if MuJoCo is missing.

    Authors' code: no scaling.
    Here:          joints turn at ±10 rad/s while angles stay within ±1. With Xavier
                   weights the first policy's mean is then beyond the actions' limits in
                   38 to 48 % of the cheetah's steps, where no gradient can be felt.
    """
    UNIT = 10.0

    def __init__(self, name: str, num_envs: int, **more):
        try:
            import mujoco
        except ImportError:
            raise BadInput('this task needs MuJoCo, which is not installed: pip '
                           'install "gymnasium[mujoco]"') from None
        # A word in Gymnasium's cheetah file is old; MuJoCo warns at every loading.
        mujoco.set_mju_user_warning(
            lambda text: None if "settotalmass" in text else print(
                f"MuJoCo: {text}", file=sys.stderr))
        body, self.earns = WALKERS[name]
        super().__init__([lambda: gym.make(**body, **more).unwrapped] * num_envs,
                         copy=False, autoreset_mode=AutoresetMode.DISABLED)
        self.task, parts = np.zeros(1), self.envs[0].observation_structure
        self.scale = np.ones(self.single_observation_space.shape)               # (S,)
        self.scale[parts["qpos"]:parts["qpos"] + parts["qvel"]] = 1 / self.UNIT

    def reset(self, *, seed=None, options=None):
        """`options={"task": (v,)}` sets the task; without it the last one stays."""
        self.task = task_in(options, self.task)
        self.obs, _ = super().reset(seed=seed)                                 # (K, S)
        self.ended = np.zeros(self.num_envs, bool)
        return self.obs * self.scale, {}

    def step(self, actions):
        """Gymnasium's steps and costs, and what the task pays for the velocities."""
        actions = np.clip(np.asarray(actions, float), -1.0, 1.0)
        rewards = np.zeros(self.num_envs)
        for k in np.flatnonzero(~self.ended):
            self.obs[k], costs, self.ended[k], _, info = self.envs[k].step(actions[k])
            rewards[k] = self.earns(info["x_velocity"], self.task[0]) + costs
        return (self.obs * self.scale, rewards, self.ended.copy(),
                np.zeros(self.num_envs, bool), {})


def walkers(name: str, highest: float | None = None) -> TaskFamily:
    """Tasks are speeds v ~ U[0, highest], the held-out ones from a fixed seed.

    Without `highest` they are the two directions in turn, in training, too: half of
    each is p(T) itself. Of an odd number the first is drawn.
    """
    def directions(rng: np.random.Generator, M: int) -> np.ndarray:
        first = rng.choice([1.0, -1.0]) if M % 2 else 1.0
        return np.resize([first, -first], (M, 1))

    make_envs = functools.partial(Walkers, name)
    if highest:
        return TaskFamily(
            name, make_envs, lambda rng, M: rng.uniform(0, highest, (M, 1)),
            lambda n: np.random.RandomState(1).uniform(0, highest, (n, 1)), 200, True)
    return TaskFamily(name, make_envs, directions,
                      lambda n: np.resize([1.0, -1.0], (n, 1)), 200, True)


# Goals are uniform on the unit square around the origin [MAML §5.3]. The held-out ones
# are the paper's own 40: numpy's old generator, seed 1.
TASKS: dict[str, TaskFamily] = {family.name: family for family in (
    TaskFamily("point2d", Point2D, lambda rng, M: rng.uniform(-0.5, 0.5, (M, 2)),
               lambda n: np.random.RandomState(1).uniform(-0.5, 0.5, (n, 2)), 100),
    walkers("cheetah-vel", highest=2.0), walkers("cheetah-dir"),
    walkers("ant-vel", highest=3.0), walkers("ant-dir"))}


POINT2D = dict(
    iterations=(60, "ours, 2 minutes; authors' code 100, paper up to 500"),
    meta_batch_size=(20, "paper"), rollouts=(20, "paper"), horizon=(100, "paper"),
    alpha=(0.1, "paper; its figure's run 0.5"), eval_episodes=(40, "paper"),
    gamma=(0.99, "authors' code"), lam=(0.9, "ours; authors' code 1"),
    init_std=(1.0, "authors' code, in units of the action limit"),
    max_kl=(0.05, "ours; authors' code 0.01"),
    cg_iterations=(5, "ours; authors' code 10"), hvp=("finite-difference", "paper"))
LOCOMOTION = dict(
    meta_batch_size=(20, "ours; paper 40"), rollouts=(20, "paper"),
    horizon=(200, "paper"), eval_episodes=(20, "paper, as in training"),
    alpha=(0.1, "paper"), gamma=(0.95, "ours; authors' code 0.99"),
    lam=(1.0, "authors' code"), init_std=(0.5, "ours; authors' code 1.0"),
    max_kl=(0.05, "ours; authors' code 0.01, cheetah-dir 0.02"),
    cg_iterations=(10, "authors' code"), hvp=("finite-difference", "paper"))
ANTS = LOCOMOTION | dict(
    rollouts=(40, "ant-vel ours, paper 20"), eval_episodes=(40, "as in training"),
    alpha=(0.2, "ours; paper 0.1"), gamma=(0.97, "ours; authors' code 0.99"),
    lam=(0.95, "ours; authors' code 1"),
    hvp=("gauss-newton", "ours; paper differences"))
PRESETS: dict[str, dict[str, tuple[Any, str]]] = {     # task → field → (value, source)
    "point2d": POINT2D,
    "cheetah-vel": LOCOMOTION | dict(
        iterations=(100, "ours, 25 minutes; authors' code 475")),
    "cheetah-dir": LOCOMOTION | dict(
        iterations=(200, "ours, 50 minutes; authors' code 100, paper up to 500")),
    "ant-vel": ANTS | dict(
        iterations=(140, "ours, 40 minutes; authors' code 375"),
        meta_batch_size=(5, "ours; paper 40")),
    "ant-dir": ANTS | dict(
        iterations=(300, "ours, 50 minutes; authors' code 575"),
        meta_batch_size=(2, "ours, both directions; paper 40")),
}


def complete(config: Config) -> Config:
    """The same settings with every field filled in: the one rule for what is not given.

    The α of evaluation is that of training; a random policy has 0 iterations; there are
    as many threads as cores; the rest is the task's preset. `dataclasses.replace` on a
    Config that is not complete changes what it names, and this comes afterwards.
    """
    values = {name: value for name, (value, _) in PRESETS[config.task].items()}
    values["eval_alpha"] = values["alpha"] if config.alpha is None else config.alpha
    if config.method == "random":
        values["iterations"] = 0
    values["workers"] = available_cores()
    return dataclasses.replace(config, **{
        name: value for name, value in values.items() if getattr(config, name) is None})


class TaskObserved(gym.vector.VectorObservationWrapper):
    """For the oracle: the task's numbers stand at the end of every observation."""

    def __init__(self, envs: VectorEnv, task_size: int):
        super().__init__(envs)
        old = envs.single_observation_space
        set_spaces(self, gym.spaces.Box(
            -np.inf, np.inf, (old.shape[0] + task_size,), old.dtype),
            envs.single_action_space)
        self.task = np.zeros(task_size)

    def reset(self, *, seed=None, options=None):
        self.task = task_in(options, self.task)
        return super().reset(seed=seed, options=options)

    def observations(self, obs: np.ndarray) -> np.ndarray:
        task = np.broadcast_to(self.task, (len(obs), len(self.task)))
        return np.concatenate([obs, task], axis=1, dtype=obs.dtype)


@functools.lru_cache
def with_task_observed(family: TaskFamily) -> TaskFamily:
    """The oracle's family: one for each, so that its environments are made once."""
    task_size = np.shape(family.test_tasks(1))[1]
    return dataclasses.replace(
        family, make_envs=lambda K: TaskObserved(family.make_envs(K), task_size))


def set_spaces(envs: VectorEnv, observation: gym.Space, action: gym.Space) -> None:
    """Give a vector environment its spaces, of one copy and of all."""
    batch = gym.vector.utils.batch_space
    envs.single_observation_space, envs.single_action_space = observation, action
    envs.observation_space = batch(observation, envs.num_envs)
    envs.action_space = batch(action, envs.num_envs)


def family_of(config: Config, family: TaskFamily | None = None) -> TaskFamily:
    """`family`, or TASKS[config.task]; for the oracle with the task observed."""
    family = family or TASKS[config.task]
    if config.method != "oracle":
        return family
    if family.name not in TASKS:                  # before its tasks are added to it
        check_environment(family, config)
    return with_task_observed(family)


def make_policy(family: TaskFamily, config: Config) -> GaussianPolicy:
    """A policy that fits the family's spaces; raises BadInput where none does."""
    check_environment(family, config)
    envs = family.envs(config.rollouts)
    return GaussianPolicy(envs.single_observation_space.shape[0],
                          envs.single_action_space.shape[0], config.hidden,
                          config.activation, config.init_std)


# %% 9. Evaluation (MAML §5.3, App. A.2)

EVALUATION = 2**31      # stands in place of the iteration in the seeds of evaluation


def adaptation(policy, theta: Tensor, family: TaskFamily, task, config: Config, m: int,
               ) -> Iterator[tuple[Tensor, Trajectories]]:
    """Adapt θ to held-out task number m: yields (φ, fresh episodes with φ), steps + 1
    times. φ is θ at first. Its episodes make the next step: α for the first, then α/2.
    The oracle, which sees the task, takes no step.
    """
    phi, alpha = theta.detach(), config.eval_alpha
    steps = 0 if config.method == "oracle" else config.eval_steps
    for step in range(steps + 1):
        data = sample_trajectories(
            family, task, policy, phi, config.eval_episodes, horizon=config.horizon,
            gamma=config.gamma, lam=config.lam, seed=(config.seed, EVALUATION, m, step))
        yield phi, data
        if step < steps:
            phi = adapt(policy, phi, [data], alpha if step == 0 else alpha / 2,
                        create_graph=False)


def adaptation_returns(policy, theta: Tensor, family: TaskFamily, tasks: Sequence,
                       config: Config) -> np.ndarray:
    """Mean return of held-out tasks before and after each step: (tasks, steps + 1).

    Q: What are the before and after numbers, where does test-time learning happen?
    A: Column 0 is θ itself, a policy that knows no task: on point2d it hovers
       near the origin. Column k is that task's policy after k plain policy-gradient
       steps (`adapt`) on k batches of its episodes. Nothing else learns: θ is not
       touched, and every number comes from fresh episodes. The paper's baselines
       pretrained (trained over all tasks without adaptation) and random are adapted in
       the same way, with an --eval-alpha of their own that has to be searched for. The
       oracle sees the task and has column 0 only.
    """
    mine = share_of_tasks(len(tasks))

    def row(m: int) -> list[float]:
        return [data.mean_return() for _, data in adaptation(
            policy, theta, family, tasks[m], config, m)]
    workers = config.workers if family.threads else 1
    return gather_over_tasks(map_over_tasks(row, mine, workers), mine)


def evaluate(config: Config, theta: Tensor, family: TaskFamily | None = None,
             ) -> np.ndarray:
    """The run's adaptation table on its held-out tasks: (tasks, steps + 1).

    `family` as for `train_maml`. Raises BadInput if θ is not of its policy's size.
    """
    config = complete(config)
    family = family_of(config, family)
    policy = make_policy(family, config)
    if theta.shape != (policy.num_params,):
        raise BadInput(f"θ has {theta.numel()} numbers, the policy for {family.name} "
                       f"{policy.num_params}: is it of another task?")
    with one_thread_each():
        return adaptation_returns(policy, theta, family,
                                  family.test_tasks(config.eval_tasks), config)


# The rows of the paper's figures: mean over its 40 test tasks, from the result files
# that its repository ships, after 0, 1, 2, 3 gradient steps. Locomotion: another
# simulator, so comparable in shape, not number by number.
PAPER: dict[str, dict[str, tuple[float, ...]]] = {
    "point2d": {"maml": (-40.41, -11.68, -3.33, -3.23),
                "pretrained": (-40.81, -19.73, -11.72, -8.47),
                "random": (-82.66, -57.96, -53.84, -46.81), "oracle": (-2.29,)},
    "cheetah-dir": {"maml": (-50.69, 293.19, 313.48, 315.65),
                    "pretrained": (-43.03, -24.75, -12.85, 19.57),
                    "random": (-35.73, 21.83, 62.32, 86.18), "oracle": (442.69,)},
    "cheetah-vel": {"maml": (-129.53, -78.57, -66.62, -60.78),
                    "pretrained": (-158.00, -135.39, -128.47, -133.61),
                    "random": (-254.83, -254.33, -246.79, -230.83),
                    "oracle": (-54.47,)},
    "ant-vel": {"maml": (30.58, 96.74, 100.06, 101.41),
                "pretrained": (-1.83, 6.11, 8.47, 9.47),
                "random": (-78.64, -62.81, -48.55, -35.56), "oracle": (107.89,)},
    "ant-dir": {"maml": (8.66, 499.15, 500.68, 499.11),
                "pretrained": (3.16, 1.27, 6.51, 6.86),
                "random": (3.11, 9.25, 15.96, 26.11), "oracle": (524.80,)},
}


# %% Files of a run: config.json, checkpoint.pt, progress.csv, evaluation.csv

FORMAT, VERSION = "maml_trpo checkpoint", 1
RUN_FILES = ("config.json", "checkpoint.pt", "progress.csv", "evaluation.csv",
             "learning.png", "adaptation.png", "trajectories.png")
PROGRESS_COLUMNS = (
    "iteration", "return_pre", "return_post", "surrogate_before", "surrogate_after",
    "kl", "line_search_steps", "cg_residual", "std_mean", "seconds_sampling",
    "seconds_gradient", "seconds_cg", "seconds_line_search", "seconds_total")


@dataclass(frozen=True)
class TrainState:
    """Where a training stands: all that is needed to go on, bit for bit."""
    iteration: int                       # the next one
    theta: Tensor                        # (P,)
    rows: list[dict[str, float]]         # one an iteration: progress.csv
    spread: list[list[float]]            # quartiles over tasks of both returns
    best_theta: Tensor                   # (P,) the θ whose return_post was highest …
    best_return: float                   # … and that return (the paper kept this one)

    @staticmethod
    def initial(policy, config: Config) -> TrainState:
        """Before the first iteration: θ drawn from the run's seed."""
        theta = policy.init(torch.Generator().manual_seed(config.seed))
        return TrainState(0, theta, [], [], theta, -math.inf)

    def after(self, theta: Tensor, returns: np.ndarray, stats: dict) -> TrainState:
        """The next state; returns (M, 2): with self.theta and with each task's θ′."""
        pre, post = returns.mean(0).tolist()
        row = dict(stats, iteration=self.iteration, return_pre=pre, return_post=post)
        better = post > self.best_return
        return TrainState(
            self.iteration + 1, theta,
            self.rows + [{name: row[name] for name in PROGRESS_COLUMNS}],
            self.spread + [np.percentile(returns, [25, 75], 0).T.flatten().tolist()],
            self.theta if better else self.best_theta,
            post if better else self.best_return)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file beside `path`, then rename it: readers see the old or the new."""
    beside = path.with_name(f".{path.name}.tmp")
    try:
        with open(beside, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def settings_of(config: Config) -> dict[str, Any]:
    """The settings kept with a run: all but `workers`, which changes no result."""
    return {name: value for name, value in dataclasses.asdict(config).items()
            if name != "workers"}


def save_checkpoint(path: Path, config: Config, state: TrainState) -> None:
    """The whole state, self-describing, atomically."""
    data = io.BytesIO()                 # into memory: a full disk is then an OSError
    torch.save(dict(format=FORMAT, version=VERSION, task=config.task,
                    config=settings_of(config), **vars(state)), data)
    write_atomically(path, data.getvalue())


def load_checkpoint(path: Path) -> tuple[Config, TrainState]:
    """Read a checkpoint; if it is none, raise BadInput and leave the file as it is."""
    try:
        with zipfile.ZipFile(path) as archive:         # torch.load checks no checksums
            if archive.testzip():
                raise ValueError("damaged")
        content = torch.load(path, weights_only=True)
        if (content["format"], content["version"]) != (FORMAT, VERSION):
            raise ValueError(f"format {content['version']!r}, not {VERSION}")
        config = complete(Config(**content["config"]))
        state = TrainState(**{f.name: content[f.name]
                              for f in dataclasses.fields(TrainState)})
        if math.isnan(state.best_return) or not (
                len(state.rows) == len(state.spread) == state.iteration):
            raise ValueError("its rows are not those of its iteration")
        for theta in (state.theta, state.best_theta):
            if theta.dim() != 1 or not torch.isfinite(theta).all():
                raise ValueError("its θ is not a row of finite numbers")
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file") from None
    except Exception as error:     # a foreign file makes torch.load raise anything
        raise BadInput(f"{path}: not a checkpoint of this program, or a damaged one "
                       f"({error!s:.100}); it was left as it is") from None
    P = make_policy(family_of(config), config).num_params
    if not len(state.theta) == len(state.best_theta) == P:
        raise BadInput(f"{path}: its θ is not {P} numbers; it was left as it is")
    return config, state


def write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence]) -> None:
    """A table with a header, atomically."""
    text = io.StringIO(newline="")
    csv.writer(text).writerows([header, *rows])
    write_atomically(path, text.getvalue().encode())


def read_evaluation(folder: Path, task: str) -> tuple[str, np.ndarray]:
    """Another run's method and (tasks, steps + 1) table; BadInput if there is none."""
    try:
        other = json.loads((folder / "config.json").read_text(encoding="utf-8"))["task"]
        with open(folder / "evaluation.csv", newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        method, steps = rows[0]["method"], 1 + int(rows[-1]["step"])
        table = np.reshape([float(row["return"]) for row in rows], (-1, steps))
        places = [(int(row["task"]), int(row["step"])) for row in rows]
        if places != list(np.ndindex(table.shape)) or not np.isfinite(table).all():
            raise ValueError("its table has gaps")
    except Exception as error:        # whatever foreign files make json and csv raise
        raise BadInput(f"--compare {folder}: no finished run there, with config.json "
                       f"and evaluation.csv ({error!s:.80})") from None
    if other != task:
        raise BadInput(f"--compare {folder}: a run of {other}, not of {task}")
    return method, table


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a run's folder: BadInput if another process is running in it.

    The lock ends with the process, however it ends. On Windows there is none.
    """
    with open(folder / ".lock", "a") as file:
        try:
            import fcntl
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BadInput(f"a run is going on in {folder}: wait for it, or choose "
                           f"another --out") from None
        except (ImportError, OSError):
            pass                               # this system or disk has no such locks
        yield


# %% 10. Figures and the printed table

PALETTE = {"maml": "#1f6fb4", "pretrained": "#d95f02", "random": "#7f7f7f",
           "oracle": "#2a9d4e"}


def new_figure(columns: int = 1, width: float = 6.4, height: float = 4.0):
    """A figure and its axes, made without any window system."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(width, height), layout="constrained", dpi=150)
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25)
    return figure, axes


def draw_learning_curve(path: Path, config: Config, state: TrainState) -> None:
    """Return before and after adaptation, mean and middle half of the tasks."""
    figure, (ax,) = new_figure()
    iterations = [row["iteration"] for row in state.rows]
    spread = np.array(state.spread)                                   # (iterations, 4)
    for k, name, label, color in (
            (0, "return_pre", "before adaptation", "#7f7f7f"),
            (1, "return_post", "after adaptation" if config.inner_updates else
             "without adaptation", PALETTE["maml"])):
        if k == 0 and not config.inner_updates:
            continue
        ax.plot(iterations, [row[name] for row in state.rows], color=color, label=label,
                marker=".", markersize=3)
        ax.fill_between(iterations, spread[:, 2 * k], spread[:, 2 * k + 1], color=color,
                        alpha=0.2, linewidth=0)
    ax.set(xlabel="meta-iteration", ylabel="return (undiscounted, training tasks)")
    ax.set_title(f"{config.task}, {config.method}: mean over {config.meta_batch_size} "
                 f"tasks, band = middle half", fontsize=10)
    ax.legend(frameon=False)
    figure.savefig(path)


def draw_adaptation(path: Path, config: Config,
                    tables: Sequence[tuple[str, np.ndarray]]) -> None:
    """Return against the number of gradient steps, with the paper's rows dashed."""
    figure, (ax,) = new_figure(width=8.4)
    for k, (label, method, mean, error) in enumerate(comparison_rows(config, tables)):
        if label.startswith(" "):                                  # one direction alone
            continue
        style = dict(color=PALETTE.get(method), label=label)
        if error is None:
            style.update(linestyle="--", alpha=0.7)
        if method == "oracle":
            ax.axhline(mean[0], **style)
        else:
            ax.errorbar(range(len(mean)), mean, error, marker="osD^v"[k % 5],
                        capsize=3, **style)
    note = "" if config.task == "point2d" else "\n(paper: another simulator)"
    ax.set(xlabel="gradient steps on the task", ylabel="return (undiscounted)")
    ax.set_title(f"{config.task}: mean ± standard error over {len(tables[0][1])} "
                 f"evaluations{note}", fontsize=10)
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path)


def draw_trajectories(path: Path, config: Config, theta: Tensor, goals: int = 4):
    """Paths in the plane before and after each step, like the paper's Figure 4."""
    figure, axes = new_figure(goals, 3.1 * goals, 3.4)
    family = family_of(config)
    policy = make_policy(family, config)
    for m, (ax, goal) in enumerate(zip(axes, family.test_tasks(goals))):
        for step, (_, data) in enumerate(adaptation(
                policy, theta, family, goal, config, m)):
            length = int(data.mask[0].sum())
            ax.plot(*data.obs[0, :length, :2].T, linewidth=1.2, alpha=0.9,
                    color=f"C{step}", label=f"{step} steps" if step != 1 else "1 step")
        ax.plot(*goal, "k*", markersize=11, label="goal")
        ax.plot(0, 0, "ko", markersize=4)
        ax.set(aspect="equal", xlabel="x", title=f"goal ({goal[0]:.2f}, {goal[1]:.2f})",
               xlim=(-0.65, 0.65), ylim=(-0.65, 0.65))
    axes[0].set_ylabel("y")
    axes[-1].legend(frameon=False, fontsize=8, loc="center left",
                    bbox_to_anchor=(1, 0.5))
    figure.savefig(path)


def standard_error(*groups: np.ndarray) -> np.ndarray:
    """Of the mean of all rows, from the spread within each group: (…, n) → (n,).

    What lies *between* the two directions is no error: both are always there. Of one
    row nothing is known: NaN.
    """
    variances = [len(rows) * rows.var(axis=0, ddof=1) if len(rows) > 1
                 else math.nan * rows[0] for rows in groups]
    return np.sqrt(sum(variances)) / sum(map(len, groups))


def comparison_rows(config: Config, tables: Sequence[tuple[str, np.ndarray]],
                    ) -> list[tuple[str, str, np.ndarray, np.ndarray | None]]:
    """(label, method, mean, standard error) of our runs, the directions and the paper.

    Mean and error are (steps + 1,); the paper's rows have None for an error.
    """
    rows: list = []
    for label, table in tables:
        method, directions = label.split(",")[0], {}
        if config.task.endswith("-dir") and len(table) > 1:
            directions = {"  forward": table[::2], "  backward": table[1::2]}  # in turn
        error = standard_error(*directions.values() or [table])
        rows.append((label, method, table.mean(0), error))
        rows += [(name, method, group.mean(0), standard_error(group))
                 for name, group in directions.items()]
    methods = {method for _, method, _, _ in rows}
    return rows + [(f"{method}, paper", method, np.array(row), None)
                   for method, row in PAPER.get(config.task, {}).items()
                   if method in methods]


def comparison_table(config: Config, tables: Sequence[tuple[str, np.ndarray]]) -> str:
    """The rows as text: mean ± standard error over the tasks, after 0, 1, … steps."""
    rows = comparison_rows(config, tables)
    width = max(len(label) for label, *_ in rows) + 2
    columns = max(len(mean) for _, _, mean, error in rows if error is not None)
    lines = ["gradient steps".ljust(width)
             + "".join(f"{step:>17}" for step in range(columns))]
    for label, _, mean, error in rows:
        cells = [f"{x:9.2f}" for x in mean[:columns]]
        if error is not None:
            cells = [f"{cell} ± {e:5.2f}" for cell, e in zip(cells, error)]
        lines.append(label.ljust(width) + "".join(cell.ljust(17) for cell in cells))
    if config.task != "point2d":
        lines.append("The paper's simulator differs: compare shapes, not numbers.")
    return "\n".join(lines)


# %% Part II: --render

class Filmed(Walkers):
    """Walkers; `frames` are pictures of the first one, before each step."""

    def __init__(self, name: str, num_envs: int):
        super().__init__(name, num_envs, render_mode="rgb_array", camera_name="track",
                         width=224, height=168)

    def reset(self, *, seed=None, options=None):
        self.frames = []
        return super().reset(seed=seed, options=options)

    def step(self, actions):
        self.frames.append(self.envs[0].render())
        return super().step(actions)


def check_render(path: Path, task: str) -> None:
    """BadInput if no film of a task's episodes can be drawn or written there."""
    if path.suffix.lower() != ".gif" or path.exists() or not path.parent.is_dir():
        raise BadInput(f"--render {path}: name a new file that ends in .gif, in a "
                       f"folder that is there")
    if task == "point2d":
        return
    if sys.platform == "linux" and "DISPLAY" not in os.environ:
        os.environ.setdefault("MUJOCO_GL", "egl")              # draws without a window
    try:
        envs = Filmed(task, 1)
        envs.reset(seed=0)
        envs.envs[0].render()
    except Exception as error:                   # of which type depends on what lacks
        raise BadInput(f"--render: MuJoCo cannot draw here ({error!s:.80}): install "
                       f"EGL (Debian: libegl1), or leave --render out") from None


def render_gif(path: Path, config: Config, theta: Tensor, every: int = 4) -> None:
    """Of each of two held-out tasks an episode with θ and one with θ′, side by side."""
    from matplotlib.animation import ArtistAnimation, PillowWriter
    check_render(path, config.task)
    plane = config.task == "point2d"
    family = family_of(config, TASKS["point2d"] if plane else dataclasses.replace(
        TASKS[config.task], make_envs=functools.partial(Filmed, config.task)))
    policy = make_policy(family, config)
    panels = []                                               # (title, task, its film)
    for m, task in enumerate(family.test_tasks(2)):
        for when, (_, data) in zip(("before", "after one step"), adaptation(
                policy, theta, family, task, config, m)):
            title = f"task {np.round(task, 2)}, {when}: return {data.rew[0].sum():.1f}"
            film = data.obs[0, :, :2].numpy() if plane else (
                family.envs(config.eval_episodes).unwrapped.frames)
            panels.append((title, task, film[:int(data.mask[0].sum()):every]))
    figure, axes = new_figure(len(panels), 3.2 * len(panels), 3.2)
    pictures = [[] for _ in range(max(len(film) for _, _, film in panels))]
    for ax, (title, task, film) in zip(axes, panels):
        ax.set_title(title, fontsize=8)
        if plane:
            ax.plot(*task, "k*", markersize=11)
            ax.set(aspect="equal", xlim=(-0.75, 0.75), ylim=(-0.75, 0.75))
        else:
            ax.axis("off")
        for t, artists in enumerate(pictures):
            now = film[min(t, len(film) - 1)]
            artists += ax.plot(*now, "C0o") if plane else [ax.imshow(now)]
    ArtistAnimation(figure, pictures).save(path, PillowWriter(fps=20 / every), dpi=72)


# %% 11. Command line

def whole_numbers(text: str) -> tuple[int, ...]:
    """"100,100" → (100, 100)."""
    return tuple(int(part) for part in text.split(","))


def build_parser() -> argparse.ArgumentParser:
    """Every field of Config is a flag; flags may be shortened while they are unique.

    A complaint is BadInput. Help says what a setting is, its choices, and its default
    or the tasks' presets.
    """
    def complain(message: str):
        raise BadInput(f"{message} (--help lists every setting)")

    parser = argparse.ArgumentParser(
        prog="maml_trpo.py", description="MAML-TRPO: meta-train, evaluate, draw, "
        "compare.", argument_default=argparse.SUPPRESS)
    parser.error = complain
    for f in dataclasses.fields(Config):
        choices = PRESETS if f.name == "task" else f.metadata["choices"]
        text = f.metadata["help"] + (f": {', '.join(choices)}" if choices else "")
        text += "" if f.default is None else f"; default {f.default}"
        tasks_of: dict[str, list[str]] = {}
        for task, preset in PRESETS.items():
            if f.name in preset:
                value, source = preset[f.name]
                tasks_of.setdefault(f"{value} ({source})", []).append(task)
        text += "".join(f"; {', '.join(tasks)}: {x}" for x, tasks in tasks_of.items())
        kind = f.type.split()[0]
        how = dict(action="store_true") if kind == "bool" else dict(
            type=dict(int=int, float=float, str=str, tuple=whole_numbers)[kind],
            metavar=dict(int="N", float="X", str="NAME", tuple="N,N")[kind])
        parser.add_argument("--" + f.name.replace("_", "-"), **how,
                            help=text.replace("%", "%%"))
    add = parser.add_argument
    add("--out", type=Path, metavar="DIR",
        help="where the run writes; default: the next free runs/TASK-METHOD-seedS")
    add("--resume", action="store_true", help="go on from --out DIR's checkpoint")
    add("--init", type=Path, metavar="FILE",
        help="start from another run's last θ, its std included")
    add("--evaluate", type=Path, metavar="FILE",
        help="no training: table and figures of a saved θ")
    add("--best", action="store_true",
        help="with --evaluate: the θ with the best return in training, not the last")
    add("--compare", type=Path, nargs="+", metavar="DIR",
        help="put other runs into this one's table and figure; the run itself is still "
        "trained, or with --evaluate only evaluated")
    add("--render", type=Path, metavar="FILE.gif",
        help="at the end, film two tasks: before and after one gradient step")
    return parser


def say(*text: str) -> None:
    """Print, on one process; go on silently if it fails (`| head`, or a full disk)."""
    if not first_rank():
        return
    try:
        print(*text, flush=True)
    except (OSError, ValueError):
        sys.stdout = open(os.devnull, "w", encoding="utf-8")


def new_folder(out: Path | None, name: str) -> Path:
    """Make a run's folder; BadInput if it already holds a run.

    Without `out`: the next free of runs/NAME, NAME-2, …. To make it is to take it, so
    two runs started together get two folders.
    """
    folder, number = out or Path("runs") / name, 1
    if out:
        out.mkdir(parents=True, exist_ok=True)
    while not out:
        try:
            folder.mkdir(parents=True)
            break
        except FileExistsError:
            number += 1
            folder = Path("runs") / f"{name}-{number}"
    for file in RUN_FILES:
        if (folder / file).exists():
            raise BadInput(f"{folder} already holds a run ({file}): choose another "
                           f"--out, or go on with --resume if it has a checkpoint.pt")
    return folder


PROGRESS_HEADER = ("  iter   return before → after   surrogate      KL  trials  CG left"
                   "    std    s/it     left")


def progress_line(row: dict[str, float], iterations: int, recent: float) -> str:
    """What is printed of an iteration; `recent`: seconds an iteration takes now."""
    minutes, seconds = divmod(round((iterations - 1 - row["iteration"]) * recent), 60)
    search = f"{row['line_search_steps']:6d}" if row["line_search_steps"] else "  none"
    return (f"{row['iteration'] + 1:6d}  {row['return_pre']:12.2f} → "
            f"{row['return_post']:8.2f}  {row['surrogate_after']:10.5f} "
            f"{row['kl']:7.4f}  {search} {row['cg_residual']:8.3f} "
            f"{row['std_mean']:6.3f} {row['seconds_total']:7.2f}  "
            f"{minutes:3d}m{seconds:02d}s")


def train_in_folder(config: Config, folder: Path, state: TrainState) -> TrainState:
    """Train, with a checkpoint, a CSV row and a printed line after every iteration."""
    def keep(new: TrainState) -> None:
        nonlocal state
        state = new
        if first_rank():
            save_checkpoint(folder / "checkpoint.pt", config, state)
            write_csv(folder / "progress.csv", PROGRESS_COLUMNS,
                      [row.values() for row in state.rows])
        if state.rows:
            recent = np.median([row["seconds_total"] for row in state.rows[-10:]])
            say(progress_line(state.rows[-1], config.iterations, recent))

    if config.iterations:
        say(PROGRESS_HEADER)
    keep(state)                       # a resumed run says once more where it stands
    train_maml(config, start=state, after_iteration=keep)
    return state


def report(config: Config, folder: Path, state: TrainState, theta: Tensor, which: str,
           compare: Sequence[Path]) -> None:
    """Evaluate θ, the `which` one; write evaluation.csv; print the table; draw."""
    say(f"Evaluating the {which}: tasks {config.eval_tasks}, episodes after each step "
        f"{config.eval_episodes} …")
    table = evaluate(config, theta)
    if not first_rank():
        return
    write_atomically(folder / "config.json", json.dumps(
        settings_of(config), indent=1).encode() + b"\n")
    write_csv(folder / "evaluation.csv", ("method", "task", "step", "return"), [
        (config.method, *place, value) for place, value in np.ndenumerate(table)])
    tables = [(f"{config.method}, {which}", table)]
    for other in compare:
        method, theirs = read_evaluation(other, config.task)
        size = "" if len(theirs) == len(table) else f", tasks: {len(theirs)}"
        tables.append((f"{method}, {other.resolve().name}{size}", theirs))
    say("\nReturn, mean ± standard error over the tasks\n"
        + comparison_table(config, tables))
    if state.rows:
        draw_learning_curve(folder / "learning.png", config, state)
    draw_adaptation(folder / "adaptation.png", config, tables)
    if config.task == "point2d":
        draw_trajectories(folder / "trajectories.png", config, theta)


def saved_run(flag: str, path: Path, wanted: dict[str, Any], free: Sequence[str] = (),
              ) -> tuple[Config, TrainState]:
    """A checkpoint's state, and its settings with those that are `wanted`.

    BadInput, naming the setting, if one differs and is not `free` to.
    """
    config, state = load_checkpoint(path)
    for name, value in wanted.items():
        if value != getattr(config, name) and name not in free:
            raise BadInput(f"--{flag}: {path} has {name} {getattr(config, name)}, not "
                           f"{value}: {name} cannot be changed here")
    return dataclasses.replace(config, **wanted), state


def first_state(options: dict[str, Any], folder: Path | None,
                ) -> tuple[Config, TrainState]:
    """Settings and state to begin with: of a saved run, or of a new one."""
    given = {f.name: options[f.name] for f in dataclasses.fields(Config)
             if f.name in options}
    if "evaluate" in options:
        return saved_run("evaluate", options["evaluate"], given, (
            "eval_tasks", "eval_episodes", "eval_steps", "eval_alpha", "seed",
            "workers"))
    if folder:
        config, state = saved_run("resume", folder / "checkpoint.pt", given,
                                  ("iterations", "workers"))
        if config.iterations < state.iteration:
            raise BadInput(f"--resume: iterations {state.iteration} are done in "
                           f"{folder}, do not ask for fewer")
        return config, state
    config = complete(Config(**given))
    state = TrainState.initial(make_policy(family_of(config), config), config)
    if "init" in options:
        _, other = saved_run("init", options["init"], dict(
            task=config.task, hidden=config.hidden, activation=config.activation))
        if len(other.theta) != len(state.theta):
            raise BadInput("--init: an oracle's θ is of no use to other methods")
        state = dataclasses.replace(state, theta=other.theta, best_theta=other.theta)
    return config, state


def prepare(options: dict[str, Any], held: ExitStack,
            ) -> tuple[Config, Path, TrainState]:
    """Settings, folder and first state of what a command line asks for.

    A new folder is made last, so that bad input leaves nothing behind.
    """
    out, folder = options.get("out"), None
    train, resume = "evaluate" not in options, "resume" in options
    for flag, wrong, why in (
            ("resume", not (train and out and out.is_dir()),
             f"or train in the folder of a run, --out DIR, not {out}"),
            ("best", train, "it goes with --evaluate FILE"),
            ("init", resume or options.get("method") == "random" or not train,
             "it is for a run that trains and has not begun")):
        if flag in options and wrong:
            raise BadInput(f"--{flag}: leave it out, {why}")
    if resume and (out / "checkpoint.pt").exists():     # otherwise it had not yet begun
        folder = out
        held.enter_context(locked(folder))
    config, state = first_state(options, folder)
    if train and torch.distributed.is_initialized() and (
            config.meta_batch_size < torch.distributed.get_world_size()):
        raise BadInput(f"meta_batch_size {config.meta_batch_size} is less than the "
                       f"number of processes: start fewer")
    for other in options.get("compare", []):
        read_evaluation(other, config.task)
    if "render" in options:                  # find out now, not after the training
        check_render(options["render"], config.task)
    if not folder:
        which = f"seed{config.seed}" if train else "evaluated"
        folder = new_folder(out, f"{config.task}-{config.method}-{which}")
        held.enter_context(locked(folder))
    return config, folder, state


def run(options: dict[str, Any]) -> int:
    """Carry out a parsed command line."""
    started, which = time.perf_counter(), "last θ"
    with ExitStack() as held:
        config, folder, state = from_first_rank(lambda: prepare(options, held))
        say(f"{config.task}, {config.method}, seed {config.seed}: {state.iteration} of "
            f"{config.iterations} meta-iterations done; tasks "
            f"{config.meta_batch_size}, episodes {config.rollouts}, steps "
            f"{config.horizon}, inner steps "
            f"{config.inner_updates}, workers {config.workers}; writes to {folder}")
        if "evaluate" not in options:
            state = train_in_folder(config, folder, state)
        theta = state.theta
        if "best" in options:
            theta, which = state.best_theta, "best θ of the training"
        report(config, folder, state, theta, which, options.get("compare", []))
        if "render" in options and first_rank():
            render_gif(options["render"], config, theta)
    files = " and ".join(str(x) for x in (folder, options.get("render")) if x)
    say(f"\nDone in {time.perf_counter() - started:.0f} s. Files: {files}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command line: → exit status (0 done, 1 failed, 2 bad input, 130 Ctrl-C)."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, ValueError):     # there is none, or it is closed
            stream.reconfigure(errors="replace")    # where θ cannot be shown: ?

    def fail(status: int, message: object) -> int:
        print(f"maml_trpo.py: {message}", file=sys.stderr)
        return status

    try:
        options = vars(build_parser().parse_args(argv))
        with process_group(), np.errstate(all="ignore"):      # the checks name them
            return run(options)
    except SystemExit as stop:                  # --help
        return int(stop.code or 0)
    except BadInput as error:
        return fail(2, error)
    except Diverged as error:
        return fail(1, error)
    except OSError as error:
        return fail(1, f"{error}: mend the cause; a training goes on from its last "
                       f"checkpoint with --resume")
    except (MemoryError, RuntimeError) as error:
        if "allocate" not in str(error):
            raise
        return fail(1, f"out of memory, choose smaller settings ({error!s:.80})")
    except KeyboardInterrupt:
        return fail(130, "interrupted; a training goes on with --out DIR --resume")


if __name__ == "__main__":
    sys.exit(main())
