"""MAML-TRPO for reinforcement learning, in one file that is read beside the paper.

What this is
    The reinforcement-learning half of "Model-Agnostic Meta-Learning for Fast
    Adaptation of Deep Networks" (C. Finn, P. Abbeel, S. Levine, ICML 2017,
    arXiv 1703.03400v3): find parameters θ from which ONE policy-gradient step on a
    few episodes of a new task gives a good policy for that task.

    Q: Why does it not match the paper? (Q4)
    A: On 2D navigation it does: README has the numbers, with seeds, and notes.md the
       table of what paper, authors' code and this file do differently.
    Q: It does not install or run? (Q15)
    A: Four packages, no worker processes; point2d runs without MuJoCo. See README.

Run it: `python maml_trpo.py --task point2d`; `--help` shows every setting's source.

Algorithm 3 of the paper, the notes' pseudocode, and the function here
    [MAML Alg.3 l.1]    [notes l.67]     initialise θ            GaussianPolicy.init
    [MAML Alg.3 l.2]    [notes l.33]     while not done          train_maml
    [MAML Alg.3 l.3]    [notes l.28]     draw tasks Tᵢ ~ p(T)    meta_iteration
    [MAML Alg.3 l.4,9]  [notes l.34]     for all Tᵢ              meta_iteration
    [MAML Alg.3 l.5]    [notes l.1-24]   K episodes D with θ     sample_trajectories
    [MAML Alg.3 l.6]    [notes l.40]     L from D, Eq. 4         inner_loss
    [MAML Alg.3 l.6,7]  [notes l.36,41,42]  ∇L, θ′ = θ − α∇L     adapt
    [MAML Alg.3 l.8]    [notes l.44-45]  K episodes D′ with θ′   sample_trajectories
    [MAML Alg.3 l.10]   [notes l.51-54]  L(θ′) using D′          surrogate_and_kl
                        [notes l.55-57]  ∇ of it, g_k            meta_gradient
      TRPO in its place [notes l.47-49]  mean KL, old ‖ new      kl_old_new
                        [notes l.61]     its Hessian, as H·v     hessian_vector_product
                        [notes l.62]     x ≈ H⁻¹g                conjugate_gradient
                        [notes l.65]     scale, then backtrack   backtrack_line_search
                        [notes l.66]     the new θ               trpo_meta_step
    [MAML Alg.3 l.11]                    end while               train_maml

Symbols (shapes stand at line ends)
    M tasks · K trajectories a task · H steps · S observation · A action · P parameters
    θ   theta         (P,)      the meta-parameters, a flat vector; θ_old: before a step
    θ′  theta_prime   (P,)      one task's adapted parameters, a function of θ
    α   alpha         ()        inner step size        γ  gamma, λ  lam: discount, GAE
    δ   max_kl        ()        trust region, in β's place: mean KL(old ‖ new) ≤ δ
    D   inner data    (K,H,..)  sampled with θ         D′ outer data, sampled with θ′
    Â   adv           (K,H)     advantages             L  loss, minimised (paper: Eq. 4)
    J   ∂θ′/∂θ        (P,P)     I − α∇²L, never formed
    F   Fisher        (P,P)     Hessian of the KL at the adapted policy, never formed
    H·v               (P,)      here H is TRPO's: Hessian of the mean KL in θ, JᵀFJ
    g   gradient      (P,)      of the meta-objective   x  step direction, x ≈ H⁻¹g

Three voices in the comments: `Paper:`; `Authors' code:`, where their repository
(cbfinn/maml_rl) does otherwise; `Here:`, our choice and its reason. notes.md has them
in a table, derivations, a key to the [tags] and to the questions (Q1)-(Q15), and the
lines of the reader's pseudocode, errors and all, that [notes l.11] and its like mean.
"""
from __future__ import annotations

import argparse
import csv
import dataclasses
import functools
import importlib
import io
import json
import math
import os
import signal
import sys
import threading
import time
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Iterator, Sequence

import gymnasium as gym
import numpy as np
import torch
import torch.distributed
import torch.nn.functional as F
from gymnasium.vector import AutoresetMode, VectorEnv
from torch import Tensor
from torch.distributions import Distribution, Independent, Normal, register_kl

# %% 0. Configuration (MAML §5.3, App. A.2)


def setting(default, help: str, choices=None) -> Any:
    """One field of Config: default, help text with its source, and the choices."""
    return field(default=default, metadata=dict(help=help, choices=choices))


HVPS = ("finite-difference", "double-backprop", "gauss-newton")


@dataclass(frozen=True)
class Config:
    """Every setting of a run; `Config(task="point2d", alpha=0.1)` fills in the rest.

    A field whose default is None takes the task's value from PRESETS.
    Raises BadInput, naming the field, if a value cannot be used (RULES, in Part II).
    """
    task: str = setting("point2d", "task family")
    method: str = setting("maml", "MAML, or one of the paper's baselines [MAML §5.3]",
                          ("maml", "pretrained", "random", "oracle"))
    seed: int = setting(0, "seed of everything random")
    iterations: int = setting(None, "meta-iterations [MAML Alg.3 l.2]")
    meta_batch_size: int = setting(None, "M, tasks a meta-iteration")
    rollouts: int = setting(None, "K, episodes a task and policy")
    horizon: int = setting(None, "H, steps an episode at most")
    # The inner step
    alpha: float = setting(None, "α, inner step size")
    inner_steps: int = setting(1, "inner steps in training (paper: 1)")
    first_order: bool = setting(False, "drop the second derivatives: ∂θ′/∂θ = I")
    inner_loss: str = setting(
        "log-prob", "inner estimator: log π·Â (authors' code), or the ratio "
        "π/stop_grad(π)·Â (LVC of ProMP)", ("log-prob", "ratio"))
    # Credit
    gamma: float = setting(None, "γ, discount")
    lam: float = setting(1.0, "λ of GAE (authors' code)")
    # The policy
    hidden: tuple = setting((100, 100), "hidden layer sizes (paper)")
    activation: str = setting("relu", "hidden units (paper: relu)", ("relu", "tanh"))
    init_std: float = setting(None, "initial std of the actions")
    # TRPO
    max_kl: float = setting(None, "δ, trust region on the adapted policies")
    damping: float = setting(1e-5, "added to H's diagonal (authors' code)")
    cg_iterations: int = setting(10, "CG's steps (authors' code)")
    cg_tolerance: float = setting(1e-10, "stop CG at r·r below this (authors' code)")
    hvp: str = setting(None, "Hessian-vector product (default: finite-difference; with "
                       "--first-order or the ratio loss gauss-newton)", HVPS)
    fd_step: float = setting(0.01, "length of the move in θ that a finite difference "
                             "makes (ours, measured: notes.md)")
    backtrack_ratio: float = setting(
        0.8, "line search: each trial's step over the last (authors' code)")
    backtrack_steps: int = setting(
        15, "line search: trials, the full step included (authors' code)")
    # Evaluation and machine
    eval_tasks: int = setting(40, "held-out tasks (authors' code)")
    eval_episodes: int = setting(None, "episodes a task and step, at evaluation")
    eval_steps: int = setting(3, "adaptation steps at evaluation")
    eval_alpha: float = setting(None, "α of the first step at evaluation, halved from "
                                "the second on (paper); a given --alpha is the default")
    workers: int = setting(None, "threads over tasks (default: the cores there are)")

    @property
    def inner_updates(self) -> int:
        """Inner steps in training: the baselines have none, θ′ = θ."""
        return self.inner_steps if self.method == "maml" else 0

    def __post_init__(self):
        complete(self)


# task → {field: (value, source)}
PRESETS: dict[str, dict[str, tuple[Any, str]]] = {
    "point2d": dict(
        iterations=(120, "ours; authors' code: 100, the paper allows up to 500"),
        meta_batch_size=(20, "paper"),
        rollouts=(20, "paper"),
        horizon=(100, "paper"),
        alpha=(0.2, "ours; the paper says 0.1, the run behind its figure used 0.5"),
        eval_alpha=(0.21, "ours, on 100 other goals; its step has 40 episodes"),
        eval_episodes=(40, "paper"),
        gamma=(0.99, "authors' code"),
        init_std=(1.0, "authors' code: 1.0 in units of the action limit"),
        max_kl=(0.01, "authors' code; the paper does not state it"),
    ),
}


# %% 1. Tasks (MAML §3, §5.3; problem formulation of the notes)


@dataclass(frozen=True)
class TaskFamily:
    """p(T): environments that share their spaces, and a way to draw tasks.

    A task is whatever `envs.reset(seed=…, options={"task": task})` understands (here a
    row of numbers). Actions reach the environment as drawn: the environment clips.

    Q: How do I use my own environment? (Q14)
    A: Write a Gymnasium environment whose `reset` takes the task from `options`, and
       `TaskFamily("mine", lambda K: SyncVectorEnv([MyEnv] * K), draw, held_out, H)`.
       notes.md has a complete example of 20 lines, which a test runs.
    """
    name: str
    make_envs: Callable[[int], VectorEnv]      # K → K copies, stepped in lockstep
    sample_tasks: Callable[[np.random.Generator, int], np.ndarray]   # → (M, task)
    test_tasks: Callable[[int], np.ndarray]    # n → (n, task), held out and fixed
    horizon: int                               # H, part of the task: see `gae`
    threads: bool = False       # does sampling on several threads pay? (MuJoCo: yes)
    _cache: threading.local = field(default_factory=threading.local, repr=False,
                                    compare=False)

    def envs(self, K: int) -> VectorEnv:
        """K copies to sample from, made once for each thread and K."""
        made = self._cache.__dict__.setdefault("made", {})
        if K not in made:
            made[K] = self.make_envs(K)
        return made[K]


class Point2D(VectorEnv):
    """2D navigation: K points walk from the origin to one unseen goal [MAML §5.3].

    Observation (K, 2): position. Action (K, 2): in [−1, 1], clipped, times MAX_STEP.
    Reward (K,): −distance to the goal after the move; nothing else tells the goal,
    which `sample_goals` draws from [−0.5, 0.5]².

    Paper:         the negative *squared* distance; it ends within 0.01 of the goal.
    Authors' code: −distance; it ends in the box |dx|, |dy| < 0.01
                   [maml_rl point_env_randgoal.py]. The paper's −40.41 before adaptation
                   is of this scale: standing still scores −40.08 on its 40 goals.
    Here:          as the authors' code. `task_rollout` counts the H steps.
    """
    MAX_STEP, GOAL_BOX = 0.1, 0.01
    metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}

    def __init__(self, num_envs: int):
        self.num_envs = num_envs
        set_spaces(self, gym.spaces.Box(-np.inf, np.inf, (2,), np.float32),
                   gym.spaces.Box(-1.0, 1.0, (2,), np.float32))
        self.goal = np.zeros(2)
        self._position = np.zeros((num_envs, 2))
        self._ended = np.zeros(num_envs, bool)

    def reset(self, *, seed=None, options=None):
        """All points to the origin; `options={"task": goal}` sets the goal, (2,)."""
        super().reset(seed=seed[0] if isinstance(seed, (list, tuple)) else seed)
        if options and "task" in options:
            goal = np.asarray(options["task"], float)
            if goal.shape != (2,) or not np.isfinite(goal).all():
                raise BadInput(f"point2d: a task is a goal (x, y), not {goal}")
            self.goal = goal
        self._position = np.zeros((self.num_envs, 2))
        self._ended = np.zeros(self.num_envs, bool)
        return self._position.astype(np.float32), {}

    def step(self, actions):
        """One move of every point: actions (K, 2) → Gymnasium's five results."""
        move = self.MAX_STEP * np.minimum(np.maximum(actions, -1.0), 1.0)      # (K, 2)
        self._position += move
        offset = self._position - self.goal
        reward = -np.hypot(offset[:, 0], offset[:, 1])                         # (K,)
        inside = np.abs(offset) < self.GOAL_BOX
        terminated = inside[:, 0] & inside[:, 1]
        if self._ended.any():          # Gymnasium's next-step autoreset: one that ended
            self._position[self._ended] = reward[self._ended] = 0.0   # starts anew, its
            terminated[self._ended] = False                          # action is ignored
        self._ended = terminated
        return (self._position.astype(np.float32), reward, terminated,
                np.zeros(self.num_envs, bool), {})


# %% 2. The policy f_θ, a pure function of one flat vector (MAML §5.3)


class GaussianPolicy:
    """π_θ(a|x) = N(a; μ_θ(x), diag σ²), with θ one flat vector (P,).

    Paper:         two hidden layers of 100 ReLU units.
    Authors' code: Xavier weights, zero biases; log σ is a parameter that does not
                   depend on the state, σ = 1 at first and never below 1e-6. The inner
                   step adapts log σ too [maml_rl maml_minimal_gauss_mlp_policy.py].

    With θ a plain vector and the network a function of it, an adapted policy is just
    another vector, θ′ = θ − α∇L, and the graph from θ′ back to θ is never cut.

    Training calls `init`, `distribution`, `sampler` and `std`, nothing else.
    """
    MIN_STD = 1e-6

    def __init__(self, obs_dim: int, act_dim: int, hidden: Sequence[int] = (100, 100),
                 activation: str = "relu", init_std: float = 1.0):
        sizes = [obs_dim, *hidden, act_dim]
        layers = [((n_out, n_in), (n_out,)) for n_in, n_out in zip(sizes, sizes[1:])]
        self.shapes = [shape for layer in layers for shape in layer] + [(act_dim,)]
        self.numels = [math.prod(shape) for shape in self.shapes]
        self.num_params = sum(self.numels)                                     # P
        self.activation = {"relu": F.relu, "tanh": torch.tanh}[activation]
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
        """μ(x): obs (..., S) → (..., A)."""
        x = obs.reshape(-1, obs.shape[-1]).T          # samples are columns: (S, N)
        *hidden, last_weight, last_bias = layers
        for weight, bias in zip(hidden[::2], hidden[1::2]):
            x = self.activation(torch.addmm(bias[:, None], weight, x))      # (100, N)
        mean = torch.addmm(last_bias[:, None], last_weight, x)                 # (A, N)
        return mean.T.reshape(*obs.shape[:-1], -1)

    def distribution(self, theta: Tensor, obs: Tensor) -> DiagonalGaussian:
        """π_θ(·|x) for obs (..., S). Its log_prob: actions (..., A) → (...)."""
        *layers, log_std = self.unpack(theta)
        return DiagonalGaussian(self.mean(layers, obs),
                                log_std.clamp(min=math.log(self.MIN_STD)))

    def std(self, theta: Tensor) -> Tensor:
        """σ (A,), for the log."""
        return self.unpack(theta.detach())[-1].exp().clamp(min=self.MIN_STD)

    def sampler(self, theta: Tensor, rng: np.random.Generator) -> Callable:
        """A function obs (K, S) → actions (K, A), both numpy, drawn from π_θ."""
        return numpy_sampler(self, theta, rng)


class DiagonalGaussian(Independent):
    """N(mean, diag exp(log_std)²): mean (..., A), log_std (A,)."""

    def __init__(self, mean: Tensor, log_std: Tensor):
        super().__init__(Normal(mean, log_std.exp(), validate_args=False), 1,
                         validate_args=False)
        self.log_std = log_std

    def log_prob(self, act: Tensor) -> Tensor:
        """log π(a) = Σ_A [ −½((a − μ)/σ)² − log σ − ½ log 2π ]: act (..., A) → (...).

        A *sum* over A, never a mean: densities of independent parts multiply.
        """
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


# %% 3. Rollouts (MAML Alg. 3 lines 5 and 8; notes l.1-24)


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
    """K = envs.num_envs episodes of `task` with π_θ, in lockstep [notes l.1-14].

    `seed` names these episodes, such as (seed, iteration, task, phase). The draws are a
    function of it alone, so a run is the same on any number of workers, and resumed.

    Q: `cumulative_disc_rew += disc_reward * log_prob`, is that right? [notes l.11]
    A: No. It credits each reward to the action of the same step only, and never learns
       that an action pays off later. The policy gradient is E[Σ_t ∇log π(a_t|x_t)·G_t]
       with the reward-to-go G_t = Σ_{u≥t} r_u. So this function records numbers, with
       no graph; `assign_credit` makes advantages of them, and `inner_loss`, computing
       log π again, takes −mean(log π·Â).
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
        next_obs, reward, terminated, truncated, _ = envs.step(action)
        all_obs[t], all_act[t], all_rew[t], mask[t] = obs, action, reward, running
        ended = terminated | truncated
        if ended.any():
            running = running & ~ended
            if not running.any():
                break
        obs = next_obs
    if not mask.all():
        for x in (all_obs, all_act, all_rew):
            x[~mask] = 0                       # what came after an episode's end
    check_rollout(task, all_obs, all_act, all_rew[..., None])
    # In memory samples stand last, the columns of `GaussianPolicy.mean`: faster.
    return Trajectories(*(torch.from_numpy(np.ascontiguousarray(x.T)).movedim(0, -1)
                          for x in (all_obs, all_act)),
                        *(torch.from_numpy(np.ascontiguousarray(x.T))
                          for x in (all_rew, mask.astype(dtype))))


def sample_trajectories(family: TaskFamily, task, policy, theta: Tensor, K: int, *,
                        seed: Sequence[int], horizon: int | None = None,
                        gamma: float = 0.99, lam: float = 1.0) -> Trajectories:
    """K episodes of `task` with π_θ, and their advantages [MAML Alg.3 l.5,8].

    The loop over K of the pseudocode [notes l.17-24] runs as K copies side by side;
    "K rollouts" are K episodes, so K·H timesteps.
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
    """Rewards-to-go G_t = r_t + γ·G_{t+1} [SpinUp VPG l.4]; (K, H), 0 after the end."""
    out = rew.numpy().copy()
    for t in reversed(range(rew.shape[1] - 1)):
        out[:, t] += gamma * out[:, t + 1]
    return torch.from_numpy(out)


class LinearBaseline:
    """V(x, t) = w·φ(x, t), ridge regression on the returns (Duan et al. 2016, App.).

    φ = (x, x², t/100, (t/100)², (t/100)³, 1) with x clipped to ±10, ridge 1e-5, time
    counted from the start of the episode. In float64 inside, whatever θ's dtype.

    Q: Which data is the baseline fitted on? (Q10)
    A: On the very episodes whose advantages it then gives, afresh for every task and
       every inner step [maml_rl]. Spinning Up uses the last iteration's fit
       [SpinUp VPG l.8]; a new task has none. The price: a bias of order 1/K (notes.md).
    """
    RIDGE, CLIP = 1e-5, 10.0

    def __init__(self):
        self.weights: Tensor | None = None                                     # (2S+4,)

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

    All (K, H). With λ = 1, the authors' value, Â_t = G_t − V_t. (This δ is no KL.)

    V after step H is 0, as after termination: H is part of the MDP (the notes' first
    item). It would be a bug for a time limit that is not part of the task, such as an
    environment's `truncated` before step H, which counts as an end: choose a smaller H.
    """
    values = values * mask
    next_values = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)
    deltas = (rew + gamma * next_values - values) * mask
    return discounted_returns(deltas, gamma * lam) * mask


def standardise(adv: Tensor, mask: Tensor) -> Tensor:
    """(Â − mean)/(std + 1e-8) over one task's samples, (K, H) [maml_rl].

    So α does not depend on the rewards' scale. The paper does not mention it.
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


# %% 5. The inner update (MAML Eq. 4; Alg. 3 lines 6 and 7; notes l.36-42)


def inner_loss(policy, theta: Tensor, trajectories: Trajectories,
               estimator: str = "log-prob") -> Tensor:
    """L(θ) = −mean over timesteps of log π_θ(a|x)·Â [MAML Eq.4] [SpinUp VPG l.6].

    Only its gradient means anything. Its mean is Eq. 4's, up to scale, if γ is 1 and
    the baseline has not seen D; what both do to it: notes.md, section 7.

    Paper:         Eq. 4 is −E[Σ_t R]: a sum over the H steps (as Spinning Up's).
    Authors' code: a mean over all K·H timesteps, of standardised advantages
                   [maml_rl maml_npo.py]. A step α on it is one of α/(H·std of the
                   raw Â) on Eq. 4's loss.
    Here:          as the authors' code.

    Q: Why REINFORCE inside and TRPO outside? (Q13)
    A: The inner step must be differentiated, and a line search has no derivative. The
       outer step is not differentiated, and may be as careful as it likes.
    Q: Which estimator? log π, ratio, DiCE, E-MAML? (Q11)
    A: log π, as the paper and its code. "ratio", π/stop_grad(π) (LVC of ProMP), and
       DiCE have its gradient and another second derivative, so another J; E-MAML adds
       a term to the outer gradient: notes.md, "The dropped term".
    """
    log_prob = policy.distribution(theta, trajectories.obs).log_prob(trajectories.act)
    if estimator == "ratio":
        log_prob = (log_prob - log_prob.detach()).exp()      # 1, with gradient ∇log π
    return -masked_mean(log_prob * trajectories.adv, trajectories.mask)


def adapt(policy, theta: Tensor, inner_data: Sequence[Trajectories], alpha: float,
          create_graph: bool, estimator: str = "log-prob") -> Tensor:
    """θ′ = θ − α∇L(θ), once for each element of `inner_data` [MAML Alg.3 l.7].

    theta, result (P,). `copy.deepcopy` and `optim.step()` of [notes l.36,42] make θ′
    a new leaf: no gradient flows from it to θ. (`get_model_update`, commented out above
    the listing, would be θ′ − θ = −α∇L; nobody needs it.)

    Q: First or second order? What does create_graph do? (Q2)
    A: For any f, ∇_θ f(θ′(θ)) = Jᵀ∇f(θ′) with J = ∂θ′/∂θ = I − α∇²L. create_graph=True
       records the computation of ∇L itself, so that backward can differentiate it.
       With False, autograd sees θ′ = θ − constant, J = I: first-order MAML.
    Q: Several inner steps? (Q5)
    A: Each on fresh episodes of the policy it starts from; J = J_n···J_1, a product
       of n factors I − α∇²L, still second derivatives only.
    """
    theta_prime = theta if theta.requires_grad else theta.detach().requires_grad_()
    for trajectories in inner_data:
        loss = inner_loss(policy, theta_prime, trajectories, estimator)
        (grad,) = torch.autograd.grad(loss, theta_prime, create_graph=create_graph)
        theta_prime = theta_prime - alpha * grad
    return theta_prime


# %% 6. The meta-objective and the KL (MAML Alg. 3 line 10; notes l.44-54, 60)


@dataclass
class TaskData:
    """What one task gives to the meta-step."""
    inner: list[Trajectories]        # D, one for each inner step, sampled with θ, …
    outer: Trajectories              # D′, sampled with θ′
    old: Distribution                # π_{θ′(θ_old)} on D′'s observations, detached


def mean_over_tasks(function: Callable[[Any], Tensor], tasks: Sequence,
                    workers: int = 1) -> Tensor:
    """(1/M) Σ_i function(task i): every mean of the outer loop [MAML Alg.3 l.10].

    In task order and float64: the number of threads cannot change it. Under torchrun
    the processes share the tasks. (The paper's sum over tasks gives the same step.)
    """
    results = map_over_tasks(function, tasks, workers)
    total = torch.stack([result.detach().double() for result in results]).sum(0)
    total = torch.cat([total.flatten(), total.new_tensor([len(results)])])
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(total)
    return (total[:-1] / total[-1]).reshape(results[0].shape).to(results[0].dtype)


def kl_old_new(old: Distribution, new: Distribution) -> Tensor:
    """KL(π_old ‖ π_new) of each sample, in closed form: (...) [TRPO Eq.12].

    Q: The KL is always 0 and the ratio always 1: is this a bug? (Q1)
    A: No. At θ_old both policies are the same: the KL is at its minimum, 0, with
       gradient 0. TRPO uses its *Hessian* there, JᵀFJ. 0 after an accepted step is one.
    Q: Which direction? (Q12)
    A: Old first, as TRPO. The two directions have the same Hessian at θ_old, the Fisher
       matrix, and differ from the third order on: the line search can tell.
    Q: Can it be had for a distribution without closed form? [notes l.59]
    A: As the mean of log π_old(a) − log π_new(a) over actions drawn from π_old. At
       θ_old its value is exactly 0; its gradient, −mean ∇log π, and its Hessian,
       −mean ∇²log π, are 0 and the Fisher matrix only in expectation.
    """
    return torch.distributions.kl_divergence(old, new)


def adapted_distribution(policy, theta: Tensor, inner: list[Trajectories], obs: Tensor,
                         alpha: float, first_order=False, estimator="log-prob"):
    """π_{θ′(θ)} on `obs` (K, H, S), differentiable in θ if θ requires it."""
    second_order = theta.requires_grad and not first_order
    theta_prime = adapt(policy, theta, inner, alpha, second_order, estimator)
    return policy.distribution(
        theta_prime if theta.requires_grad else theta_prime.detach(), obs)


def surrogate_and_kl(policy, theta: Tensor, task_data: TaskData, alpha: float,
                     first_order: bool = False, estimator: str = "log-prob",
                     ) -> tuple[Tensor, Tensor]:
    """One task's meta-objective and KL as functions of θ; both () [MAML Alg.3 l.10].

    surrogate = −mean over D′ of π_{θ′(θ)}(a|x) / π_{θ′(θ_old)}(a|x) · Â′  [TRPO Eq.14]
    kl        =  mean over D′ of KL(π_{θ′(θ_old)}(·|x) ‖ π_{θ′(θ)}(·|x))

    Both compare *adapted* policies, on D′'s states. The pseudocode's KL is between
    adapted and meta-policy [notes l.48]: it bounds the inner step, not the meta-step.
    Nor has it a ratio [notes l.54]: a line search could compare nothing.

    Q: Why run the inner update again in here? (Q8)
    A: The θ′ that sampled D′ is a vector without a graph. The outer gradient needs θ′
       *as a function of θ*, from the stored D; and every trial θ of the line search
       has adapted policies of its own.
    Q: "KL always 0, ratio always 1"? (Q1)
    A: Yes at θ_old, by construction; the gradient of the ratio is what counts.
    """
    new = adapted_distribution(policy, theta, task_data.inner, task_data.outer.obs,
                               alpha, first_order, estimator)
    outer, old = task_data.outer, task_data.old
    ratio = (new.log_prob(outer.act) - old.log_prob(outer.act)).exp()          # (K, H)
    surrogate = -masked_mean(ratio * outer.adv, outer.mask)
    return surrogate, mean_kl(new, task_data)


def mean_kl(new: Distribution, task_data: TaskData) -> Tensor:
    """KL(old ‖ new) averaged over the steps of D′: ()."""
    return masked_mean(kl_old_new(task_data.old, new), task_data.outer.mask)


# %% 7. The TRPO step (TRPO §6, App. C; SpinUp TRPO lines 7-9; notes l.55-66)
#
# One step of TRPO on the meta-objective, in place of Algorithm 3's line 10:
#     g = ∇ surrogate(θ_old)        H = ∇²KL(θ_old), P × P, known only through v ↦ H·v
#     x ≈ H⁻¹g                      by conjugate gradient
#     θ = θ_old − ratioʲ·√(2δ / xᵀHx)·x     the first j that passes the line search


def gradient(function: Callable[[Tensor], Tensor], theta: Tensor) -> Tensor:
    """∇function at θ, as a new vector (P,) without a graph."""
    theta = theta.detach().requires_grad_()
    return torch.autograd.grad(function(theta), theta)[0]


def meta_gradient(policy, theta: Tensor, task_data: TaskData, alpha: float,
                  first_order: bool = False, estimator: str = "log-prob") -> Tensor:
    """One task's g = ∇_θ surrogate, (P,) [MAML Alg.3 l.10] [SpinUp TRPO l.7].

    Q: What must `meta_grad.backward()` reach, and what is g_k? [notes l.55-57]
    A: It must reach the *meta*-parameters θ, through θ′ = θ − α∇L(θ) and the gradient
       in it: g = Jᵀ∇_θ′ surrogate. g_k is its mean over tasks, (P,). The pseudocode's
       path is cut twice: `copy.deepcopy` makes parameters that do not know θ, and
       `optim.step()` changes them outside the graph. θ is left without a gradient.
    """
    return gradient(lambda t: surrogate_and_kl(
        policy, t, task_data, alpha, first_order, estimator)[0], theta)


def hessian_vector_product(grad_fn: Callable[[Tensor], Tensor], theta: Tensor,
                           v: Tensor, step: float = 0.01,
                           grad_at_theta: Tensor | None = None,
                           symmetric: bool = False) -> Tensor:
    """H·v by a finite difference of ∇k = grad_fn; theta, v, result (P,) [MAML §5.3].

    one-sided:  H·v ≈ (∇k(θ + εv) − ∇k(θ)) / ε           error O(ε)
    symmetric:  H·v ≈ (∇k(θ + εv) − ∇k(θ − εv)) / (2ε)    error O(ε²), twice the cost
    with ε = step/‖v‖, so that the move in θ has length `step` whatever v's length.

    `grad_at_theta` is ∇k(θ), None where it is known to be 0: the KL's gradient is, at
    θ_old, so one product costs ONE gradient.

    Q: Where is the third derivative that the paper avoids? [notes l.77-78]
    A: Not in the line search, which differentiates L only. With k(θ) = κ(θ′(θ)), κ the
       KL as a function of θ′,
           ∇²k = Jᵀ (∇²κ) J + Σ_j (∂κ/∂θ′_j) ∇²θ′_j,   ∇²θ′_j = −α ∂_j ∇²L,
       and that ∂_j∇²L is it. At θ_old each ∂κ/∂θ′_j is 0: double backprop builds the
       third-order graph and multiplies it by zero. A difference of ∇k needs second
       derivatives only. (Part II has the exact products.)
    Q: What size is the KL's Hessian? (obs × obs) × act? [notes l.61]
    A: P × P, here 10,604², never formed: one Hessian, of the KL averaged over samples
       and tasks. (`kl_div.mean(axis=1)` [notes l.60] would keep one for each task.)
    Q: What are CG, Hessian-vector products, damping for? (Q7)
    A: See `conjugate_gradient`.

    Authors' code: symmetric, ε = 1/‖θ‖ through a mixed-up argument: a move of ‖v‖/‖θ‖
                   [maml_rl conjugate_gradient_optimizer.py].
    Here:          one-sided, step 0.01: on point2d a median error of 8-9 %, far more
                   in CG's last directions; 76-95 % of the exact step's progress. A
                   smaller step is worse at initialisation, where episodes start on
                   ReLU's kinks (x = 0, zero biases): notes.md. `--hvp gauss-newton` is
                   exact, at twice the price.
    """
    eps = step / v.norm()
    if symmetric:
        return (grad_fn(theta + eps * v) - grad_fn(theta - eps * v)) / (2 * eps)
    ahead = grad_fn(theta + eps * v)
    return (ahead if grad_at_theta is None else ahead - grad_at_theta) / eps


def conjugate_gradient(hvp: Callable[[Tensor], Tensor], b: Tensor, iterations: int = 10,
                       tolerance: float = 1e-10) -> tuple[Tensor, Tensor]:
    """x ≈ H⁻¹b from products H·p alone: → (x, r = b − Hx), all (P,) [SpinUp TRPO l.8].

    Stops at r·r < `tolerance`, or, keeping the last x, when pᵀHp is not positive.

    Q: x = inverse(kl_hessian) * meta_grad, is that right? [notes l.62]
    A: H⁻¹g is wanted, but H has P² ≈ 10⁸ entries and need not have an inverse (and `*`
       multiplies entry by entry, with meta_grad a loss, not g). CG needs products H·p
       only; its n-th x is the best one in the span of g, Hg, …, Hⁿ⁻¹g. Ten are far
       from H⁻¹g on the walkers ("CG left" near 1), and still a good direction.
    Q: What are CG, HVP, damping for, and whose Hessian is it? (Q7)
    A: The Hessian of the mean KL between old and new *adapted* policies, as a function
       of θ: it measures a step by what it does to them. Damping, in `trpo_meta_step`,
       adds 1e-5·I: directions in which the KL is flat give no infinite steps.
    """
    x, r, p = torch.zeros_like(b), b, b
    rr = r @ r
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
    """√(2δ / xᵀHx): with s = scale·x, ½sᵀHs = δ [TRPO App.C] [SpinUp TRPO l.9]."""
    return math.sqrt(2 * max_kl / xHx)


def backtrack_line_search(evaluate: Callable[[Tensor], tuple[float, float]],
                          theta: Tensor, full_step: Tensor, surrogate_before: float,
                          max_kl: float, ratio: float = 0.8, trials: int = 15,
                          ) -> tuple[Tensor, float, float, int]:
    """θ + ratioʲ·full_step, smallest j that passes [SpinUp TRPO l.9] [notes l.65].

    `evaluate(θ)` → (surrogate, KL). → (θ_new, its surrogate, its KL, trials made), or θ
    itself, `surrogate_before`, 0.0 and 0 when none of the trials passed.

    Q: What does it check, and what if it fails? (Q6)
    A: That the surrogate fell AND the KL is within δ: the quadratic model behind the
       step's scale is only local. If no trial passes, θ stays what it was, and the log
       says so (line_search_steps 0).
    Q: `backtrack_line_search(kl_hessian, x)`? [notes l.65]
    A: It needs neither H nor a derivative, but the loss and δ, which the pseudocode
       does not give it; and every trial re-runs the inner step, see `surrogate_and_kl`.
    """
    for trial in range(trials):
        candidate = theta + ratio**trial * full_step
        surrogate, kl = evaluate(candidate)
        if surrogate < surrogate_before and kl <= max_kl:      # False for NaN
            return candidate, surrogate, kl, trial + 1
    return theta, surrogate_before, 0.0, 0


def kl_hessian_product(policy, theta: Tensor, task_data: Sequence[TaskData],
                       config: Config) -> Callable[[Tensor], Tensor]:
    """v ↦ H·v of the mean KL at θ_old; --hvp's exact products: Part II.

    With --first-order or the ratio estimator a difference is not symmetric: it moves θ′
    by its true J and multiplies by the estimator's Jᵀ. Their default is gauss-newton.
    """
    settings = config.alpha, config.first_order, config.inner_loss

    def kl(data):                                  # k(θ) = κ(θ′(θ)) of one task
        return lambda t: mean_kl(adapted_distribution(
            policy, t, data.inner, data.outer.obs, *settings), data)

    def mean(function):
        return mean_over_tasks(function, task_data, config.workers)

    if config.hvp != "finite-difference":
        return exact_product(policy, theta, kl, mean, config)
    return lambda v: hessian_vector_product(
        lambda t: mean(lambda data: gradient(kl(data), t)), theta, v, config.fd_step)


def trpo_meta_step(policy, theta: Tensor, task_data: Sequence[TaskData], config: Config,
                   ) -> tuple[Tensor, dict[str, float]]:
    """One TRPO step on the meta-objective: θ → (θ_new, the log's numbers)."""
    settings = config.alpha, config.first_order, config.inner_loss
    clock = Stopwatch()

    def evaluate(t: Tensor) -> tuple[float, float]:
        return tuple(mean_over_tasks(lambda data: torch.stack(surrogate_and_kl(
            policy, t.detach(), data, *settings)), task_data, config.workers).tolist())

    # At θ_old every ratio is 1: the surrogate is −mean Â′, 0 but for rounding.
    before = float(mean_over_tasks(lambda data: -masked_mean(
        data.outer.adv, data.outer.mask), task_data))
    g = mean_over_tasks(lambda data: meta_gradient(policy, theta, data, *settings),
                        task_data, config.workers)                             # (P,)
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


# %% 8. Meta-training (MAML Alg. 3; notes l.27-69)


def sample_task_data(policy, theta: Tensor, family: TaskFamily, task, config: Config,
                     seed: Sequence[int]) -> TaskData:
    """One task's D, θ′ and D′ [MAML Alg.3 l.5-8] [notes l.36-45]."""
    def sample(t, phase):
        return sample_trajectories(
            family, task, policy, t, config.rollouts, seed=(*seed, phase),
            horizon=config.horizon, gamma=config.gamma, lam=config.lam)

    theta_prime, inner = theta.detach(), []
    for step in range(config.inner_updates):
        inner.append(sample(theta_prime, step))                             # l.5
        theta_prime = adapt(policy, theta_prime, inner[-1:], config.alpha,  # l.6, l.7
                            False, config.inner_loss).detach()   # numbers only: Q8
    outer = sample(theta_prime, config.inner_updates)                       # l.8
    return TaskData(inner, outer, policy.distribution(theta_prime, outer.obs))


def train_maml(config: Config, family: TaskFamily | None = None,
               start: TrainState | None = None,
               after_iteration: Callable[[TrainState], None] = lambda state: None,
               ) -> tuple[Tensor, list[dict[str, float]]]:
    """Algorithm 3 with TRPO outside: → (θ (P,), one dict of numbers an iteration).

    `family` defaults to the task family that `config.task` names; `start` goes on from
    an earlier state; `after_iteration(state)` may print and save.
    Raises Diverged when a number stops being finite.

    Q: What else is wrong with the pseudocode's loop?
    A: Loudly: no `torch.kl_divergence` [notes l.48]; a list has no `mean` [notes l.60];
       its lists are never emptied: iteration 2 goes backward through a freed graph.
       Silently: a fixed list of tasks [notes l.28], of which no episode hears anything
       [notes l.1-14]; no `zero_grad`, so a copy's inner and outer gradient add up; one
       optimizer, which holds a replaced model's parameters; see `surrogate_and_kl` and
       `backtrack_line_search` for the rest.
    """
    family = family or family_of(config)
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
    returns = returns_of_tasks(data, mine, len(tasks))                      # (M, 2)
    stats = dict(seconds_sampling=clock.lap())
    new_theta, step = trpo_meta_step(policy, theta, data, config)              # l.10
    check_finite("θ", new_theta)
    check_std(policy.std(new_theta))
    stats.update(step, std_mean=float(policy.std(new_theta).mean()),
                 seconds_total=watch.lap())
    return state.after(new_theta, returns, stats)


# =====================================================================================
#   You can stop reading here. What follows is not the algorithm: the other tasks,
#   evaluation and baselines, checkpoints, figures, the command line.
# =====================================================================================

# %% Part II: the two exact Hessian-vector products (--hvp), beside section 7's


def double_backprop_product(function: Callable[[Tensor], Tensor], theta: Tensor,
                            v: Tensor) -> Tensor:
    """H·v = ∇(∇k·v), exactly; theta, v, result (P,). Third-order graph included."""
    theta = theta.detach().requires_grad_()
    (grad,) = torch.autograd.grad(function(theta), theta, create_graph=True)
    return torch.autograd.grad(grad @ v, theta)[0]


def gauss_newton_product(policy, theta: Tensor, task_data: TaskData, v: Tensor,
                         alpha: float, first_order: bool = False,
                         estimator: str = "log-prob") -> Tensor:
    """One task's Jᵀ(F(J·v)): exactly H·v at θ_old, with second derivatives only; (P,).

    J = J_n···J_1, one factor I − α∇²L_i for each inner step. A factor is symmetric, so
    the same reverse-mode product serves J (steps in order) and Jᵀ (in reverse order).
    """
    factors, theta_prime = [], theta.detach()       # (θ_i, ∇L_i(θ_i) with its graph)
    for trajectories in task_data.inner:
        theta_i = theta_prime.requires_grad_()
        loss = inner_loss(policy, theta_i, trajectories, estimator)
        (grad,) = torch.autograd.grad(loss, theta_i, create_graph=True)
        factors.append((theta_i, grad))
        theta_prime = (theta_i - alpha * grad).detach()
    if first_order:
        factors = []                                                           # J = I

    def times(factor, u):                           # u ↦ (I − α∇²L_i)·u
        theta_i, grad = factor
        return u - alpha * torch.autograd.grad(grad, theta_i, u, retain_graph=True)[0]

    def kl(phi):                                    # κ(φ); its Hessian at θ′: F
        return mean_kl(policy.distribution(phi, task_data.outer.obs), task_data)

    for factor in factors:
        v = times(factor, v)                                                # J·v
    v = double_backprop_product(kl, theta_prime, v)                         # F(J·v)
    for factor in reversed(factors):
        v = times(factor, v)                                                # Jᵀ(F(J·v))
    return v


def exact_product(policy, theta: Tensor, kl: Callable, mean: Callable,
                  config: Config) -> Callable[[Tensor], Tensor]:
    """`kl_hessian_product` for the two exact products."""
    settings = config.alpha, config.first_order, config.inner_loss
    return {
        "double-backprop": lambda v: mean(
            lambda data: double_backprop_product(kl(data), theta, v)),
        "gauss-newton": lambda v: mean(
            lambda data: gauss_newton_product(policy, theta, data, v, *settings)),
    }[config.hvp]


# %% Part II: machinery that Part I calls


def complete(config: Config) -> None:
    """Fill in the fields that are None from the task's preset; check every field."""
    if config.task not in PRESETS:
        raise BadInput(f"unknown task {config.task!r}: choose from "
                       f"{', '.join(PRESETS)}")
    preset = {name: value for name, (value, _) in PRESETS[config.task].items()}
    if config.alpha is not None:              # an α of one's own is for evaluation too
        preset["eval_alpha"] = config.alpha
    preset.setdefault("eval_alpha", preset["alpha"])
    preset["workers"] = available_cores()
    another_j = config.first_order or config.inner_loss == "ratio"
    preset["hvp"] = "gauss-newton" if another_j else "finite-difference"
    if config.method == "random":
        preset["iterations"] = 0
        if config.iterations:
            raise BadInput(f"method random does not train: leave out iterations "
                           f"{config.iterations}")
    for name, value in preset.items():
        if getattr(config, name) is None:
            object.__setattr__(config, name, value)
    for f in dataclasses.fields(config):
        check_setting(f, getattr(config, f.name))
    steps = config.horizon * max(config.meta_batch_size * config.rollouts,
                                 config.eval_tasks * config.eval_episodes)
    if steps > 10**8:
        raise BadInput(f"horizon × rollouts × meta_batch_size and horizon × "
                       f"eval_episodes × eval_tasks are at most 10**8, not {steps}")


class BadInput(ValueError):
    """Unusable input; the message says what, where, and what to do."""


POSITIVE = (lambda x: 0 < x < math.inf, "a finite number above 0")
NOT_NEGATIVE = (lambda x: 0 <= x < math.inf, "a finite number, 0 or more")
FRACTION = (lambda x: 0 <= x <= 1, "between 0 and 1")
COUNT = (lambda x: 1 <= x <= 10**9, "a whole number from 1 to 10**9")
COUNT_OR_0 = (lambda x: 0 <= x <= 10**9, "a whole number from 0 to 10**9")
RULES = {                                 # field of Config → what its value must be
    **dict.fromkeys(("seed", "iterations", "eval_steps"), COUNT_OR_0),
    **dict.fromkeys(("meta_batch_size", "rollouts", "horizon", "inner_steps", "workers",
                     "cg_iterations", "backtrack_steps", "eval_tasks", "eval_episodes"),
                    COUNT),
    **dict.fromkeys(("alpha", "damping", "cg_tolerance", "eval_alpha"), NOT_NEGATIVE),
    **dict.fromkeys(("init_std", "max_kl", "fd_step"), POSITIVE),
    **dict.fromkeys(("gamma", "lam"), FRACTION),
    "backtrack_ratio": (lambda x: 0 < x < 1, "above 0 and below 1"),
    "hidden": (lambda sizes: sizes and all(1 <= n <= 10**4 for n in sizes),
               "whole numbers from 1 to 10000, such as 100,100"),
}


def random_stream(*key: int) -> np.random.Generator:
    """Random numbers as a function of `key`, such as (seed, iteration, task, phase).

    The key's length goes in too: numpy takes (a, b) and (a, b, 0, 0) for the same seed.
    """
    return np.random.default_rng([len(key), *(int(k) for k in key)])


def map_over_tasks(function: Callable, tasks: Sequence, workers: int = 1) -> list:
    """[function(task) for task in tasks], on `workers` threads, in order.

    Threads are enough: torch and MuJoCo let go of Python's lock inside their kernels.
    """
    if workers == 1:
        return [function(task) for task in tasks]
    return list(thread_pool(workers).map(function, tasks))


def numpy_sampler(policy: GaussianPolicy, theta: Tensor, rng: np.random.Generator,
                  ) -> Callable:
    """`GaussianPolicy.sampler`: the same network in numpy.

    Numpy's calls cost a third of torch's on K = 20 rows, and rollouts make 4,000 of
    them an iteration. A test holds it to `distribution`.
    """
    *layers, log_std = [x.detach().numpy() for x in policy.unpack(theta)]
    std = np.exp(np.maximum(log_std, math.log(policy.MIN_STD)))
    zero = np.zeros(1, std.dtype)     # converting a plain 0 takes longer than the ReLU
    activate = {F.relu: lambda x: np.maximum(x, zero, out=x), torch.tanh: np.tanh}[
        policy.activation]
    weights, biases = [np.ascontiguousarray(w.T) for w in layers[::2]], layers[1::2]
    hidden = list(zip(weights[:-1], biases[:-1]))

    def act(obs: np.ndarray) -> np.ndarray:
        x = obs.astype(std.dtype, copy=False)
        for weight, bias in hidden:
            x = activate(x.dot(weight) + bias)
        mean = x.dot(weights[-1]) + biases[-1]                                 # (K, A)
        return mean + std * rng.standard_normal(mean.shape, std.dtype)
    return act


def set_spaces(envs: VectorEnv, observation: gym.Space, action: gym.Space) -> None:
    """Give a vector environment its spaces, of one copy and of all."""
    batch = gym.vector.utils.batch_space
    envs.single_observation_space, envs.single_action_space = observation, action
    envs.observation_space = batch(observation, envs.num_envs)
    envs.action_space = batch(action, envs.num_envs)


@contextmanager
def one_thread_each():
    """One thread per kernel, since the parallelism is over tasks; memory kept at hand.

    glibc hands freed blocks of a megabyte back to the kernel, and every new one then
    costs page faults again; freeing one block of 30 MB raises that threshold (measured:
    10-20 % of an iteration). Without glibc it does nothing.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.ones(30 * 2**18)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@functools.lru_cache
def thread_pool(workers: int) -> ThreadPoolExecutor:
    """One pool for each number of threads, kept for the life of the process."""
    return ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))


@contextmanager
def process_group():
    """Join the other processes that torchrun started; alone, do nothing.

    When one of them dies, either gloo's next call fails or torchrun's SIGTERM comes
    first: both raise RuntimeError, and `main` says what happened.
    """
    def stop(*_):
        raise torch.distributed.DistError("torchrun sent SIGTERM")

    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    torch.distributed.init_process_group("gloo")
    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)   # this process is ending anyway
        torch.distributed.destroy_process_group()


def first_rank() -> bool:
    """Whether this process prints and writes: alone, or number 0 under torchrun."""
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def from_first_rank(function: Callable[[], Any]) -> Any:
    """function() as process 0 computes it, on every process; its BadInput ends all."""
    outcome = [None]
    if first_rank():
        try:
            outcome = [(function(), None)]
        except BadInput as error:
            outcome = [(None, error)]
        except OSError as error:                     # a path that no system can take
            outcome = [(None, BadInput(f"{error}: choose another path"))]
    if torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(outcome)
    value, error = outcome[0]
    if error:
        raise error if first_rank() else SystemExit(2)             # said once is enough
    return value


def share_of_tasks(M: int) -> range:
    """The task numbers that this process works on: all, or under torchrun a share."""
    if not torch.distributed.is_initialized():
        return range(M)
    return range(torch.distributed.get_rank(), M, torch.distributed.get_world_size())


def gather_over_tasks(values: Sequence, mine: Sequence[int], M: int) -> np.ndarray:
    """Rows of numbers of this process's tasks → the rows of all M tasks, (M, ...)."""
    if not torch.distributed.is_initialized():
        return np.array(values)
    everyone: list = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, list(zip(mine, values)))
    return np.array([row for _, row in sorted(sum(everyone, []))])


def returns_of_tasks(data: Sequence[TaskData], mine: Sequence[int], M: int):
    """Mean returns with θ and with θ′ of all M tasks, for the log: (M, 2)."""
    return gather_over_tasks([[(d.inner or [d.outer])[0].mean_return(),
                               d.outer.mean_return()] for d in data], mine, M)


class Stopwatch:
    """Seconds between calls of `lap`."""

    def __init__(self):
        self.started = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last call."""
        now = time.perf_counter()
        seconds, self.started = now - self.started, now
        return seconds


class Diverged(RuntimeError):
    """Training produced numbers that are not finite; the message says which, when."""


SMALLER = "try a smaller --alpha or --max-kl"


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
    if not all(np.isfinite(x).all() for x in recorded):
        finite = np.stack([np.isfinite(x).all(-1) for x in recorded], -1)      # (H,K,3)
        step, _, which = np.argwhere(~finite)[0]
        name = ("observation", "action", "reward")[which]
        error, advice = ((Diverged, SMALLER) if name == "action" else
                         (BadInput, "check the environment's reset() and step()"))
        raise error(f"task {task}: the {name} at step {step} is not finite: {advice}")


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


def check_setting(f: dataclasses.Field, value) -> None:
    """Raise BadInput unless `value` has the type and range of Config's field `f`."""
    kind = {"int": int, "float": (int, float), "bool": bool, "str": str,
            "tuple": tuple}[f.type]
    numbers = value if f.type == "tuple" and isinstance(value, tuple) else [value]
    wrong_type = not isinstance(value, kind) or f.type != "bool" and any(
        isinstance(x, bool) or f.type == "tuple" and not isinstance(x, int)
        for x in numbers)
    choices, (ok, must) = f.metadata["choices"], RULES.get(f.name, (None, ""))
    if choices and (wrong_type or value not in choices):
        raise BadInput(f"{f.name} must be one of {', '.join(choices)}, not {value!r}")
    if wrong_type or ok and not ok(value):
        raise BadInput(f"{f.name} must be {must or f'of type {f.type}'}, not {value!r}")


def available_cores() -> int:
    """Processors for this process: a share of them where torchrun starts several."""
    cores = (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity")
             else os.cpu_count() or 1)
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


# %% Part II: the paper's locomotion tasks (MAML §5.3)


@functools.lru_cache
def load_model(xml: str):
    """The mujoco module and a model that Gymnasium ships; BadInput if not installed."""
    try:
        import mujoco
    except ImportError:
        raise BadInput('this task needs MuJoCo, which is not installed: pip install '
                       '"gymnasium[mujoco]"') from None
    # MuJoCo would write its warnings to a file in the current folder. Two are known: a
    # word of the cheetah's file is old; a state is not finite (`step` sees to that).
    mujoco.set_mju_user_warning(lambda text: None)
    model = mujoco.MjModel.from_xml_path(
        str(Path(gym.__file__).parent / "envs" / "mujoco" / "assets" / xml))
    model.opt.disableflags |= mujoco.mjtDisableBit.mjDSBL_AUTORESET
    return mujoco, model


class Locomotion(VectorEnv):
    """K copies of one of Gymnasium's walkers, with an unseen task in the reward.

    States, observations and, seed by seed, the noise of the first state are those of
    Gymnasium's HalfCheetah-v5 and Ant-v5 to the last bit; a test compares them.
    Rewards and the ends of episodes are those of the authors' code: see the subclasses.
    Actions are clipped to [−1, 1] before the physics and before their cost.

    Authors' code: rllab's bodies. A step of the cheetah is 0.01 s, of the ant 0.02 s.
    Here:          Gymnasium's. A step is 5 × 0.01 s for both, so the 200 steps are 10 s
                   and not 2 s or 4 s: compare returns in shape only. More in notes.md.

    Every copy has its own MjData. `mujoco.rollout` would step all of them in one call
    (its speed: see notes.md), but gives back neither the ant's contact forces nor the
    solver's warm start, without which episodes drift away from Gymnasium's.
    """
    FRAME_SKIP, NOISE = 5, 0.1
    metadata = {"autoreset_mode": AutoresetMode.DISABLED}     # a copy that ended rests
    XML: str                        # a subclass says which model …
    HIDDEN: int                     # … how many coordinates are not observed: x (y) …
    x_of: Callable                  # … and where in an MjData the torso's x is: (1,)

    def __init__(self, num_envs: int):
        self._mujoco, self.model = load_model(self.XML)
        self.dt = self.FRAME_SKIP * self.model.opt.timestep
        self.copies = [self._mujoco.MjData(self.model) for _ in range(num_envs)]
        # Views into MuJoCo's memory, made once
        self._state = [view for d in self.copies for view in (d.qpos, d.qvel)]
        self._ctrl = [d.ctrl for d in self.copies]
        self._x = [self.x_of(d) for d in self.copies]
        self._forces = [d.cfrc_ext.ravel() for d in self.copies]
        self.num_envs, box = num_envs, gym.spaces.Box
        size = self.observe(self.read(self._state)).shape[1:]
        set_spaces(self, box(-np.inf, np.inf, size, np.float64),
                   box(-1.0, 1.0, (self.model.nu,), np.float32))
        self.task = np.zeros(1)
        self._rngs: list = [None] * num_envs
        self._ended = np.zeros(num_envs, bool)

    def read(self, views: list[np.ndarray]) -> np.ndarray:
        """Numbers of all copies: (K, n)."""
        return np.concatenate(views).reshape(len(self.copies), -1)

    def observe(self, state: np.ndarray) -> np.ndarray:
        """What Gymnasium's environment shows of qpos and qvel (K, nq + nv): (K, S)."""
        return state[:, self.HIDDEN:]

    def reset(self, *, seed=None, options=None):
        """All copies to the start; `options={"task": (v*,)}` or `(±1,)` sets the task.

        `seed`: a number for each copy, from which its noise is drawn; s: s, s+1, ….
        Gymnasium's `options={"reset_mask": (K,)}` keeps the others where they are.
        """
        if options and "task" in options:
            task = np.asarray(options["task"], float)
            if task.shape != (1,) or not np.isfinite(task).all():
                raise BadInput(f"{type(self).__name__}: a task is one number in a row, "
                               f"not {task}")
            self.task = task
        if seed is None or isinstance(seed, (int, np.integer)):
            seed = [None if seed is None else seed + k for k in range(self.num_envs)]
        mask = (options or {}).get("reset_mask", np.ones(self.num_envs, bool))
        for k in np.flatnonzero(mask):
            if seed[k] is not None or self._rngs[k] is None:
                self._rngs[k], _ = gym.utils.seeding.np_random(seed[k])
            self._start(k)
        self._ended = self._ended & ~mask
        return self.observe(self.read(self._state)), {}

    def _start(self, k: int) -> None:
        d, rng = self.copies[k], self._rngs[k]
        self._mujoco.mj_resetData(self.model, d)
        d.qpos += rng.uniform(-self.NOISE, self.NOISE, self.model.nq)
        d.qvel += self.NOISE * rng.standard_normal(self.model.nv)
        self._mujoco.mj_forward(self.model, d)

    def step(self, actions):
        """One step of each running copy: actions (K, A) → Gymnasium's five results."""
        actions = np.minimum(np.maximum(np.asarray(actions, float), -1.0), 1.0)
        x, ended = self.read(self._x), self._ended
        for d, ctrl, action, rests in zip(self.copies, self._ctrl, actions, ended):
            if not rests:
                ctrl[:] = action
                self.advance(d)
        velocity = (self.read(self._x) - x)[:, 0] / self.dt                    # (K,)
        state = self.read(self._state)
        finite = np.isfinite(state).all(1)
        reward = np.where(finite & ~ended, self.reward(velocity, actions), 0.0)
        self._ended = ended | ~(finite & self.healthy(state))
        obs = self.observe(state)
        obs[~finite] = 0.0
        return obs, reward, self._ended.copy(), np.zeros(self.num_envs, bool), {}

    def advance(self, d) -> None:
        """The physics of one copy's step."""
        self._mujoco.mj_step(self.model, d, self.FRAME_SKIP)

    def healthy(self, state: np.ndarray) -> np.ndarray | bool:
        """Which copies go on: (K,)."""
        return True


class HalfCheetahVel(Locomotion):
    """Run at speed v*: r = −|v − v*| − 0.05·Σa² [maml_rl half_cheetah_env_rand.py]."""
    XML, HIDDEN = "half_cheetah.xml", 1
    x_of = staticmethod(lambda d: d.qpos[:1])

    def gain(self, velocity: np.ndarray) -> np.ndarray:
        return -np.abs(velocity - self.task[0])

    def reward(self, velocity: np.ndarray, actions: np.ndarray) -> np.ndarray:
        return self.gain(velocity) - 0.05 * (actions ** 2).sum(1)


class HalfCheetahDir(HalfCheetahVel):
    """Run forward (1) or backward (−1): r = ±v − 0.05·Σa²."""

    def gain(self, velocity):
        return self.task[0] * velocity


class AntVel(Locomotion):
    """Walk along x at speed v* [maml_rl ant_env_rand.py], while 0.2 ≤ height ≤ 1:

    r = 1 − |v − v*| + 0.05 − 0.005·Σa² − 0.0005·Σ clip(contact forces, ±1)²

    Paper: a bonus each step, so that ending the episode does not pay. Its size, 1, is
    from the authors' code.
    """
    XML, HIDDEN = "ant.xml", 2
    x_of = staticmethod(lambda d: d.body("torso").xpos[:1])

    def gain(self, velocity: np.ndarray) -> np.ndarray:
        return 1.0 - np.abs(velocity - self.task[0])

    def reward(self, velocity, actions):
        return (self.gain(velocity) + 0.05 - 0.005 * (actions ** 2).sum(1)
                - 0.0005 * (self.contacts() ** 2).sum(1))

    def contacts(self) -> np.ndarray:
        """Six numbers a body, the first body being the world: (K, 84)."""
        return np.clip(self.read(self._forces), -1.0, 1.0)

    def observe(self, state):
        return np.concatenate([super().observe(state), self.contacts()[:, 6:]], 1)

    def advance(self, d):
        super().advance(d)
        self._mujoco.mj_rnePostConstraint(self.model, d)           # the contact forces

    def healthy(self, state):
        return (0.2 <= state[:, 2]) & (state[:, 2] <= 1.0)


class AntDir(AntVel):
    """Walk forward (1) or backward (−1): AntVel with ±v in place of 1 − |v − v*|."""

    def gain(self, velocity):
        return self.task[0] * velocity


class VelocitiesScaled(gym.vector.VectorObservationWrapper):
    """A walker whose policy sees a tenth of each velocity (m/s, rad/s).

    Authors' code: no scaling.
    Here:          joints turn at ±10 rad/s while angles stay within ±1. With Xavier
                   weights the first policy's mean is then beyond the actions' limits in
                   45 % of the cheetah's steps, where no gradient can be felt. After 20
                   iterations: 133 with scaling, −1 without; notes.md has the runs.
    """
    UNIT = 10.0

    def __init__(self, envs: Locomotion):
        super().__init__(envs)
        self.scale = np.ones(envs.single_observation_space.shape)
        angles = envs.model.nq - envs.HIDDEN
        self.scale[angles:angles + envs.model.nv] = 1 / self.UNIT

    def observations(self, obs: np.ndarray) -> np.ndarray:
        return obs * self.scale


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
        self.task = np.asarray((options or {}).get("task", self.task), float)
        return super().reset(seed=seed, options=options)

    def observations(self, obs: np.ndarray) -> np.ndarray:
        task = np.broadcast_to(self.task, (len(obs), len(self.task)))
        return np.concatenate([obs, task], axis=1, dtype=obs.dtype)


@functools.lru_cache
def with_task_observed(family: TaskFamily) -> TaskFamily:
    """The same tasks for `--method oracle`: the policy is told which one it is in."""
    task_size = np.shape(family.test_tasks(1))[1]
    return dataclasses.replace(
        family, make_envs=lambda K: TaskObserved(family.make_envs(K), task_size),
        _cache=threading.local())


def walkers(name: str, body, highest: float | None = None) -> TaskFamily:
    """v* ~ U[0, highest], held-out ones from a fixed seed; or one of two directions,
    which alternate at evaluation: nothing can be held out."""
    def make_envs(K: int) -> VectorEnv:
        return VelocitiesScaled(body(K))

    if highest:
        return TaskFamily(
            name, make_envs, lambda rng, M: rng.uniform(0, highest, (M, 1)),
            lambda n: np.random.RandomState(1).uniform(0, highest, (n, 1)), 200, True)
    return TaskFamily(name, make_envs, lambda rng, M: rng.choice([-1.0, 1.0], (M, 1)),
                      lambda n: np.resize([1.0, -1.0], (n, 1)), 200, True)


def sample_goals(rng: np.random.Generator, M: int) -> np.ndarray:
    """M goals, uniform on the unit square around the origin (M, 2) [MAML §5.3]."""
    return rng.uniform(-0.5, 0.5, (M, 2))


def paper_goals(n: int = 40) -> np.ndarray:
    """The first n of the paper's 40 test goals: numpy's old generator, seed 1."""
    return np.random.RandomState(1).uniform(-0.5, 0.5, (n, 2))


TASKS: dict[str, TaskFamily] = {family.name: family for family in (
    TaskFamily("point2d", Point2D, sample_goals, paper_goals, horizon=100),
    walkers("cheetah-vel", HalfCheetahVel, highest=2.0),
    walkers("cheetah-dir", HalfCheetahDir),
    walkers("ant-vel", AntVel, highest=3.0),
    walkers("ant-dir", AntDir),
)}

FIGURE_RUN = "the authors' run behind the paper's figure"
LOCOMOTION = dict(
    iterations=(475, FIGURE_RUN + ", with 10 rollouts; the paper allows up to 500"),
    meta_batch_size=(40, "paper"), rollouts=(20, "paper"), horizon=(200, "paper"),
    eval_episodes=(20, "paper: no other number than in training"),
    alpha=(0.1, "paper"), gamma=(0.95, "ours, measured: notes.md; authors' code 0.99"),
    init_std=(0.5, "ours, measured: notes.md; authors' code: 1.0"),
    max_kl=(0.05, "ours, measured: notes.md; authors' code: 0.01, cheetah-dir 0.02"))
PRESETS |= {
    "cheetah-vel": LOCOMOTION,
    "cheetah-dir": LOCOMOTION | dict(iterations=(100, FIGURE_RUN)),
    "ant-vel": LOCOMOTION | dict(iterations=(375, FIGURE_RUN)),
    "ant-dir": LOCOMOTION | dict(iterations=(575, FIGURE_RUN), rollouts=(40, "paper"),
                                 eval_episodes=(40, "paper, as in training")),
}


def family_of(config: Config) -> TaskFamily:
    """The family a run uses: TASKS[task]; for the oracle with the task observed."""
    family = TASKS[config.task]
    return with_task_observed(family) if config.method == "oracle" else family


def make_policy(family: TaskFamily, config: Config) -> GaussianPolicy:
    """A policy that fits the family's spaces; raises BadInput where none does."""
    envs = family.envs(config.rollouts)
    if not isinstance(envs, VectorEnv) or envs.num_envs != config.rollouts:
        raise BadInput(f"{family.name}: make_envs({config.rollouts}) must return a "
                       f"Gymnasium VectorEnv of {config.rollouts} copies")
    obs, act = envs.single_observation_space, envs.single_action_space
    for name, space in (("observation", obs), ("action", act)):
        if not isinstance(space, gym.spaces.Box) or not (
                len(space.shape) == 1 <= space.shape[0]):
            raise BadInput(f"{family.name}: the {name} space must be a Box of one row "
                           f"of numbers, not {space}: wrap the environment")
    check_environment(family, envs, config)
    return GaussianPolicy(obs.shape[0], act.shape[0], config.hidden, config.activation,
                          config.init_std)


def check_environment(family: TaskFamily, envs: VectorEnv, config: Config) -> None:
    """Raise BadInput unless reset and a first step keep to Gymnasium and the spaces.

    Whether `reset` heeds the task cannot be seen. Later errors pass as they are.
    """
    K, shape = envs.num_envs, envs.observation_space.shape
    if family.name not in TASKS and config.horizon != family.horizon:
        raise BadInput(f"{family.name}: its horizon is {family.horizon}, the settings' "
                       f"{config.horizon}: give both the same")
    try:
        obs, _ = envs.reset(seed=[0] * K, options={"task": family.test_tasks(1)[0]})
        results = obs, *envs.step(np.zeros(envs.action_space.shape, np.float32))[:4]
        if [np.shape(x) for x in results] != [shape, shape, (K,), (K,), (K,)]:
            raise ValueError(f"shapes {[np.shape(x) for x in results]}")
    except (TypeError, ValueError, AttributeError) as error:
        raise BadInput(f"{family.name}: reset() and step() must take and return what "
                       f"Gymnasium says, in the spaces' shapes: {error}") from error


# %% 9. Evaluation (MAML §5.3, App. A.2)


def adaptation(policy, theta: Tensor, family: TaskFamily, task, steps: int,
               episodes: int, alpha: float, *, horizon: int | None, gamma: float,
               lam: float, estimator: str, seed: Sequence[int],
               ) -> Iterator[tuple[Tensor, Trajectories]]:
    """Adapt θ to one held-out task: yields (φ, fresh episodes with φ), steps + 1 times.

    φ is θ at first. Its episodes make the next step: α for the first, then α/2.
    """
    phi = theta.detach()
    for step in range(steps + 1):
        data = sample_trajectories(
            family, task, policy, phi, episodes, horizon=horizon, gamma=gamma, lam=lam,
            seed=(*seed, step))
        yield phi, data
        if step < steps:
            phi = adapt(policy, phi, [data], alpha if step == 0 else alpha / 2, False,
                        estimator).detach()


def adaptation_of(config: Config, theta: Tensor, m: int, steps: int,
                  ) -> Iterator[tuple[Tensor, Trajectories]]:
    """`adaptation` to held-out task m with a run's settings, for the figures."""
    family = family_of(config)
    return adaptation(
        make_policy(family, config), theta, family, family.test_tasks(m + 1)[m], steps,
        config.eval_episodes, config.eval_alpha, horizon=config.horizon,
        gamma=config.gamma, lam=config.lam, estimator=config.inner_loss,
        seed=(config.seed, EVALUATION, m))


def adaptation_returns(policy, theta: Tensor, family: TaskFamily, tasks: Sequence,
                       steps: int = 3, episodes: int = 40, alpha: float = 0.1, *,
                       horizon: int | None = None, gamma: float = 0.99,
                       lam: float = 1.0, estimator: str = "log-prob", seed: int = 0,
                       workers: int = 1) -> np.ndarray:
    """Mean return of held-out tasks before and after each step: (tasks, steps + 1).

    α for the first step and α/2 for the later ones, as in the paper; `episodes` fresh
    episodes after every step, whose mean return is reported and which then make the
    next step.

    Q: What are the before and after numbers, where does test-time learning happen? (Q3)
    A: Column 0 is θ itself, a policy that knows no task and so can only hedge: on
       point2d it hovers at the origin. Column k is that task's policy after k plain
       policy-gradient steps (`adapt`) on k batches of its episodes. Nothing else
       learns: θ is not touched, and every number comes from fresh episodes.
    Q: How were oracle, pretrained, random made? (Q9)
    A: By `--method`: pretrained trains one policy over all tasks without adaptation,
       random does not train; both are then adapted here like MAML's θ. The oracle sees
       the task in its observation; only its column 0 means anything.
    """
    mine = share_of_tasks(len(tasks))

    def row(m: int) -> list[float]:
        return [data.mean_return() for _, data in adaptation(
            policy, theta, family, tasks[m], steps, episodes, alpha, horizon=horizon,
            gamma=gamma, lam=lam, estimator=estimator, seed=(seed, EVALUATION, m))]
    workers = workers if family.threads else 1
    return gather_over_tasks(map_over_tasks(row, mine, workers), mine, len(tasks))


EVALUATION = 2**31      # stands in place of the iteration in the seeds of evaluation


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


def evaluate(config: Config, theta: Tensor, family: TaskFamily | None = None,
             ) -> np.ndarray:
    """The run's adaptation table (tasks, steps + 1); the oracle has step 0 only.

    `family` as for `train_maml`. Raises BadInput if θ is not of its policy's size.
    """
    family = family or family_of(config)
    policy = make_policy(family, config)
    if theta.shape != (policy.num_params,):
        raise BadInput(f"θ has {theta.numel()} numbers, the policy for {family.name} "
                       f"{policy.num_params}: is it of another task?")
    steps = 0 if config.method == "oracle" else config.eval_steps
    with one_thread_each():
        return adaptation_returns(
            policy, theta, family,
            family.test_tasks(config.eval_tasks), steps, config.eval_episodes,
            config.eval_alpha, horizon=config.horizon, gamma=config.gamma,
            lam=config.lam, estimator=config.inner_loss, seed=config.seed,
            workers=config.workers)


# %% Files of a run: config.json, checkpoint.pt, progress.csv, evaluation.csv

FORMAT, VERSION = "maml_trpo checkpoint", 1


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """`write` a file beside `path`, then rename it: readers see the old or the new."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(beside)
        with open(beside, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(beside, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        beside.unlink(missing_ok=True)


def save_checkpoint(path: Path, config: Config, state: TrainState) -> None:
    """The whole state, self-describing, atomically."""
    content, data = dict(format=FORMAT, version=VERSION, task=config.task,
                         config=dataclasses.asdict(config), **vars(state)), io.BytesIO()
    torch.save(content, data)         # into memory: a full disk is then an OSError
    write_atomically(path, lambda beside: beside.write_bytes(data.getvalue()))


def load_checkpoint(path: Path) -> tuple[Config, TrainState]:
    """Read a checkpoint; if it is none, raise BadInput and leave the file as it is."""
    def refuse(why):
        raise BadInput(f"{path}: {why}; it was left as it is") from None
    try:
        if zipfile.ZipFile(path).testzip():            # torch.load checks no checksums
            raise zipfile.BadZipFile
        content = torch.load(path, weights_only=True)
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file") from None
    except OSError as error:
        raise BadInput(f"{path} cannot be read ({error.strerror})") from None
    except Exception:        # torch.load raises whatever a foreign file makes it raise
        refuse("not a checkpoint of this program, or a damaged one")
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        refuse("not a checkpoint of this program")
    if content.get("version") != VERSION:
        refuse(f"written by another version (format {content.get('version')!r}, this "
               f"program reads {VERSION})")
    try:
        config = Config(**content["config"])
        state = TrainState(**{f.name: content[f.name]
                              for f in dataclasses.fields(TrainState)})
        P = make_policy(family_of(config), config).num_params
        if math.isnan(state.best_return) or not (
                len(state.rows) == len(state.spread) == state.iteration):
            raise ValueError("its rows are not those of its iteration")
    except (KeyError, TypeError, ValueError) as error:
        refuse(f"a checkpoint with unusable content ({error})")
    for theta in (state.theta, state.best_theta):
        if not (isinstance(theta, Tensor) and theta.shape == (P,)
                and theta.dtype in (torch.float32, torch.float64)
                and torch.isfinite(theta).all()):
            refuse(f"its θ is not {P} finite numbers")
    return config, state


def write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence]) -> None:
    """A table with a header, atomically."""
    def write(beside):
        with open(beside, "w", newline="", encoding="utf-8") as f:
            csv.writer(f).writerows([header, *rows])
    write_atomically(path, write)


def write_evaluation(path: Path, method: str, returns: np.ndarray) -> None:
    """One row for each held-out task (by its number) and step."""
    write_csv(path, ("method", "task", "step", "return"), [
        (method, task, step, float(value)) for task, row in enumerate(returns)
        for step, value in enumerate(row)])


def read_evaluation(folder: Path, task: str) -> tuple[str, np.ndarray]:
    """Another run's method and (tasks, steps + 1) table; BadInput if there is none.

    From a run's folder, or from an evaluation.csv alone, which does not name its task.
    """
    try:
        other, file = task, folder
        if folder.suffix != ".csv":
            run, file = (folder / "config.json").exists(), folder / "evaluation.csv"
            with open(folder / ("config.json" if run else "evaluated.json"),
                      encoding="utf-8") as f:
                other = json.load(f)["task"]
        with open(file, newline="", encoding="utf-8") as f:
            rows = list(csv.DictReader(f))
        shape = [1 + max(int(row[name]) for row in rows) for name in ("task", "step")]
        table = np.full(shape, np.nan)
        for row in rows:
            table[int(row["task"]), int(row["step"])] = float(row["return"])
        method = rows[0]["method"]
        if not np.isfinite(table).all():
            raise ValueError
    except Exception:                # whatever a foreign file makes json and csv raise
        raise BadInput(f"--compare {folder}: no finished run there (it needs "
                       f"evaluation.csv, and config.json or evaluated.json)") from None
    if other != task:
        raise BadInput(f"--compare {folder}: a run of {other}, not of {task}")
    return method, table


# %% 10. Figures

PALETTE = {"maml": "#1f6fb4", "pretrained": "#d95f02", "random": "#7f7f7f",
           "oracle": "#2a9d4e"}


def new_figure(columns: int = 1, width: float = 6.4, height: float = 4.0):
    """A figure and its axes, made without any window system."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    figure = Figure(figsize=(width, height), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
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
            (1, "return_post", "after adaptation", PALETTE["maml"])):
        if k == 0 and not config.inner_updates:
            continue
        ax.plot(iterations, [row[name] for row in state.rows], color=color, label=label)
        ax.fill_between(iterations, spread[:, 2 * k], spread[:, 2 * k + 1], color=color,
                        alpha=0.2, linewidth=0)
    ax.set(xlabel="meta-iteration", ylabel="return (undiscounted, training tasks)",
           title=f"{config.task}, {config.method}, seed {config.seed}: mean over "
                 f"{config.meta_batch_size} tasks, band = middle half")
    ax.title.set_fontsize(10)
    ax.legend(frameon=False)
    figure.savefig(path)


def draw_adaptation(path: Path, config: Config,
                    tables: Sequence[tuple[str, np.ndarray]]) -> None:
    """Return against the number of gradient steps, with the paper's rows dashed."""
    figure, (ax,) = new_figure(width=8.4)
    for label, table in tables:
        steps = np.arange(table.shape[1])
        color = PALETTE.get(method_of(label), None)
        mean = np.nanmean(table, axis=0)
        error = standard_error(*by_task(config, table).values())
        if len(steps) == 1:
            ax.axhline(mean[0], color=color, label=label)
        else:
            ax.errorbar(steps, mean, yerr=error, color=color, marker="o", capsize=3,
                        label=label)
    for method, row in PAPER.get(config.task, {}).items():
        if method in {method_of(label) for label, _ in tables}:
            style = dict(color=PALETTE[method], linestyle="--", alpha=0.7)
            if len(row) == 1:
                ax.axhline(row[0], label=f"{method}, paper", **style)
            else:
                ax.plot(range(len(row)), row, marker="s", markersize=4,
                        label=f"{method}, paper", **style)
    note = "" if config.task == "point2d" else "\n(paper: another simulator)"
    count, groups = len(tables[0][1]), len(by_task(config, tables[0][1]))
    over = f"{count} " + ("held-out tasks" if groups == 1 else
                          f"evaluations of the {groups} tasks")
    ax.set(xlabel="gradient steps on the task", ylabel="return (undiscounted)",
           title=f"{config.task}: mean ± standard error over {over}{note}")
    ax.title.set_fontsize(10)
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path)


def draw_trajectories(path: Path, config: Config, theta: Tensor, goals: int = 4):
    """Paths in the plane before and after 1-3 steps, as the paper's Figure 4."""
    figure, axes = new_figure(goals, 3.1 * goals, 3.4)
    for m, (ax, goal) in enumerate(zip(axes, family_of(config).test_tasks(goals))):
        for step, (_, data) in enumerate(
                adaptation_of(config, theta, m, config.eval_steps)):
            length = int(data.mask[0].sum())
            ax.plot(*data.obs[0, :length].T, linewidth=1.2, alpha=0.9,
                    color=f"C{step}", label=f"{step} steps" if step != 1 else "1 step")
        ax.plot(*goal, "k*", markersize=11, label="goal")
        ax.plot(0, 0, "ko", markersize=4)
        ax.set(aspect="equal", xlabel="x", title=f"goal ({goal[0]:.2f}, {goal[1]:.2f})",
               xlim=(-0.65, 0.65), ylim=(-0.65, 0.65))
    axes[0].set_ylabel("y")
    axes[-1].legend(frameon=False, fontsize=8, loc="center left",
                    bbox_to_anchor=(1, 0.5))
    figure.savefig(path)


def method_of(label: str) -> str:
    """"maml, last θ" → "maml"."""
    return label.split(",")[0]


def by_task(config: Config, table: np.ndarray) -> dict[str, np.ndarray]:
    """The rows of a table (tasks, n), apart for tasks that come again: the two
    directions, which are all of p(T). Other tasks are a sample, in one group."""
    tasks = family_of(config).test_tasks(len(table))
    kinds = np.unique(tasks, axis=0)
    if len(kinds) == len(tasks):
        return {"": table}
    return {f"task {kind[0]:+g}": table[(tasks == kind).all(1)] for kind in kinds}


def standard_error(*groups: np.ndarray) -> np.ndarray:
    """Of the mean of all rows, from the spread within each group: (…, n) → (n,).

    What lies *between* the two directions is no error: both are always there.
    """
    variances = [len(rows) * rows.var(axis=0, ddof=1) if len(rows) > 1
                 else 0 * rows[0] for rows in groups]
    return np.sqrt(sum(variances)) / sum(map(len, groups))


def comparison_table(config: Config, tables: Sequence[tuple[str, np.ndarray]]) -> str:
    """Our rows (mean ± standard error over tasks) above the paper's."""
    width = max(len(label) for label, _ in tables) + 2
    width = max(width, len("pretrained, paper") + 2)
    columns = max(table.shape[1] for _, table in tables)
    lines = ["gradient steps".ljust(width)
             + "".join(f"{step:>17}" for step in range(columns))]
    for label, table in tables:
        groups = by_task(config, table)
        rows = {label: list(groups.values())}
        if len(groups) > 1:
            rows |= {f"  {name}": [group] for name, group in groups.items()}
        for name, parts in rows.items():
            one = sum(map(len, parts)) == len(parts)       # nothing to see a spread in
            cells = [f"{m:9.2f}" + (" " * 8 if one else f" ± {e:5.2f}") for m, e in zip(
                np.nanmean(np.concatenate(parts), axis=0), standard_error(*parts))]
            lines.append(name.ljust(width) + "".join(cell.rjust(17) for cell in cells))
    for method, row in PAPER.get(config.task, {}).items():
        if method in {method_of(label) for label, _ in tables}:
            cells = [f"{value:9.2f}        " for value in row[:columns]]
            lines.append(f"{method}, paper".ljust(width)
                         + "".join(cell.rjust(17) for cell in cells))
    if config.task != "point2d":
        lines.append("The paper's simulator differs: compare shapes, not numbers.")
    return "\n".join(lines)


# %% Part II: --render


def walker_camera(xml: str, width: int = 320, height: int = 240) -> Callable:
    """A function qpos → picture (height, width, 3), drawn without a window."""
    mujoco, model = load_model(xml)
    for backend in ("egl", "osmesa", "glfw"):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                module = importlib.import_module(f"mujoco.{backend}")
                gl = module.GLContext(width, height)
                gl.make_current()
                context = mujoco.MjrContext(model, 100)          # 100: size of its font
            break
        except Exception:                # of which type depends on what is missing
            continue
    else:
        raise BadInput("--render: MuJoCo has nothing here to draw with: install EGL or "
                       "OSMesa (Debian: libegl1, libosmesa6), or leave --render out")
    mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, context)
    data, scene = mujoco.MjData(model), mujoco.MjvScene(model, 1000)
    camera, rect = mujoco.MjvCamera(), mujoco.MjrRect(0, 0, width, height)
    camera.type, camera.fixedcamid = mujoco.mjtCamera.mjCAMERA_FIXED, 0    # it follows

    def picture(qpos: np.ndarray) -> np.ndarray:
        gl.make_current()
        data.qpos[:], pixels = qpos, np.empty((height, width, 3), np.uint8)
        mujoco.mj_forward(model, data)
        mujoco.mjv_updateScene(model, data, mujoco.MjvOption(), None, camera,
                               mujoco.mjtCatBit.mjCAT_ALL, scene)
        for effect in ("mjRND_SHADOW", "mjRND_REFLECTION"):    # two thirds of the time
            scene.flags[getattr(mujoco.mjtRndFlag, effect)] = False
        mujoco.mjr_render(rect, scene, context)
        mujoco.mjr_readPixels(pixels, None, rect, context)
        return pixels[::-1]
    return picture


def plane_picture(path: np.ndarray, goal: np.ndarray, size: int = 240) -> np.ndarray:
    """A walk in the plane so far, path (t, 2), and its goal, within ±0.75."""
    from PIL import Image, ImageDraw
    image = Image.new("RGB", (2 * size, 2 * size), "white")
    draw, scale = ImageDraw.Draw(image), np.array([1, -1]) / 0.75
    pixels = [tuple((size * (1 + scale * xy)).tolist())
              for xy in (np.zeros(2), goal, *path)]
    draw.line(pixels[2:], fill=PALETTE["maml"], width=4, joint="curve")
    for at, radius, color in ((0, 6, "black"), (1, 12, "#d95f02"),
                              (-1, 10, PALETTE["maml"])):
        draw.circle(pixels[at], radius, fill=color)
    return np.asarray(image.resize((size, size)))


def render_gif(path: Path, config: Config, theta: Tensor, every: int = 2) -> None:
    """One episode with θ beside one with θ′, on the first held-out task."""
    from PIL import Image, ImageDraw
    family, plane = family_of(config), config.task == "point2d"
    policy, task, envs = (make_policy(family, config), family.test_tasks(1)[0],
                          family.envs(1))
    body, seed = envs.unwrapped, (config.seed, EVALUATION, 0)
    camera = None if plane else walker_camera(body.XML)
    panels = []
    for title, (phi, _) in zip(("before", "after one step"),
                               adaptation_of(config, theta, 0, steps=1)):
        rng, total, states = random_stream(*seed, 1), 0.0, []
        obs, _ = envs.reset(seed=[int(rng.integers(2**31))], options={"task": task})
        act = policy.sampler(phi, rng)
        for _ in range(config.horizon):
            states.append(obs[0, :2] if plane else body.copies[0].qpos.copy())
            obs, reward, terminated, _, _ = envs.step(act(obs))
            total += float(reward[0])
            if terminated[0]:
                break
        pictures = [plane_picture(np.array(states[:t + 1]), task) if plane
                    else camera(states[t]) for t in range(0, len(states), every)]
        panels.append((f"{title}: return {total:.1f}", pictures))
    frames = []
    for t in range(max(len(pictures) for _, pictures in panels)):
        row = [pictures[min(t, len(pictures) - 1)] for _, pictures in panels]
        frames.append(Image.fromarray(np.concatenate(row, axis=1)))
        for k, (title, _) in enumerate(panels):
            ImageDraw.Draw(frames[-1]).text((8 + k * row[0].shape[1], 6), title,
                                            fill="black" if plane else "white")
    write_atomically(path, lambda beside: frames[0].save(
        beside, format="GIF", save_all=True, append_images=frames[1:], loop=0,
        duration=int(1000 * every * (0.05 if plane else body.dt))))


# %% 11. Command line

RUN_FILES = ("config.json", "evaluated.json", "checkpoint.pt", "progress.csv",
             "evaluation.csv", "learning.png", "adaptation.png", "trajectories.png")
EVALUATION_FLAGS = ("eval_tasks", "eval_episodes", "eval_steps", "eval_alpha",
                    "workers", "seed")


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are BadInput: one sentence, exit status 2."""

    def error(self, message: str):
        raise BadInput(f"{message} (--help lists every setting)")


def whole_numbers(text: str) -> tuple[int, ...]:
    """"100,100" → (100, 100)."""
    return tuple(int(part) for part in text.split(","))


def build_parser() -> Parser:
    """Every field of Config is a flag; its help says its default and source."""
    parser = Parser(prog="maml_trpo.py", allow_abbrev=False,
                    formatter_class=argparse.RawTextHelpFormatter,
                    description="MAML-TRPO: meta-train, evaluate, draw, compare.")
    for f in dataclasses.fields(Config):
        flag, lines = "--" + f.name.replace("_", "-"), [f.metadata["help"]]
        if f.metadata["choices"]:
            lines.append("one of " + ", ".join(f.metadata["choices"]))
        if f.name == "task":
            lines.append("one of " + ", ".join(PRESETS))
        if f.default is not None:
            lines.append(f"default {f.default}")
        lines += [f"{task}: {preset[f.name][0]} ({preset[f.name][1]})"
                  for task, preset in PRESETS.items() if f.name in preset]
        kind = dict(action="store_true") if f.type == "bool" else dict(
            type=dict(int=int, float=float, str=str, tuple=whole_numbers)[f.type],
            metavar=dict(int="N", float="X", str="NAME", tuple="N,N")[f.type])
        parser.add_argument(flag, default=argparse.SUPPRESS, **kind,
                            help="\n".join(lines).replace("%", "%%"))
    add = functools.partial(parser.add_argument, default=argparse.SUPPRESS)
    add("--out", type=Path, metavar="DIR",
        help="where the run writes (default: the next free runs/TASK-METHOD-seedS)")
    add("--resume", action="store_true", help="go on from DIR's checkpoint")
    add("--init", type=Path, metavar="FILE", help="start from a saved θ")
    add("--evaluate", type=Path, metavar="FILE",
        help="no training: table and figures of a saved θ")
    add("--compare", type=Path, nargs="+", metavar="DIR",
        help="put other runs (or evaluation.csv files) into the table and figure")
    add("--render", type=Path, metavar="FILE.gif",
        help="at the end, draw an episode before and one after a gradient step")
    return parser


def say(*text: str) -> None:
    """Print, on one process; go on silently if it fails (`| head`, or a full disk)."""
    if not first_rank():
        return
    try:
        print(*text, flush=True)
    except (OSError, ValueError):
        sys.stdout = open(os.devnull, "w", encoding="utf-8")


def next_free(name: str) -> Path:
    """runs/NAME, or NAME-2, NAME-3, … if that is there already."""
    count = 1
    while (path := Path("runs") / (name if count == 1 else f"{name}-{count}")).exists():
        count += 1
    return path


def leftovers(folder: Path) -> set[Path]:
    """Temporary files of processes that were killed while they wrote."""
    return {path for name in RUN_FILES for path in folder.glob(f".{name}.*.tmp")}


def make_folder(folder: Path, resume: bool) -> None:
    """Create the run's folder; BadInput if it cannot be written or holds a run."""
    there = [name for name in RUN_FILES if (folder / name).exists()]
    if there and not resume:
        raise BadInput(f"{folder} already holds a run ({there[0]}): add --resume to go "
                       f"on with it, or choose another --out")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f".config.json.{os.getpid()}.tmp").touch()
        for path in leftovers(folder):
            path.unlink()
    except OSError as error:
        raise BadInput(f"--out {folder} cannot be written ({error.strerror}): choose "
                       f"another folder") from None


def resumed(folder: Path, given: dict) -> tuple[Config, TrainState | None]:
    """A run's settings and state; BadInput if `given` would change what it computes."""
    if not folder.is_dir():
        raise BadInput(f"--resume: there is no folder {folder}")
    if (folder / "checkpoint.pt").exists():
        config, state = load_checkpoint(folder / "checkpoint.pt")
    elif (folder / "config.json").exists() or (
            set(folder.iterdir()) <= leftovers(folder)):
        config, state = read_config(folder / "config.json") or Config(**given), None
    else:
        raise BadInput(f"--resume: {folder} holds files, but no run")
    for name, value in given.items():
        old = getattr(config, name)
        if name == "iterations" and value >= (state.iteration if state else 0):
            continue
        if name != "workers" and value != old:
            raise BadInput(f"--resume: the run in {folder} has {name} {old}, not "
                           f"{value}: only a larger --iterations can be changed")
    allowed = {name: given[name] for name in ("iterations", "workers") if name in given}
    return dataclasses.replace(config, **allowed), state


def write_config(path: Path, config: Config) -> None:
    """A run's settings, or in evaluated.json those of an evaluation without a run."""
    write_atomically(path, lambda beside: beside.write_text(
        json.dumps(dataclasses.asdict(config), indent=1) + "\n", encoding="utf-8"))


def read_config(path: Path) -> Config | None:
    """The settings in a run's config.json; None if there is none."""
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return Config(**content | {"hidden": tuple(content["hidden"])})
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise BadInput(f"{path} is not a run's configuration ({error})") from None


PROGRESS_HEADER = ("  iter   return before → after   surrogate      KL  trials  CG left"
                   "    std    s/it     left")


def progress_line(row: dict[str, float], iterations: int, recent: float) -> str:
    """What is printed of an iteration; `recent`: seconds an iteration takes now."""
    left = (iterations - 1 - row["iteration"]) * recent
    search = f"{row['line_search_steps']:6d}" if row["line_search_steps"] else "  none"
    return (f"{row['iteration'] + 1:6d}  {row['return_pre']:12.2f} → "
            f"{row['return_post']:8.2f}  {row['surrogate_after']:10.5f} "
            f"{row['kl']:7.4f}  {search} {row['cg_residual']:8.3f} "
            f"{row['std_mean']:6.3f} {row['seconds_total']:7.2f}  "
            f"{left / 60:3.0f}m{left % 60:02.0f}s")


def train_in_folder(config: Config, folder: Path, state: TrainState) -> TrainState:
    """Train, with a checkpoint, a CSV row and a printed line after every iteration."""
    latest = [state]

    def after_iteration(state: TrainState) -> None:
        latest[0] = state
        if first_rank():
            row = state.rows[-1]
            with open(folder / "progress.csv", "a", newline="", encoding="utf-8") as f:
                csv.writer(f).writerow(row.values())
            save_checkpoint(folder / "checkpoint.pt", config, state)
            recent = np.median([r["seconds_total"] for r in state.rows[-10:]])
            say(progress_line(row, config.iterations, recent))

    if first_rank():
        save_checkpoint(folder / "checkpoint.pt", config, state)
        write_config(folder / "config.json", config)
        write_csv(folder / "progress.csv", PROGRESS_COLUMNS,
                  [row.values() for row in state.rows])
    if state.iteration < config.iterations:
        say(PROGRESS_HEADER)
    try:
        train_maml(config, start=state, after_iteration=after_iteration)
    except KeyboardInterrupt:
        if latest[0].rows and first_rank():
            draw_learning_curve(folder / "learning.png", config, latest[0])
        say(f"Interrupted after iteration {latest[0].iteration}. Go on with: python "
            f"maml_trpo.py --task {config.task} --out {folder} --resume")
        raise
    return latest[0]


def report(config: Config, folder: Path, state: TrainState,
           compare: Sequence[Path]) -> None:
    """Evaluate the last θ; write evaluation.csv and the figures; print the table."""
    say(f"Evaluating the last θ on {config.eval_tasks} tasks, "
        f"{config.eval_episodes} episodes after each step …")
    table = evaluate(config, state.theta)
    if not first_rank():
        return
    write_evaluation(folder / "evaluation.csv", config.method, table)
    tables = [(f"{config.method}, last θ", table)]
    for other in compare:
        method, rows = read_evaluation(other, config.task)
        size = "" if len(rows) == len(table) else f", {len(rows)} tasks"
        name = other.name.removesuffix(".csv").removesuffix("-evaluation")
        tables.append((f"{method}, {name}{size}", rows))
    if state.rows:
        draw_learning_curve(folder / "learning.png", config, state)
    draw_adaptation(folder / "adaptation.png", config, tables)
    if config.task == "point2d":
        draw_trajectories(folder / "trajectories.png", config, state.theta)
    say("\nReturn, mean ± standard error over the tasks\n"
        + comparison_table(config, tables))


def prepare(options: dict[str, Any]) -> tuple[Config, Path, TrainState]:
    """Settings, folder and first state of what a command line asks for."""
    names = {f.name for f in dataclasses.fields(Config)}
    given = {name: value for name, value in options.items() if name in names}
    resume, folder = options.get("resume", False), options.get("out")
    if "evaluate" in options:
        allowed = {*EVALUATION_FLAGS, "evaluate", "out", "compare", "task", "render"}
        for name in sorted(set(options) - allowed):
            raise BadInput(f"--evaluate takes {name} from the file: leave it out")
        config, state = load_checkpoint(options["evaluate"])
        if given.get("task", config.task) != config.task:
            raise BadInput(f"{options['evaluate']} is of {config.task}, not of "
                           f"{given['task']}")
        config = dataclasses.replace(config, **given)
        folder = folder or next_free(f"{config.task}-{config.method}-evaluated")
    else:
        config, state = Config(**given), None
        name = f"{config.task}-{config.method}-seed{config.seed}"
        if resume and not folder and (Path("runs") / f"{name}-2").exists():
            raise BadInput(f"--resume: there are several runs/{name}…: name one, --out")
        folder = folder or (Path("runs") / name if resume else next_free(name))
        if resume:
            config, state = resumed(folder, given)
        if "init" in options and (state or config.method == "random"):
            raise BadInput("--init is for a run that trains and has not begun: leave "
                           "it out")
        if state is None:
            state = TrainState.initial(make_policy(family_of(config), config), config)
            if "init" in options:
                state = start_from(options["init"], config, state)
    if torch.distributed.is_initialized() and (
            config.meta_batch_size < torch.distributed.get_world_size()):
        raise BadInput(f"meta_batch_size {config.meta_batch_size} is less than the "
                       f"number of processes: start fewer")
    for other in options.get("compare", []):
        read_evaluation(other, config.task)
    if "render" in options:                      # find out now, not after the training
        if options["render"].suffix.lower() != ".gif":
            raise BadInput(f"--render {options['render']}: the name must end in .gif")
        if options["render"].exists():
            raise BadInput(f"--render {options['render']}: that file is there already")
        options["render"].touch()
        options["render"].unlink()
        if config.task != "point2d":
            walker_camera(family_of(config).envs(1).unwrapped.XML)
    make_folder(folder, resume)
    return config, folder, state


def run(options: dict[str, Any]) -> int:
    """Carry out a parsed command line."""
    started = time.perf_counter()
    config, folder, state = from_first_rank(lambda: prepare(options))
    if "evaluate" not in options:
        times = (f"{config.inner_updates + 1} times" if config.inner_updates else
                 "once (no inner step: before = after)")
        done = f", {state.iteration} of them done" if state.iteration else ""
        say(f"{config.task}, {config.method}, seed {config.seed}: {config.iterations} "
            f"meta-iterations{done} of {config.meta_batch_size} tasks × "
            f"{config.rollouts} episodes × {config.horizon} steps, {times}; "
            f"{config.workers} workers; writes to {folder}")
        state = train_in_folder(config, folder, state)
    else:
        say(f"{options['evaluate']}: {config.task}, {config.method}, seed "
            f"{config.seed}, θ after {state.iteration} meta-iterations")
        if first_rank():
            write_config(folder / "evaluated.json", config)
    report(config, folder, state, options.get("compare", []))
    if "render" in options and first_rank():
        render_gif(options["render"], config, state.theta)
    files = " and ".join(str(x) for x in (folder, options.get("render")) if x)
    say(f"\nDone in {time.perf_counter() - started:.0f} s. Files: {files}")
    return 0


def start_from(path: Path, config: Config, start: TrainState) -> TrainState:
    """The state before the first iteration, with the θ that another run ended on."""
    theirs, other = load_checkpoint(path)
    old, new = ((c.task, c.hidden, c.activation, c.method == "oracle")
                for c in (theirs, config))
    if old != new:
        raise BadInput(f"--init {path}: its task, hidden, activation and oracle are "
                       f"{old}, this run's {new}: they must be the same")
    return dataclasses.replace(start, theta=other.theta, best_theta=other.theta)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line: → exit status (0 done, 1 failed, 2 bad input, 130 Ctrl-C)."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):      # a terminal that cannot show θ gets ?
            stream.reconfigure(errors="replace")

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
        return fail(1, f"{error}; the last checkpoint is intact: mend the cause, then "
                       f"go on with --resume")
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, MemoryError) or "allocate memory" in str(error):
            return fail(1, f"out of memory, choose smaller settings ({error!s:.80})")
        if not isinstance(error, torch.distributed.DistError) and (
                "gloo" not in str(error)):
            raise
        return fail(1, "another process of this run ended or cannot be reached, or "
                       "torchrun was stopped; the last checkpoint, if there is one, is "
                       "intact: go on with --resume and the --out of this run")
    except KeyboardInterrupt:
        return fail(130, "interrupted; --resume goes on from the last checkpoint")


if __name__ == "__main__":
    sys.exit(main())
