"""MAML-TRPO for reinforcement learning, in one file that is read beside the paper.

What this is
    MAML (C. Finn, P. Abbeel, S. Levine, "Model-Agnostic Meta-Learning for Fast
    Adaptation of Deep Networks", ICML 2017, arXiv 1703.03400v3) looks for parameters θ
    from which ONE gradient step on a few episodes of a new task gives a good policy
    for that task. This file is the reinforcement-learning half of the paper: the inner
    step is a plain policy gradient, and θ itself is improved by TRPO.
    Run it with `python maml_trpo.py --task point2d`; `--help` lists every setting.
    The same algorithm on one page, without what surrounds it: notes.md, chapter 2.

One meta-iteration, and the function that does each line
    for each of M tasks:                                        sample_task_data
        D  = K episodes with θ                                  sample_trajectories
        θ′ = θ − α∇L(θ), L from D                               adapt
        D′ = K episodes with θ′                                 sample_trajectories
    Sampling ends here. D is random given the task and θ, and D′ given the task and θ′.
    The θ that played D is from now on called θ_old. It is fixed, and so are D and D′.
    Now θ is a variable, which is θ_old at first. Each task's θ′(θ) is a function of it,
    so every function below runs the inner step AGAIN, from the stored D. π is the
    policy with θ′(θ), and π_old the one with θ′(θ_old).
    U(θ) = mean of −(π/π_old)·Â′ and k(θ) = mean of KL(π_old ‖ π), both means over
    the steps of D′ and then over the tasks                     surrogate_and_kl
    g    = ∇U(θ_old)                                            meta_gradient
    H·v  ≈ ∇k(θ_old + εv)/ε, with H = ∇²k(θ_old); ∇k(θ_old) = 0 hessian_vector_product
         (U, g and k take all M tasks; H may take k of the first few only)
    x    a few iterations towards Hx = g                        conjugate_gradient
    θ   ← θ_old − c·x, with the largest c of 15 that passes     backtrack_line_search

Which function holds which line of the paper's Algorithm 3, and of the listing, the
reader's faulty pseudocode that this file answers. You need not have it: notes.md,
chapter 2, says line by line what it does. Its line 1 is `def task_rollout(task):`.
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
                        [listing l.62,63]    towards Hx = g        conjugate_gradient
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
    L   inner_loss    ()        stands in for the paper's Eq. 4: its gradient up to a
                                factor, not its value, not its Hessian
    U k surrogate, KL ()        means over tasks; one task's share: Uᵢ, kᵢ
    J   ∂θ′/∂θ        (P,P)     I − α∇²L for one inner step, never formed
    F   Fisher matrix (P,P)     E[∇log π ∇log πᵀ] over a ~ π, mean over the states of
                                D′, at θ′; never formed
    g   gradient      (P,)      ∇U at θ_old
    H is the number of steps in a shape, and the Hessian ∇²k(θ_old) in H·v, Hx and xᵀHx.
    x is a state, as in π(a|x) and x_t; in Hx and xᵀHx it is the direction that
    conjugate gradient finds. σ is the std of the actions; σᵢ, with a task's index, that
    of its advantages. κ is one task's KL as a function of θ′, so kᵢ(θ) = κ(θ′(θ)).

Who runs the inner step, and what autograd sees of it (`adapt`)
    sampling D′       θ without grad                        θ′ is numbers, to play D′
    g                 θ with grad, create_graph=True        ∂θ′/∂θ = J
    g, first order    θ with grad, create_graph=False       ∂θ′/∂θ = I
    ∇k inside H·v     θ with grad, create_graph=True        ∂θ′/∂θ = J
    … first order     θ′ with grad, no inner step           ∂θ′/∂θ = I
    line search       θ without grad                        θ′ is numbers
    Costs, for each task: g takes one gradient through the inner step, and so does each
    H·v; each trial of the line search takes one ordinary ∇L, no gradient of U or k.
    figures/graph.png draws the way from θ to U and k, and where the listing cuts it.

Three voices in the comments: `Paper:`; `Authors' code:`, where their repository
(cbfinn/maml_rl) does otherwise; `Here:`, our choice. notes.md has a table of them, the
derivations and a key to the [tags]. Part I is sections 0 to 8, the algorithm. What it
uses of Part II are checks and presets, what makes a task family ready, the two exact
products, and functions that share tasks among processes.
"""
from __future__ import annotations

import argparse
import csv
import dataclasses
import functools
import io
import json
import math
import numbers
import os
import subprocess
import sys
import threading
import time
import zipfile
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Iterator, NamedTuple, Sequence

try:
    import gymnasium as gym
    import numpy as np
    import torch
except ModuleNotFoundError as error:
    if __name__ != "__main__":
        raise
    print(f"maml_trpo.py: {error}: pip install -r requirements.txt", file=sys.stderr)
    sys.exit(2)
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv
from torch import Tensor

# %% 0. Configuration (MAML §5.3, App. A.2)

def setting(default, help: str, choices=None) -> Any:
    """One field of Config: its value for point2d, help text with source, choices."""
    return field(default=default, metadata=dict(help=help, choices=choices))


@dataclass(frozen=True, init=False)
class Config:
    """Every setting of a run; `Config()` is point2d as `--task point2d` runs it.

    `Config(task="ant-dir", alpha=0.3)` is ant-dir's preset (PRESETS in Part II holds
    what differs there) with another α. `dataclasses.replace` changes what it names, and
    is not for changing the task. Raises BadInput for an unusable value.
    """
    task: str = setting("point2d", "task family [MAML §5.3]")
    method: str = setting("maml", "MAML, or one of the paper's baselines [MAML §5.3]",
                          ("maml", "pretrained", "random", "oracle"))
    seed: int = setting(0, "seed of everything random")
    iterations: int = setting(60, "meta-iterations [MAML Alg.3 l.2] (ours; authors' "
                              "code 100, paper up to 500)")
    meta_batch_size: int = setting(20, "M, tasks a meta-iteration (paper)")
    rollouts: int = setting(20, "K, episodes a task and policy (paper)")
    horizon: int = setting(100, "H, steps an episode at most (paper)")
    alpha: float = setting(0.1, "α, inner step size (paper; its figure's run 0.5)")
    alpha_follows_std: bool = setting(False, "multiply α by (σ/--init-std)², with σ the"
                                      " std of the θ that the iteration starts from")
    inner_steps: int = setting(1, "inner steps in training (paper)")
    first_order: bool = setting(False, "take J = I in g and in the step's direction")
    inner_loss: str = setting("log-prob", "inner loss inside g: log π·Â (authors' code)"
                              ", or π/stop_grad(π)·Â", ("log-prob", "ratio"))
    gamma: float = setting(0.99, "γ, discount (authors' code)")
    lam: float = setting(0.9, "λ of GAE (ours: less noise; authors' code 1)")
    hidden: tuple[int, ...] = setting((100, 100), "hidden layer sizes (paper)")
    activation: str = setting("relu", "hidden units (paper: relu)", ("relu", "tanh"))
    init_std: float = setting(1.0, "initial std of the actions, whose limit is 1 in "
                              "every task here (authors' code)")
    max_kl: float = setting(0.05, "δ, trust region on the adapted policies (ours: "
                            "fewer iterations; authors' code 0.01)")
    damping: float = setting(1e-5, "added to H's diagonal (authors' code)")
    cg_iterations: int = setting(5, "iterations of conjugate gradient (ours: as good "
                                 "here; authors' code 10)")
    cg_tolerance: float = setting(1e-10, "CG ends at r·r below this (authors' code)")
    hvp: str = setting("finite-difference", "Hessian-vector product (paper)", (
        "finite-difference", "double-backprop", "gauss-newton"))
    curvature_tasks: int = setting(5, "n, H is made from the first n tasks only (ours: "
                                   "a quarter of CG's time, the same returns after "
                                   "one and two steps, a little worse after three; "
                                   "authors' code all M; [TRPO App.C] takes a tenth of "
                                   "the samples)")
    fd_step: float = setting(0.01, "length of a difference's move in θ (ours)")
    backtrack_ratio: float = setting(0.8, "line search: shrinking (authors' code)")
    backtrack_steps: int = setting(15, "trials, full step included (authors' code)")
    eval_tasks: int = setting(40, "held-out tasks (authors' code)")
    eval_episodes: int = setting(40, "episodes a task and step at evaluation; each "
                                 "step learns from them (paper)")
    eval_steps: int = setting(3, "adaptation steps at evaluation")
    eval_alpha: float = setting(0.1, "α of the first step at evaluation, then half of "
                                "it (paper); follows --alpha where that alone is given")
    workers: int = setting(0, "processes that share the tasks; 0: one for each core")

    def __init__(self, task: str = "point2d", **given):
        vars(self).update(complete_settings(task, given))

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


class Point2D(VectorEnv):
    """2D navigation: K points walk from the origin to one unseen goal [MAML §5.3].

    Goals are uniform on the square from (−0.5, −0.5) to (0.5, 0.5).
    Observation (K, 2): position. Action (K, 2): in [−1, 1], clipped, times MAX_STEP.
    Reward (K,): −distance to the goal after the move. Nothing else tells the goal.

    Paper:         the negative *squared* distance; it ends within 0.01 of the goal.
    Authors' code: −distance; it ends in the box |dx|, |dy| < 0.01
                   [maml_rl point_env_randgoal.py]. The paper's curve begins at −40.41,
                   and on its 40 held-out goals a point that never moves scores −40.08
                   here, but −17.8 in squared distance: that run had the distance, too.
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

@dataclass(frozen=True)
class DiagonalGaussian:
    """N(mean, diag σ²), one for each sample: mean (..., A), log σ (A,)."""
    mean: Tensor
    log_std: Tensor

    def log_prob(self, act: Tensor) -> Tensor:
        """Σ_A [ −½((a − μ)/σ)² − log σ − ½ log 2π ]: act (..., A) → (...).

        A *sum* over A, never a mean: densities of independent parts multiply.
        """
        z = (act - self.mean) / self.log_std.exp()
        return (-0.5 * (z * z).sum(-1)
                - (self.log_std + 0.5 * math.log(2 * math.pi)).sum())


def kl_old_new(old: DiagonalGaussian, new: DiagonalGaussian) -> Tensor:
    """KL(π_old ‖ π_new) of each sample, in closed form: (...) [TRPO Eq.12].

    Σ_A [ log σ_n − log σ_o + (σ_o² + (μ_o − μ_n)²)/(2σ_n²) − ½ ]

    At θ_old the two policies are the same, so the KL is 0 and its gradient is 0. That
    is no bug: TRPO uses its *Hessian* there. Exactly 0 after an accepted step would be
    a bug. Old comes first, as in TRPO; the other direction has the same Hessian there.

    Q: Can it be had for a distribution without closed form? [listing l.59]
    A: Yes, as the mean of log π_old(a) − log π_new(a) over actions drawn from π_old.
       That brings noise, and a price that notes.md names (appendix, A.3).
    """
    log_ratio = new.log_std - old.log_std                                      # (A,)
    z = (old.mean - new.mean) / new.log_std.exp()                           # (..., A)
    return ((log_ratio + 0.5 * torch.exp(-2 * log_ratio) - 0.5).sum()
            + 0.5 * (z * z).sum(-1))


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

    def __init__(self, obs_dim: int, act_dim: int, hidden: Sequence[int],
                 activation: str = "relu", init_std: float = 1.0):
        sizes = [obs_dim, *hidden, act_dim]
        layers = [((n_out, n_in), (n_out, 1)) for n_in, n_out in zip(sizes, sizes[1:])]
        self.shapes = [shape for layer in layers for shape in layer] + [(act_dim,)]
        self.numels = [math.prod(shape) for shape in self.shapes]
        self.num_params = sum(self.numels)                                     # P
        self.activate = {"relu": torch.relu_, "tanh": torch.tanh_}[activation]
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
        """θ (P,) → views [W₁ (100, S), b₁ (100, 1), W₂, b₂, W₃, b₃, log σ (A,)]."""
        return [piece.view(shape)
                for piece, shape in zip(theta.split(self.numels), self.shapes)]

    def mean(self, layers: list[Tensor], obs: Tensor) -> Tensor:
        """μ(x): obs (..., S) → (..., A). Samples are columns, which is faster."""
        x = obs.reshape(-1, obs.shape[-1]).T                                   # (S, N)
        *hidden, last_weight, last_bias = layers
        for weight, bias in zip(hidden[::2], hidden[1::2]):
            x = self.activate(torch.addmm(bias, weight, x))                  # (100, N)
        mean = torch.addmm(last_bias, last_weight, x)                          # (A, N)
        return mean.T.reshape(*obs.shape[:-1], -1)

    def distribution(self, theta: Tensor, obs: Tensor) -> DiagonalGaussian:
        """π_θ(·|x) for obs (..., S). Its log_prob: actions (..., A) → (...)."""
        *layers, log_std = self.unpack(theta)
        return DiagonalGaussian(self.mean(layers, obs),
                                log_std.clamp(min=math.log(self.MIN_STD)))

    def std(self, theta: Tensor) -> Tensor:
        """σ (A,) as numbers."""
        return self.unpack(theta.detach())[-1].exp().clamp(min=self.MIN_STD)

    def sampler(self, theta: Tensor, rng: np.random.Generator) -> Callable:
        """A function obs (K, S) → actions a ~ π_θ(·|x) (K, A), both numpy arrays."""
        *layers, _ = self.unpack(theta.detach())
        std = self.std(theta).numpy()

        def act_on(obs: np.ndarray) -> np.ndarray:
            mean = self.mean(layers, torch.from_numpy(obs)).numpy()
            return mean + std * rng.standard_normal(mean.shape, std.dtype)
        return act_on


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


def random_stream(*key: int) -> np.random.Generator:
    """Random numbers as a function of `key`, such as (seed, iteration, task, phase).

    Nothing else decides them: no earlier draw, and no number of processes. The key's
    length goes in, too: numpy takes (a, b) and (a, b, 0, 0) for the same seed.
    """
    return np.random.default_rng([len(key), *(int(k) for k in key)])


def task_rollout(envs: VectorEnv, policy, theta: Tensor, task, horizon: int,
                 key: Sequence[int]) -> Trajectories:
    """K = envs.num_envs episodes of `task` with π_θ, in lockstep [listing l.1-14].

    `key` names these episodes for `random_stream`: (seed, iteration, task, phase). With
    one inner step phase 0 is D and phase 1 is D′.

    Q: `cumulative_disc_rew += disc_reward * log_prob`, is that right? [listing l.11]
    A: No. It credits each reward to the action of the same step only, so it never
       learns that an action pays off later. The policy gradient is
       E[Σ_t ∇log π(a_t|x_t)·G_t], where G_t = r_t + r_{t+1} + … is the reward-to-go.
       This function therefore only records numbers. `assign_credit` makes advantages
       of them, and `inner_loss` computes log π again and takes −mean(log π·Â).
    """
    K, H, rng = envs.num_envs, horizon, random_stream(*key)
    S, A = envs.single_observation_space.shape[0], envs.single_action_space.shape[0]
    dtype = np.float64 if theta.dtype == torch.float64 else np.float32
    # Zeros (K, H, S) and (K, H, A). Their order in memory is for `mean`'s speed only.
    all_obs = np.moveaxis(np.zeros((S, K, H), dtype), 0, -1)
    all_act = np.moveaxis(np.zeros((A, K, H), dtype), 0, -1)
    all_rew, mask = np.zeros((K, H), dtype), np.zeros((K, H), dtype)
    act_on = policy.sampler(theta, rng)
    obs, _ = envs.reset(seed=rng.integers(2**31, size=K).tolist(),
                        options={"task": task})
    running = np.ones(K, bool)
    for t in range(H):
        obs = np.asarray(obs, dtype)
        action = act_on(obs)                                   # a_t ~ π_θ(·|x_t) (K, A)
        all_obs[:, t], all_act[:, t], mask[:, t] = obs, action, running
        obs, reward, terminated, truncated, _ = envs.step(action)
        all_rew[:, t] = np.asarray(reward)
        running &= ~(np.asarray(terminated, bool) | np.asarray(truncated, bool))
        if not running.any():
            break
    for x in (all_obs, all_act, all_rew):
        x[mask == 0] = 0                       # what came after an episode's end
    check_rollout(task, all_obs, all_act, all_rew)
    return Trajectories(*map(torch.from_numpy, (all_obs, all_act, all_rew, mask)))


def sample_trajectories(family: TaskFamily, task, policy, theta: Tensor, K: int, *,
                        key: Sequence[int], horizon: int, gamma: float, lam: float,
                        ) -> Trajectories:
    """K episodes of `task` with π_θ, and their advantages [MAML Alg.3 l.5,8].

    The loop over K of the pseudocode [listing l.17-24] runs as K copies side by side.
    "K rollouts" are K episodes, so at most K·H timesteps.
    """
    episodes = task_rollout(family.make_envs(K), policy, theta, task, horizon, key)
    data = assign_credit(episodes, gamma, lam)
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
    task, for each D and for D′ [maml_rl]. Spinning Up uses the last iteration's fit
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
    Smaller λ makes Â less noisy, and trusts V more.

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

    Its value means nothing; its derivatives are used. The gradient estimates that of
    the paper's loss [MAML Eq.4] up to a positive factor: without bias only if γ = λ =
    1, no episode ends early, and baseline, mean and std come from other episodes than D
    (notes.md, chapter 5).

    Paper:         Eq. 4 is −E[Σ_t R], a sum over the H steps.
    Authors' code: a mean over timesteps, of standardised Â [maml_rl maml_npo.py].
                   A step of size α here equals one of size α/(Tσᵢ) on Eq. 4's loss,
                   with T the episodes' mean length and σᵢ the std of the raw Â of D.
    Here:          as the authors' code. With estimator "ratio" (ProMP's low-variance
                   curvature, LVC) log π becomes π/stop_grad(π). The inner step is the
                   same numbers, but autograd finds another ∇²L, hence another J, in it.
    """
    log_prob = policy.distribution(theta, trajectories.obs).log_prob(trajectories.act)
    if estimator == "ratio":
        log_prob = (log_prob - log_prob.detach()).exp()      # 1, with gradient ∇log π
    return -masked_mean(log_prob * trajectories.adv, trajectories.mask)


def adapt(policy, theta: Tensor, inner_data: Sequence[Trajectories], alpha: float,
          create_graph: bool, estimator: str = "log-prob") -> Tensor:
    """θ′ = θ − α∇L(θ), once for each element of `inner_data` [MAML Alg.3 l.7].

    theta, result (P,). Element n was played with the parameters where step n starts.

    Q: `copy.deepcopy`, `loss.backward()`, `optim.step()`? [listing l.36,41,42]
    A: Even with the right loss they make new parameters that do not know θ: no gradient
       flows from them to θ. Here θ′ is computed from θ, and for any function f
       ∇_θ f(θ′(θ)) = Jᵀ∇f(θ′) with J = ∂θ′/∂θ = I − α∇²L. `create_graph=True` (for a θ
       that requires grad) records the computation of ∇L itself, so that autograd finds
       this J. With False autograd sees θ′ = θ − a constant, so J = I: that is
       first-order MAML. The header has a table of who asks for which.
    """
    theta_prime = theta
    for trajectories in inner_data:
        start = theta_prime if create_graph else theta_prime.detach().requires_grad_()
        loss = inner_loss(policy, start, trajectories, estimator)
        (grad,) = torch.autograd.grad(loss, start, create_graph=create_graph)
        theta_prime = theta_prime - alpha * grad
    return theta_prime


# %% 6. The meta-objective and the KL (MAML Alg. 3 line 10; listing l.44-54, 60)

@dataclass
class TaskData:
    """What one task gives to the meta-step."""
    inner: list[Trajectories]        # D, one for each inner step, played with θ, …
    outer: Trajectories              # D′, played with θ′
    old: DiagonalGaussian            # π_old on D′'s observations, without a graph


def mean_over_tasks(function: Callable[[Any], Tensor], tasks: Sequence, like: Tensor,
                    ) -> Tensor:
    """(1/M) Σᵢ function(task i), in shape and dtype `like` a given tensor.

    Every mean of the outer loop is made here. Algorithm 3 has a sum [MAML Alg.3 l.10];
    TRPO's step is the same for both. Where several processes share the M tasks, `tasks`
    are this one's, and the sum goes over all processes. It is made in float64, so that
    its order does not show in float32.
    """
    total = torch.zeros_like(like, dtype=torch.float64)
    for task in tasks:
        total += function(task).detach()
    total, M = sum_over_processes(total, len(tasks))
    return (total / M).to(like.dtype)


def surrogate_and_kl(policy, theta: Tensor, task_data: TaskData, alpha: float,
                     first_order: bool = False, estimator: str = "log-prob",
                     ) -> tuple[Tensor, Tensor]:
    """One task's share of the meta-objective and of the KL at θ: Uᵢ, kᵢ, both ().

    Uᵢ = −mean over D′ of π(a|x)/π_old(a|x) · Â′             (minus [TRPO Eq.14])
    kᵢ =  mean over D′ of KL(π_old(·|x) ‖ π(·|x))            [MAML Alg.3 l.10]

    with π the policy of θ′(θ) and π_old that of θ′(θ_old). `first_order` and
    `estimator` change derivatives through the inner step, never the values.

    Q: KL of adapted and meta-policy, and returns as the loss? [listing l.48,54]
    A: Both policies must be *adapted* ones. The listing's KL bounds the inner step, not
       the meta-step. The listing also has no importance ratio π/π_old. At θ_old the
       ratio is 1, and −mean(log π·Â′) would have the same gradient. The line search
       needs *values* away from θ_old, and those of log π are no returns. With the ratio
       they say how the return changes, as long as π and π_old visit similar states.
    """
    create_graph = theta.requires_grad and not first_order
    theta_prime = adapt(policy, theta, task_data.inner, alpha, create_graph, estimator)
    outer, old = task_data.outer, task_data.old
    new = policy.distribution(theta_prime, outer.obs)
    ratio = (new.log_prob(outer.act) - old.log_prob(outer.act)).exp()          # (K, H)
    surrogate = -masked_mean(ratio * outer.adv, outer.mask)
    return surrogate, masked_mean(kl_old_new(old, new), outer.mask)

# What is approximated here, and what to keep in mind:
# 1. D is held fixed. θ also decides which D is played, and a whole gradient would have
#    a term for that. Paper and authors' code drop it, and so does this file.
# 2. J contains ∇² of −mean(log π·Â), which is not the Hessian of Eq. 4's loss. Which of
#    1 and 2 is amiss depends on what is wanted: 1 if the inner step is an estimate from
#    K episodes, 2 if it is the exact gradient.
# 3. Uᵢ is a mean over timesteps, of advantages divided by the task's own σᵢ. So g is
#    not the plain mean over tasks of Eq. 4's gradients: task i has a factor 1/(Tᵢσᵢ),
#    with Tᵢ the mean length of D′'s episodes and σᵢ the std of their raw advantages.
#    The authors' code does the same.
# notes.md, chapter 6, derives them, and says what other papers do about 1 and 2.


# %% 7. The TRPO step (TRPO §6, App. C; SpinUp TRPO lines 7-9; listing l.55-66)
#
# It takes the place of Algorithm 3's line 10, with the means U and k over tasks:
#     θ = θ_old − 0.8ʲ·√(2δ / xᵀHx)·x, x from a few iterations towards Hx = g,
#     and the first j that passes
# The minus is there because U is a loss. (Spinning Up's ĝ is the gradient of a return.)

def gradient(function: Callable[[Tensor], Tensor], theta: Tensor) -> Tensor:
    """∇function at θ, as a new vector (P,) without a graph."""
    theta = theta.detach().requires_grad_()
    return torch.autograd.grad(function(theta), theta)[0]


def meta_gradient(policy, theta: Tensor, task_data: Sequence[TaskData], config: Config,
                  ) -> Tensor:
    """g = ∇U at θ_old, (P,), the mean over tasks [MAML Alg.3 l.10] [SpinUp TRPO l.7].

    Q: What must `meta_grad.backward()` reach, and what is g_k? [listing l.55-57]
    A: It must reach the *meta*-parameters θ, through θ′ = θ − α∇L(θ) and the gradient
       inside it: one task's gradient is Jᵀ∇_θ′ Uᵢ. g_k is their mean, P numbers. The
       listing's path is cut twice: `copy.deepcopy` makes parameters that do not know θ,
       and `optim.step()` changes them outside the graph. θ is left without a gradient.
    """
    def one_task(data: TaskData) -> Tensor:
        return gradient(lambda t: surrogate_and_kl(
            policy, t, data, config.alpha, config.first_order, config.inner_loss)[0],
            theta)
    return mean_over_tasks(one_task, task_data, like=theta)


def hessian_vector_product(grad_fn: Callable[[Tensor], Tensor], theta: Tensor,
                           v: Tensor, step: float) -> Tensor:
    """H·v ≈ ∇k(θ_old + εv)/ε, a finite difference of ∇k = grad_fn; (P,) [MAML §5.3].

    ε = step/‖v‖: the move in θ has length `step` whatever v's length. A difference
    would be (∇k(θ_old + εv) − ∇k(θ_old))/ε, but at θ_old ∇k is exactly 0, so that it
    costs ONE gradient. Its error, as a share of H·v, is proportional to `step`, and is
    large where H·v is small; ReLU's kinks add to it (notes.md, 7.4).

    Q: Where is the third derivative that the paper avoids? [listing l.77-78]
    A: Not in the line search, which differentiates L only. Take one number for θ, and
       one task: k(θ) = κ(θ′(θ)), where κ(θ′) is the KL as a function of the adapted
       parameters, and θ′ = θ − αL′(θ). (A prime at θ means adapted, at L, κ and k a
       derivative.) Differentiated twice, this is
           k″ = κ″·(1 − αL″)² − κ′·αL‴.
       There it is, as L‴, and it comes with the factor κ′. At θ_old κ has its minimum,
       so κ′ = 0, and k″ is the first part alone. With P numbers this first part is
       JᵀFJ, since κ's Hessian at its minimum is the Fisher matrix F, and H is the mean
       of JᵀFJ over the tasks. Differentiating ∇k by autograd would build the graph of
       L‴ and multiply it by 0. A difference of ∇k = Jᵀ∇κ needs second derivatives only.

    Authors' code: symmetric, ε = 1/‖θ‖ by mistake: θ moves by ‖v‖/‖θ‖
                   [maml_rl conjugate_gradient_optimizer.py].
    Here:          one-sided, step 0.01. The ants use an exact product of Part II.
    """
    eps = step / v.norm()
    return grad_fn(theta + eps * v) / eps


def kl_hessian_product(policy, theta: Tensor, task_data: Sequence[TaskData],
                       config: Config) -> Callable[[Tensor], Tensor]:
    """v ↦ H·v, with H = ∇²k(θ_old), by the product that `--hvp` names.

    ∇k always has the J of the log π inner loss, whatever `--inner-loss` says. First
    order takes the inner step as a constant, here as in g: θ′ = θ + constant. Then J is
    I, and the product is F·v, with F the mean of the tasks' ∇²κ at their θ′.
    """
    def one_task(data: TaskData) -> Callable[[Tensor], Tensor]:
        start = theta
        if config.first_order:
            start = adapt(policy, theta, data.inner, config.alpha, create_graph=False)
            data = dataclasses.replace(data, inner=[])           # no step from θ′ on

        def kl_gradient(t: Tensor) -> Tensor:
            return gradient(lambda u: surrogate_and_kl(
                policy, u, data, config.alpha)[1], t)

        if config.hvp == "finite-difference":
            return lambda v: hessian_vector_product(kl_gradient, start, v,
                                                    config.fd_step)
        return EXACT_PRODUCTS[config.hvp](policy, start, data, config.alpha)  # Part II

    products = [one_task(data) for data in task_data]
    return lambda v: mean_over_tasks(lambda product: product(v), products, like=v)


def conjugate_gradient(hvp: Callable[[Tensor], Tensor], b: Tensor, iterations: int,
                       tolerance: float) -> tuple[Tensor, Tensor]:
    """A few iterations towards Hx = b, from products H·p alone [SpinUp TRPO l.8].

    → (x, r = b − Hx), both (P,).
    Ends at r·r < `tolerance`, or keeps the x so far if pᵀHp is not positive.

    Q: The size of H? Is `inverse(kl_hessian) * meta_grad` right? [listing l.60-63]
    A: The mean KL is one number, so H is P × P, here 10,604², and need not have an
       inverse. (meta_grad is a loss there; its gradient g is wanted.) Conjugate
       gradient needs products H·p only. With exact ones its n-th x minimises ½xᵀHx −
       gᵀx among the combinations of g, Hg, …, Hⁿ⁻¹g. After 5 or 10 iterations Hx is
       still far from g, but −x leads downhill, and H has shaped it. Damping
       (1e-5·I is added to H) keeps steps finite where the KL is flat.
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

    k and ∇k are 0 at θ_old, so to leading order a short step s has the KL ½sᵀHs and
    changes U by gᵀs. Among all s with ½sᵀHs = δ, −scale·x makes gᵀs smallest if Hx = g
    (notes.md, 7.3).
    """
    return math.sqrt(2 * max_kl / xHx)


def backtrack_line_search(evaluate: Callable[[Tensor], tuple[float, float]],
                          theta: Tensor, full_step: Tensor, surrogate_before: float,
                          max_kl: float, ratio: float, trials: int,
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


def trpo_meta_step(policy, theta: Tensor, task_data: Sequence[TaskData], config: Config,
                   ) -> tuple[Tensor, dict[str, float]]:
    """One TRPO step on the meta-objective: θ_old → (θ_new, numbers about the step).

    TRPO itself estimates H from a tenth of the samples, since H is only the metric in
    which the step is measured [TRPO App.C]. Here H comes from the first
    `curvature_tasks` of the tasks; U, g and the line search's KL come from all of them.
    """
    def evaluate(t: Tensor) -> tuple[float, float]:
        def one_task(data: TaskData) -> Tensor:
            return torch.stack(surrogate_and_kl(policy, t, data, config.alpha))
        two_numbers = torch.zeros(2, dtype=t.dtype)
        return tuple(mean_over_tasks(one_task, task_data, like=two_numbers).tolist())

    # At θ_old every ratio is 1, so Uᵢ is −mean Â′, which is 0 but for rounding. It is
    # computed, so that the line search compares values with like rounding.
    before = float(mean_over_tasks(lambda data: -masked_mean(
        data.outer.adv, data.outer.mask), task_data, like=theta[0]))
    g = meta_gradient(policy, theta, task_data, config)                        # (P,)
    check_finite("the meta-gradient", g)

    # Those of the first n tasks that are this process's: its tasks are in their order.
    few = task_data[:len(own_tasks(config.curvature_tasks))]

    def damped_product(config: Config) -> Callable[[Tensor], Tensor]:
        """v ↦ H·v + damping·v"""
        hvp = kl_hessian_product(policy, theta, few, config)
        return lambda v: hvp(v) + config.damping * v

    x, residual = conjugate_gradient(damped_product(config), g, config.cg_iterations,
                                     config.cg_tolerance)
    # g − r = Hx + damping·x: damping counts, too. With finite differences the equality
    # holds only nearly. (The authors' code makes one more product.)
    Hx = g - residual
    if config.first_order:       # F gave the direction; the length is the KL's own
        Hx = damped_product(dataclasses.replace(config, first_order=False))(x)
    xHx = float(x @ Hx)

    new_theta, after, kl, trials = theta, before, 0.0, 0
    if 0 < xHx < math.inf:                   # otherwise the step is skipped, θ kept
        full_step = -step_scale(xHx, config.max_kl) * x
        new_theta, after, kl, trials = backtrack_line_search(
            evaluate, theta, full_step, before, config.max_kl, config.backtrack_ratio,
            config.backtrack_steps)
    return new_theta, dict(
        surrogate_before=before, surrogate_after=after, kl=kl, line_search_steps=trials,
        cg_residual=float(residual.norm() / g.norm().clamp(min=1e-30)),
        surrogate_predicted=before + float(g @ (new_theta - theta)))


# %% 8. Meta-training (MAML Alg. 3; listing l.27-69)

@dataclass(frozen=True)
class TrainState:
    """Where a training stands: all that is needed to go on, bit for bit."""
    iteration: int                       # the next one, counted from 0
    theta: Tensor                        # (P,)
    rows: list[dict[str, float]]         # one an iteration: progress.csv
    best_theta: Tensor                   # (P,) the θ whose return_post was highest …
    best_return: float                   # … and that return (the paper kept this one)


def sample_task_data(policy, theta: Tensor, family: TaskFamily, task, config: Config,
                     key: Sequence[int]) -> TaskData:
    """One task's D, θ′ (as numbers) and D′ [MAML Alg.3 l.5-8] [listing l.36-45]."""
    def sample(t: Tensor, phase: int) -> Trajectories:
        return sample_trajectories(
            family, task, policy, t, config.rollouts, key=(*key, phase),
            horizon=config.horizon, gamma=config.gamma, lam=config.lam)

    theta_prime, inner = theta.detach(), []
    for step in range(config.inner_updates):
        inner.append(sample(theta_prime, step))                         # Alg.3 l.5
        theta_prime = adapt(policy, theta_prime, inner[-1:], config.alpha,
                            create_graph=False)                         # Alg.3 l.6, 7
    outer = sample(theta_prime, config.inner_updates)                   # Alg.3 l.8
    # `old` by the same operations as in `surrogate_and_kl`: ∇k(θ_old) is 0 to the bit.
    return TaskData(inner, outer, policy.distribution(theta_prime, outer.obs))


def meta_iteration(policy, family: TaskFamily, state: TrainState, config: Config,
                   ) -> TrainState:
    """Lines 3 to 10 of Algorithm 3: state → the next state."""
    started = time.perf_counter()
    i, theta = state.iteration, state.theta
    config = dataclasses.replace(config, alpha=step_size(
        config.alpha, policy.std(theta), config))
    tasks = family.sample_tasks(random_stream(config.seed, i),          # Alg.3 l.3
                                config.meta_batch_size)
    # `data` is of all tasks. Of several processes, number p of N has the tasks p, p+N,
    # p+2N, …, and all of them then make the same step.
    data = map_over_tasks(lambda m: sample_task_data(                   # Alg.3 l.4-9
        policy, theta, family, tasks[m], config, (config.seed, i, m)), len(tasks))
    new_theta, step = trpo_meta_step(policy, theta, data, config)       # Alg.3 l.10
    check_finite("θ", new_theta)
    check_std(policy.std(new_theta))

    two_numbers = torch.zeros(2, dtype=torch.float64)
    pre, post = mean_over_tasks(returns_of, data, like=two_numbers).tolist()
    row = dict(iteration=i, return_pre=pre, return_post=post, **step,
               std_mean=float(policy.std(new_theta).mean()),
               seconds=time.perf_counter() - started)
    best = (theta, post) if post > state.best_return else (
        state.best_theta, state.best_return)
    return TrainState(i + 1, new_theta, state.rows + [row], *best)


def step_size(alpha: float, std: Tensor, config: Config) -> float:
    """α, or with `alpha_follows_std` α·(σ/σ₀)², σ the geometric mean of std (A,).

    The inner step in μ grows as 1/σ, and what it does to the policy counts in units of
    σ. So a fixed α overshoots once σ has fallen. This α is a number: nothing
    differentiates it.
    """
    if config.alpha_follows_std:
        alpha *= (float(std.log().mean().exp()) / config.init_std) ** 2
        if not alpha < 10**6:
            raise Diverged(f"α has become {alpha:g}: {SMALLER}")
    return alpha


def returns_of(data: TaskData) -> Tensor:
    """One task's mean return with θ and with θ′, (2,): equal without inner steps."""
    first = data.inner[0] if data.inner else data.outer
    return torch.tensor([first.mean_return(), data.outer.mean_return()],
                        dtype=torch.float64)


def train_maml(config: Config, family: TaskFamily | None = None,
               start: TrainState | None = None,
               report: Callable[[TrainState], None] = lambda state: None,
               ) -> tuple[Tensor, list[dict[str, float]]]:
    """Algorithm 3 with TRPO outside: → (θ (P,), one dict of numbers an iteration).

    `family` defaults to that of `config.task`; `start` is an earlier state to go on
    from; `report(state)` is called at the beginning and after each iteration, to print
    and to save. Raises Diverged (NaN, infinity).

    Q: What else is wrong with the listing's loop? [listing l.27-69]
    A: Some lines fail loudly: see notes.md, chapter 3. Others are wrong in silence:
       `task_rollout` never uses its task [listing l.1-14], so all tasks are one; the
       outer `backward` adds to the inner gradient of each copy; and `self.optim`, which
       the listing never makes, would not move a copy if it was made for the meta-model.
       That the task list is fixed [listing l.28] is a restriction, not an error.
    """
    with known_modes():            # gradients on, one thread, whatever the caller has
        family = family_of(config, family)
        policy = make_policy(family, config)
        theta = policy.init(torch.Generator().manual_seed(config.seed)) # Alg.3 l.1
        state = start or TrainState(0, theta, [], theta, -math.inf)
        report(state)
        while state.iteration < config.iterations:                      # Alg.3 l.2
            try:
                state = meta_iteration(policy, family, state, config)   # Alg.3 l.3-10
            except (BadInput, Diverged) as e:
                raise type(e)(f"iteration {state.iteration}: {e}") from e
            report(state)
    return state.theta, state.rows


# =====================================================================================
#   You can stop reading here. What follows surrounds the algorithm: settings, other
#   tasks, two exact products, processes, evaluation, files, figures, the command line.
# =====================================================================================

# %% 9. Settings: the presets, and one form for what is handed in

class BadInput(ValueError):
    """Unusable input; the message says what, where, and what to do."""


class Diverged(RuntimeError):
    """Training produced numbers that are not finite; the message says which, when."""


LOCOMOTION = dict(
    horizon=(200, "paper"), eval_episodes=(20, "paper, as in training"),
    gamma=(0.95, "ours; authors' code 0.99"), lam=(1.0, "authors' code"),
    init_std=(0.5, "ours; authors' code 1.0"), cg_iterations=(10, "authors' code"),
    curvature_tasks=(20, "all, as the authors' code: 5 learned more slowly"))
ANTS = LOCOMOTION | dict(
    rollouts=(40, "ant-vel ours, paper 20"), eval_episodes=(40, "as in training"),
    alpha=(0.2, "ours; paper 0.1"), eval_alpha=(0.2, "as in training"),
    alpha_follows_std=(True, "ours: a fixed α overshoots once the std has fallen"),
    gamma=(0.97, "ours; authors' code 0.99"), lam=(0.95, "ours; authors' code 1"),
    hvp=("gauss-newton", "ours; paper differences"))
PRESETS: dict[str, dict[str, tuple[Any, str]]] = {     # task → field → (value, source)
    "point2d": {},                                     # it is Config's own defaults
    "cheetah-vel": LOCOMOTION | dict(
        iterations=(100, "ours; authors' code 475")),
    "cheetah-dir": LOCOMOTION | dict(
        iterations=(200, "ours; authors' code 100, paper up to 500")),
    "ant-vel": ANTS | dict(
        iterations=(140, "ours; authors' code 375"),
        meta_batch_size=(5, "ours; paper 40")),
    "ant-dir": ANTS | dict(
        iterations=(600, "ours; authors' code 575"),
        meta_batch_size=(2, "ours, both directions; paper 40")),
}
LIMITS = {                                             # the usual ones, and exceptions
    int: (1, 10**4), tuple: (1, 10**4), float: (0, 10**6), bool: (0, 1), str: (0, 1),
    "seed": (0, 10**9), "iterations": (0, 10**9), "eval_steps": (0, 10**4),
    "workers": (0, 10**4), "gamma": (0, 1), "lam": (0, 1),
    "backtrack_ratio": (0.01, 0.99), "init_std": (1e-5, 1e5), "max_kl": (1e-12, 10**6),
    "fd_step": (1e-12, 10**6)}


def complete_settings(task: str, given: dict[str, Any]) -> dict[str, Any]:
    """Every field of a Config: what was given, or else the task's preset.

    Numbers may be numpy's, and rows of numbers lists: each value is brought to one form
    and checked. Raises BadInput, naming the setting.
    """
    fields = {f.name: f for f in dataclasses.fields(Config)}
    if not isinstance(task, str) or task not in PRESETS:
        raise BadInput(f"task must be one of {', '.join(PRESETS)}, not {task!r}")
    for name in given:
        if name not in fields:
            raise BadInput(f"there is no setting {name}")
    preset = {name: value for name, (value, _) in PRESETS[task].items()}
    values = {name: f.default for name, f in fields.items()} | preset
    if "alpha" in given:
        values["eval_alpha"] = given["alpha"]
    if given.get("method") == "random":
        values["iterations"] = 0
    values |= {"task": task} | given
    if preset and all(values[name] == fields[name].default for name in preset):
        raise BadInput(f"these are the settings of point2d, not of {task}: begin with "
                       f"Config(task={task!r})")
    values = {name: one_form(f, values[name]) for name, f in fields.items()}
    if values["method"] == "random" and values["iterations"]:
        raise BadInput(f"method random does not train: leave out iterations "
                       f"{values['iterations']}")
    return values


def one_form(f: dataclasses.Field, value: Any) -> Any:
    """The setting as a plain bool, str, int, float or tuple; BadInput if it is none."""
    kind, choices = type(f.default), f.metadata["choices"]
    low, high = LIMITS.get(f.name, LIMITS.get(kind))
    convert, accepted, must = {
        bool: (bool, (bool, np.bool_), "True or False"),
        str: (str, str, f"one of {', '.join(choices or PRESETS)}"),
        int: (int, numbers.Integral, f"a whole number from {low} to {high}"),
        float: (float, numbers.Real, f"a number from {low} to {high}"),
        tuple: (int, numbers.Integral,
                f"whole numbers such as 100,100, each from {low} to {high}")}[kind]
    parts = [value] if kind is not tuple else (
        list(value) if isinstance(value, (list, tuple, np.ndarray)) else [])
    good = len(parts) > 0 and all(
        isinstance(x, accepted) and (kind is bool or not isinstance(x, bool)) and (
            kind in (bool, str) or low <= x <= high) for x in parts)
    if not good or choices and value not in choices:
        raise BadInput(f"{f.name} must be {must}, not {value!r:.60}")
    plain = tuple(convert(x) for x in parts)
    return plain if kind is tuple else plain[0]


@contextmanager
def without_variable(name: str) -> Iterator[None]:
    """An environment variable that is of no concern to what is done inside is unset."""
    before = os.environ.copy()
    os.environ.pop(name, None)
    try:
        yield
    finally:
        os.environ.pop(name, None)
        if name in before:
            os.environ[name] = before[name]


@contextmanager
def known_modes():
    """Undo what the caller may have set and the numbers rest on, for a while.

    One thread each, since the parallelism is over tasks. numpy is silent: the checks
    below name what is not finite. And glibc hands every freed megabyte back to the
    system until a block of 30 MB has been freed once: 10-20 % of an iteration.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.ones(30 * 2**18)
    try:
        with (torch.inference_mode(False), torch.enable_grad(),
              torch.autocast("cpu", enabled=False), np.errstate(all="ignore")):
            yield
    finally:
        torch.set_num_threads(before)


# %% 10. Checks of numbers

SMALLER = "try a smaller --alpha, --eval-alpha or --max-kl"


def check_finite(what: str, x: Tensor) -> None:
    """Raise Diverged, naming the quantity, if x holds NaN or infinity."""
    if not torch.isfinite(x).all():
        raise Diverged(f"{what} is not finite: {SMALLER}")


def check_std(std: Tensor) -> None:
    """Raise Diverged if σ (A,) is at its floor, where log σ has no gradient, or 1e6."""
    if not (std.log().abs() < 0.999 * -math.log(GaussianPolicy.MIN_STD)).all():
        raise Diverged(f"std {std.tolist()} is not between 1e-6 and 1e6: {SMALLER}")


def check_rollout(task, obs: np.ndarray, act: np.ndarray, rew: np.ndarray) -> None:
    """Name the first number that is not finite: obs (K,H,S), act (K,H,A), rew (K,H).

    A bad action is the policy's fault, the others are the environment's.
    """
    recorded = dict(observation=obs, action=act, reward=rew[..., None])
    bad = np.stack([~np.isfinite(x).all((0, 2)) for x in recorded.values()], 1)  # (H,3)
    if bad.any():
        step, which = np.argwhere(bad)[0]
        name = list(recorded)[which]
        error, advice = ((Diverged, SMALLER) if name == "action" else
                         (BadInput, "check the environment's reset() and step()"))
        raise error(f"task {task}: the {name} at step {step} is not finite: {advice}")


# %% 11. Environments: what is made of a task family, and the paper's walkers

def set_spaces(envs: VectorEnv, observation: gym.Space, action: gym.Space) -> None:
    """Give a vector environment its spaces, of one copy and of all."""
    batch = gym.vector.utils.batch_space
    envs.single_observation_space, envs.single_action_space = observation, action
    envs.observation_space = batch(observation, envs.num_envs)
    envs.action_space = batch(action, envs.num_envs)


def task_in(options: dict | None, last: np.ndarray) -> np.ndarray:
    """The task in `reset`'s options, or else the last one; BadInput if it is none."""
    task = np.asarray((options or {}).get("task", last), float)
    if task.shape != last.shape or not np.isfinite(task).all():
        raise BadInput(f"a task here is a row of {len(last)} finite numbers, not "
                       f"{task}")
    return task


class Lockstep(SyncVectorEnv):
    """K copies of a gymnasium.Env. A copy whose episode has ended is not stepped."""

    def __init__(self, env_fns: Sequence[Callable[[], gym.Env]]):
        super().__init__(env_fns, copy=False, autoreset_mode=AutoresetMode.DISABLED)

    def reset(self, *, seed=None, options=None):
        """All copies begin anew, each with the task in `options`."""
        self.obs, info = super().reset(seed=seed, options=options)             # (K, S)
        self.ended = np.zeros(self.num_envs, bool)
        return self.obs.copy(), info

    def step(self, actions):
        """One step of the copies that are still running; the others keep their obs."""
        rewards = np.zeros(self.num_envs)
        for k in np.flatnonzero(~self.ended):
            self.obs[k], rewards[k], terminated, truncated, _ = self.envs[k].step(
                actions[k])
            self.ended[k] = terminated or truncated
        return (self.obs.copy(), rewards, self.ended.copy(),
                np.zeros(self.num_envs, bool), {})


class TaskObserved(gym.vector.VectorObservationWrapper):
    """For the oracle: the task's numbers stand at the end of every observation."""

    def __init__(self, envs: VectorEnv, task_size: int):
        super().__init__(envs)
        size = envs.single_observation_space.shape[0] + task_size
        set_spaces(self, gym.spaces.Box(-np.inf, np.inf, (size,), np.float64),
                   envs.single_action_space)
        self.task = np.zeros(task_size)

    def reset(self, *, seed=None, options=None):
        self.task = task_in(options, self.task)
        return super().reset(seed=seed, options=options)

    def observations(self, obs: np.ndarray) -> np.ndarray:
        task = np.broadcast_to(self.task, (self.num_envs, len(self.task)))
        return np.concatenate([obs, task], axis=1)


def family_of(config: Config, family: TaskFamily | None = None) -> TaskFamily:
    """`family`, or that of config.task, ready for use: checked, with environments that
    are made once for each K, stepped in lockstep, and for the oracle show the task.
    """
    family = family or TASKS[config.task]

    @functools.cache
    def make_envs(K: int) -> VectorEnv:
        envs = family.make_envs(K)
        if type(envs) is SyncVectorEnv:       # its own autoreset would forget the task
            envs = Lockstep([functools.partial(lambda env: env, env)
                             for env in envs.envs])
        return envs

    check_environment(family, make_envs(config.rollouts), config)
    ready = dataclasses.replace(family, make_envs=make_envs)
    if config.method != "oracle":
        return ready
    task_size = np.shape(family.test_tasks(1))[1]
    return dataclasses.replace(ready, make_envs=functools.cache(
        lambda K: TaskObserved(make_envs(K), task_size)))


def check_environment(family: TaskFamily, envs: VectorEnv, config: Config) -> None:
    """Raise BadInput unless the family keeps to what `TaskFamily` says of it.

    Whether `reset` heeds the task cannot be seen from outside.
    """
    def must(fact: bool, what: str) -> None:
        if not fact:
            raise BadInput(f"{family.name}: {what}")

    K = config.rollouts
    must(isinstance(envs, VectorEnv) and envs.num_envs == K,
         f"make_envs({K}) must return a Gymnasium VectorEnv of {K} copies")
    copies = getattr(envs.unwrapped, "envs", [])
    must(len({id(env.unwrapped) for env in copies}) == len(copies),
         "make_envs gave one environment twice: make a new one for each copy")
    for space in (envs.single_observation_space, envs.single_action_space):
        must(isinstance(space, gym.spaces.Box) and len(space.shape) == 1
             and space.shape != (0,), f"a space must be a Box of one row of numbers, "
             f"not {space}: wrap the environment")
    must(family.name in TASKS or config.horizon == family.horizon,
         f"its horizon is {family.horizon}, the settings' {config.horizon}: give both "
         f"the same")
    for tasks in (family.test_tasks(2),
                  family.sample_tasks(np.random.default_rng(0), 2)):
        shape = np.shape(tasks)
        must(len(shape) == 2 == shape[0],
             f"tasks must be rows of numbers, (2, n) for two, not {shape}")
    try:
        first, _ = envs.reset(seed=[0] * K, options={"task": tasks[0]})
        results = first, *envs.step(np.zeros(envs.action_space.shape, np.float32))[:4]
        shapes = [np.shape(np.asarray(x, float)) for x in results]
    except (TypeError, ValueError, AttributeError, LookupError) as error:
        raise BadInput(f"{family.name}: reset() and step() must take and return what "
                       f"Gymnasium says: {error}") from error
    shape = envs.observation_space.shape
    must(shapes == [shape, shape, (K,), (K,), (K,)],
         f"reset() and step() returned shapes {shapes}, not those of its spaces")


def make_policy(family: TaskFamily, config: Config) -> GaussianPolicy:
    """A policy for the spaces of a family that `family_of` made ready."""
    envs = family.make_envs(config.rollouts)
    return GaussianPolicy(envs.single_observation_space.shape[0],
                          envs.single_action_space.shape[0], config.hidden,
                          config.activation, config.init_std)


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


class Walker(gym.Wrapper):
    """One of Gymnasium's walkers, with an unseen task in the reward [MAML §5.3].

    The task is one number: a speed in m/s, or a direction, 1 or −1. Actions are clipped
    to [−1, 1]. The policy sees velocities (m/s, rad/s) divided by 10. Raises BadInput
    if MuJoCo cannot be loaded.

    Authors' code: no scaling.
    Here:          joints turn at ±10 rad/s while angles stay within ±1. With Xavier
                   weights the first policy's mean is then beyond the actions' limits in
                   38 to 48 % of the cheetah's steps, where no gradient can be felt.
    """
    UNIT = 10.0

    def __init__(self, name: str, **more):
        body, self.earns = WALKERS[name]
        load_mujoco()
        super().__init__(gym.make(**body, **more).unwrapped)
        parts, self.task = self.env.observation_structure, np.zeros(1)
        self.scale = np.ones(self.observation_space.shape)                     # (S,)
        self.scale[parts["qpos"]:parts["qpos"] + parts["qvel"]] = 1 / self.UNIT

    def reset(self, *, seed=None, options=None):
        """`options={"task": (v,)}` sets the task; without it the last one stays."""
        self.task = task_in(options, self.task)
        obs, info = self.env.reset(seed=seed)
        return obs * self.scale, info

    def step(self, action):
        """Gymnasium's step and costs, and what the task pays for the velocity."""
        action = np.clip(np.asarray(action, float), -1.0, 1.0)
        obs, costs, ended, _, info = self.env.step(action)
        reward = self.earns(info["x_velocity"], self.task[0]) + costs
        return obs * self.scale, reward, ended, False, info


@functools.cache
def load_mujoco() -> None:
    """Import MuJoCo; BadInput if that fails, for whatever reason.

    Nothing is drawn, so that the library which MUJOCO_GL names need not be there.
    """
    try:
        with without_variable("MUJOCO_GL"):
            os.environ["MUJOCO_GL"] = "disabled"
            import mujoco
    except Exception as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == "mujoco"
        raise BadInput('this task needs MuJoCo, which is not installed: pip install '
                       '"gymnasium[mujoco]"' if missing else "this task needs MuJoCo, "
                       f"which cannot be loaded here: {error}") from None
    # Its word on Gymnasium's cheetah file, at every loading, is old.
    mujoco.set_mju_user_warning(lambda text: None if "settotalmass" in text else print(
        f"MuJoCo: {text}", file=sys.stderr))


def walkers(name: str, highest: float | None = None) -> TaskFamily:
    """Tasks are speeds v ~ U[0, highest], the held-out ones from a fixed seed.

    Without `highest` they are the two directions in turn, in training, too: half of
    each is p(T) itself. Of an odd number the first is drawn.
    """
    def make_envs(K: int) -> Lockstep:
        return Lockstep([functools.partial(Walker, name)] * K)

    def directions(rng: np.random.Generator, M: int) -> np.ndarray:
        first = rng.choice([1.0, -1.0]) if M % 2 else 1.0
        return np.resize([first, -first], (M, 1))

    if highest is None:
        return TaskFamily(name, make_envs, directions,
                          lambda n: np.resize([1.0, -1.0], (n, 1)), 200)
    return TaskFamily(
        name, make_envs, lambda rng, M: rng.uniform(0, highest, (M, 1)),
        lambda n: np.random.RandomState(1).uniform(0, highest, (n, 1)), 200)


# Goals are uniform on the unit square around the origin [MAML §5.3]. The held-out ones
# are the paper's own 40: numpy's old generator, seed 1.
TASKS: dict[str, TaskFamily] = {family.name: family for family in (
    TaskFamily("point2d", Point2D, lambda rng, M: rng.uniform(-0.5, 0.5, (M, 2)),
               lambda n: np.random.RandomState(1).uniform(-0.5, 0.5, (n, 2)), 100),
    walkers("cheetah-vel", highest=2.0), walkers("cheetah-dir"),
    walkers("ant-vel", highest=3.0), walkers("ant-dir"))}


# %% 12. The two exact Hessian-vector products (--hvp), beside section 7's

def double_backprop_product(policy, theta: Tensor, task_data: TaskData, alpha: float,
                            ) -> Callable[[Tensor], Tensor]:
    """One task's v ↦ H·v = ∇(∇k·v), exactly; (P,). Third-order graph included."""
    def product(v: Tensor) -> Tensor:
        t = theta.detach().requires_grad_()
        _, kl = surrogate_and_kl(policy, t, task_data, alpha)
        (grad,) = torch.autograd.grad(kl, t, create_graph=True)
        return torch.autograd.grad(grad @ v, t)[0]
    return product


def gauss_newton_product(policy, theta: Tensor, task_data: TaskData, alpha: float,
                         ) -> Callable[[Tensor], Tensor]:
    """One task's v ↦ Jᵀ(F(J·v)): exactly H·v at θ_old, second derivatives only; (P,).

    J = J_n···J_1, one factor I − α∇²L for each inner step. A factor is symmetric, so
    one reverse-mode product serves J (steps in order) and Jᵀ (in reverse order).

    F = GᵀWG: G = ∂(μ, log σ)/∂θ′, the outputs of the adapted network on D′; W, the
    Hessian of the Gaussians' mean KL in its outputs, is diagonal: 1/σ² over the number
    of steps for each μ, 2 for each log σ. Gᵀ is one backward pass. Gᵀw is linear in w,
    so G is the backward pass of that backward pass. The graphs are made once here, and
    kept for all products. For DiagonalGaussians only.
    """
    steps, theta_prime = [], theta.detach()     # steps: (start, ∇L with its graph)
    for trajectories in task_data.inner:
        start = theta_prime.detach().requires_grad_()
        loss = inner_loss(policy, start, trajectories)
        (grad,) = torch.autograd.grad(loss, start, create_graph=True)
        steps.append((start, grad))
        theta_prime = start - alpha * grad
    theta_prime = theta_prime.detach().requires_grad_()
    new = policy.distribution(theta_prime, task_data.outer.obs)
    outputs = new.mean, new.log_std                                # (K, H, A) and (A,)
    w = [torch.zeros_like(x).requires_grad_() for x in outputs]
    (Gtw,) = torch.autograd.grad(outputs, theta_prime, w, create_graph=True)
    mask = task_data.outer.mask[..., None]
    W_mean = mask / mask.sum() * (-2 * new.log_std.detach()).exp()          # (K, H, A)
    backward = functools.partial(torch.autograd.grad, retain_graph=True)

    def factor(start: Tensor, grad: Tensor, u: Tensor) -> Tensor:
        return u - alpha * backward(grad, start, u)[0]          # (I − α∇²L)·u

    def product(v: Tensor) -> Tensor:
        for start, grad in steps:
            v = factor(start, grad, v)                                      # J·v
        G_mean, G_log_std = backward(Gtw, w, v)
        (v,) = backward(outputs, theta_prime, (W_mean * G_mean, 2.0 * G_log_std))
        for start, grad in reversed(steps):
            v = factor(start, grad, v)                                      # Jᵀ(F(J·v))
        return v
    return product


EXACT_PRODUCTS = {"double-backprop": double_backprop_product,
                  "gauss-newton": gauss_newton_product}


# %% 13. Several processes: task m of an iteration is worked on by process m mod N

@dataclass
class Processes:
    """This process's number among N. Only `processes` changes it: a torch.distributed
    group that somebody else has made is none of this program's business."""
    number: int = 0
    N: int = 1


PROCESSES = Processes()


def own_tasks(M: int) -> range:
    """The numbers of this process's tasks among M: all, or a share."""
    return range(PROCESSES.number, M, PROCESSES.N)


def sum_over_processes(total: Tensor, count: int) -> tuple[Tensor, float]:
    """The sums of a float64 tensor and of a number over all processes."""
    if PROCESSES.N == 1:
        return total, count
    both = torch.cat([total.flatten(), total.new_tensor([count])])
    torch.distributed.all_reduce(both)
    return both[:-1].reshape(total.shape), float(both[-1])


def map_over_tasks(function: Callable[[int], Any], M: int) -> list:
    """[function(m) for this process's tasks m]; what one complains of, all raise."""
    results, complaint = [], None
    try:
        results = [function(m) for m in own_tasks(M)]
    except (BadInput, Diverged) as error:
        if PROCESSES.N == 1:
            raise
        complaint = isinstance(error, BadInput), str(error)
    if PROCESSES.N > 1:
        complaints = [None] * PROCESSES.N
        torch.distributed.all_gather_object(complaints, complaint)
        for complaint in filter(None, complaints):
            bad_input, message = complaint
            raise (BadInput if bad_input else Diverged)(message)
    return results


@contextmanager
def processes(N: int) -> Iterator[None]:
    """Be one of N processes: torchrun's, or the first one, which starts the others.

    Those are this program again, told the same as torchrun would tell them. None is
    left behind: each ends by itself when its standard input, a pipe from the first one,
    is closed.
    """
    if N == 1 and not under_torchrun() or torch.distributed.is_initialized():
        yield
        return
    number, store, others = 0, None, []
    if under_torchrun():
        number, N = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    else:
        server = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True,
                                            wait_for_workers=False)
        store = torch.distributed.PrefixStore("default_pg", server)
        others = [start_process(i, N, server.port) for i in range(1, N)]
    try:
        if not all(other.stdout.read(1) for other in others):
            raise Diverged("another process could not start: try --workers 1")
        torch.distributed.init_process_group("gloo", store=store, rank=number,
                                             world_size=N)
        PROCESSES.number, PROCESSES.N = number, N
        yield
    except RuntimeError as error:
        if "gloo" in str(error).lower():         # its word when another process is gone
            raise Diverged("another process of this run has ended; the last checkpoint "
                           "is whole, go on with --resume") from None
        raise
    finally:
        PROCESSES.number, PROCESSES.N = 0, 1
        for other in others:
            other.kill()
            other.communicate()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def start_process(number: int, N: int, port: int) -> subprocess.Popen:
    """Start process `number` of N. Ctrl-C does not reach it."""
    told = dict(RANK=number, WORLD_SIZE=N, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    return subprocess.Popen(
        [sys.executable, os.path.abspath(__file__), STARTED_BY_FIRST],
        env=os.environ | {name: str(value) for name, value in told.items()},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)


STARTED_BY_FIRST = "--started-by-the-first-process"


def under_torchrun() -> bool:
    """Whether several processes were started from outside, of which this is one.

    Not if their group is somebody else's: then this one works alone.
    """
    several = (os.environ.get("WORLD_SIZE", "1") != "1"
               and not torch.distributed.is_initialized())
    if several and not {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= set(os.environ):
        raise BadInput("WORLD_SIZE is set, but not by torchrun: unset it")
    return several


def exchange_job(config: Config | None = None, state: TrainState | None = None,
                 train: bool = True) -> tuple[Config, TrainState | None, bool]:
    """What the first process has to do, on every process; it travels as plain data."""
    if PROCESSES.N == 1:
        return config, state, train
    job = [config and dataclasses.asdict(config), state and vars(state), train]
    torch.distributed.broadcast_object_list(job)
    return Config(**job[0]), job[1] and TrainState(**job[1]), job[2]


def help_first_process(started_by_first: bool) -> None:
    """What every other process does: the same job. The first one says all errors."""
    with suppress(BadInput, Diverged, OSError):
        if started_by_first:
            threading.Thread(target=end_with_first_process, daemon=True).start()
            print(".", end="", flush=True)                          # here I am
        with processes(0):
            config, state, train = exchange_job()
            theta = train_maml(config, start=state)[0] if train else state.theta
            evaluate(config, theta)


def end_with_first_process() -> None:
    """Wait until the pipe from the first process is closed, and end at once."""
    os.read(sys.stdin.fileno(), 1)
    os._exit(1)


def available_cores() -> int:
    """The processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# %% 14. Evaluation (MAML §5.3, App. A.2)

EVALUATION = 2**31      # stands in place of the iteration in the keys of evaluation


def adaptation(policy, theta: Tensor, family: TaskFamily, task, config: Config, m: int,
               ) -> Iterator[tuple[Tensor, Trajectories]]:
    """Adapt θ to held-out task number m: yields (φ, fresh episodes with φ), steps + 1
    times. φ is θ at first. Its episodes make the next step: α for the first, then α/2.
    The oracle, which sees the task, takes no step.
    """
    phi = theta.detach().clone()
    alpha = step_size(config.eval_alpha, policy.std(theta), config)
    steps = 0 if config.method == "oracle" else config.eval_steps
    for step in range(steps + 1):
        data = sample_trajectories(
            family, task, policy, phi, config.eval_episodes, horizon=config.horizon,
            gamma=config.gamma, lam=config.lam, key=(config.seed, EVALUATION, m, step))
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
    rows = map_over_tasks(lambda m: [data.mean_return() for _, data in adaptation(
        policy, theta, family, tasks[m], config, m)], len(tasks))
    columns = 1 if config.method == "oracle" else config.eval_steps + 1
    table = torch.zeros(len(tasks), columns, dtype=torch.float64)
    for m, row in zip(own_tasks(len(tasks)), rows):
        table[m] = torch.tensor(row)
    return sum_over_processes(table, 0)[0].numpy()       # each process has its own rows


def evaluate(config: Config, theta: Tensor, family: TaskFamily | None = None,
             ) -> np.ndarray:
    """The run's adaptation table on its held-out tasks: (tasks, steps + 1).

    `family` as for `train_maml`. Raises BadInput if θ is not of its policy's size.
    """
    with known_modes():
        family = family_of(config, family)
        policy = make_policy(family, config)
        if theta.shape != (policy.num_params,):
            raise BadInput(f"θ has {theta.numel()} numbers, the policy for "
                           f"{family.name} {policy.num_params}: is it of another task?")
        return adaptation_returns(policy, theta, family,
                                  family.test_tasks(config.eval_tasks), config)


# The paper's figures: mean return over its 40 test tasks after 0, 1, 2, 3 gradient
# steps, from the result files that its repository ships. Locomotion: another simulator,
# so comparable in shape, not number by number.
PAPER_TABLE = """
    point2d      maml         -40.41  -11.68   -3.33   -3.23
    point2d      pretrained   -40.81  -19.73  -11.72   -8.47
    point2d      random       -82.66  -57.96  -53.84  -46.81
    point2d      oracle        -2.29
    cheetah-dir  maml         -50.69  293.19  313.48  315.65
    cheetah-dir  pretrained   -43.03  -24.75  -12.85   19.57
    cheetah-dir  random       -35.73   21.83   62.32   86.18
    cheetah-dir  oracle       442.69
    cheetah-vel  maml        -129.53  -78.57  -66.62  -60.78
    cheetah-vel  pretrained  -158.00 -135.39 -128.47 -133.61
    cheetah-vel  random      -254.83 -254.33 -246.79 -230.83
    cheetah-vel  oracle       -54.47
    ant-vel      maml          30.58   96.74  100.06  101.41
    ant-vel      pretrained    -1.83    6.11    8.47    9.47
    ant-vel      random       -78.64  -62.81  -48.55  -35.56
    ant-vel      oracle       107.89
    ant-dir      maml           8.66  499.15  500.68  499.11
    ant-dir      pretrained     3.16    1.27    6.51    6.86
    ant-dir      random         3.11    9.25   15.96   26.11
    ant-dir      oracle       524.80
"""


def paper_rows(task: str) -> dict[str, np.ndarray]:
    """Method → the paper's mean returns on this task, (steps + 1,)."""
    lines = [line.split() for line in PAPER_TABLE.strip().splitlines()]
    return {method: np.array(row, float)
            for name, method, *row in lines if name == task}


# %% 15. Files of a run: config.json, checkpoint.pt, progress.csv, evaluation.csv

FORMAT, VERSION = "maml_trpo checkpoint", 2
RUN_FILES = ("config.json", "checkpoint.pt", "progress.csv", "evaluation.csv",
             "learning.png", "adaptation.png", "trajectories.png")
PROGRESS_COLUMNS = (
    "iteration", "return_pre", "return_post", "surrogate_before", "surrogate_after",
    "kl", "line_search_steps", "cg_residual", "std_mean", "seconds")


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file beside `path`, then rename it: readers see the old or the new."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(beside, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence]) -> None:
    """A table with a header, atomically."""
    text = io.StringIO(newline="")
    csv.writer(text).writerows([header, *rows])
    write_atomically(path, text.getvalue().encode())


def settings_of(config: Config) -> dict[str, Any]:
    """The settings kept with a run: all but `workers`, which changes no result."""
    return {name: value for name, value in dataclasses.asdict(config).items()
            if name != "workers"}


def save_checkpoint(path: Path, config: Config, state: TrainState) -> None:
    """The whole state, self-describing, atomically."""
    data = io.BytesIO()                 # into memory: a full disk is then an OSError
    torch.save(dict(format=FORMAT, version=VERSION, config=settings_of(config),
                    **vars(state)), data)
    write_atomically(path, data.getvalue())


def load_checkpoint(path: Path) -> tuple[Config, TrainState]:
    """Read a checkpoint; if it is none, raise BadInput and leave the file as it is."""
    try:
        with zipfile.ZipFile(path) as archive:         # torch.load checks no checksums
            if archive.testzip():
                raise ValueError("damaged")
        content = torch.load(path, weights_only=True)
        if content["format"] != FORMAT or content["version"] not in (1, VERSION):
            raise ValueError(f"format {content['version']!r}, not {VERSION}")
        if content["version"] == 1:       # of a program that had not yet these settings
            content["config"]["curvature_tasks"] = content["config"]["meta_batch_size"]
            content["config"]["alpha_follows_std"] = False
            for row in content["rows"]:
                row["seconds"] = row["seconds_total"]
        config = Config(**content["config"])
        state = TrainState(**{f.name: content[f.name]
                              for f in dataclasses.fields(TrainState)})
        check_state(state)
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file") from None
    except Exception as error:     # a foreign file makes torch.load raise anything
        raise BadInput(f"{path}: not a checkpoint of this program, or a damaged one "
                       f"({error!s:.100}); it was left as it is") from None
    P = make_policy(family_of(config), config).num_params    # may say: no MuJoCo here
    if not len(state.theta) == len(state.best_theta) == P:
        raise BadInput(f"{path}: its θ is not {P} numbers; it was left as it is")
    return config, state


def check_state(state: TrainState) -> None:
    """ValueError for a state that no training leaves."""
    if math.isnan(state.best_return) or len(state.rows) != state.iteration:
        raise ValueError("its rows are not those of its iteration")
    for theta in (state.theta, state.best_theta):
        if theta.dim() != 1 or not torch.isfinite(theta).all():
            raise ValueError("its θ is not a row of finite numbers")


def read_config(folder: Path) -> Config:
    """The settings of a run's folder; BadInput if it is none."""
    try:
        return Config(**json.loads((folder / "config.json").read_text("utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise BadInput(f"{folder}: no run there, with a config.json ({error!s:.100})"
                       ) from None


def read_evaluation(folder: Path, task: str) -> tuple[str, np.ndarray]:
    """Another run's method and (tasks, steps + 1) table; BadInput if there is none."""
    try:
        theirs = read_config(folder).task
        with open(folder / "evaluation.csv", newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        method, steps = rows[0]["method"], 1 + int(rows[-1]["step"])
        table = np.reshape([float(row["return"]) for row in rows], (-1, steps))
        places = [(int(row["task"]), int(row["step"])) for row in rows]
        if places != list(np.ndindex(table.shape)) or not np.isfinite(table).all():
            raise ValueError("its table has gaps")
        if theirs != task:
            raise ValueError(f"it is a run of {theirs}, not of {task}")
    except Exception as error:        # whatever foreign files make json and csv raise
        raise BadInput(f"--compare {folder}: no finished run to compare with, with "
                       f"config.json and evaluation.csv ({error!s:.80})") from None
    return method, table


# %% 16. The printed table, and figures

class Row(NamedTuple):
    """A row of the table: one run, one direction of it, or the paper."""
    label: str
    method: str
    mean: np.ndarray                   # (steps + 1,)
    error: np.ndarray | None           # its standard error; the paper's rows have none
    part: bool = False                 # of one direction only: not drawn


def standard_error(*groups: np.ndarray) -> np.ndarray:
    """Of the mean of all rows, from the spread within each group: (…, n) → (n,).

    What lies *between* the two directions is no error: both are always there. Of one
    row nothing is known: NaN.
    """
    variances = [len(rows) * rows.var(axis=0, ddof=1) if len(rows) > 1
                 else math.nan * rows[0] for rows in groups]
    return np.sqrt(sum(variances)) / sum(map(len, groups))


def comparison_rows(config: Config, tables: Sequence[tuple[str, str, np.ndarray]],
                    ) -> list[Row]:
    """The rows of (method, label, table) each, with their directions; then the paper's.
    """
    rows = []
    for method, label, table in tables:
        directions = {}
        if config.task.endswith("-dir") and len(table) > 1:             # they alternate
            directions = {"  forward": table[::2], "  backward": table[1::2]}
        error = standard_error(*(directions.values() or [table]))
        rows.append(Row(f"{method}, {label}", method, table.mean(0), error))
        for name, part in directions.items():
            rows.append(Row(name, method, part.mean(0), standard_error(part), True))
    methods = {row.method for row in rows}
    return rows + [Row(f"{method}, paper", method, mean, None)
                   for method, mean in paper_rows(config.task).items()
                   if method in methods]


def comparison_table(config: Config, rows: Sequence[Row]) -> str:
    """The rows as text: mean ± standard error over the tasks, after 0, 1, … steps."""
    width = max(len(row.label) for row in rows) + 2
    columns = max(len(row.mean) for row in rows if row.error is not None)
    lines = ["gradient steps".ljust(width)
             + "".join(f"{step:>17}" for step in range(columns))]
    for row in rows:
        cells = [f"{x:9.2f}" for x in row.mean[:columns]]
        if row.error is not None:
            cells = [f"{cell} ± {e:5.2f}" for cell, e in zip(cells, row.error)]
        lines.append(row.label.ljust(width) + "".join(cell.ljust(17) for cell in cells))
    if config.task != "point2d":
        lines.append("The paper's simulator differs: compare shapes, not numbers.")
    return "\n".join(lines)


COLORS = {"maml": "#1f6fb4", "pretrained": "#d95f02", "random": "#7f7f7f",
          "oracle": "#2a9d4e"}


@contextmanager
def new_figure(path: Path | io.BytesIO, columns: int = 1, width: float = 6.4,
               height: float = 4.0) -> Iterator[Sequence]:
    """The axes of a figure that is written to `path` at the end, without any window.

    In matplotlib's own style: a user's settings may need a backend, LaTeX or a font.
    """
    with without_variable("MPLBACKEND"):
        import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    style = {name: value for name, value in matplotlib.rcParamsDefault.items()
             if not name.startswith("backend")}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(width, height), layout="constrained", dpi=150)
        FigureCanvasAgg(figure)
        axes = figure.subplots(1, columns, squeeze=False)[0]
        for ax in axes:
            ax.spines[["top", "right"]].set_visible(False)
            ax.grid(alpha=0.25)
        yield axes
        figure.savefig(path, format="png")


def check_figures() -> None:
    """BadInput now, and not after the training, if no figure can be drawn."""
    try:
        with new_figure(io.BytesIO(), width=1, height=1) as (ax,):
            ax.set_title("−")
    except Exception as error:
        raise BadInput(f"matplotlib cannot draw here ({error!s:.100}): mend that first"
                       ) from None


def draw_learning_curve(path: Path, config: Config, rows: Sequence[dict]) -> None:
    """Return before and after adaptation, the mean over an iteration's tasks."""
    lines = {"return_post": ("without adaptation", COLORS[config.method])}
    if config.inner_updates:
        lines = {"return_pre": ("before adaptation", "#7f7f7f"),
                 "return_post": ("after adaptation", COLORS["maml"])}
    with new_figure(path) as (ax,):
        for name, (label, color) in lines.items():
            ax.plot([row["iteration"] for row in rows], [row[name] for row in rows],
                    color=color, label=label, marker=".", markersize=3)
        ax.set(xlabel="meta-iteration", ylabel="return (undiscounted, training tasks)")
        ax.set_title(f"{config.task}, {config.method}: mean over "
                     f"{config.meta_batch_size} tasks", fontsize=10)
        ax.legend(frameon=False)


def draw_adaptation(path: Path, config: Config, rows: Sequence[Row], tasks: int):
    """Return against the number of gradient steps, with the paper's rows dashed."""
    with new_figure(path, width=8.4) as (ax,):
        for k, row in enumerate(row for row in rows if not row.part):
            style = dict(color=COLORS.get(row.method), label=row.label)
            if row.error is None:
                style.update(linestyle="--", alpha=0.7)
            if row.method == "oracle":
                ax.axhline(row.mean[0], **style)
            else:
                ax.errorbar(range(len(row.mean)), row.mean, row.error, capsize=3,
                            marker="osD^v"[k % 5], **style)
        note = "" if config.task == "point2d" else "\n(paper: another simulator)"
        ax.set(xlabel="gradient steps on the task", ylabel="return (undiscounted)")
        ax.set_title(f"{config.task}: mean ± standard error over {tasks} "
                     f"evaluations{note}", fontsize=10)
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))


def draw_trajectories(path: Path, config: Config, theta: Tensor) -> None:
    """Paths in the plane before and after each step, like the paper's Figure 4."""
    family = family_of(config)
    policy = make_policy(family, config)
    with known_modes(), new_figure(path, 4, width=12.4, height=3.4) as axes:
        for m, (ax, goal) in enumerate(zip(axes, family.test_tasks(4))):
            walks = adaptation(policy, theta, family, goal, config, m)
            for step, (_, data) in enumerate(walks):
                length = int(data.mask[0].sum())
                ax.plot(*data.obs[0, :length, :2].T, color=f"C{step}",
                        linewidth=2.4 / (1 + step),       # so that none hides another
                        label="1 step" if step == 1 else f"{step} steps")
            ax.plot(*goal, "k*", markersize=11, label="goal")
            ax.plot(0, 0, "ko", markersize=4)
            ax.set(aspect="equal", xlabel="x", xlim=(-0.65, 0.65), ylim=(-0.65, 0.65),
                   title=f"goal ({goal[0]:.2f}, {goal[1]:.2f})")
        axes[0].set_ylabel("y")
        axes[-1].legend(frameon=False, fontsize=8, loc="center left",
                        bbox_to_anchor=(1, 0.5))


# %% 17. The command line

def build_parser() -> argparse.ArgumentParser:
    """Every field of Config is a flag; flags may be shortened while they are unique.

    A complaint is BadInput. Help says what a setting is, its choices, its value for
    point2d, and what differs for the other tasks.
    """
    def complain(message: str):
        raise BadInput(f"{message} (--help lists every setting)")

    def whole_numbers(text: str) -> tuple[int, ...]:
        return tuple(int(part) for part in text.split(","))

    parser = argparse.ArgumentParser(
        prog="maml_trpo.py", description="MAML-TRPO: meta-train, evaluate, draw, "
        "compare.", argument_default=argparse.SUPPRESS)
    parser.error = complain
    for f in dataclasses.fields(Config):
        choices = PRESETS if f.name == "task" else f.metadata["choices"]
        text = f.metadata["help"] + (f": {', '.join(choices)}" if choices else "")
        text += f"; default {f.default}"
        for task, preset in PRESETS.items():
            if f.name in preset:
                value, source = preset[f.name]
                text += f"; {task}: {value} ({source})"
        kind = whole_numbers if type(f.default) is tuple else type(f.default)
        how = dict(type=kind)
        if kind is bool:                                     # --first-order, --no-…
            how = dict(action=argparse.BooleanOptionalAction)
        parser.add_argument("--" + f.name.replace("_", "-"), **how, help=text)
    add = parser.add_argument
    add("--out", type=Path, metavar="DIR",
        help="where the run writes; default: the next free runs/TASK-METHOD-seedS")
    add("--resume", action="store_true", help="go on with the run in --out DIR")
    add("--init", type=Path, metavar="FILE",
        help="start from another run's last θ, its std included")
    add("--evaluate", type=Path, metavar="FILE",
        help="no training: table and figures of a saved θ")
    add("--best", action="store_true",
        help="with --evaluate: the θ with the best return in training, not the last")
    add("--compare", type=Path, nargs="+", metavar="DIR",
        help="put other runs into this one's table and figure; the run itself is still "
        "trained, or with --evaluate only evaluated")
    return parser


EVALUATION_SETTINGS = ("eval_tasks", "eval_episodes", "eval_steps", "eval_alpha",
                       "seed", "workers")


def plan(options: dict[str, Any]) -> tuple[Config, TrainState | None]:
    """Settings and first state of what the options ask for; a new training has none.

    Raises BadInput, and writes nothing.
    """
    given = {f.name: options[f.name] for f in dataclasses.fields(Config)
             if f.name in options}
    out, train = options.get("out"), "evaluate" not in options
    for flag, wrong, why in (
            ("resume", not (train and out), "it goes with --out DIR, and trains"),
            ("best", train, "it goes with --evaluate FILE"),
            ("init", not train or "resume" in options or given.get(
                "method") == "random", "it is for a run that trains and begins anew")):
        if flag in options and wrong:
            raise BadInput(f"--{flag}: leave it out, {why}")
    if not train:
        config, state = load_checkpoint(options["evaluate"])
        theta = state.best_theta if "best" in options else state.theta
        state = dataclasses.replace(state, theta=theta)
        config = with_given(config, given, EVALUATION_SETTINGS, options["evaluate"])
        return config, state
    if "resume" in options:
        config, state = read_config(out), None
        if (out / "checkpoint.pt").exists():              # otherwise it had not begun
            config, state = load_checkpoint(out / "checkpoint.pt")
        elif (out / "evaluation.csv").exists():
            raise BadInput(f"{out} is an evaluation, no training that could go on")
        config = with_given(config, given, ("iterations", "workers"), out)
        if state and config.iterations < state.iteration:
            raise BadInput(f"--resume: iterations {state.iteration} are done in {out}, "
                           f"do not ask for fewer")
        return config, state
    config = Config(**given)
    if "init" not in options:
        return config, None
    other, state = load_checkpoint(options["init"])
    with_given(other, dict(task=config.task, hidden=config.hidden,
                           activation=config.activation), (), options["init"])
    if "oracle" in (config.method, other.method):
        raise BadInput("--init: an oracle's θ is of no use to other methods")
    return config, TrainState(0, state.theta, [], state.theta, -math.inf)


def with_given(config: Config, given: dict[str, Any], free: Sequence[str], where: Path,
               ) -> Config:
    """A saved run's settings with those given; BadInput if one differs and may not."""
    for name, value in given.items():
        if value != getattr(config, name) and name not in free:
            raise BadInput(f"{where} has {name} {getattr(config, name)}, not {value}: "
                           f"{name} cannot be changed here")
    return dataclasses.replace(config, **given)


def new_folder(out: Path | None, name: str) -> Path:
    """Make a run's folder; BadInput if it already holds a run.

    Without `out`: the next free of runs/NAME, NAME-2, …. To make it is to take it, so
    two runs started together get two folders.
    """
    if out:
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BadInput(f"--out: no folder can be made there: {error}") from None
        for file in RUN_FILES:
            if (out / file).exists():
                raise BadInput(f"{out} already holds a run ({file}): choose another "
                               f"--out, or go on with --resume if it was training")
        return out
    number = 1
    while True:
        folder = Path("runs") / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            number += 1


def say(*text: str) -> None:
    """Print at once; an OSError says that nothing can be printed any more."""
    try:
        print(*text, flush=True)
    except ValueError as error:                                        # it is closed
        raise OSError(f"nothing can be printed ({error})") from None


PROGRESS_HEADER = ("  iter   return before → after   surrogate predicted      KL"
                   "  trials  CG left    std    s/it     left")


def progress_line(row: dict[str, float], iterations: int, recent: float) -> str:
    """What is printed of an iteration; `recent`: seconds an iteration takes now."""
    minutes, seconds = divmod(round((iterations - 1 - row["iteration"]) * recent), 60)
    search = f"{row['line_search_steps']:6d}" if row["line_search_steps"] else "  none"
    predicted = row.get("surrogate_predicted", math.nan)    # an older checkpoint: none
    return (f"{row['iteration']:6d}  {row['return_pre']:12.2f} → "
            f"{row['return_post']:8.2f}  {row['surrogate_after']:10.5f} "
            f"{predicted:9.5f} {row['kl']:7.4f}  {search} {row['cg_residual']:8.3f} "
            f"{row['std_mean']:6.3f} {row['seconds']:7.2f}  "
            f"{minutes:3d}m{seconds:02d}s")


def train_in_folder(config: Config, folder: Path, start: TrainState | None,
                    ) -> TrainState:
    """Train, with a checkpoint, a CSV row and a printed line after every iteration."""
    last = start

    def report(state: TrainState) -> None:
        nonlocal last
        last = state
        save_checkpoint(folder / "checkpoint.pt", config, state)
        write_csv(folder / "progress.csv", PROGRESS_COLUMNS,
                  [[row[name] for name in PROGRESS_COLUMNS] for row in state.rows])
        if state.rows:
            recent = np.median([row["seconds"] for row in state.rows[-10:]])
            say(progress_line(state.rows[-1], config.iterations, recent))

    if config.iterations:
        say(PROGRESS_HEADER)
    train_maml(config, start=start, report=report)
    return last


def report_evaluation(config: Config, folder: Path, state: TrainState, label: str,
                      compare: Sequence[Path]) -> None:
    """Evaluate the state's θ; write evaluation.csv; print the table; draw."""
    say(f"Evaluating the {label}: {config.eval_tasks} tasks, {config.eval_episodes} "
        f"episodes after each step …")
    table = evaluate(config, state.theta)
    write_csv(folder / "evaluation.csv", ("method", "task", "step", "return"), [
        (config.method, *place, value) for place, value in np.ndenumerate(table)])
    tables = [(config.method, label, table)]
    for other in compare:
        method, theirs = read_evaluation(other, config.task)
        size = "" if len(theirs) == len(table) else f", {len(theirs)} tasks"
        tables.append((method, other.resolve().name + size, theirs))
    compared = comparison_rows(config, tables)
    say("\nReturn, mean ± standard error over the tasks\n"
        + comparison_table(config, compared))
    if state.rows:
        draw_learning_curve(folder / "learning.png", config, state.rows)
    draw_adaptation(folder / "adaptation.png", config, compared, len(table))
    if config.task == "point2d":
        draw_trajectories(folder / "trajectories.png", config, state.theta)


def carry_out(options: dict[str, Any]) -> None:
    """Do what the options ask for, as the first process."""
    started, train = time.perf_counter(), "evaluate" not in options
    config, state = plan(options)
    compare = options.get("compare", [])
    for other in compare:
        read_evaluation(other, config.task)
    check_figures()
    family_of(config)                       # an environment that cannot be made
    folder = options.get("out")
    if "resume" not in options:             # the last thing that may be refused
        which = f"seed{config.seed}" if train else "evaluated"
        folder = new_folder(folder, f"{config.task}-{config.method}-{which}")
    write_atomically(folder / "config.json", json.dumps(
        settings_of(config), indent=1).encode() + b"\n")
    most = config.meta_batch_size if train and config.iterations else config.eval_tasks
    N = min(config.workers or available_cores(), most)
    if under_torchrun():
        N = int(os.environ["WORLD_SIZE"])
    say(f"{config.task}, {config.method}, seed {config.seed}: {config.iterations} "
        f"iterations of {config.meta_batch_size} tasks × {config.rollouts} episodes × "
        f"{config.horizon} steps, {N} process{'es' * (N > 1)}; writes to {folder}")
    try:
        with processes(N):
            exchange_job(config, state, train)
            if train:
                state = train_in_folder(config, folder, state)
            label = "best θ of the training" if "best" in options else "last θ"
            report_evaluation(config, folder, state, label, compare)
    except KeyboardInterrupt:
        advice = f"go on with --resume --out {folder}" if train else "nothing is lost"
        raise KeyboardInterrupt(advice) from None
    say(f"\nDone in {time.perf_counter() - started:.0f} s. Table and figures: {folder}")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line: → exit status (0 done, 1 failed, 2 bad input, 130 Ctrl-C)."""
    argv = sys.argv[1:] if argv is None else [str(word) for word in argv]
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, ValueError):     # there is none, or it is closed
            stream.reconfigure(errors="replace")    # where θ cannot be shown: ?

    def fail(status: int, message: object) -> int:
        print(f"maml_trpo.py: {message}", file=sys.stderr)
        return status

    try:
        if under_torchrun() and os.environ["RANK"] != "0":
            if not {"-h", "--help"} & set(argv):
                help_first_process(started_by_first=argv == [STARTED_BY_FIRST])
        else:
            carry_out(vars(build_parser().parse_args(argv)))
        return 0
    except SystemExit as stop:                  # --help
        return int(stop.code or 0)
    except BadInput as error:
        return fail(2, error)
    except Diverged as error:
        return fail(1, error)
    except OSError as error:
        return fail(1, f"{error}: mend the cause; a training goes on from its last "
                       f"checkpoint with --resume")
    except KeyboardInterrupt as error:
        return fail(130, f"interrupted; {str(error) or 'nothing was begun'}")


if __name__ == "__main__":
    sys.exit(main())
