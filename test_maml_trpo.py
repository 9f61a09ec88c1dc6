"""The tests of maml_trpo.py in the order of its sections, then the proofs of notes.md.

    python -m pytest                        the fast suite
    MAML_SLOW=1 python -m pytest            the long tests too

Oracles are independent of the functions they test: plain loops, closed forms,
torch.distributions, dense solves, central finite differences in float64, a raw
Gymnasium environment. Sizes are pairwise different, so that a wrong axis cannot hide;
inputs are random and seeded; nothing depends on the clock.
"""
import contextlib
import copy
import csv
import dataclasses
import functools
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import gymnasium as gym
import hypothesis
import hypothesis.strategies as draw
import numpy as np
import pytest
import torch
import torch.distributed.run
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from torch.distributions import Independent, Normal, kl_divergence

import maml_trpo as mt

HERE = Path(__file__).resolve().parent
SLOW = os.environ.get("MAML_SLOW") == "1"
slow = pytest.mark.skipif(not SLOW, reason="takes minutes: set MAML_SLOW=1")
with warnings.catch_warnings():                  # there is no pytest.ini to name it in
    warnings.simplefilter("ignore", pytest.PytestUnknownMarkWarning)
    text = pytest.mark.text           # reads text, runs nothing: catches no mutation
hypothesis.settings.register_profile(
    "ours", derandomize=True, deadline=None, database=None,
    max_examples=2000 if SLOW else 150,
    suppress_health_check=list(hypothesis.HealthCheck))
hypothesis.settings.load_profile("ours")
torch.set_num_threads(1)
ALPHA = 0.1
POINT2D = mt.TASKS["point2d"]
HVPS = ("finite-difference", "double-backprop", "gauss-newton")
pytestmark = pytest.mark.filterwarnings("ignore:.*fork")       # with idle threads
FORK = torch.multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")


# %% Helpers: small random problems, float64, pairwise different sizes

def random_trajectories(rng, K=3, H=5, S=4, A=2):
    """Trajectories of random numbers; two end early and are padded with zeros."""
    mask = np.ones((K, H))
    mask[0, H - 2:] = 0
    mask[1, H - 1:] = 0
    obs = rng.standard_normal((K, H, S)) * mask[..., None]
    act = rng.standard_normal((K, H, A)) * mask[..., None]
    rew = rng.standard_normal((K, H)) * mask
    adv = rng.standard_normal((K, H)) * mask
    return mt.Trajectories(*(torch.tensor(x) for x in (obs, act, rew, mask, adv)))


def plain_policy(policy, theta, obs):
    """π_θ by torch.distributions; no std is near its minimum."""
    mean = policy.distribution(theta, obs).mean
    return Independent(Normal(mean, theta[-mean.shape[-1]:].exp()), 1)


def plain_mean(x, mask):
    return (x * mask).sum() / mask.sum()


def plain_adapt(policy, theta, inner, alpha=ALPHA, config=None):
    """θ′, written out once more: a function of θ if θ requires grad, else numbers."""
    graph = theta.requires_grad
    for d in inner:
        t = theta if graph else theta.detach().requires_grad_()
        log_prob = plain_policy(policy, t, d.obs).log_prob(d.act)
        if config and config.inner_loss == "ratio":
            log_prob = (log_prob - log_prob.detach()).exp()
        loss = -plain_mean(log_prob * d.adv, d.mask)
        (grad,) = torch.autograd.grad(loss, t, create_graph=graph)
        theta = t - alpha * (grad.detach() if config and config.first_order else grad)
    return theta if graph else theta.detach()


def small_problem(seed=0, inner_steps=1, activation="tanh", K=3, H=5, S=4, A=2):
    """policy, θ_old (float64), TaskData whose `old` is the adapted policy at θ_old."""
    rng = np.random.default_rng(seed)
    policy = mt.GaussianPolicy(S, A, hidden=(7, 6), activation=activation, init_std=0.7)
    theta = policy.init(torch.Generator().manual_seed(seed), torch.float64)
    theta = theta + 0.1 * torch.tensor(rng.standard_normal(theta.shape))
    inner = [random_trajectories(rng, K, H, S, A) for _ in range(inner_steps)]
    outer = random_trajectories(rng, K + 1, H, S, A)
    old = policy.distribution(plain_adapt(policy, theta, inner), outer.obs)
    return policy, theta, mt.TaskData(inner, outer, old)


def central_difference(function, theta, step=1e-5):
    """∂function/∂θ by central differences: (P,), or (P, n) for n functions at once."""
    moves = step * torch.eye(len(theta), dtype=theta.dtype)
    return torch.stack([function(theta + move) - function(theta - move)
                        for move in moves]) / (2 * step)


hessian = functools.partial(torch.autograd.functional.hessian, vectorize=True)
jacobian = functools.partial(torch.autograd.functional.jacobian, vectorize=True)


def gap(a, b):
    """‖a − b‖/‖b‖ of two vectors or matrices."""
    return float((a - b).norm() / b.norm())


def order(steps, errors):
    """n in error ∝ stepⁿ: the slope on logarithmic axes."""
    return np.polyfit(np.log(steps), np.log(errors), 1)[0]


def tiny_config(**changes):
    """A run of a second: everything small, whatever the presets are."""
    return mt.complete(mt.Config(**{**dict(
        iterations=2, meta_batch_size=3, rollouts=4, horizon=7, hidden=(8, 6),
        alpha=0.2, lam=1.0, max_kl=0.02, cg_iterations=3, hvp="finite-difference",
        eval_tasks=5, eval_episodes=3, workers=1), **changes}))


def sampled_problem(config, seed=0, dtype=torch.float64):
    """policy, θ and the data of config.meta_batch_size tasks of point2d."""
    policy = mt.make_policy(POINT2D, config)
    theta = policy.init(torch.Generator().manual_seed(seed), dtype)
    theta += 0.1 * torch.randn(theta.shape, generator=torch.Generator().manual_seed(9),
                               dtype=dtype)
    tasks = POINT2D.sample_tasks(np.random.default_rng(seed), config.meta_batch_size)
    return policy, theta, [
        mt.sample_task_data(policy, theta, POINT2D, task, config, (seed, m))
        for m, task in enumerate(tasks)]


def without_seconds(rows):
    return [{k: v for k, v in row.items() if "seconds" not in k} for row in rows]


def toy_family(reward=lambda t, task: 0.1 * t, obs=lambda t: np.zeros(2, np.float32),
               done=lambda t: False, S=None, A=None, reset="new", results=5, raises=0,
               mode=AutoresetMode.NEXT_STEP, **changes):
    """A task family of which every part can be replaced by a wrong one."""
    class Toy(gym.Env):
        observation_space = S or gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)
        action_space = A or gym.spaces.Box(-1, 1, (3,), np.float32)

        def step(self, action):
            self.t += 1
            if self.t == raises:
                raise KeyError("a mistake of one's own")
            return (obs(self.t), reward(self.t, self.task), done(self.t), False,
                    {})[:results]

        def reset(self, *, seed=None, options=None):
            self.t, self.task = 0, (options or {}).get("task", getattr(self, "task", 0))
            return (obs(0), {}) if reset == "new" else obs(0)

    return dataclasses.replace(mt.TaskFamily(
        "toy", lambda K: SyncVectorEnv([Toy] * K, autoreset_mode=mode),
        lambda rng, M: rng.uniform(-1, 1, (M, 1)), lambda n: np.zeros((n, 1)), 4),
        **changes)


def train_toy(family, **changes):
    small = dict(meta_batch_size=2, rollouts=2, horizon=4, hidden=(4,), cg_iterations=2)
    return mt.train_maml(tiny_config(**small | changes), family)


# %% Section 0: configuration

# Every default once more, by hand: what `--task NAME` alone does.
DEFAULTS = dict(
    method="maml", seed=0, inner_steps=1, first_order=False, inner_loss="log-prob",
    hidden=(100, 100), activation="relu", damping=1e-5, cg_tolerance=1e-10,
    fd_step=0.01, backtrack_ratio=0.8, backtrack_steps=15, eval_tasks=40, eval_steps=3)
COLUMNS = ("iterations", "meta_batch_size", "rollouts", "horizon", "alpha",
           "eval_alpha", "eval_episodes", "gamma", "lam", "init_std", "max_kl",
           "cg_iterations", "hvp")
ALL_TASKS = {
    "point2d": (60, 20, 20, 100, 0.1, 0.1, 40, 0.99, 0.9, 1.0, 0.05, 5, HVPS[0]),
    "cheetah-vel": (100, 20, 20, 200, 0.1, 0.1, 20, 0.95, 1.0, 0.5, 0.05, 10, HVPS[0]),
    "cheetah-dir": (200, 20, 20, 200, 0.1, 0.1, 20, 0.95, 1.0, 0.5, 0.05, 10, HVPS[0]),
    "ant-vel": (140, 5, 40, 200, 0.2, 0.2, 40, 0.97, 0.95, 0.5, 0.05, 10, HVPS[2]),
    "ant-dir": (300, 2, 40, 200, 0.2, 0.2, 40, 0.97, 0.95, 0.5, 0.05, 10, HVPS[2]),
}


@pytest.mark.parametrize("task", ALL_TASKS)
def test_presets_and_defaults_are_these(task):
    config = dataclasses.asdict(mt.complete(mt.Config(task=task)))
    assert config.pop("workers") >= 1
    assert config == {**DEFAULTS, **dict(zip(COLUMNS, ALL_TASKS[task])), "task": task}
    assert mt.TASKS[task].horizon == config["horizon"]
    assert set(mt.TASKS) == set(mt.PRESETS) == set(ALL_TASKS)


def test_replace_changes_what_it_names_and_nothing_else():
    """What was not given is filled in by `complete`, and only there."""
    nothing = mt.Config()
    usual = dataclasses.asdict(mt.complete(nothing))
    assert nothing.alpha is nothing.horizon is nothing.workers is None
    for changes, more in (
            (dict(alpha=0.5), dict(eval_alpha=0.5)),
            (dict(alpha=0.5, eval_alpha=0.4), {}),
            (dict(task="ant-dir"), dict(zip(COLUMNS, ALL_TASKS["ant-dir"]))),
            (dict(method="random"), dict(iterations=0)), (dict(first_order=True), {})):
        full = mt.complete(dataclasses.replace(nothing, **changes))
        assert dataclasses.asdict(full) == {**usual, **changes, **more}
        assert mt.complete(full) == full


@pytest.mark.parametrize("ranks, workers", [("1", 6), ("2", 3), ("9", 1)])
def test_workers_are_the_cores_or_a_ranks_share_of_them(monkeypatch, ranks, workers):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
    assert mt.complete(mt.Config()).workers == workers


@pytest.mark.parametrize("name, value", [
    ("alpha", -0.1), ("alpha", math.nan), ("alpha", math.inf), ("alpha", "much"),
    ("gamma", 1.5), ("meta_batch_size", 0), ("rollouts", 1.5), ("rollouts", True),
    ("backtrack_ratio", 1.5), ("backtrack_ratio", 0), ("inner_steps", 0),
    ("horizon", 10**9), ("hidden", ()), ("hidden", (3, 0)), ("hidden", [3]),
    ("hvp", "magic"), ("max_kl", 0), ("task", "walker"), ("first_order", 1)])
def test_config_refuses_an_impossible_value_by_name(name, value):
    with pytest.raises(mt.BadInput, match=rf"\b{name}\b"):
        mt.Config(**{name: value})


# %% Section 1: tasks

def test_point2d_ends_in_a_box_and_not_in_a_circle():
    """At (0.008, 0.008) from the goal an episode ends; at (0.011, 0.0) it does not."""
    envs = mt.Point2D(3)
    envs.reset(options={"task": np.array([0.008, 0.008])})
    _, _, ended, _, _ = envs.step(np.array([[0.0, 0.0], [-0.03, 0.08], [0.0, 0.17]]))
    assert ended.tolist() == [True, False, True]
    assert envs.single_action_space == gym.spaces.Box(-1, 1, (2,), np.float32)
    assert envs.action_space.shape == envs.observation_space.shape == (3, 2)


def test_goals_are_the_papers_and_training_goals_fill_the_square():
    """The paper's goals by six of their digits, and by what standing still scores."""
    goals = POINT2D.test_tasks(40)
    assert goals.shape == (40, 2)
    np.testing.assert_allclose(goals[[0, 1, 39]], [
        [-0.082978, 0.220324], [-0.499886, -0.197667], [0.250812, 0.225998]], atol=1e-6)
    envs, returns = mt.Point2D(1), []
    for goal in goals:
        envs.reset(options={"task": goal})
        returns.append(sum(envs.step(np.zeros((1, 2)))[1].item() for _ in range(100)))
    assert round(np.mean(returns), 2) == -40.08
    goals = POINT2D.sample_tasks(np.random.default_rng(0), 2000)
    assert goals.shape == (2000, 2) and np.abs(goals).max() <= 0.5
    np.testing.assert_allclose(goals.mean(0), 0, atol=0.03)
    np.testing.assert_allclose(goals.std(0), 1 / math.sqrt(12), atol=0.02)
    assert abs(np.corrcoef(goals.T)[0, 1]) < 0.1              # and not its diagonal


def test_two_threads_never_share_an_environment_and_each_makes_its_own_once():
    made, both = [], threading.Barrier(2, timeout=10)
    family = dataclasses.replace(
        POINT2D, make_envs=lambda K: made.append(K) or mt.Point2D(K))

    def envs(_):
        both.wait()                     # so that both threads live at the same time
        return family.envs(3), family.envs(3), family.envs(4)

    with ThreadPoolExecutor(2) as pool:
        (a, again, other), (b, _, another) = pool.map(envs, range(2))
    assert a is again and a is not b and other is not another
    assert (a.num_envs, other.num_envs) == (3, 4) and sorted(made) == [3, 3, 4, 4]


def test_replaced_make_envs_makes_the_environments_that_are_used():
    """A family that was used before, and the oracle's, which is made of it."""
    family = dataclasses.replace(POINT2D, make_envs=mt.Point2D)
    assert family.envs(3).single_observation_space.shape == (2,)
    oracle = mt.family_of(mt.Config(method="oracle"), family)
    assert oracle.envs(3).single_observation_space.shape == (4,)
    assert family.envs(3).single_observation_space.shape == (2,)
    other = dataclasses.replace(family, make_envs=toy_family().make_envs)
    assert other.envs(3).single_action_space.shape == (3,)
    assert family.envs(3).single_action_space.shape == (2,)


# %% Section 2: the policy

def test_policy_kl_equals_torch_distributions_and_monte_carlo():
    """The reversed arguments give another number."""
    policy, theta, data = small_problem()
    other, obs = theta + 0.3, data.outer.obs[0, :3]
    old, new = (policy.distribution(t, obs) for t in (theta, other))
    kl = mt.kl_old_new(old, new)
    torch.testing.assert_close(kl, kl_divergence(*(
        plain_policy(policy, t, obs) for t in (theta, other))))
    assert kl.shape == (3,) and (kl - mt.kl_old_new(new, old)).abs().min() > 1e-3
    torch.manual_seed(1)
    act = old.sample((200_000,))
    estimate = old.log_prob(act) - new.log_prob(act)
    error = estimate.std(0) / math.sqrt(len(act))
    assert ((estimate.mean(0) - kl).abs() < 5 * error).all()


@pytest.mark.parametrize("activation, log_std, expected", [
    ("relu", -0.4, math.exp(-0.4)), ("tanh", 3.0, math.exp(3.0)), ("relu", -99, 1e-6)])
def test_policy_sampler_draws_from_distribution(activation, log_std, expected):
    """The numpy twin of the network: the same mean and σ, with the same least σ."""
    policy, theta, _ = small_problem(activation=activation)
    theta[-1] = log_std
    obs = np.random.default_rng(0).standard_normal((9, 4))
    act = policy.sampler(theta, np.random.default_rng(1))
    draws = np.stack([act(obs) for _ in range(5_000)])
    pi = policy.distribution(theta, torch.tensor(obs))
    std = pi.stddev.numpy()
    assert (abs(draws.mean(0) - pi.mean.numpy()) < 5 * std / 70).all()
    np.testing.assert_allclose(draws.std(0), std, rtol=0.06)
    np.testing.assert_allclose([std[0, 1], policy.std(theta)[1]], expected, rtol=1e-6)


def test_policy_init_is_xavier_with_zero_biases():
    policy = mt.GaussianPolicy(30, 10, hidden=(50, 40))
    *layers, _ = policy.unpack(policy.init(torch.Generator().manual_seed(0)))
    for weight in layers[::2]:
        bound = math.sqrt(6 / sum(weight.shape))
        assert 0.95 * bound < weight.abs().max() <= bound
        assert abs(float(weight.std()) - bound / math.sqrt(3)) < 0.1 * bound
    assert not any(bias.any() for bias in layers[1::2])


@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_policy_of_a_run_equals_torchs_layers_with_its_sizes_and_first_std(activation):
    policy = mt.make_policy(POINT2D, tiny_config(activation=activation, init_std=0.3))
    theta = policy.init(torch.Generator().manual_seed(0), torch.float64)
    torch.testing.assert_close(theta[-2:].exp(), torch.full_like(theta[-2:], 0.3))
    theta[:-2] += 0.1
    unit = {"relu": torch.nn.ReLU, "tanh": torch.nn.Tanh}[activation]
    layers = torch.nn.Sequential(torch.nn.Linear(2, 8), unit(), torch.nn.Linear(8, 6),
                                 unit(), torch.nn.Linear(6, 2))
    torch.nn.utils.vector_to_parameters(theta[:-2], layers.parameters())
    obs = torch.tensor([[0.4, -0.7], [0.1, 3.0]], dtype=torch.float64)
    mean = policy.distribution(theta, obs).mean
    torch.testing.assert_close(mean, layers(obs).detach())
    numbers = sum(weights.numel() for weights in layers.parameters())
    assert numbers + 2 == len(theta) == policy.num_params


# %% Section 3: rollouts

def test_rollout_records_what_the_environment_saw():
    """point2d, replayed from the recorded actions: positions, rewards, ends."""
    policy = mt.GaussianPolicy(2, 2, hidden=(8, 6))
    theta = policy.init(torch.Generator().manual_seed(0), torch.float64)
    goal = np.array([0.1, -0.1])           # two clipped actions away: some end at once
    data = mt.task_rollout(POINT2D.envs(60), policy, theta, goal, 20, seed=(1, 2, 3))
    assert data.obs.shape == (60, 20, 2) and data.act.shape == (60, 20, 2)
    assert data.rew.shape == data.mask.shape == (60, 20)
    lengths = data.mask.sum(1).long().tolist()
    assert min(lengths) < 20, "no early end: choose another goal"
    for k, length in enumerate(lengths):
        act, obs, rew, mask = (getattr(data, name)[k].numpy() for name in (
            "act", "obs", "rew", "mask"))
        after = np.cumsum(0.1 * act[:length].clip(-1, 1), axis=0)
        np.testing.assert_allclose(obs[:length], [[0, 0], *after[:-1]], atol=1e-6)
        np.testing.assert_allclose(
            rew[:length], [-math.dist(at, goal) for at in after], atol=1e-6)
        ended = (abs(after - goal) < 0.01).all(1)
        assert not ended[:-1].any() and ended[-1] == (length < 20)
        assert not any(x[length:].any() for x in (act, obs, rew, mask))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rollout_is_recorded_before_the_environment_can_overwrite_it(dtype):
    """Actions as drawn and given, to the last bit; observations of a shared buffer."""
    class Overwrites(SyncVectorEnv):
        def step(self, actions):
            given.append(actions.copy())
            np.clip(actions, -0.1, 0.1, out=actions)
            return super().step(actions)

    family = toy_family(obs=lambda t: np.full(2, t, np.float32))
    env, given = type(family.make_envs(1).envs[0]), []
    policy = mt.GaussianPolicy(2, 3, hidden=(4,))
    theta = policy.init(torch.Generator().manual_seed(0), dtype)
    envs = Overwrites([lambda: gym.wrappers.TimeLimit(env(), 5)] * 4, copy=False)
    data = mt.task_rollout(envs, policy, theta, None, 9, (0,))
    assert data.obs[..., 0].tolist() == [[0, 1, 2, 3, 4] + 4 * [0]] * 4
    assert data.mask.tolist() == [[1] * 5 + [0] * 4] * 4     # its own time limit counts
    np.testing.assert_array_equal(np.stack(given, 1)[:, :5], data.act.numpy()[:, :5])
    assert data.act.dtype == dtype and data.act.abs().max() > 0.5
    assert data.mean_return() == pytest.approx(0.1 * (1 + 2 + 3 + 4 + 5))


def test_rollout_depends_on_its_seed_and_on_nothing_before():
    """First states and actions of every copy: all different for all different seeds."""
    envs = SyncVectorEnv([lambda: gym.make("Pendulum-v1")] * 3)
    policy = mt.GaussianPolicy(3, 1, hidden=(8, 6))
    theta = policy.init(torch.Generator().manual_seed(0))

    def first(*seed):
        data = mt.task_rollout(envs, policy, theta, None, 9, seed)
        noise = data.act - policy.distribution(theta, data.obs).mean
        return torch.cat([data.obs[:, 0], noise[:, 0]], dim=1)                 # (3, 4)
    seeds = [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1),
             (0, 0), (0,)]
    every = torch.stack([first(*seed) for seed in seeds])
    assert torch.equal(every[0], first(*seeds[0]))
    for column in every.reshape(21, 4).T:
        assert len(set(column.tolist())) == 21


# %% Section 4: returns, baseline, advantages

@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_advantages_equal_plain_loops_from_rewards_to_the_end(dtype):
    """R by γ, V by ridge on R, δ by γ, Σ(γλ)ˡδ, then mean 0 and std 1; γ ≠ λ ≠ 1."""
    K, H, gamma, lam = 11, 13, 0.8, 0.5
    data = random_trajectories(np.random.default_rng(8), K, H, S=3)
    data.obs[2, 1], data.obs[2, 2] = 50.0, -50.0                 # clipped to ±10
    data = mt.Trajectories(*(x.to(dtype) for x in vars(data).values()))
    rew, happened = data.rew.double().numpy(), data.mask.numpy() == 1

    def discounted(x, factor):
        return np.array([[sum(factor**(u - t) * x[k, u] for u in range(t, H))
                          for t in range(H)] for k in range(K)])

    x, s = data.obs.double().numpy().clip(-10, 10), np.arange(H)[:, None] / 100
    phi = np.array([np.hstack([x[k], x[k]**2, s, s**2, s**3, s**0]) for k in range(K)])
    weights, *_ = np.linalg.lstsq(                  # min ‖φw − R‖² + 1e-5‖w‖²
        np.vstack([phi[happened], math.sqrt(1e-5) * np.eye(10)]),
        np.append(discounted(rew, gamma)[happened], np.zeros(10)))
    values = phi @ weights * happened
    tolerance = dict(rtol=0, atol=2e-6 if dtype == torch.float32 else 1e-7)
    returns = mt.discounted_returns(data.rew, gamma)
    ours = mt.LinearBaseline().fit(data.obs, returns, data.mask).predict(data.obs)
    np.testing.assert_allclose(ours.numpy() * happened, values, **tolerance)
    ahead = np.hstack([values[:, 1:], np.zeros((K, 1))])         # V is 0 after the end
    raw = discounted((rew + gamma * ahead - values) * happened, gamma * lam)
    expected = (raw - raw[happened].mean()) / raw[happened].std() * happened
    ours = mt.assign_credit(data, gamma, lam).adv
    assert ours.dtype == dtype
    np.testing.assert_allclose(ours, expected, **tolerance)


# %% Section 5: the inner update

def test_inner_loss_equals_plain_loop():
    """−(1/N) Σ log π·Â over the N steps that happened, not episodes."""
    policy, theta, data = small_problem()
    d, total, count = data.inner[0], 0.0, 0
    for k, t in itertools.product(range(3), range(5)):
        if d.mask[k, t]:
            pi = plain_policy(policy, theta, d.obs[k, t])
            total += float(pi.log_prob(d.act[k, t]) * d.adv[k, t])
            count += 1
    assert abs(float(mt.inner_loss(policy, theta, d)) + total / count) < 1e-12
    with pytest.raises(ValueError, match="shapes"):               # would broadcast
        mt.masked_mean(torch.ones(3, 1), torch.ones(3, 5))


def test_adapt_takes_each_step_on_its_own_data_from_the_last_theta():
    policy, theta, data = small_problem(inner_steps=2)
    expected = theta
    for d in data.inner:
        expected = expected - ALPHA * central_difference(
            lambda t: mt.inner_loss(policy, t, d), expected)
    for create_graph in (False, True):
        t = theta.clone().requires_grad_(create_graph)
        torch.testing.assert_close(
            mt.adapt(policy, t, data.inner, ALPHA, create_graph).detach(), expected,
            rtol=1e-7, atol=1e-9)


def test_adapt_without_a_graph_is_theta_minus_a_constant():
    """Plain numbers of plain numbers; of a θ that requires grad, J = I."""
    policy, theta, data = small_problem(inner_steps=2)
    before = theta.clone()
    assert not mt.adapt(policy, theta, data.inner, ALPHA, False).requires_grad
    assert torch.equal(theta, before) and not theta.requires_grad
    weights = torch.arange(1.0, len(theta) + 1, dtype=torch.float64)
    for create_graph, first_order in ((False, True), (True, False)):
        t = theta.clone().requires_grad_()
        theta_prime = mt.adapt(policy, t, data.inner, ALPHA, create_graph)
        (grad,) = torch.autograd.grad(theta_prime @ weights, t)
        assert torch.equal(grad, weights) == first_order


# %% Section 6: meta-objective and KL

def meta_objective(policy, data, alpha=ALPHA, config=None):
    """The surrogate as a plain function of θ, written out once more."""
    def function(theta):
        phi, outer = plain_adapt(policy, theta, data.inner, alpha, config), data.outer
        log_new = plain_policy(policy, phi, outer.obs).log_prob(outer.act)
        ratio = torch.exp(log_new - data.old.log_prob(outer.act))
        return -plain_mean(ratio * outer.adv, outer.mask)
    return function


@pytest.mark.parametrize("inner_steps", [1, 2])
@pytest.mark.parametrize("away", [0.0, 0.05])
def test_meta_gradient_equals_central_differences(inner_steps, away):
    """Second order, through one and two inner steps, at θ_old and away from it."""
    policy, theta, data = small_problem(seed=1, inner_steps=inner_steps)
    theta = theta + away
    expected = central_difference(meta_objective(policy, data), theta)
    exact = mt.meta_gradient(policy, theta, data, ALPHA)
    assert (exact - expected).abs().max() < 1e-7 * expected.abs().max()
    for settings in ((True, "log-prob"), (False, "ratio")):
        other = mt.meta_gradient(policy, theta, data, ALPHA, *settings)
        assert (other - exact).norm() > 0.01 * exact.norm()


def plain_kl(policy, data, alpha=ALPHA):
    """KL(old adapted ‖ new adapted) as a function of θ, by torch.distributions."""
    def function(theta):
        phi = plain_adapt(policy, theta, data.inner, alpha)
        old = Independent(Normal(data.old.mean, data.old.stddev), 1)
        new = plain_policy(policy, phi, data.outer.obs)
        return plain_mean(kl_divergence(old, new), data.outer.mask)
    return function


@pytest.mark.parametrize("settings", [(), (True,), (False, "ratio")])
def test_surrogate_has_the_ratio_and_kl_is_of_old_and_new_adapted_policies(settings):
    """At θ_old and away from it, on D′; the values do not depend on the estimator."""
    policy, theta, data = small_problem(seed=3)
    for at in (theta, theta + 0.1):
        surrogate, kl = mt.surrogate_and_kl(policy, at, data, ALPHA, *settings)
        torch.testing.assert_close(surrogate, meta_objective(policy, data)(at))
        torch.testing.assert_close(kl, plain_kl(policy, data)(at))
    assert kl > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kl_and_its_gradient_are_exactly_zero_at_theta_old(dtype):
    """Not merely small: the one-sided difference leaves ∇k(θ_old) out."""
    config = tiny_config(rollouts=20, horizon=30, hidden=(100, 100), meta_batch_size=1)
    policy, theta, (data,) = sampled_problem(config, dtype=dtype)
    _, kl = mt.surrogate_and_kl(policy, theta, data, config.alpha)
    grad = mt.gradient(
        lambda t: mt.surrogate_and_kl(policy, t, data, config.alpha)[1], theta)
    assert kl.item() == 0.0 and (grad == 0).all()


# %% Section 7: the TRPO step

def one_j_problem(**changes):
    """Three tasks of point2d; tanh, float64, an α so large that J is far from I."""
    config = tiny_config(activation="tanh", alpha=1.0, hidden=(4,), **changes)
    return config, *sampled_problem(config)


def mean_of(objective, policy, data, *more):
    """The mean over tasks of `meta_objective` or `plain_kl`, as a function of θ."""
    each = [objective(policy, d, 1.0, *more) for d in data]
    return lambda theta: sum(function(theta) for function in each) / len(each)


ESTIMATORS = pytest.mark.parametrize("changes", [
    dict(inner_steps=2), dict(first_order=True), dict(inner_loss="ratio")], ids=str)


@pytest.mark.parametrize("hvp", HVPS)
@ESTIMATORS
def test_three_products_equal_the_dense_hessian(hvp, changes):
    """Of the KL's values, which have one Hessian, whatever supplies g. The J of first
    order or of the ratio would give another. Two inner steps: J ≠ Jᵀ."""
    config, policy, theta, data = one_j_problem(hvp=hvp, fd_step=1e-6, **changes)
    for d in data:
        d.outer.mask[0, -2:] = 0                                       # an early end
    kl = mean_of(plain_kl, policy, data)
    H, product = hessian(kl, theta), mt.kl_hessian_product(policy, theta, data, config)
    for v in torch.randn(3, len(theta), generator=torch.Generator().manual_seed(0),
                         dtype=torch.float64):
        tolerance = 1e-3 if hvp == "finite-difference" else 1e-8
        assert gap(product(v), H @ v) < tolerance
    v, e, own = v / v.norm(), 1e-3, 0.0
    measured = (kl(theta + e * v) - 2 * kl(theta) + kl(theta - e * v)) / e**2
    assert abs(v @ product(v) - measured) < 1e-4 * measured
    for d in data:
        phi, still = plain_adapt(policy, theta, d.inner, 1.0), mt.TaskData(
            [], d.outer, d.old)
        J = jacobian(lambda t: plain_adapt(policy, t, d.inner, 1.0, config), theta)
        own += v @ J.T @ hessian(plain_kl(policy, still), phi) @ J @ v / len(data)
    assert (abs(own - measured) < 0.05 * measured) == ("inner_steps" in changes)


def test_hessian_vector_product_moves_theta_by_the_step_whatever_v_is():
    """On a cubic, where the one-sided error is known: H·v + ½ε·(third derivative)."""
    c = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    theta = torch.zeros(3, dtype=torch.float64)
    for length in (1e-3, 1.0, 1e3):
        v, asked = length * torch.tensor([2.0, 1.0, -2.0], dtype=torch.float64), []
        product = mt.hessian_vector_product(
            lambda t: asked.append(t) or t + c * t**2, theta, v, 0.01)
        torch.testing.assert_close(product, v + (0.01 / v.norm()) * c * v**2)
        assert len(asked) == 1 and not theta.any()       # one gradient; θ is as it was


def test_conjugate_gradient_is_best_in_the_krylov_space():
    """After n steps: argmin of ½xᵀHx − bᵀx over span(b, Hb, …), at last H⁻¹b; and r."""
    a, b = torch.tensor(np.random.default_rng(2).standard_normal((2, 8, 8)))
    H, b = a @ a.T + 0.1 * torch.eye(8), b[0]
    for n in (1, 2, 4, 8):
        basis = torch.linalg.qr(torch.stack(
            [torch.linalg.matrix_power(H, i) @ b for i in range(n)], dim=1))[0]
        best = basis @ torch.linalg.solve(basis.T @ H @ basis, basis.T @ b)
        calls = []
        x, r = mt.conjugate_gradient(lambda v: calls.append(1) or H @ v, b, n)
        torch.testing.assert_close(x, best, rtol=1e-7, atol=1e-8)
        torch.testing.assert_close(r, b - H @ x)
        assert len(calls) == n


def test_conjugate_gradient_ends_when_the_squared_residual_is_small():
    H = torch.diag(torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64))
    b = torch.full((3,), 0.1, dtype=torch.float64)
    r = b - H @ b * (b @ b) / (b @ H @ b)               # after one iteration, by hand
    for tolerance, products in ((1.01 * float(r @ r), 1), (0.99 * float(r @ r), 2)):
        asked = []
        mt.conjugate_gradient(lambda v: asked.append(v) or H @ v, b, 2, tolerance)
        assert len(asked) == products


def test_conjugate_gradient_stops_at_curvature_that_is_not_positive():
    H = torch.diag(torch.tensor([1.0, -1.0, 1.0], dtype=torch.float64))
    b = torch.tensor([0.1, 5.0, 0.1], dtype=torch.float64)
    x, r = mt.conjugate_gradient(lambda v: H @ v, b)
    assert (x == 0).all() and torch.equal(r, b)
    x, _ = mt.conjugate_gradient(lambda v: v * math.nan, b)
    assert (x == 0).all()
    x, _ = mt.conjugate_gradient(lambda v: v, torch.zeros(3))
    assert (x == 0).all()
    products = iter([b / b.norm(), torch.full_like(b, math.nan)])
    x, _ = mt.conjugate_gradient(lambda v: next(products), b)
    assert (x != 0).all() and torch.isfinite(x).all()     # the x so far is used


def quadratic_search(surrogate, kl, full_step, **kw):
    """A line search along one number; returns the accepted step, and what was tried."""
    tried = []

    def evaluate(theta):
        tried.append(float(theta))
        return surrogate(float(theta)), kl(float(theta))
    out = mt.backtrack_line_search(evaluate, torch.zeros(1), torch.tensor([full_step]),
                                   0.0, 0.01, **kw)
    return out, tried


def test_line_search_backtracks_until_both_conditions_hold():
    """None is needed; KL alone refuses two trials, the surrogate alone three."""
    (theta, s, kl, trials), tried = quadratic_search(lambda x: -x, lambda x: 0.01, 1.0)
    assert (float(theta), s, kl, trials, len(tried)) == (1.0, -1.0, 0.01, 1, 1)
    (theta, _, kl, trials), tried = quadratic_search(
        lambda x: -x, lambda x: 0.01 * x, 1.5, ratio=0.8)
    assert trials == 3 and abs(float(theta) - 1.5 * 0.64) < 1e-6 and kl <= 0.01
    np.testing.assert_allclose(tried, [1.5, 1.2, 0.96], rtol=1e-6)
    (theta, s, _, trials), _ = quadratic_search(
        lambda x: x * (x - 0.6), lambda x: 0.0, 1.0, ratio=0.8)
    assert trials == 4 and s < 0


def test_line_search_restores_theta_when_nothing_is_accepted():
    """After fifteen trials of four fifths, or those that were asked for."""
    for surrogate, kl in (
            (lambda x: x, lambda x: 0.0), (lambda x: -x, lambda x: 1.0),
            (lambda x: math.nan, lambda x: 0.0), (lambda x: 0.0, lambda x: 0.0),
            (lambda x: -x, lambda x: math.nan)):
        for how, expected in (({}, 0.8 ** np.arange(15)),
                              (dict(ratio=0.5, trials=3), [1.0, 0.5, 0.25])):
            (theta, *numbers), tried = quadratic_search(surrogate, kl, 1.0, **how)
            assert (float(theta), *numbers) == (0.0, 0.0, 0.0, 0)
            np.testing.assert_allclose(tried, expected, rtol=1e-6)


def dense_meta_step(policy, theta, data, config):
    """−√(2δ/xᵀHx)·x, of the mean over tasks. Only g heeds the estimator, H does not."""
    g = jacobian(mean_of(meta_objective, policy, data, config), theta)
    H = hessian(mean_of(plain_kl, policy, data), theta)
    H = H + config.damping * torch.eye(len(theta))
    x = torch.linalg.solve(H, g)
    return -math.sqrt(2 * config.max_kl / float(x @ H @ x)) * x


@pytest.mark.parametrize("hvp", HVPS)
@ESTIMATORS
def test_trpo_step_equals_dense_solve_and_scale(hvp, changes):
    """x from the dense damped Hessian, scaled to ½sᵀHs = δ; the first 0.9ʲ to pass."""
    config, policy, theta, data = one_j_problem(
        hvp=hvp, damping=0.2, cg_iterations=60, cg_tolerance=1e-22, fd_step=1e-6,
        backtrack_ratio=0.9, **changes)
    full = dense_meta_step(policy, theta, data, config)
    if "inner_steps" not in changes:
        other = dense_meta_step(policy, theta, data, dataclasses.replace(
            config, first_order=False, inner_loss="log-prob"))
        assert gap(other, full) > 0.02, "the test shows too little"
    new, stats = mt.trpo_meta_step(policy, theta, data, config)
    j = stats["line_search_steps"] - 1
    tolerance = 1e-3 if hvp == "finite-difference" else 1e-6
    assert (new - theta - 0.9**j * full).norm() < tolerance * full.norm()
    surrogate, kl = (mean_of(f, policy, data) for f in (meta_objective, plain_kl))
    before = surrogate(theta)
    assert stats["surrogate_before"] == pytest.approx(float(before), abs=1e-9)
    trials = [theta + 0.9**trial * full for trial in range(j + 1)]
    passed = [bool(surrogate(t) < before and kl(t) <= config.max_kl) for t in trials]
    assert passed == [False] * j + [True]
    assert (stats["surrogate_after"], stats["kl"]) == pytest.approx(
        (float(surrogate(new)), float(kl(new))), rel=1e-6)


def test_meta_gradient_divides_each_tasks_gradient_by_its_own_sigma(monkeypatch):
    """g = (1/M) Σ (1/σ_i)∇U_i, with U_i of the raw advantages less their mean."""
    config, policy, theta, tasks = one_j_problem()
    seen, slopes, sigmas = [], [], []
    monkeypatch.setattr(mt, "conjugate_gradient", lambda hvp, g, *_: (
        seen.append(g) or g, 0.25 * g))
    _, stats = mt.trpo_meta_step(policy, theta, tasks, config)
    assert stats["cg_residual"] == pytest.approx(0.25)         # as a share of g
    for task in tasks:
        data, mask = task.outer, task.outer.mask
        returns = mt.discounted_returns(data.rew, config.gamma)
        values = mt.LinearBaseline().fit(data.obs, returns, mask).predict(data.obs)
        raw = mt.gae(data.rew, values, mask, config.gamma, config.lam)
        sigmas.append(raw[mask.bool()].std(correction=0))
        outer = dataclasses.replace(data, adv=(raw - raw[mask.bool()].mean()) * mask)
        slopes.append(central_difference(meta_objective(
            policy, mt.TaskData(task.inner, outer, task.old), 1.0), theta))
        data.adv = 0 * data.adv                        # now rewards that do not differ
    assert gap(seen[0], sum(U / sigma for U, sigma in zip(slopes, sigmas)) / 3) < 1e-5
    assert torch.cosine_similarity(seen[0], sum(slopes), dim=0) < 0.999
    new, stats = mt.trpo_meta_step(policy, theta, tasks, config)
    assert stats["cg_residual"] == 0 and torch.equal(new, theta)


@pytest.mark.parametrize("factor", [math.nan, math.inf, -1, 0, "not asked"])
def test_step_without_curvature_is_skipped_and_the_log_says_so(monkeypatch, factor):
    """pᵀHp NaN, infinite, negative or 0, or g·g below CG's tolerance: θ is kept."""
    config = tiny_config(damping=0.0)
    if factor == "not asked":
        config = tiny_config(cg_tolerance=1e6)
    monkeypatch.setattr(mt, "kl_hessian_product", lambda *args: lambda v: factor * v)
    theta, rows = mt.train_maml(config)
    assert torch.equal(theta, first_theta(config))
    for row in rows:
        assert (row["line_search_steps"], row["kl"]) == (0, 0)
        assert row["surrogate_after"] == row["surrogate_before"]
        assert not row["cg_residual"] < 1
    assert "none" in mt.progress_line(rows[0], 2, 1.0)
    monkeypatch.setattr(mt, "conjugate_gradient", lambda hvp, b, *_: (b, 2 * b))
    assert torch.equal(mt.train_maml(config)[0], theta)                 # xᵀHx = −b·b


# %% Section 8: meta-training

def first_theta(config):
    policy = mt.make_policy(mt.family_of(config), config)
    return mt.TrainState.initial(policy, config).theta


def test_no_stream_of_random_numbers_is_used_twice_and_all_have_the_runs_seed(
        monkeypatch):
    """Tasks and episodes of a training with two inner steps, and the evaluation's."""
    right, keys = mt.random_stream, []
    monkeypatch.setattr(mt, "random_stream",
                        lambda *key: keys.append(key) or right(*key))
    config = tiny_config(seed=7, inner_steps=2)
    theta, _ = mt.train_maml(config)
    assert len(keys) == 2 * (1 + 3 * 3)              # tasks; 3 tasks × (D, D, D′)
    mt.evaluate(config, theta)
    assert len(keys) == 20 + 5 * 4 and len(set(keys)) == len(keys)
    assert {key[0] for key in keys} == {7}


def test_every_inner_step_has_its_own_policy_and_noise_and_the_runs_credit():
    """Three inner steps; γ and λ are not the defaults, α is not evaluation's."""
    config = tiny_config(inner_steps=3, alpha=0.8, eval_alpha=0.3, gamma=0.7, lam=0.6)
    policy, theta, _ = sampled_problem(config)
    goal = np.array([0.3, -0.2])
    data, phi = mt.sample_task_data(policy, theta, POINT2D, goal, config, (5, 6)), theta
    for phase, episodes in enumerate([*data.inner, data.outer]):
        again = mt.task_rollout(POINT2D.envs(4), policy, phi, goal, 7, (5, 6, phase))
        torch.testing.assert_close(episodes.act, again.act, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(
            episodes.adv, mt.assign_credit(again, 0.7, 0.6).adv, rtol=1e-6, atol=1e-6)
        if phase < 3:
            phi = plain_adapt(policy, phi, [episodes], 0.8)
    torch.testing.assert_close(data.old.mean,
                               policy.distribution(phi, data.outer.obs).mean)
    assert len(data.inner) == 3


def constant_runs(monkeypatch, pre, post, move=1.0):
    """Training in which task m of iteration i returns pre[i][m], post[i][m]; nothing is
    sampled, and a meta-step adds `move` to θ."""
    def sample(policy, theta, family, task, config, seed):
        _, i, m = seed
        later = SimpleNamespace(mean_return=lambda: 1e6)
        return SimpleNamespace(
            inner=[SimpleNamespace(mean_return=lambda: pre[i][m]), later],
            outer=SimpleNamespace(mean_return=lambda: post[i][m]))
    stats = dict.fromkeys((
        "surrogate_before", "surrogate_after", "kl", "line_search_steps", "cg_residual",
        "seconds_gradient", "seconds_cg", "seconds_line_search"), 0.0)
    monkeypatch.setattr(mt, "sample_task_data", sample)
    monkeypatch.setattr(mt, "trpo_meta_step",
                        lambda policy, theta, *_: (theta + move, dict(stats)))
    states, config = [], tiny_config(iterations=len(pre), meta_batch_size=len(pre[0]),
                                     inner_steps=2, init_std=1.0)
    theta, rows = mt.train_maml(config, after_iteration=states.append)
    assert torch.equal(theta, states[-1].theta) and rows == states[-1].rows
    return config, states


PRE = [[-9, -8, -4], [-7, -6, -5], [-3, -2, -1]]
POST = [[-6, -5, -4], [5, 1, 3], [2, 1, 0]]


def test_best_theta_is_the_one_that_was_sampled_when_the_return_after_was_highest(
        monkeypatch):
    """Second of three by the return after adaptation, third by the one before."""
    move = torch.linspace(0.1, 2.0, len(first_theta(tiny_config())))   # two σ differ
    config, states = constant_runs(monkeypatch, PRE, POST, move)
    first = first_theta(config)
    torch.testing.assert_close(states[-1].best_theta, first + move)
    torch.testing.assert_close(states[-1].theta, first + 3 * move)
    assert [state.best_return for state in states] == [-5, 3, 3]
    for i, row in enumerate(states[-1].rows):
        assert (row["iteration"], row["return_pre"], row["return_post"]) == (
            i, np.mean(PRE[i]), np.mean(POST[i]))
        assert states[-1].spread[i] == [*np.percentile(PRE[i], [25, 75]),
                                        *np.percentile(POST[i], [25, 75])]
        std = ((i + 1) * move[-2:]).exp().mean().item()            # of the new θ
        assert row["std_mean"] == pytest.approx(std, rel=1e-5)


def test_std_that_leaves_its_bounds_stops_in_that_iteration(monkeypatch):
    """One σ is enough; that of the new θ counts."""
    move = torch.zeros(len(first_theta(tiny_config())))
    for log_std in (-50.0, 50.0):
        move[-1] = log_std
        with pytest.raises(mt.Diverged, match="^iteration 1: .*std"):
            constant_runs(monkeypatch, [[0.0]], [[0.0]], move)
    move[-2:] = torch.tensor([-13.0, 13.0])
    constant_runs(monkeypatch, [[0.0]], [[0.0]], move)


def test_short_training_improves_the_return_after_adaptation():
    """Eight meta-iterations on the real task, by more than any noise."""
    config = tiny_config(iterations=8, rollouts=10, meta_batch_size=6, horizon=40,
                         hidden=(30, 20), cg_iterations=5, seed=1)
    _, rows = mt.train_maml(config)
    assert rows[-1]["return_post"] > rows[0]["return_post"] + 5
    assert sum(row["line_search_steps"] == 0 for row in rows) <= 1


# %% The paper's locomotion tasks, against Gymnasium's own environments

def family_named(name):
    if name != "point2d":
        pytest.importorskip("mujoco")
    return mt.TASKS[name]


@pytest.mark.parametrize("name", [task for task in ALL_TASKS if task != "point2d"])
def test_walkers_match_gymnasium_step_by_step_over_whole_episodes(name):
    """Same first states from the same seeds, then the same observations, but for the
    velocities, and ends; the authors' rewards; no more steps after an early end."""
    K, seeds, task, cheetah = 3, [11, 5, 2024], -1.0, name.startswith("cheetah")
    envs, rng = family_named(name).make_envs(K), np.random.default_rng(0)
    body, angles, speeds = (("HalfCheetah-v5", 8, 9) if cheetah else
                            ("Ant-v5", 13, 14))
    twins, ended = [gym.make(body).unwrapped for _ in range(K)], np.zeros(K, bool)
    obs, _ = envs.reset(seed=seeds, options={"task": np.array([task])})
    expected = np.array([twin.reset(seed=s)[0] for twin, s in zip(twins, seeds)])
    units = np.ones(expected.shape[1])
    units[angles:angles + speeds] = 10
    np.testing.assert_allclose(obs, expected / units, rtol=1e-15)
    assert envs.single_action_space.shape == twins[0].action_space.shape
    for _ in range(200):
        actions = 0.8 * rng.standard_normal((K, *twins[0].action_space.shape))
        obs, reward, terminated, truncated, _ = envs.step(actions)
        for k, twin in enumerate(twins):
            if ended[k]:
                assert terminated[k] and reward[k] == 0
                continue
            action = np.clip(actions[k], -1, 1)
            expected, _, ended[k], _, info = twin.step(action)
            np.testing.assert_allclose(obs[k], expected / units, rtol=1e-15)
            assert terminated[k] == ended[k] and not truncated[k]
            speed = info["x_velocity"]
            paid = task * speed if name.endswith("dir") else -abs(speed - task)
            paid -= (0.05 if cheetah else 0.005) * np.square(action).sum()
            if not cheetah:
                forces = np.square(twin.data.cfrc_ext.clip(-1, 1)).sum()
                paid += 0.05 - 0.0005 * forces + (name == "ant-vel")
            assert reward[k] == pytest.approx(paid, rel=1e-12, abs=1e-12)
    assert ended.any() != cheetah                              # both ways were seen
    envs.reset(seed=seeds)
    _, reward, terminated, *_ = envs.step(actions)             # all walk again
    assert reward.all() and not terminated.any()


@pytest.mark.parametrize("name", ("point2d", "cheetah-dir", "ant-vel"))
def test_same_seed_same_run_with_one_or_two_workers(name, monkeypatch):
    """θ after an iteration, bit for bit; and another seed gives another θ. Threads do
    the work: gradients, products and trials, but not point2d's sampling."""
    used = {"task_rollout": set(), "surrogate_and_kl": set()}
    family = family_named(name)

    def run(**changes):
        return mt.train_maml(tiny_config(task=name, iterations=1, **changes), family)

    theta, rows = run()
    for function, threads in used.items():
        def spy(*args, right=getattr(mt, function), threads=threads, **kw):
            threads.add(threading.current_thread() is threading.main_thread())
            used.setdefault("threads", set()).add(torch.get_num_threads())
            return right(*args, **kw)
        monkeypatch.setattr(mt, function, spy)
    torch.set_num_threads(2)                    # of the caller, who gets them back
    again, same = run(workers=2)
    assert torch.get_num_threads() == 2 and used.pop("threads") == {1}
    torch.set_num_threads(1)
    assert used == {"task_rollout": {name == "point2d"}, "surrogate_and_kl": {False}}
    assert torch.equal(theta, again) and without_seconds(rows) == without_seconds(same)
    assert torch.equal(theta, run()[0]) and not torch.equal(theta, run(seed=1)[0])
    first = [first_theta(tiny_config(task=name, seed=seed)) for seed in (1, 1, 2)]
    assert torch.equal(first[0], first[1]) and (first[0] != first[2]).sum() > 50


def test_only_the_oracle_of_ones_own_family_sees_its_task_and_only_maml_adapts(
        monkeypatch):
    """Who sees what, and how many times each task is played, at evaluation too."""
    right, seen = mt.task_rollout, []

    def spy(envs, policy, theta, task, *rest):
        data = right(envs, policy, theta, task, *rest)
        seen.append((data.obs, task))
        return data
    monkeypatch.setattr(mt, "task_rollout", spy)
    for method, size, plays, columns in (("maml", 2, 2, 4), ("pretrained", 2, 1, 4),
                                         ("random", 2, 0, 4), ("oracle", 3, 1, 1)):
        config = tiny_config(method=method, horizon=4,
                             iterations=0 if method == "random" else 2)
        theta, _ = mt.train_maml(config, toy_family())
        assert len(seen) == 2 * 3 * plays
        assert mt.evaluate(config, theta, toy_family()).shape == (5, columns)
        for obs, task in seen:
            assert obs.shape[-1] == size and not obs[..., :2].any()
            assert size == 2 or (obs[..., 2] == torch.tensor(task).float()).all()
        seen.clear()


@pytest.mark.parametrize("name, high", [("cheetah-vel", 2), ("ant-vel", 3)])
def test_velocity_tasks_are_uniform_and_the_held_out_ones_fixed(name, high):
    drawn = mt.TASKS[name].sample_tasks(np.random.default_rng(0), 4000)
    held_out = mt.TASKS[name].test_tasks(40)
    for tasks, n in ((drawn, 4000), (held_out, 40)):
        assert tasks.shape == (n, 1) and 0 <= tasks.min() and tasks.max() <= high
        counts = np.histogram(tasks, 4, (0, high))[0]
        assert (abs(counts - n / 4) < 2.5 * math.sqrt(n / 4)).all()
    np.testing.assert_array_equal(held_out[:7], mt.TASKS[name].test_tasks(7))
    first = high * np.array([0.417022, 0.720324, 0.000114])   # numpy's old generator
    np.testing.assert_allclose(held_out[:3, 0], first, atol=3e-6)


@pytest.mark.parametrize("name", ("cheetah-dir", "ant-dir"))
def test_direction_tasks_are_two_and_taken_in_turn(name):
    """Half of each is the expectation; of an odd number the first is drawn."""
    family, rng = mt.TASKS[name], np.random.default_rng(0)
    for tasks in (family.sample_tasks(rng, 4), family.test_tasks(4)):
        assert tasks.tolist() == [[1], [-1], [1], [-1]]
    odd = {tuple(family.sample_tasks(rng, 3)[:, 0]) for _ in range(20)}
    assert odd == {(1, -1, 1), (-1, 1, -1)} and family.test_tasks(1) == [[1]]


@pytest.mark.parametrize("name, task", [
    ("cheetah-vel", [1.0, 2.0]), ("ant-dir", [np.nan]), ("ant-vel", 1.0),
    ("point2d", [1.0]), ("point2d", [0.0, math.nan]), ("point2d", 3)])
def test_a_task_that_is_no_task_is_refused(name, task):
    with pytest.raises(mt.BadInput, match="task"):
        family_named(name).make_envs(1).reset(seed=[1], options={"task": task})


def test_walkers_say_nothing_and_leave_no_file(tmp_path, monkeypatch, capfd):
    """MuJoCo warns of Gymnasium's model at each loading, and would keep a log."""
    monkeypatch.chdir(tmp_path)
    mt.train_maml(tiny_config(task="cheetah-dir"), family_named("cheetah-dir"))
    assert capfd.readouterr() == ("", "") and not any(tmp_path.iterdir())


# %% Section 9: evaluation

# The paper's figures, a second time: maml, oracle, the sums of pretrained and random.
PAPER = {
    "point2d": ("-40.41 -11.68 -3.33 -3.23", "-2.29", (-80.73, -241.27)),
    "cheetah-dir": ("-50.69 293.19 313.48 315.65", "442.69", (-61.06, 134.60)),
    "cheetah-vel": ("-129.53 -78.57 -66.62 -60.78", "-54.47", (-555.47, -986.78)),
    "ant-vel": ("30.58 96.74 100.06 101.41", "107.89", (22.22, -225.56)),
    "ant-dir": ("8.66 499.15 500.68 499.11", "524.80", (17.80, 54.43)),
}


@pytest.mark.parametrize("task", ALL_TASKS)
def test_papers_numbers_are_these_and_stand_below_ours(task):
    methods = ("maml", "oracle", "pretrained", "random")
    tables = [(f"{method}, last θ", np.zeros((40, 4))) for method in methods]
    printed = mt.comparison_table(mt.complete(mt.Config(task=task)), tables)
    paper = {method: row.split() for method, row in re.findall(
        r"^(\w+), paper +(.*)$", printed, re.MULTILINE)}
    assert [paper["maml"], paper["oracle"]] == [row.split() for row in PAPER[task][:2]]
    sums = [sum(map(float, paper[method])) for method in methods[2:]]
    np.testing.assert_allclose(sums, PAPER[task][2])
    assert printed.splitlines()[0].split() == "gradient steps 0 1 2 3".split()


def plain_evaluation(config, theta, m, task):
    """(φ, episodes) after 0, 1, … steps on held-out task m, written out once more."""
    family = mt.family_of(config)
    policy = mt.make_policy(family, config)
    for step in range(config.eval_steps + 1 if config.method != "oracle" else 1):
        data = mt.task_rollout(
            family.envs(config.eval_episodes), policy, theta, task, config.horizon,
            (config.seed, mt.EVALUATION, m, step))
        yield theta, data
        mt.assign_credit(data, config.gamma, config.lam)
        theta = plain_adapt(policy, theta, [data],
                            config.eval_alpha * (1 if step == 0 else 0.5))


def test_evaluation_equals_a_plain_loop_with_every_setting_of_the_run():
    """Fresh episodes after each step; α/2 from the second step on and no less later."""
    config = tiny_config(seed=5, alpha=0.1, eval_alpha=0.9, gamma=0.7, lam=0.6,
                         eval_steps=4, eval_tasks=3, eval_episodes=5)
    theta = first_theta(config)
    table = mt.evaluate(config, theta)
    assert table.shape == (3, 5)
    for m, goal in enumerate(POINT2D.test_tasks(3)):
        expected = [data.rew.sum(1).mean().item()
                    for _, data in plain_evaluation(config, theta, m, goal)]
        np.testing.assert_allclose(table[m], expected, atol=1e-5)
    config = dataclasses.replace(config, eval_steps=0)
    np.testing.assert_array_equal(mt.evaluate(config, theta), table[:, :1])


# %% The files of a run

# A run of a moment; later flags win.
TINY = ["--iterations", "2", "--meta-batch-size", "2", "--rollouts", "3", "--horizon",
        "4", "--hidden", "5,4", "--cg-iterations", "2", "--eval-tasks", "5",
        "--eval-episodes", "2", "--workers", "1"]


def without_figures(patch):
    for name in ("draw_learning_curve", "draw_adaptation", "draw_trajectories",
                 "render_gif"):
        patch.setattr(mt, name, lambda *args: None)
    patch.setattr(mt.os, "fsync", lambda file: None)


@pytest.fixture
def no_figures(monkeypatch):
    """Runs without drawing and waiting for the disk, which take most of their time."""
    without_figures(monkeypatch)


def tiny_run(folder, *more) -> int:
    return mt.main([*TINY, "--out", str(folder), *map(str, more)])


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A finished run that nobody may change. Its best θ is not its last."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    with pytest.MonkeyPatch.context() as patch:
        without_figures(patch)
        assert tiny_run(folder) == 0
    content = torch.load(folder / "checkpoint.pt", weights_only=True)
    content["best_theta"] = content["theta"] + 0.5
    torch.save(content, folder / "checkpoint.pt")
    return folder


@pytest.fixture
def copied(trained, tmp_path):
    """A finished run that may be changed."""
    return shutil.copytree(trained, tmp_path / "copied")


def refused(capsys, *args) -> str:
    """The one line that is said when these arguments are refused."""
    capsys.readouterr()
    assert mt.main([str(arg) for arg in args]) == 2, args
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "Traceback" not in error, error
    return error


def files_of(folder: Path) -> dict[Path, bytes]:
    """All but the locks."""
    return {path: path.read_bytes() for path in folder.rglob("*")
            if path.is_file() and path.name != ".lock"}


def names_in(folder: Path) -> list[str]:
    """All but the lock."""
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


def outcome(folder: Path) -> list:
    """All that a run computed: its whole state and tables, without the seconds."""
    config, state = mt.load_checkpoint(folder / "checkpoint.pt")
    with open(folder / "progress.csv", newline="", encoding="utf-8") as f:
        progress = without_seconds(csv.DictReader(f))
    return [config, state.iteration, state.theta.tolist(), without_seconds(state.rows),
            state.spread, state.best_theta.tolist(), state.best_return, progress,
            (folder / "evaluation.csv").read_text(encoding="utf-8"),
            (folder / "config.json").read_text(encoding="utf-8")]


def test_evaluation_is_written_task_by_task_and_read_again(
        tmp_path, no_figures, monkeypatch):
    """Two tasks and three values, all different; whole when the file is synced."""
    sizes, table = [], np.array([[1.5, -2.25, 3.125], [4.0, 5.0, -6.0625]])
    monkeypatch.setattr(os, "fsync", lambda file: sizes.append(os.fstat(file).st_size))
    monkeypatch.setattr(mt, "evaluate", lambda *args: table)
    config = mt.complete(mt.Config(method="oracle"))
    mt.report(config, tmp_path, mock.Mock(rows=[]), None, "last θ", [])
    assert sizes[-1] == (tmp_path / "evaluation.csv").stat().st_size
    assert (tmp_path / "evaluation.csv").read_text().split() == [
        "method,task,step,return", "oracle,0,0,1.5", "oracle,0,1,-2.25",
        "oracle,0,2,3.125", "oracle,1,0,4.0", "oracle,1,1,5.0", "oracle,1,2,-6.0625"]
    method, again = mt.read_evaluation(tmp_path, "point2d")
    assert method == "oracle" and np.array_equal(again, table)


def test_a_runs_files_hold_its_rows_its_settings_and_not_its_workers(trained):
    with open(trained / "progress.csv", newline="", encoding="utf-8") as f:
        header, *rows = csv.reader(f)
    state = mt.load_checkpoint(trained / "checkpoint.pt")[1]
    assert tuple(header) == mt.PROGRESS_COLUMNS and len(rows) == state.iteration == 2
    assert [[float(x) for x in row] for row in rows] == [
        list(row.values()) for row in state.rows]
    for row in state.rows:
        *parts, total = (row[name] for name in header if "seconds" in name)
        assert 0 < sum(parts) <= total
    settings = json.loads((trained / "config.json").read_text(encoding="utf-8"))
    kept = torch.load(trained / "checkpoint.pt", weights_only=True)["config"]
    for config in (settings, kept):
        expected = dataclasses.asdict(mt.complete(mt.Config(
            iterations=2, meta_batch_size=2, rollouts=3, horizon=4, hidden=(5, 4),
            cg_iterations=2, eval_tasks=5, eval_episodes=2)))
        assert expected.pop("workers") and {
            **config, "hidden": tuple(config["hidden"])} == expected


# %% Section 10: figures, read back from their axes, and the printed table

@pytest.fixture
def drawn(monkeypatch):
    """{"learning.png": figure}: figures are kept in place of being written."""
    from matplotlib.figure import Figure
    kept = {}
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **how: kept.update(
        {Path(path).name: figure}))
    return kept


def test_learning_curve_shows_means_and_the_middle_half_of_the_tasks(
        drawn, monkeypatch):
    config, states = constant_runs(monkeypatch, PRE, POST)
    mt.draw_learning_curve(Path("learning.png"), config, states[-1])
    (ax,) = drawn["learning.png"].axes
    assert len(ax.lines) == len(ax.collections) == 2 and "3 tasks" in ax.get_title()
    for returns, line, band in zip((PRE, POST), ax.lines, ax.collections):
        x, y = line.get_data()
        assert x.tolist() == [0, 1, 2] and y.tolist() == np.mean(returns, 1).tolist()
        corners = band.get_paths()[0].vertices
        for i, (low, high) in enumerate(np.percentile(returns, [25, 75], 1).T):
            heights = corners[corners[:, 0] == i][:, 1]
            assert (heights.min(), heights.max()) == pytest.approx((low, high))
    mt.draw_learning_curve(Path("learning.png"), dataclasses.replace(
        config, method="pretrained"), states[-1])                 # which is not adapted
    (line,) = drawn["learning.png"].axes[0].lines
    assert line.get_ydata().tolist() == np.mean(POST, 1).tolist()
    assert line.get_label() == "without adaptation"


def plain_error(table):
    return table.std(axis=0, ddof=1) / math.sqrt(len(table))


@pytest.mark.parametrize("task", ["point2d", "cheetah-dir", "ant-dir"])
def test_standard_error_leaves_out_what_lies_between_the_two_directions(drawn, task):
    """Printed and drawn: mean ± error of the mean by its definition, and the paper."""
    table = np.random.default_rng(0).normal(0, 500, (40, 3))
    table += 9000.0 * np.resize([1, -1], (40, 1))
    error, rows, config = plain_error(table), [], mt.complete(mt.Config(task=task))
    if task != "point2d":
        rows = [table[0::2], table[1::2]]
        error = np.hypot(*map(plain_error, rows)) / 2
    tables = [("maml, last θ", table), ("oracle, other", table[:20, :1])]
    printed = mt.comparison_table(config, tables).splitlines()
    expected = [(table.mean(0), error), *((x.mean(0), plain_error(x)) for x in rows)]
    for line, numbers in zip(printed[1:], expected):
        cells = re.findall(r"(-?[\d.]+) ± +([\d.]+)", line)
        np.testing.assert_allclose(np.array(cells, float).T, numbers, atol=0.006)
    assert [line.split()[0] for line in printed[2:2 + len(rows)]] == [
        "forward", "backward"][:len(rows)]
    assert printed[-1].startswith("The paper's simulator") == (task != "point2d")
    few = table[:1 if task == "point2d" else 2]      # one of each kind: none is known
    printed = mt.comparison_table(config, [("maml, last θ", few)])
    assert set(re.findall(r"± +(\S+)", printed)) == {"nan"}
    mt.draw_adaptation(Path("adaptation.png"), config, tables)
    (ax,) = drawn["adaptation.png"].axes
    containers = {container.get_label(): container for container in ax.containers}
    ours, paper = containers["maml, last θ"].lines, containers["maml, paper"].lines[0]
    np.testing.assert_allclose(ours[0].get_xydata().T, [[0, 1, 2], table.mean(0)])
    assert (ours[0].get_linestyle(), paper.get_linestyle()) == ("-", "--")
    assert "over 40" in ax.get_title()
    bars = np.array(ours[2][0].get_segments())             # (3, both ends, x and y)
    np.testing.assert_allclose(bars[..., 1].T, [table.mean(0) - error,
                                                table.mean(0) + error])
    assert paper.get_ydata().tolist() == [float(x) for x in PAPER[task][0].split()]
    flat = [line.get_ydata()[0] for line in ax.lines if "oracle" in line.get_label()]
    np.testing.assert_allclose(flat, [table[:20, 0].mean(), float(PAPER[task][1])])


@pytest.mark.parametrize("method", ["maml", "oracle"])
def test_trajectories_show_each_goals_own_walks(drawn, monkeypatch, method):
    """The first episode of each step to its end, as the evaluation played it."""
    monkeypatch.setattr(mt.Point2D, "GOAL_BOX", 0.3)
    config = tiny_config(method=method, eval_steps=2, horizon=9)
    theta, goals, lengths = first_theta(config), POINT2D.test_tasks(4), []
    mt.draw_trajectories(Path("trajectories.png"), config, theta)
    axes = drawn["trajectories.png"].axes
    assert len(axes) == 4
    for m, (ax, goal) in enumerate(zip(axes, goals)):
        *walks, star, origin = [np.array(line.get_data()) for line in ax.lines]
        expected = [data for _, data in plain_evaluation(config, theta, m, goal)]
        assert len(walks) == len(expected) == (3 if method == "maml" else 1)
        for walk, data in zip(walks, expected):
            lengths.append(int(data.mask[0].sum()))
            path = data.obs[0, :lengths[-1], :2].T
            np.testing.assert_allclose(walk, path, atol=1e-5)
        np.testing.assert_allclose([star[:, 0], origin[:, 0]], [goal, [0, 0]])
        assert ax.get_title() == "goal ({:.2f}, {:.2f})".format(*goal)
        assert np.abs(ax.get_xlim()).min() == np.abs(ax.get_ylim()).min() > 0.5
        assert ax.lines[1].get_label() == ("1 step" if method == "maml" else "goal")
    assert min(lengths) < 9 == max(lengths), "choose another box"


@pytest.mark.parametrize("name", (
    "point2d", "cheetah-dir", pytest.param("ant-vel", marks=slow)))
def test_render_draws_an_episode_before_and_one_after_adaptation(name, tmp_path):
    from PIL import Image, ImageSequence
    family_named(name)
    config = tiny_config(task=name, eval_alpha=3.0, horizon=5)
    try:
        mt.render_gif(tmp_path / "a.gif", config, first_theta(config))
    except mt.BadInput as error:
        pytest.skip(str(error))
    with Image.open(tmp_path / "a.gif") as gif:
        frames = np.array([np.asarray(frame.convert("RGB"), int)
                           for frame in ImageSequence.Iterator(gif)])
    assert len(frames) == 2 and names_in(tmp_path) == ["a.gif"]
    panels = np.array_split(np.abs(frames[1] - frames[0]), 4, axis=1)
    for before, after in (panels[:2], panels[2:]):                  # of two tasks
        assert before.sum() > 0 and after.sum() > 0                 # something moves
        assert before.sum() != after.sum()                          # and adapts


# %% Section 11: the command line, end to end

def test_command_line_trains_evaluates_draws_and_says_where(
        tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert mt.main(["--task", "point2d", *TINY]) == 0
    out, folder = capsys.readouterr().out, Path("runs/point2d-maml-seed0")
    assert names_in(folder) == sorted(mt.RUN_FILES)
    assert str(folder) in out.splitlines()[-1] and "maml, paper" in out
    assert re.findall(r"^ +(\d+) .*→", out, re.MULTILINE) == ["1", "2"]
    for name in ("learning.png", "adaptation.png", "trajectories.png"):
        assert (folder / name).read_bytes()[:4] == b"\x89PNG"


def test_help_says_every_setting_and_its_default(capsys):
    assert mt.main(["--help"]) == 0
    said = "".join(capsys.readouterr().out.split())
    for f in dataclasses.fields(mt.Config):
        default = "" if f.default is None else f"default{f.default}".replace(" ", "")
        begins = "".join(f.metadata["help"].split())
        assert re.search(re.escape(begins) + ".{,200}?" + re.escape(default), said), f


def test_import_has_no_side_effects_and_point2d_needs_no_mujoco(tmp_path):
    """Without MuJoCo, what needs it is refused with what to install."""
    program = f"""
import sys, torch
sys.path.insert(0, {str(HERE)!r})
sys.modules["mujoco"], n = None, torch.get_num_threads()
import maml_trpo as mt
assert torch.get_num_threads() == n and "matplotlib" not in sys.modules
print([mt.main({[*TINY, "--out", "a"]!r}),
       mt.main({[*TINY, "--task", "ant-dir"]!r})])"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, text=True,
                          capture_output=True, timeout=300)
    assert done.stdout.endswith("[0, 2]\n") and "pip install" in done.stderr
    assert done.stderr.count("\n") == 1 and names_in(tmp_path) == ["a"]
    assert subprocess.run([sys.executable, HERE / "maml_trpo.py", "--best"],
                          capture_output=True, timeout=300).returncode == 2


def test_progress_line_shows_each_number_in_its_column():
    """A row of numbers all different; 5 iterations of 54.5 s are left: 272.5 s."""
    row = dict(zip(mt.PROGRESS_COLUMNS, (
        6, -31.25, -12.75, 0.01625, -0.21375, 0.0175, 3, 0.625, 0.875, 1.5, 2.5, 3.5,
        4.5, 13.25)))
    line = mt.progress_line(row, 12, 54.5)
    *numbers, left = line.replace("→", " ").split()
    np.testing.assert_allclose([float(x) for x in numbers], [
        7, -31.25, -12.75, -0.21375, 0.0175, 3, 0.625, 0.875, 13.25], atol=1e-4)
    assert left in ("4m32s", "4m33s")
    assert mt.progress_line(row | {"iteration": 11}, 12, 54.5).split()[-1] == "0m00s"


def test_command_line_resumes_extends_compares_and_evaluates(
        tmp_path, no_figures, trained, monkeypatch, capsys):
    a, b, e = tmp_path / "a", tmp_path / "b", str(tmp_path / "e")
    monkeypatch.setattr(mt, "draw_adaptation", drawn := mock.Mock())
    assert tiny_run(a, "--iterations", "3", "--workers", "2") == 0
    assert tiny_run(b) == 0 and tiny_run(b, "--iterations", "3", "--resume") == 0
    assert outcome(a) == outcome(b)
    evaluate = ["--evaluate", str(a / "checkpoint.pt"), "--compare"]
    assert mt.main([*evaluate, str(trained), "--out", e]) == 0
    theirs = [line for line in capsys.readouterr().out.splitlines()
              if line.startswith("maml, run")]
    returns = mt.read_evaluation(trained, "point2d")[1].mean(0)
    np.testing.assert_allclose(
        [float(x) for x in re.findall(r"(\S+) ±", theirs[0])], returns, atol=0.006)
    assert Path(e, "evaluation.csv").read_text() == Path(
        a, "evaluation.csv").read_text()
    assert mt.main([*evaluate, e, "--out", e + "2", "--eval-tasks", "2"]) == 0
    assert re.search("maml, e,.* 5", capsys.readouterr().out)       # of an evaluation
    assert len(drawn.call_args.args[2]) == 2                        # both are drawn


def test_report_is_of_the_last_theta_and_with_best_of_the_best(
        trained, tmp_path, no_figures, monkeypatch, capsys):
    """With every setting of an evaluation, which are written down with it."""
    config, state = mt.load_checkpoint(trained / "checkpoint.pt")
    given = dict(eval_tasks=3, eval_steps=1, eval_episodes=4, seed=6, eval_alpha=0.7)
    shown = []
    for name in ("draw_trajectories", "render_gif"):
        monkeypatch.setattr(mt, name, lambda path, config, theta: shown.append(theta))
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
    for more, theta, which, changes in (([], state.theta, "last", {}),
                                        (["--best"], state.best_theta, "best", {}),
                                        (flags, state.theta, "last", given)):
        out = tmp_path / str(len(more))
        assert mt.main(["--evaluate", str(trained / "checkpoint.pt"), "--out", str(out),
                        "--workers=1", f"--render={out}.gif", *more]) == 0
        assert torch.equal(shown.pop(), theta) and torch.equal(shown.pop(), theta)
        assert f"maml, {which} θ" in capsys.readouterr().out
        np.testing.assert_array_equal(
            mt.read_evaluation(out, "point2d")[1],
            mt.evaluate(dataclasses.replace(config, **changes), theta))
        assert changes.items() <= json.loads((out / "config.json").read_text()).items()


def test_init_starts_from_the_last_theta_of_the_other_run(
        trained, tmp_path, no_figures, capsys):
    last = mt.load_checkpoint(trained / "checkpoint.pt")[1].theta
    init = ["--init", trained / "checkpoint.pt"]
    assert tiny_run(tmp_path / "a", *init, "--iter", "0", "--inner-l", "ratio") == 0
    config, state = mt.load_checkpoint(tmp_path / "a" / "checkpoint.pt")
    assert state.iteration == 0 and torch.equal(state.theta, last)
    assert torch.equal(state.best_theta, last)
    assert config.inner_loss == "ratio"                   # flags may be shortened
    for more, words in ((["--activation", "tanh"], "activation"), (["--hidden", "5"],
                        "hidden"), (["--method", "oracle"], "oracle"), (
                        ["--task", "ant-dir"], "task"),
                        (["--method", "random", "--iterations", "0"], "--init")):
        assert words in refused(capsys, *TINY, "--out", tmp_path / "b", *init, *more)
    assert not (tmp_path / "b").exists()


def test_resume_refuses_every_setting_but_iterations_and_workers(copied, capsys):
    """Each by its name, and nothing is changed; also fewer iterations than before."""
    config, before = mt.load_checkpoint(copied / "checkpoint.pt")[0], files_of(copied)
    resume = ["--resume", "--out", copied]
    others = dict(task="ant-dir", method="oracle", hidden="4,3", activation="tanh",
                  hvp="gauss-newton", inner_loss="ratio", first_order=None)
    for name, value in vars(config).items():
        if name not in ("iterations", "workers"):
            flag = "--" + name.replace("_", "-")
            other = others[name] if name in others else (
                value + 1 if type(value) is int else value / 2)
            error = refused(capsys, *resume, flag, *[other] * (other is not None))
            assert re.search(rf"\b{name}\b|{flag}\b", error) and "copied" in error
    assert "iterations" in refused(capsys, *resume, "--iterations", "1")
    assert "--init" in refused(capsys, *resume, "--init", copied / "checkpoint.pt")
    assert files_of(copied) == before


def test_resume_of_a_finished_run_evaluates_it_again(copied, no_figures, capsys):
    first = outcome(copied)
    (copied / "evaluation.csv").unlink()               # killed while it was evaluated
    with open(copied / "progress.csv", "a") as f:      # a row ahead of the checkpoint
        f.write("1,-0.3")
    assert mt.main(["--resume", "--out", str(copied), "--workers", "2"]) == 0
    assert ("2 of 2 meta-iterations done; tasks 2, episodes 3, steps 4, inner steps 1, "
            "workers 2; " in capsys.readouterr().out)
    assert outcome(copied) == first


def test_two_runs_started_at_once_get_two_folders(tmp_path, no_figures, monkeypatch):
    """The other run takes the name after this one has seen that it is free."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    mkdir, name = os.mkdir, "point2d-maml-seed0"

    def too_late(path, *args):
        if not Path("runs", name).exists():
            mkdir(f"runs/{name}")
        return mkdir(path, *args)
    monkeypatch.setattr(os, "mkdir", too_late)
    assert mt.main(TINY) == 0
    assert names_in(Path("runs")) == [name, f"{name}-2"]
    assert not names_in(Path("runs", name)) and mt.main(["--resume"]) == 2   # of which?


@pytest.mark.parametrize("args, words", [
    (["--task", "walker"], "walker"), (["--alpha", "nan"], r"\balpha"),
    (["--iterations", "many"], "iterations"), (["--no-such-flag"], "no-such-flag"),
    (["--method", "random", "--iterations", "3"], "random.*iterations"),
    (["--evaluate", "missing.pt"], "missing.pt"), (["--hidden", "64 64"], "--hidden"),
    (["--evaluate", "foreign.pt"], "foreign.pt"),
    (["--init", "foreign.pt"], "foreign.pt"), (["--compare", "nowhere"], "nowhere"),
    (["--resume", "--out", "nowhere"], "nowhere"), (["--out", "run"], "run"),
    (["--out", "foreign.pt"], "foreign.pt"), (["--best"], "--evaluate"),
    (["--eval", "2"], "ambiguous.*eval-tasks"), (["--meth", "magic"], "method"),
    (["--evaluate", "run/checkpoint.pt", "--resume"], "--resume"),
    (["--evaluate", "run/checkpoint.pt", "--render", "a.mp4"], ".gif"),
    (["--evaluate", "run/checkpoint.pt", "--alpha", "0.3"], "alpha"),
    (["--evaluate", "run/checkpoint.pt", "--task", "ant-vel"], "point2d.*ant-vel"),
    (["--compare", "run/evaluation.csv"], "run"), (["--compare", "ant"], "ant"),
    (["--compare", "gaps"], "gaps"), (["--compare", "header"], "header"),
    (["--out", "gaps"], "already"), (["--out", "/proc/maml"], "/proc/maml"),
    (["--render", "old.gif"], "new file")])
def test_bad_input_is_one_sentence_and_status_2_and_changes_nothing(
        tmp_path, trained, monkeypatch, capsys, args, words):
    (tmp_path / "foreign.pt").write_bytes(b"not a checkpoint")
    (tmp_path / "old.gif").write_bytes(b"mine")
    shutil.copytree(trained, tmp_path / "run")
    for name, old, new in (("gaps", ",1,2,", ",1,1,"), ("header", "method", "")):
        table = shutil.copytree(trained, tmp_path / name) / "evaluation.csv"
        table.write_text(table.read_text().replace(old, new))
        (tmp_path / name / "checkpoint.pt").unlink()         # as after --evaluate
    shutil.copytree(trained, tmp_path / "ant")              # a run of another task
    config = tmp_path / "ant" / "config.json"
    config.write_text(config.read_text().replace("point2d", "ant-vel"))
    before = files_of(tmp_path)
    monkeypatch.chdir(tmp_path)
    small = [] if "--evaluate" in args else TINY     # should it be accepted after all
    assert re.search(words, refused(capsys, *small, *args))
    assert files_of(tmp_path) == before


def test_world_size_without_torchrun_is_one_sentence(monkeypatch, capsys):
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "torchrun" in refused(capsys, *TINY)


# %% The notes

# The lines of the listing that are not blank.
LISTING = [1, 3, 5, 7, 8, 10, 11, 13, 14, 17, *range(19, 23), 24, *range(27, 32), 33,
           34, 36, 37, *range(39, 43), 44, 45, *range(47, 50), *range(51, 58),
           *range(59, 64), *range(65, 70), 72, 73, 77, 78, 80]


@text
def test_map_has_exactly_one_row_for_every_line_and_names_existing_functions():
    notes = (HERE / "notes.md").read_text(encoding="utf-8")
    table = notes.split("<!-- map begins -->")[1].split("<!-- map ends -->")[0]
    rows = re.findall(r"^\| (\d+) \|.*?\|(.*?)\|", table, re.MULTILINE)
    assert [int(number) for number, _ in rows] == LISTING
    for number, functions in rows:
        names = re.findall(r"`([A-Za-z_][\w.]*)`", functions)
        assert names, f"line {number} names no function"
        for name in names:
            target = mt
            for part in name.split("."):
                assert hasattr(target, part), f"line {number}: there is no {name}"
                target = getattr(target, part)


@text
def test_tests_named_in_notes_and_docstrings_exist():
    files = [HERE / "test_maml_trpo.py", *HERE.glob("classroom/test_*.py")]
    names = {name for file in files for name in re.findall(
        r"^def (test_\w+)", file.read_text(encoding="utf-8"), re.MULTILINE)}
    for file in ("notes.md", "maml_trpo.py", "README.md"):
        text = (HERE / file).read_text(encoding="utf-8")
        named = set(re.findall(r"\btest_\w+", text)) - {
            "test_maml_trpo", "test_tasks", "test_exercises"}
        assert named <= names, f"{file}: {sorted(named - names)}"
        assert file != "notes.md" or len(named) > 30


@text
def test_source_tags_of_the_code_and_of_the_notes_index_are_the_same():
    code = (HERE / "maml_trpo.py").read_text(encoding="utf-8")
    notes = (HERE / "notes.md").read_text(encoding="utf-8")
    index = notes.split("Sources and tags\n")[1]
    tag = re.compile(r"\[((?:MAML|TRPO|GAE|SpinUp|maml_rl|listing)\b[^\]…]*)\]")
    in_code = {" ".join(found.split()) for found in tag.findall(code)}
    patterns = {"listing l.N", "MAML Alg.3 l.N"}
    assert in_code - patterns == set(tag.findall(index)) - patterns
    for number in range(1, 16):                  # every reader's question is answered
        assert re.search(rf"\bQ{number}\b", notes), f"Q{number}"


def test_own_environment_of_the_notes_runs(tmp_path, monkeypatch):
    """The example as it stands, with two iterations in place of twenty."""
    monkeypatch.chdir(tmp_path)
    section = (HERE / "notes.md").read_text(encoding="utf-8").split(
        "Your own environment\n")[1]
    example = section.split("```python\n")[1].split("```")[0]
    assert "iterations=20" in example and len(example.splitlines()) <= 24
    scope: dict = {}
    few = "iterations=2, eval_tasks=5, eval_episodes=4"
    exec(example.replace("iterations=20", few), scope)
    assert len(scope["rows"]) == 2 and torch.isfinite(scope["theta"]).all()
    family, theta = scope["family"], scope["theta"]
    returns = mt.evaluate(scope["config"], theta, family)
    assert returns.shape == (5, 4) and -20 < returns.mean() < 0
    with pytest.raises(mt.BadInput, match="is 20, the settings' 100"):
        mt.train_maml(mt.Config(iterations=1), family)
    with pytest.raises(mt.BadInput, match="another task"):
        mt.evaluate(mt.Config(), theta)                       # θ is not point2d's


# %% Many machines: real processes, gloo on the loopback address

def three_iterations(dtype, out):
    """θ, returns and evaluation of a run; then status and number of printed lines of a
    command with three tasks, and of one with a single task, too few for several."""
    config = tiny_config(iterations=3, meta_batch_size=5, horizon=9, eval_tasks=4,
                         cg_iterations=4, hvp="gauss-newton")
    with mt.process_group():
        policy = mt.make_policy(POINT2D, config)
        start = mt.TrainState.initial(policy, config)
        start = dataclasses.replace(start, theta=start.theta.to(getattr(torch, dtype)))
        theta, rows = mt.train_maml(config, start=start)
        table = mt.evaluate(config, theta)
    runs = []
    for tasks, folder in (("3", out), ("1", f"{out}, one task")):
        os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)
        with contextlib.redirect_stdout(io.StringIO()) as said, (
                contextlib.redirect_stderr(said)):
            status = tiny_run(folder, "--meta-batch-size", tasks)
        runs.append([status, said.getvalue().count("\n")])
    return [theta.tolist(), [row["return_post"] for row in rows], table.tolist(), runs]


def one_rank(dtype, out, port, ranks, rank):
    """In a process of its own (a fork: no import), with what torchrun would tell it."""
    signal.alarm(180)
    os.environ |= dict(RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1",
                       MASTER_PORT=str(port))
    return three_iterations(dtype, out)


@pytest.mark.parametrize("dtype, tolerance, counts", [
    ("float64", 1e-9, (3,)), pytest.param("float32", 1e-2, (2, 3), marks=slow)])
def test_ranks_compute_the_same_run(tmp_path, monkeypatch, dtype, tolerance, counts):
    """Five tasks on 1, 2, 3 processes; one of them writes, and prints errors, too."""
    monkeypatch.setenv("MASTER_PORT", "0")
    with pytest.MonkeyPatch.context() as patch:
        without_figures(patch)
        alone = three_iterations(dtype, tmp_path / "1")
    for ranks in counts:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        with ProcessPoolExecutor(ranks, FORK) as pool:
            every = list(pool.map(functools.partial(
                one_rank, dtype, tmp_path / str(ranks), port, ranks), range(ranks)))
        for one in every:
            for a, b in zip(alone[:3], one[:3]):
                a, b = (torch.tensor(x, dtype=torch.float64) for x in (a, b))
                assert gap(b, a) <= tolerance
        assert every[0][3] == [alone[3][0], [2, 1]]
        assert all(one[3] == [[0, 0], [2, 0]] for one in every[1:])
        assert names_in(tmp_path / str(ranks)) == sorted(mt.RUN_FILES)
        assert not (tmp_path / f"{ranks}, one task").exists()
        with open(tmp_path / str(ranks) / "progress.csv", encoding="utf-8") as f:
            assert [row["iteration"] for row in csv.DictReader(f)] == ["0", "1"]


def test_meta_step_sums_twice_and_once_for_each_product_and_each_trial():
    """What travels: P + 1 numbers a gradient or product, 3 a trial, all of float64."""
    config = tiny_config(cg_iterations=4, backtrack_ratio=0.7, backtrack_steps=7)
    policy, theta, data = sampled_problem(config, dtype=torch.float32)
    search = mock.Mock(wraps=mt.backtrack_line_search)
    with mock.patch("torch.distributed.is_initialized", return_value=True), (
            mock.patch.object(mt, "backtrack_line_search", search)), (
            mock.patch("torch.distributed.all_reduce")) as all_reduce:
        _, stats = mt.trpo_meta_step(policy, theta, data, config)
    sent = [call.args[0] for call in all_reduce.call_args_list]
    assert search.call_args.args[-3:] == (config.max_kl, 0.7, 7)
    assert stats["line_search_steps"] > 0
    assert [len(x) for x in sent] == [2] + [policy.num_params + 1] * (1 + 4) + (
        [3] * stats["line_search_steps"])
    assert all(x.dtype == torch.float64 for x in sent)


def dying_rank(dies, seconds, args):
    """In a process of torchrun's: rank `dies` is killed in the third iteration."""
    def third() -> None:
        if os.environ["RANK"] == str(dies):
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(seconds)
    signal.alarm(180)
    interrupted_at(pytest.MonkeyPatch(), 3, third)
    sys.exit(mt.main(args))


@pytest.mark.parametrize("dies, seconds", [
    (0, 2), pytest.param(0, 0, marks=slow), pytest.param(1, 5, marks=slow)])
def test_killed_rank_ends_the_run_and_it_can_go_on(tmp_path, no_figures, dies, seconds):
    """Under torchrun, SIGKILL: the other one is in gloo's call, or busy for a while."""
    script, out = tmp_path / "ranks.py", tmp_path / "out"
    args = [*TINY, "--iterations", "5", "--hvp", HVPS[1], "--out", str(out)]
    script.write_text(f"import sys; sys.path.insert(0, {str(HERE)!r})\n"
                      f"import test_maml_trpo as t; t.dying_rank{dies, seconds, args}")
    torchrun = FORK.Process(daemon=True, target=torch.distributed.run.main, args=(
        ["--standalone", "--nproc-per-node=2", str(script)],))
    torchrun.start()
    torchrun.join(300)
    assert torchrun.exitcode == 1
    assert mt.load_checkpoint(out / "checkpoint.pt")[1].iteration == 2
    assert mt.main([*args, "--resume"]) == 0
    config, state = mt.load_checkpoint(out / "checkpoint.pt")
    theta, rows = mt.train_maml(config)                      # undisturbed, one process
    assert len(state.rows) == len(rows) == 5 and gap(state.theta, theta) <= 1e-5


# %% Faults: kills, full disks, bad input

OLD_LOCALE = {name: value for name, value in os.environ.items()
              if name != "DISPLAY"} | dict(
    LC_ALL="C", PYTHONIOENCODING="latin-1", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0",
    MPLBACKEND="TkAgg", PYTHONPATH=str(HERE))


def kill_and_resume() -> None:
    """In a process of its own: kill a run at each write, rename and meta-step, a file
    being half written, and resume it. Each must end as the undisturbed run does."""
    without_figures(pytest.MonkeyPatch())

    def start(folder, dies, *more) -> int:
        if pid := os.fork():
            return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        events = itertools.count()
        for module, name in ((os, "fsync"), (os, "replace"), (mt, "trpo_meta_step")):
            def dying(*args, right=getattr(module, name), name=name):
                if next(events) == dies:
                    if name == "fsync":
                        os.truncate(args[0], 9)
                    os.kill(os.getpid(), signal.SIGKILL)
                return right(*args)
            setattr(module, name, dying)
        os._exit(tiny_run(folder, "--eval-tasks", "1", *more))

    assert tiny_run("whole", "--eval-tasks", "1") == 0
    expected = outcome(Path("whole"))
    for n in itertools.count():
        if start(f"killed {n}", n) != -signal.SIGKILL:
            break                                           # it ended before that
        assert start(f"killed {n}", -1, "--resume") == 0, n
        assert outcome(Path(f"killed {n}")) == expected, n
        assert not any(Path(f"killed {n}").glob(".*.tmp"))
    print(f"killed {n} times")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_killed_runs_end_bit_identical_when_resumed(tmp_path):
    """In a folder with a space and an umlaut, where the locale knows only ASCII."""
    (cwd := tmp_path / "Übung 1").mkdir()
    code = "import test_maml_trpo as t; t.kill_and_resume()"
    out = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True,
                         text=True, errors="replace", timeout=300, env=OLD_LOCALE)
    assert out.returncode == 0, out.stderr
    assert int(re.search(r"killed (\d+) times", out.stdout)[1]) >= 12
    assert "before ? after" in out.stdout and "Done in" in out.stdout   # → in latin-1


def interrupted_at(monkeypatch, call, action):
    """Before its `call`-th meta-step the program meets `action`."""
    step, calls = mt.trpo_meta_step, itertools.count(1)
    monkeypatch.setattr(mt, "trpo_meta_step", lambda *args: (
        action() if next(calls) == call else None, step(*args))[1])


def test_run_that_is_going_on_is_left_alone_and_interrupted_says_how_to_go_on(
        tmp_path, no_figures, monkeypatch, capsys):
    """A second --resume, and then Ctrl-C, come in the second iteration."""
    run = tmp_path / "run"

    def second() -> None:
        (run / ".checkpoint.pt.1.tmp").write_text("being written")
        before = files_of(run)
        assert "going on" in refused(capsys, "--resume", "--out", run)
        assert files_of(run) == before
        raise KeyboardInterrupt

    interrupted_at(monkeypatch, 2, second)
    assert tiny_run(run) == 130 and "--resume" in capsys.readouterr().err
    assert mt.load_checkpoint(run / "checkpoint.pt")[1].iteration == 1


@pytest.mark.parametrize("room", [0, 1000])
def test_full_disk_is_one_sentence_and_keeps_the_last_checkpoint(
        tmp_path, no_figures, monkeypatch, capsys, trained, room):
    """The disk is full from the second iteration on: files end after `room` bytes."""
    resource, run = pytest.importorskip("resource"), tmp_path / "run"
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    interrupted_at(monkeypatch, 2, lambda: resource.setrlimit(
        resource.RLIMIT_FSIZE, (room, limit[1])))
    try:
        assert tiny_run(run) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "File too large" in error and "--resume" in error
    assert mt.load_checkpoint(run / "checkpoint.pt")[1].iteration == 1
    assert not any(run.glob(".*.tmp")) and tiny_run(run, "--resume") == 0
    assert outcome(run)[-2] == outcome(trained)[-2]                # evaluation.csv


@pytest.mark.parametrize("stdout", ["head", "full", "closed", "none"])
def test_training_goes_on_when_nothing_can_be_printed(
        tmp_path, no_figures, monkeypatch, stdout):
    stream = None if stdout == "none" else io.StringIO()
    if stdout == "closed":
        stream.close()
    elif stdout == "full":
        stream.write = mock.Mock(side_effect=OSError(28, "No space left on device"))
    elif stdout == "head":
        reader, writer = os.pipe()
        os.close(reader)
        stream = open(writer, "w")
    monkeypatch.setattr(sys, "stdout", stream)
    assert tiny_run(tmp_path / "run") == 0
    with contextlib.suppress(OSError):
        stream and stream.close()


def test_checkpoint_of_another_kind_is_refused_and_left(copied, tmp_path, capsys):
    """Content that only a foreign or newer program would write, change by change."""
    path = copied / "checkpoint.pt"
    good = torch.load(path, weights_only=True)

    class Command:                              # what a pickle may do, and ours may not
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "broken in"),)
    def saved(content) -> bytes:
        torch.save(content, buffer := io.BytesIO())
        return buffer.getvalue()

    flipped, theta = bytearray(saved(good)), good["theta"]
    flipped[flipped.index(theta.numpy().tobytes()) + 9] ^= 1         # one bit of θ
    for content in (bytes(flipped), saved(good)[:-99], saved(Command()), saved([]), *(
            saved(good | changes) for changes in (
                dict(version=99), dict(format="other"), dict(theta=torch.zeros(31)),
                dict(theta=None), dict(theta=theta * math.nan), dict(iteration=7),
                dict(best_theta=theta[:-1]), dict(best_theta=theta * math.nan),
                dict(iteration="x"), dict(rows=[]), dict(spread=None),
                dict(best_return="x"), dict(config={}), dict(config={"no_such": 1}),
                dict(config=good["config"] | {"alpha": -1})))):
        path.write_bytes(content)
        for args in (["--out", copied, "--resume"], ["--evaluate", path],
                     [*TINY, "--init", path, "--out", tmp_path / "i"]):
            assert "copied" in refused(capsys, *args)
        assert path.read_bytes() == content
    assert not (tmp_path / "broken in").exists()


@pytest.mark.parametrize("reward, error, words", [
    (math.nan, mt.BadInput, "reward at step 2"),
    (1e300, mt.BadInput, "reward at step 2"), (3e38, mt.Diverged, "advantage")])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_bad_reward_is_named_with_iteration_task_and_step(reward, error, words):
    """Of the second task in the second iteration."""
    tasks, done = np.array([[0.25], [-0.75]]), []
    family = toy_family(lambda t, task: reward if done and t > 2 and task == -0.75
                        else 0.1 * t, sample_tasks=lambda rng, M: tasks)
    config = tiny_config(meta_batch_size=2, horizon=4)
    with pytest.raises(error, match=rf"^iteration 2: .*-0\.75.*{words}"):
        mt.train_maml(config, family, after_iteration=done.append)


def test_gradient_or_action_that_is_not_finite_stops_in_its_iteration(monkeypatch):
    right, calls = mt.meta_gradient, itertools.count(1)
    monkeypatch.setattr(mt, "meta_gradient", lambda *args: right(*args) * (
        math.nan if next(calls) == 3 else 1))
    with pytest.raises(mt.Diverged, match="iteration 2: the meta-gradient"):
        train_toy(toy_family())
    with pytest.raises(mt.Diverged, match="action at step 0"):      # θ's fault
        mt.evaluate(tiny_config(), math.nan * first_theta(tiny_config()))


@pytest.mark.parametrize("error, words", [
    (MemoryError("Unable to allocate 9 GiB"), "out of memory"), (RuntimeError(
        "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        "out of memory"), (mt.Diverged("θ is not finite"), "is not finite")])
def test_failed_training_is_one_sentence_and_status_1(
        tmp_path, monkeypatch, capsys, error, words):
    monkeypatch.setattr(mt, "train_maml", mock.Mock(side_effect=error))
    assert tiny_run(tmp_path / "run") == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and words in error


def test_environments_own_error_keeps_its_traceback(tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="mine"):
        patch.setattr(mt, "train_maml", mock.Mock(side_effect=RuntimeError("mine")))
        tiny_run(tmp_path / "run")
    with pytest.raises(KeyError, match="one's own"):
        train_toy(toy_family(raises=4))
    with pytest.raises(mt.BadInput, match="expected 5, got 4") as raised:
        train_toy(toy_family(results=4))
    assert isinstance(raised.value.__cause__, ValueError)
    with pytest.raises(mt.BadInput, match="observation at step 2"):
        train_toy(toy_family(obs=lambda t: np.full(2, t if t < 2 else math.nan)))


def test_family_that_breaks_its_promises_is_refused_in_one_sentence():
    """Among them the likeliest two: one environment K times, tasks that are no rows."""
    one = toy_family().make_envs(1).envs[0]
    for changes, words in (
            (dict(make_envs=lambda K: mt.Point2D(3)), "VectorEnv of 2"),
            (dict(make_envs=lambda K: SyncVectorEnv([lambda: one] * K)), "same|each"),
            (dict(sample_tasks=lambda rng, M: rng.uniform(size=M)), "rows? of numbers"),
            (dict(test_tasks=lambda n: np.zeros(n)), "rows? of numbers"),
            (dict(horizon=9), "9.*4")):
        for method in ("maml", "oracle"):
            with pytest.raises(mt.BadInput, match=f"^toy: .*({words})") as raised:
                train_toy(toy_family(**changes), method=method)
            assert "\n" not in str(raised.value)


def test_any_command_line_works_or_is_refused_in_one_sentence(
        trained, tmp_path, monkeypatch, no_figures, capsys):
    """Every flag, with words that fit and that do not: status 0, or 2 or 1 with one
    line. What was there before stays, unless the run was resumed."""
    words = ["", " ", "-1", "0", "1", "2", "0.5", "1e-300", "1e30", "1e400", "nan",
             "inf", "None", "true", "1,2", ",", "3,0", "a,b", "0x10", "1_0", "٣", "θ",
             "--", "-", "maml", "tanh", "ratio", "point2d", "gauss-newton", "9" * 20,
             "99999,9", "%s"]
    paths = ["", ".", "missing", "kept", "kept/run", "kept/a/b", "kept/foreign.txt",
             "kept/foreign.txt/x", "kept/half.pt", "kept/run/checkpoint.pt", "/proc/x",
             "x" * 300, "θ 1", "new.gif", "kept/run/config.json", "-", "nowhere/x.gif"]
    monkeypatch.chdir(tmp_path)
    kept = shutil.copytree(trained, tmp_path / "kept" / "run").parent
    (kept / "foreign.txt").write_bytes(b"\xff\xfenot a run")
    (kept / "half.pt").write_bytes((kept / "run" / "checkpoint.pt").read_bytes()[:9999])
    names, seen = [f.name.replace("_", "-") for f in dataclasses.fields(mt.Config)], []
    setting = draw.tuples(draw.sampled_from(names), draw.sampled_from(words))
    path = draw.tuples(draw.sampled_from([
        "out", "init", "evaluate", "compare", "render"]), draw.sampled_from(paths))
    loose = draw.sampled_from([("resume",), ("no-such",), ("resume", "x"), ("best",)])

    @hypothesis.given(draw.lists(setting | path | loose, min_size=1, max_size=3))
    def check(flags):
        given = {flag[0] for flag in flags}
        args = [] if "evaluate" in given else list(TINY)
        args += [] if "out" in given else ["--out", f"new/{len(seen)}"]
        for name, *value in flags:
            args += ["--" + name, *value]
        before = files_of(kept)
        capsys.readouterr()
        status = mt.main(args)
        error = capsys.readouterr().err
        assert status in (0, 2) or status == 1 and re.search("finite|std", error), error
        assert error.count("\n") == (status > 0) and "Traceback" not in error, error
        if (after := files_of(kept)) != before:
            assert "--resume" in args and status == 0 or before.items() <= after.items()
            shutil.rmtree(kept)              # the next one finds what this one found
            for file, content in before.items():
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(content)
        seen.append(status)
    check()
    assert seen.count(2) > len(seen) / 2 and seen.count(0) > 1


@pytest.mark.filterwarnings("ignore")
def test_any_environment_trains_is_refused_or_raises_its_own_error():
    """What reset and step may return wrongly, spaces of all kinds, and combinations."""
    box, seen, small = gym.spaces.Box, [], np.zeros(2, np.float32)
    parts = dict(
        obs=[small.astype(int), [0.0, 1.0], np.zeros(3), np.zeros((1, 2)), 0.5, None,
             "x", small * math.nan, np.full(2, 1e300)],
        reward=[1, True, np.ones(1), np.ones(2), None, "much", 1j, -math.inf, 1e300],
        done=[lambda t: True, lambda t: t == 3, lambda t: t % 2, lambda t: None,
              lambda t: np.bool_(t > 4), lambda t: [False, True]],
        S=[box(-1, 1, (2,), np.float64), box(0, 9, (2,), np.uint8), box(0, 1, (2, 2)),
           box(0, 1, ()), box(0, 1, (0,)), gym.spaces.Discrete(2), gym.spaces.Dict()],
        A=[box(-np.inf, np.inf, (3,)), box(0, 5, (1,), np.int64), box(0, 1, (0,)),
           gym.spaces.Discrete(3), gym.spaces.MultiBinary(3), gym.spaces.Tuple([])],
        reset=["old"], results=[4, 3], raises=[1, 2, 4],
        mode=[AutoresetMode.SAME_STEP, AutoresetMode.DISABLED])
    one = draw.sampled_from([(name, value) for name in parts for value in parts[name]])

    @hypothesis.given(draw.lists(one, max_size=2, unique_by=lambda pair: pair[0]))
    def check(chosen):
        changes = dict(chosen)
        for name in {"obs", "reward"} & set(changes):
            changes[name] = lambda *_, value=changes[name]: value
        try:
            theta, _ = train_toy(toy_family(**changes), iterations=1)
        except (mt.BadInput, mt.Diverged) as error:
            assert "\n" not in str(error) and len(str(error)) > 30
        except (KeyError, AssertionError):
            assert "raises" in changes or changes.get("mode") == AutoresetMode.DISABLED
        else:
            seen.append(changes)
            assert torch.isfinite(theta).all()
    check()
    assert len(seen) >= 10


# %% Proofs: an MDP small enough to enumerate, expectations without sampling
#
# Every expectation below is a finite sum, over all trajectories or over all sets D of K
# trajectories. True gradients are central differences of `MdpTiny.value`, which
# knows no trajectory, no log π and no autograd.


class MdpTiny:
    """Random: S states, A actions, H steps; `starts` first states, `successors` of each
    (state, action). It is its own policy, too: tabular, π_θ(a|s) ∝ exp θ[s, a]."""

    def __init__(self, seed, S, A, H, starts=1, successors=1):
        rng, start, move = np.random.default_rng(seed), np.zeros(S), np.zeros((S, A, S))
        start[:starts] = rng.dirichlet(np.ones(starts))
        for s, a in itertools.product(range(S), range(A)):
            move[s, a, rng.permutation(S)[:successors]] = rng.dirichlet(
                np.ones(successors))
        self.start, self.move, self.reward, self.theta = map(torch.tensor, (
            start, move, rng.standard_normal((S, A)), 0.5 * rng.standard_normal(S * A)))
        self.S, self.A, self.H, self.P = S, A, H, S * A
        # All paths: states and actions (N, H), and the dynamics' part of p(τ), (N,).
        pairs = torch.cartesian_prod(*[torch.arange(self.P)] * H).reshape(-1, H)
        states, actions = pairs // A, pairs % A
        luck = self.start[states[:, 0]] * self.move[
            states[:, :-1], actions[:, :-1], states[:, 1:]].prod(1)
        self.states, self.actions, self.luck = (
            x[luck > 0] for x in (states, actions, luck))
        self.N = len(self.luck)

    def distribution(self, theta, obs):
        """For obs one-hot (n, H, S); actions are (n, H)."""
        return torch.distributions.Categorical(
            logits=obs @ theta.view(self.S, self.A), validate_args=False)

    def probability(self, theta):
        """p_θ(τ) of each path: (N,)."""
        pi = theta.view(self.S, self.A).softmax(-1)
        return self.luck * pi[self.states, self.actions].prod(1)

    def value(self, theta, gamma=1.0):
        """V(θ) = E[Σ_t γᵗ r_t]/H, backwards in time from the last step: ()."""
        pi = theta.view(self.S, self.A).softmax(-1)
        ahead = torch.zeros(self.S, dtype=torch.float64)
        for _ in range(self.H):
            ahead = (pi * (self.reward + gamma * self.move @ ahead)).sum(-1)
        return self.start @ ahead / self.H

    def data(self, paths, weight=1.0, gamma=1.0):
        """These paths as episodes, rewards times `weight`, credited with G_t."""
        rew = self.reward[self.states, self.actions][paths] * weight
        obs = torch.nn.functional.one_hot(self.states[paths], self.S).double()
        return mt.Trajectories(obs, self.actions[paths], rew, torch.ones_like(rew),
                               mt.discounted_returns(rew, gamma))

    def weighted(self, theta):
        """All paths, rewards times N·p_θ(τ): a mean over these N is an expectation."""
        return self.data(range(self.N), self.N * self.probability(theta)[:, None])

    def sets(self, K):
        """Every D of K paths, in every order, with θ ↦ p_θ(D)."""
        for D in itertools.product(range(self.N), repeat=K):
            yield self.data(list(D)), (
                lambda theta, D=list(D): self.probability(theta)[D].prod())


# 1,296 paths for H = 4, with chance in every move; 8 for H = 3, in the actions alone.
MDP_FOR_CREDIT = functools.partial(MdpTiny, 3, S=3, A=2, starts=3, successors=3)
MDP_FOR_SETS = functools.partial(MdpTiny, 3, S=5, A=2)


def mdp_expected(mdp, theta, credit):
    """E[Σ_t ∇log π_t·credit_t]/H through mt.inner_loss: credit (N, H), each path's."""
    data = mdp.weighted(theta)
    data.adv = credit * (mdp.N * mdp.probability(theta))[:, None]
    return -mt.gradient(lambda t: mt.inner_loss(mdp, t, data), theta)


def mdp_expected_over_sets(mdp, K, credit):
    """The same at mdp.theta, D of K paths at a time, credited by credit(D), (K, H)."""
    total = 0.0
    for data, probability in mdp.sets(K):
        data.adv = credit(data)
        total = total - probability(mdp.theta) * mt.gradient(
            lambda t: mt.inner_loss(mdp, t, data), mdp.theta)
    return total


def test_reward_times_own_score_expectation_is_not_the_enumerated_gradient():
    """[listing l.11] E[Σ_t r_t ∇log π_t] is the gradient for H = 1, not for H = 4.

    It is the slope of each step's own reward, the visits of the states held fixed."""
    for H in (1, 4):
        mdp = MDP_FOR_CREDIT(H=H)
        visits = torch.nn.functional.one_hot(mdp.states).sum(1).double()        # (N, S)
        visits = mdp.probability(mdp.theta) @ visits
        own = mdp_expected(mdp, mdp.theta, mdp.data(range(mdp.N)).rew)
        frozen = central_difference(lambda x: (visits[:, None] * mdp.reward * x.view(
            mdp.S, mdp.A).softmax(-1)).sum() / mdp.H, mdp.theta)
        assert torch.allclose(own, frozen, atol=1e-9)
        error = gap(own, central_difference(mdp.value, mdp.theta))
        assert error < 1e-8 if H == 1 else error > 0.1


@pytest.mark.parametrize("gamma", [1.0, 0.7])
def test_discounted_reward_to_go_drops_gamma_to_the_t_of_the_enumerated_gradient(gamma):
    """E[Σ_t s_t γᵗG_t] is the gradient, as E[Σ_t s_t R(τ)] is; without γᵗ it is not.

    mt's estimator is without. At γ < 1 its Jacobian is not symmetric either: it is the
    gradient of no function."""
    mdp = MDP_FOR_CREDIT(H=4)
    theta, every = mdp.theta, mdp.data(range(mdp.N), gamma=gamma)
    weight = gamma ** torch.arange(mdp.H, dtype=torch.float64)
    total = (every.rew @ weight)[:, None]
    true = central_difference(lambda x: mdp.value(x, gamma), theta)
    for credit in (every.adv * weight, total):
        assert torch.allclose(mdp_expected(mdp, theta, credit), true, atol=1e-9)
    usual = mdp_expected(mdp, theta, every.adv)
    by_gae = mt.gae(every.rew, 0 * every.rew, every.mask, gamma, 1.0)
    assert torch.allclose(mdp_expected(mdp, theta, by_gae), usual, atol=1e-12)
    second, of_true = (central_difference(lambda x: mdp_expected(mdp, x, credit), theta)
                       for credit in (every.adv, every.adv * weight))
    assert gap(of_true, of_true.T) < 1e-8
    for error in (gap(usual, true), gap(second, second.T)):
        assert error < 1e-8 if gamma == 1.0 else error > 0.05


@pytest.mark.parametrize("gamma", [1.0, 0.7])
def test_baseline_fitted_on_other_paths_leaves_the_expectation_unchanged(gamma):
    """E[∇log π_t·V(x_t, t)] = 0 if V has not seen these paths; λ = .5 biases."""
    mdp = MDP_FOR_CREDIT(H=4)
    every, other = (mdp.data(paths, gamma=gamma)
                    for paths in (range(mdp.N), range(5, mdp.N, 321)))
    baseline = mt.LinearBaseline().fit(other.obs, other.adv, other.mask)
    values = baseline.predict(every.obs)
    without, exact, biased = (mdp_expected(mdp, mdp.theta, credit) for credit in (
        every.adv, mt.gae(every.rew, values, every.mask, gamma, 1.0),
        mt.gae(every.rew, values, every.mask, gamma, 0.5)))
    assert values.std() > 0.1 and gap(biased, without) > 0.01
    assert torch.allclose(exact, without, atol=1e-12)


def test_baseline_fitted_on_the_same_paths_biases_the_expectation():
    """The mean return of the same K paths leaves (1 − 1/K)·gradient, exactly.

    mt.LinearBaseline, fitted on the K paths it then predicts, biases less for larger K.
    """
    def less_mean(data):
        total = data.rew.sum(1, keepdim=True)
        return (total - total.mean()).expand(-1, mdp.H)

    def less_fitted(data):
        baseline = mt.LinearBaseline().fit(data.obs, data.adv, data.mask)
        return mt.gae(data.rew, baseline.predict(data.obs), data.mask, 1.0, 1.0)
    mdp = MDP_FOR_SETS(H=3)
    true, errors = central_difference(mdp.value, mdp.theta), []
    for K in (1, 2, 3):
        assert torch.allclose(mdp_expected_over_sets(mdp, K, less_mean),
                              (1 - 1 / K) * true, atol=1e-9)
        errors.append(gap(mdp_expected_over_sets(mdp, K, less_fitted), true))
    assert errors[0] > errors[1] > errors[2] > 0.1


def test_standardising_by_the_same_paths_turns_the_expected_step():
    """mt.standardise takes mean and σ from D itself. H 1, K 2, rewards 0, 1, 10.

    Two different actions have Â = ±1, whatever their rewards: the expected step points
    along (−2, 0, 2), the gradient along (−11, −8, 19). As K grows the angle closes.
    """
    mdp = MdpTiny(0, S=1, A=3, H=1)
    mdp.reward = torch.tensor([[0.0, 1, 10]], dtype=torch.float64)
    mdp.theta = torch.zeros(3, dtype=torch.float64)
    steps = [mdp_expected_over_sets(mdp, K, lambda data: mt.standardise(
        data.rew, data.mask)) for K in (2, 4, 6)]
    true = central_difference(mdp.value, mdp.theta)
    assert torch.allclose(9 * true, torch.tensor([-11.0, -8.0, 19.0]).double())
    assert torch.allclose(steps[0] / steps[0][2], torch.tensor([-1.0, 0, 1]).double())
    cosines = [float(torch.cosine_similarity(step, true, dim=0)) for step in steps]
    assert abs(cosines[0] - 60 / math.sqrt(8 * 546)) < 1e-6                  # 0.908
    assert cosines == sorted(cosines) and cosines[2] > 0.95


# The dropped term, and two objectives: (II) is E_D[V(θ′(θ, D))], K paths in D, drawn
# with θ, as Algorithm 3 has it; (I) is V(θ + α∇V(θ)), the inner expectation exact.

MDP_ALPHA = 2.0


def emaml_term(policy, theta, inner, value, alpha):
    """value·∇_θ log p(D): with value = V(θ′), the term of ∇E_D[V(θ′)] that MAML drops.

    log p(D) is a *sum* over the K episodes of every inner step, whose D comes from what
    that step started from. Any number that has not seen D may be taken off the value.
    """
    theta = theta.detach().requires_grad_()
    log_p = 0.0
    for i, data in enumerate(inner):
        theta_i = mt.adapt(policy, theta, inner[:i], alpha, create_graph=True)
        log_prob = policy.distribution(theta_i, data.obs).log_prob(data.act)
        log_p = log_p + (log_prob * data.mask).sum()
    return value * torch.autograd.grad(log_p, theta)[0]


def mdp_dice_loss(policy, theta, trajectories, estimator=None):
    """−mean of □(τ_{≤t})·r_t, □ = exp(Σ_{u≤t} log π_u − its own value): DiCE."""
    log_prob = policy.distribution(theta, trajectories.obs).log_prob(trajectories.act)
    so_far = log_prob.cumsum(1)
    return -((so_far - so_far.detach()).exp() * trajectories.rew).mean()


def mdp_gradient_through(mdp, theta, inner, estimator):
    """Jᵀ∇V(θ′) by mt.adapt: "first order", "log-prob", "ratio" or (as loss) "DiCE"."""
    t = theta.clone().requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        if estimator == "DiCE":
            patch.setattr(mt, "inner_loss", mdp_dice_loss)
        theta_prime = mt.adapt(mdp, t, inner, MDP_ALPHA, estimator != "first order",
                               "ratio" if estimator == "ratio" else "log-prob")
    return torch.autograd.grad(mdp.value(theta_prime), t)[0]


class MdpSampled:
    """(II) by sums over all D, or all sequences of D for several inner steps."""

    def __init__(self, mdp, K=1, steps=1, credit=lambda data: data.adv):
        self.mdp, sets = mdp, list(mdp.sets(K))
        for data, _ in sets:
            data.adv = credit(data)
        self.sequences = list(itertools.product(sets, repeat=steps))
        self.true = central_difference(lambda theta: sum(
            p * mdp.value(theta_prime) for p, theta_prime, _ in self.outcomes(theta)),
            mdp.theta)

    def outcomes(self, theta):
        """p(D…), θ′ and D… of each sequence: numbers, never differentiated."""
        for sequence in self.sequences:
            p, theta_prime = 1.0, theta
            for data, probability in sequence:
                p = p * probability(theta_prime)
                theta_prime = mt.adapt(self.mdp, theta_prime, [data], MDP_ALPHA, False)
            yield p, theta_prime, [data for data, _ in sequence]

    def mean(self, estimator):
        """E[Jᵀ∇V(θ′)]; or, for "term", of the E-MAML term with V(θ′) − 1.3 in it."""
        total, mdp, theta = 0.0, self.mdp, self.mdp.theta
        for p, theta_prime, inner in self.outcomes(theta):
            if estimator == "term":
                value = mdp.value(theta_prime) - 1.3
                total += p * emaml_term(mdp, theta, inner, value, MDP_ALPHA)
            else:
                total += p * mdp_gradient_through(mdp, theta, inner, estimator)
        return total


@pytest.mark.parametrize("how", [
    dict(K=2), dict(K=2, credit=lambda data: mt.assign_credit(data, 1.0, 1.0).adv),
    dict(steps=2)], ids=["reward-to-go", "assign_credit", "two steps"])
def test_emaml_term_and_log_prob_equal_differences_of_the_sampled_objective(how):
    """(II): log π in the inner loss plus the E-MAML term is exact; neither is alone."""
    case = MdpSampled(MDP_FOR_SETS(H=2 if "steps" in how else 3), **how)
    log_prob, term = case.mean("log-prob"), case.mean("term")
    assert torch.allclose(log_prob + term, case.true, atol=1e-9)
    for wrong in (log_prob, case.mean("first order"), term,
                  log_prob + term / 2):                      # a mean over the K paths
        assert gap(wrong, case.true) > 0.05


def test_meta_gradient_expectation_equals_the_sampled_objective_with_sampling_frozen():
    """E[mt.meta_gradient] over D, D′ lacks exactly the E-MAML term of −∇ of (II).

    First order, it is −E[∇V(θ′)].
    """
    mdp = MdpTiny(2, S=3, A=2, H=3, starts=3)
    case, theta = MdpSampled(mdp), mdp.theta
    second, first, slope = torch.zeros(3, mdp.P, dtype=torch.float64)
    for p, theta_prime, inner in case.outcomes(theta):               # D: one path (K 1)
        outer = mdp.weighted(theta_prime)                            # all D′, by p_θ′
        task = mt.TaskData(inner, outer, mdp.distribution(theta_prime, outer.obs))
        second -= p * mt.meta_gradient(mdp, theta, task, MDP_ALPHA)
        first -= p * mt.meta_gradient(mdp, theta, task, MDP_ALPHA, first_order=True)
        slope += p * central_difference(mdp.value, theta_prime)
    assert torch.allclose(second + case.mean("term"), case.true, atol=1e-9)
    assert torch.allclose(first, slope, atol=1e-9)
    assert gap(second, case.true) > 0.05 and gap(first, second) > 0.05


def mdp_expected_true(mdp):
    """∇ of (I), V(θ + α∇V(θ)): V is per step, as the inner loss is."""
    return central_difference(
        lambda x: mdp.value(x + MDP_ALPHA * mt.gradient(mdp.value, x)), mdp.theta)


@pytest.mark.parametrize("H, exact", [(4, ["DiCE"]), (1, ["DiCE", "ratio"])])
def test_dice_and_at_horizon_1_ratio_equal_differences_of_the_expected_objective(
        H, exact):
    """(I): DiCE is exact, the ratio (LVC) for H = 1; first order and log π are not."""
    mdp = MDP_FOR_SETS(H=H)
    true, inner = mdp_expected_true(mdp), [mdp.weighted(mdp.theta)]
    for name in ("first order", "log-prob", "ratio", "DiCE"):
        error = gap(mdp_gradient_through(mdp, mdp.theta, inner, name), true)
        assert error < 1e-8 if name in exact else error > 0.01


def test_inner_loss_hessian_misses_exactly_these_terms():
    """E[inner loss], twice derived: ratio misses the cross-time terms, log π more.

    With s_t = ∇log π_t and G_t the reward-to-go, ∇²E[R] is the ratio's Hessian plus
    E[Σ_{t<u} (s_t s_uᵀ + s_u s_tᵀ)G_u]; the ratio's is log π's + E[Σ_t s_t s_tᵀ G_t].
    A constant baseline b adds b·(Fisher matrix) to log π's and nothing to the ratio's.
    """
    mdp = MDP_FOR_CREDIT(H=4)
    theta, data = mdp.theta, mdp.weighted(mdp.theta)
    weight = mdp.N * mdp.probability(theta)[:, None]
    to_go, n = data.adv, data.adv.numel()

    def second(estimator, baseline=0.0):
        data.adv = to_go - baseline * weight
        return hessian(lambda t: -mt.inner_loss(mdp, t, data, estimator), theta)
    pi = theta.view(mdp.S, mdp.A).softmax(-1)                        # s_t, closed form
    score = torch.nn.functional.one_hot(mdp.states, mdp.S)[..., None] * (
        torch.nn.functional.one_hot(mdp.actions, mdp.A) - pi[mdp.states])[..., None, :]
    score = score.flatten(2)                                                # (N, H, P)
    same = torch.einsum("nti,ntj,nt->ij", score, score, to_go) / n
    fisher = torch.einsum("nti,ntj,nt->ij", score, score, weight.expand(-1, mdp.H)) / n
    cross = sum(torch.einsum("ni,nj,n->ij", score[:, t], score[:, u], to_go[:, u])
                for u in range(mdp.H) for t in range(u)) / n
    whole = torch.einsum("nti,nuj,nu->ij", score, score, to_go) / n
    # α·E[Σ_t s_t (Σ_u s_u G_u)ᵀ]·∇V is E-MAML's term to first order: what log π lacks.
    true = hessian(mdp.value, theta)
    log_prob, ratio = second("log-prob"), second("ratio")
    for left, right in (
            (whole, same + cross + cross.T), (ratio + cross + cross.T, true),
            (log_prob + same, ratio), (second("ratio", 1.3), ratio),
            (second("log-prob", 1.3), log_prob + 1.3 * fisher)):
        assert torch.allclose(left, right, atol=1e-12)
    assert gap(ratio, true) > 0.1 and gap(log_prob, true) > 0.1


def test_neither_family_is_exact_for_the_other_objective():
    """E-MAML is exact for (II), not (I); DiCE and ratio, at finite K, for neither."""
    mdp = MDP_FOR_SETS(H=3)
    expected = mdp_expected_true(mdp)
    for K in (1, 2):
        case = MdpSampled(mdp, K)
        term = case.mean("term")
        emaml = case.mean("log-prob") + term
        assert gap(emaml, case.true) < 1e-8 and gap(emaml, expected) > 0.1
        for mean in (case.mean("ratio"), case.mean("DiCE")):
            assert gap(mean, case.true) > 0.01 and gap(mean, expected) > 0.1
            assert gap(mean + term, case.true) > 0.2         # one effect, counted twice
    for shift, first_is_nearer in ((0.0, True), (2.0, False)):     # a constant decides
        case = MdpSampled(mdp, credit=lambda data: data.adv + shift)
        first, second = (gap(case.mean(name), case.true)
                         for name in ("first order", "log-prob"))
        assert (first < second) == first_is_nearer


def test_surrogate_is_the_value_itself_at_horizon_1_and_log_prob_only_its_slope():
    """Away from θ_old, E[ratio·r] is V(θ) for H = 1; E[log π·r] is another function."""
    mdp = MdpTiny(3, S=4, A=3, H=1, starts=4)
    theta, outer = mdp.theta, mdp.weighted(mdp.theta)
    task = mt.TaskData([], outer, mdp.distribution(theta, outer.obs))

    def ratio(x):
        return -mt.surrogate_and_kl(mdp, x, task, MDP_ALPHA)[0]

    def log_prob(x):                                                 # [listing l.11,54]
        return (mdp.distribution(x, outer.obs).log_prob(outer.act) * outer.rew).mean()
    moved = theta + torch.linspace(-4, 4, mdp.P).double()
    assert torch.allclose(ratio(moved), mdp.value(moved), rtol=1e-12)
    gain, other = (f(moved) - f(theta) for f in (mdp.value, log_prob))
    assert abs(other / gain - 1) > 0.2
    slope = central_difference(mdp.value, theta)
    for f in (ratio, log_prob):
        assert torch.allclose(mt.gradient(f, theta), slope, atol=1e-9)


# %% Proofs: the listing, run

def listing_run(copies=True, steps=True):
    """Listing l.36-55 for one task; `copies`, `steps` False leave out l.36, l.42."""
    policy, theta, data = small_problem(5)
    D, D2 = data.inner[0], data.outer

    def loss(model, episodes):                           # −mean over K of Σ_t r_t log π
        log_prob = policy.distribution(model, episodes.obs).log_prob(episodes.act)
        return -(log_prob * episodes.rew).sum(1).mean()
    meta = torch.nn.Parameter(theta.clone())
    model = copy.deepcopy(meta) if copies else meta                             # l.36
    optim = torch.optim.SGD([model], lr=0.3)
    loss(model, D).backward()                                              # l.40, l.41
    if steps:
        optim.step()                                                            # l.42
    loss(model, D2).backward()                                             # l.54, l.55
    D.adv, share = D.rew, D.mask.sum() / len(D.rew)

    def adapted(t):                    # the same θ′, as a function of θ: a mean over K
        return mt.adapt(policy, t, [D], 0.3 * share, True)      # is share·(over steps)
    return SimpleNamespace(
        policy=policy, theta=theta, meta=meta, model=model, D2=D2, adapted=adapted,
        inner=mt.gradient(lambda t: loss(t, D), theta),
        outer=mt.gradient(lambda t: loss(t, D2), model),
        wanted=mt.gradient(lambda t: loss(adapted(t), D2), theta))


@pytest.mark.parametrize("steps", [True, False])
def test_pseudocode_deepcopy_alone_cuts_the_graph(steps):
    """l.55: no meta-parameter has a grad, silently, even if l.42 is left out.

    The copy's grad is inner plus outer gradient, since nothing sets it to zero. And an
    optimizer made once, for the meta-parameters, has nothing to step along.
    """
    run = listing_run(steps=steps)
    torch.optim.SGD([run.meta], lr=0.3).step()
    assert run.meta.grad is None and torch.equal(run.meta, run.theta)
    assert torch.allclose(run.model.grad, run.inner + run.outer)
    assert run.wanted.norm() > 0.1


def test_pseudocode_optimizer_step_alone_cuts_the_graph():
    """With no copy, θ is overwritten, and l.55's gradient has J = I, taken at θ′."""
    run = listing_run(copies=False)
    assert torch.allclose(run.meta, run.adapted(run.theta.clone().requires_grad_()))
    assert torch.allclose(run.meta.grad, run.inner + run.outer)
    assert gap(run.outer, run.wanted) > 0.05


def test_pseudocode_kl_is_not_zero_and_its_hessian_is_not_the_metric():
    """l.48: KL(θ′ ‖ θ) > 0, its slope is not 0, its Hessian in θ is not JᵀFJ."""
    run = listing_run()

    def kl(p, q):
        return kl_divergence(*(plain_policy(run.policy, x, run.D2.obs)
                               for x in (p, q))).mean()
    phi, J = run.model.detach(), jacobian(run.adapted, run.theta)
    metric = J.T @ hessian(lambda x: kl(phi, x), phi) @ J
    for k in (lambda t: kl(phi, t), lambda t: kl(run.adapted(t), t)):   # θ′ held or not
        assert k(run.theta.clone().requires_grad_()) > 1e-3
        assert mt.gradient(k, run.theta).norm() > 0.01
        assert gap(hessian(k, run.theta), metric) > 0.1


# %% Proofs: the KL's Hessian, where the third derivative is, what a product leaves out
#
# k(θ) = κ(θ′(θ)), κ(φ) = KL(π_old ‖ π_φ) averaged over D′. P = 99, so that every P × P
# derivative can be had in full; products are taken with a random vector, v.

HESS_ALPHA = 0.5


def hess_problem(inner_steps=2, activation="tanh", K=3):
    """A small problem with its J far from I, and θ′, κ, k written out once more."""
    policy, theta, data = small_problem(7, inner_steps, activation, K=K)
    adapted = plain_adapt(policy, theta, data.inner, HESS_ALPHA)
    data.old = policy.distribution(adapted, data.outer.obs)
    still = mt.TaskData([], data.outer, data.old)                   # nothing is adapted
    v, away = torch.tensor(np.random.default_rng(0).standard_normal((2, len(theta))))
    return SimpleNamespace(
        policy=policy, theta=theta, data=data, adapted=adapted,
        theta_prime=lambda t: plain_adapt(policy, t, data.inner, HESS_ALPHA),
        kappa=plain_kl(policy, still), k=plain_kl(policy, data, HESS_ALPHA),
        kl=lambda t: mt.surrogate_and_kl(policy, t, data, HESS_ALPHA)[1],
        v=v, away=theta + 0.15 * away)


def hess_fisher(p, phi):
    """F = E[score·scoreᵀ] over D′'s states and, exactly, over π_φ's actions: (P, P).

    Gauss and Hermite's three points for each of the two actions: exact up to degree 5.
    """
    outer, (z, weights) = p.data.outer, np.polynomial.hermite_e.hermegauss(3)
    normal, F = plain_policy(p.policy, phi, outer.obs), 0.0
    for i, j in itertools.product(range(3), repeat=2):
        act = normal.mean + normal.stddev * torch.tensor([z[i], z[j]])
        scores = jacobian(lambda f: plain_policy(p.policy, f, outer.obs).log_prob(act),
                          phi)                                              # (K, H, P)
        F = F + weights[i] * weights[j] / (2 * math.pi) * torch.einsum(
            "kt,ktp,ktq->pq", outer.mask / outer.mask.sum(), scores, scores)
    return F


@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_kl_hessian_at_theta_old_equals_jacobian_fisher_jacobian_by_three_routes(
        activation):
    """∇²k = JᵀFJ at θ_old: by autograd's hessian, by dense J and F, by the products.

    J = J₂J₁, J_i = I − α∇²L_i at θ_i: each is symmetric, their product is not.
    KL(new‖old) has the same Hessian there, and another elsewhere.
    """
    p = hess_problem(activation=activation)
    whole = hessian(p.k, p.theta)
    J, F = jacobian(p.theta_prime, p.theta), hess_fisher(p, p.adapted)
    assert gap(J.T @ F @ J, whole) < 1e-12
    assert gap(J @ F @ J.T, whole) > 0.01 and gap(J.T, J) > 0.01
    product, theta_i = torch.eye(len(p.theta), dtype=torch.float64), p.theta
    for data in p.data.inner:
        second = hessian(lambda t: mt.inner_loss(p.policy, t, data), theta_i)
        product = product - HESS_ALPHA * second @ product
        theta_i = plain_adapt(p.policy, theta_i, [data], HESS_ALPHA)
    assert gap(J, product) < 1e-12 and gap(second.T, second) < 1e-12
    for ours in (mt.double_backprop_product(p.kl, p.theta, p.v),
                 mt.gauss_newton_product(p.policy, p.theta, p.data, p.v, HESS_ALPHA)):
        assert gap(ours, whole @ p.v) < 1e-12

    def kl_new_old(t):
        new = p.policy.distribution(p.theta_prime(t), p.data.outer.obs)
        return plain_mean(mt.kl_old_new(new, p.data.old), p.data.outer.mask)
    assert gap(hessian(kl_new_old, p.theta), whole) < 1e-12
    assert gap(hessian(kl_new_old, p.away), hessian(p.k, p.away)) > 0.01


def test_kl_hessian_at_theta_old_is_symmetric_positive_and_no_bigger_than_its_samples():
    """Symmetric, no negative eigenvalue, and rank ≤ samples × A + A, below P if few."""
    for K, samples in ((24, 122), (3, 17)):
        p = hess_problem(1, K=K)
        assert p.data.outer.mask.sum() == samples
        whole = hessian(p.k, p.theta)
        assert gap(whole.T, whole) < 1e-12
        eigenvalues = torch.linalg.eigvalsh(whole)
        assert eigenvalues.min() > -1e-12 * eigenvalues.max()
        rank = int((eigenvalues > 1e-10 * eigenvalues.max()).sum())
        assert rank <= 2 * samples + 2 and (K == 24 or rank < len(p.theta) / 2)


@pytest.mark.parametrize("place", ["theta", "away"])
def test_difference_products_converge_with_order_one_and_two(place):
    """Error O(ε) one-sided; O(ε²) symmetric, written out here; tanh, float64."""
    p, steps, one_sided, symmetric = hess_problem(), np.geomspace(1e-3, 3e-2, 7), [], []
    theta, v = getattr(p, place), p.v / p.v.norm()
    exact, at_theta = hessian(p.k, theta) @ v, mt.gradient(p.k, theta)
    for step in steps:
        one_sided.append(gap(mt.hessian_vector_product(
            lambda t: mt.gradient(p.kl, t) - at_theta, theta, v, step), exact))
        ahead, behind = (mt.gradient(p.kl, theta + e * v) for e in (step, -step))
        symmetric.append(gap((ahead - behind) / (2 * step), exact))
    assert abs(order(steps, one_sided) - 1) < 0.1
    assert abs(order(steps, symmetric) - 2) < 0.1


@pytest.mark.parametrize("activation, moved, expected", [
    ("relu", False, -1), ("tanh", False, 1), ("relu", True, 1)])
def test_difference_product_fails_at_initial_kinks_but_not_with_tanh_or_moved_biases(
        activation, moved, expected):
    """At zero biases every episode's first sample lies on every ReLU's kink.

    There the one-sided error *grows* as 1/step, in float64 too. With tanh, or once the
    biases have moved, it falls with the step.
    """
    config = tiny_config(meta_batch_size=1, alpha=0.1, activation=activation)
    policy, theta, (data,) = sampled_problem(config)
    assert (data.inner[0].obs[:, 0] == 0).all()
    if not moved:
        theta = policy.init(torch.Generator().manual_seed(0), torch.float64)
    phi = plain_adapt(policy, theta, data.inner, 0.1)
    data.old = policy.distribution(phi, data.outer.obs)
    v = mt.meta_gradient(policy, theta, data, 0.1)
    exact = mt.gauss_newton_product(policy, theta, data, v, 0.1)
    steps, errors = np.geomspace(1e-6, 1e-4, 5), []
    for step in steps:
        product = mt.kl_hessian_product(policy, theta, [data], dataclasses.replace(
            config, fd_step=float(step)))
        errors.append(gap(product(v), exact))
    assert abs(order(steps, errors) - expected) < 0.1
    assert errors[0] > 10 if expected == -1 else errors[0] < 1e-4


@pytest.mark.parametrize("inner_steps, activation", [(2, "tanh"), (1, "relu")])
def test_kl_hessian_away_from_theta_old_is_the_sum_of_three_parts(inner_steps,
                                                                  activation):
    """∇²k = JᵀFJ + Jᵀ(∇²κ − F)J + Σ_j ∂_jκ ∇²θ′_j, the last two not zero.

    Each on its own: F from scores, ∇²κ in φ alone, the last with ∂_jκ held constant.
    Double backprop has all three; the Gauss–Newton product has the first alone.
    """
    p = hess_problem(inner_steps, activation)
    phi = plain_adapt(p.policy, p.away, p.data.inner, HESS_ALPHA)
    J, F = jacobian(p.theta_prime, p.away), hess_fisher(p, phi)
    flat, curved = J.T @ F @ J, J.T @ (hessian(p.kappa, phi) - F) @ J
    slope = mt.gradient(p.kappa, phi)
    third = hessian(lambda t: slope @ p.theta_prime(t), p.away)
    whole = hessian(p.k, p.away)
    assert min(curved.norm(), third.norm()) > 0.01 * whole.norm()
    assert gap(flat + curved + third, whole) < 1e-12
    double = mt.double_backprop_product(p.kl, p.away, p.v)
    newton = mt.gauss_newton_product(p.policy, p.away, p.data, p.v, HESS_ALPHA)
    assert gap(double, whole @ p.v) < 1e-12 and gap(newton, flat @ p.v) < 1e-12


def test_third_derivative_at_theta_old_is_not_zero_but_is_multiplied_by_zero():
    """∇²θ′_j = −α ∂_j∇²L ≠ 0 at θ_old; every ∂_jκ = 0, exactly."""
    p, e = hess_problem(1), 1e-5
    third = hessian(lambda t: p.v @ p.theta_prime(t), p.theta)       # Σ_j v_j ∇²θ′_j
    ahead, behind = (hessian(lambda t: mt.inner_loss(p.policy, t, p.data.inner[0]),
                             p.theta + move * p.v) for move in (e, -e))
    assert gap(-HESS_ALPHA * (ahead - behind) / (2 * e), third) < 1e-6
    assert third.norm() > 0.1
    rounded = p.policy.distribution(p.adapted.float().double(), p.data.outer.obs)
    for old in (p.data.old, rounded):             # `old` right only to rounding: not 0
        still = mt.TaskData([], p.data.outer, old)
        slope = mt.gradient(lambda phi: mt.surrogate_and_kl(
            p.policy, phi, still, HESS_ALPHA)[1], p.adapted)
        assert (slope == 0).all() == (old is p.data.old)


def test_sampled_kl_has_exact_value_but_gradient_and_hessian_only_in_expectation():
    """mean(log π_old − log π_new) over n actions, at θ_old: its value is 0.

    Its gradient is near 0 and its Hessian near F: both errors fall as 1/√n. A gradient
    that is not 0 brings the third derivative back: ∇² in θ is not Jᵀ(∇²κ̂)J any more.
    """
    p, sizes, slopes, gaps = hess_problem(), (1, 10, 100), [], []
    F, J = hess_fisher(p, p.adapted), jacobian(p.theta_prime, p.theta)
    for n in sizes:
        torch.manual_seed(n)
        act = p.data.old.sample((n,))

        def kappa(phi):
            new = p.policy.distribution(phi, p.data.outer.obs)
            each = p.data.old.log_prob(act) - new.log_prob(act)
            return plain_mean(each.mean(0), p.data.outer.mask)
        second = hessian(kappa, p.adapted)
        assert kappa(p.adapted).item() == 0.0
        slopes.append(mt.gradient(kappa, p.adapted).norm())
        gaps.append(gap(second, F))
        whole = hessian(lambda t: kappa(p.theta_prime(t)), p.theta)
        assert gap(J.T @ second @ J, whole) > 0.01 / math.sqrt(n)
    for errors in (slopes, gaps):
        assert abs(order(sizes, errors) + 0.5) < 0.15 and errors[0] > 0.05


# %% Long tests

@slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_main_job_reaches_its_returns(seed):
    """The defaults, at 0/1/2/3 steps on the paper's 40 goals."""
    config = mt.Config(task="point2d", seed=seed)
    theta, _ = mt.train_maml(config)
    returns = mt.evaluate(config, theta).mean(axis=0)
    assert (returns >= [-41.5, -12.5, -5.0, -5.0]).all(), returns
