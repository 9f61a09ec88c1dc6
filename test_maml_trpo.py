"""The tests of maml_trpo.py in the order of its sections, then the proofs of notes.md.

    python -m pytest                        the fast suite
    MAML_SLOW=1 python -m pytest            the long tests too

Oracles are independent of the functions they test: plain loops, closed forms,
torch.distributions, dense solves, central finite differences in float64, a raw
Gymnasium environment. Sizes are pairwise different, so that a wrong axis cannot hide;
inputs are random and seeded; nothing depends on the clock.
"""
import ast
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
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import gymnasium as gym
import hypothesis
import hypothesis.strategies as draw
import numpy as np
import pytest
import torch
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
    "fast", derandomize=True, deadline=None, database=None, max_examples=150,
    suppress_health_check=list(hypothesis.HealthCheck))
hypothesis.settings.register_profile(
    "slow", hypothesis.settings.get_profile("fast"), max_examples=2000)
hypothesis.settings.load_profile("slow" if SLOW else "fast")
torch.set_num_threads(1)
ALPHA = 0.1
POINT2D = mt.TASKS["point2d"]
HVPS = ("finite-difference", "double-backprop", "gauss-newton")


# %% Helpers: small random problems, float64, pairwise different sizes


def random_trajectories(rng, K=3, H=5, S=4, A=2, early_ends=True):
    """Trajectories of random numbers; with early ends, padded with zeros."""
    mask = np.ones((K, H))
    if early_ends:
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


def plain_adapt(policy, theta, inner, alpha=ALPHA, graph=False, config=None):
    """θ′, written out once more; `graph`: as a function of θ, which requires grad."""
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


def dense(product, P):
    """The matrix of v ↦ product(v)."""
    return torch.stack([product(e) for e in torch.eye(P, dtype=torch.float64)], dim=1)


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

    if reset == "without options":
        Toy.reset = lambda self, *, seed=None: (obs(0), {})
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
WALKER_DEFAULTS = dict(
    iterations=200, meta_batch_size=20, rollouts=20, horizon=200, alpha=0.1,
    eval_alpha=0.1, eval_episodes=20, gamma=0.95, lam=1.0, init_std=0.5, max_kl=0.05,
    cg_iterations=10, hvp="finite-difference")
ANT_DEFAULTS = WALKER_DEFAULTS | dict(
    meta_batch_size=10, alpha=0.2, eval_alpha=0.2, gamma=0.9, lam=0.8,
    hvp="gauss-newton")
ALL_TASKS = {
    "point2d": dict(
        iterations=60, meta_batch_size=20, rollouts=20, horizon=100, alpha=0.1,
        eval_alpha=0.1, eval_episodes=40, gamma=0.99, lam=0.9, init_std=1.0,
        max_kl=0.05, cg_iterations=5, hvp="finite-difference"),
    "cheetah-vel": WALKER_DEFAULTS | dict(iterations=100),
    "cheetah-dir": WALKER_DEFAULTS,
    "ant-vel": ANT_DEFAULTS,
    "ant-dir": ANT_DEFAULTS | dict(iterations=400, meta_batch_size=2, rollouts=40,
                                   eval_episodes=40),
}
WALKERS = [task for task in ALL_TASKS if task != "point2d"]


@pytest.mark.parametrize("task", ALL_TASKS)
def test_presets_and_defaults_are_these(task):
    config = dataclasses.asdict(mt.complete(mt.Config(task=task)))
    assert config.pop("workers") >= 1
    assert config == {**DEFAULTS, **ALL_TASKS[task], "task": task}
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
            (dict(task="ant-dir"), ALL_TASKS["ant-dir"]),
            (dict(method="random"), dict(iterations=0)),
            (dict(first_order=True), {}), (dict(inner_loss="ratio"), {})):
        changed = dataclasses.replace(nothing, **changes)
        full = mt.complete(changed)
        assert changed == mt.Config(**changes) and mt.complete(full) == full
        assert dataclasses.asdict(full) == {**usual, **changes, **more}
    assert mt.Config() == nothing                          # completing changed nothing


def test_random_is_the_initial_policy_untrained():
    config = tiny_config(method="random", iterations=None)
    theta, rows = mt.train_maml(config)
    policy = mt.make_policy(mt.family_of(config), config)
    assert rows == [] and torch.equal(
        theta, policy.init(torch.Generator().manual_seed(config.seed)))
    with pytest.raises(mt.BadInput, match="random.*iterations"):
        mt.complete(mt.Config(method="random", iterations=3))


@pytest.mark.parametrize("name, value", [
    ("alpha", -0.1), ("alpha", math.nan), ("alpha", math.inf), ("alpha", "much"),
    ("gamma", 1.5), ("lam", -1), ("meta_batch_size", 0), ("rollouts", 1.5),
    ("rollouts", True), ("horizon", -3), ("hidden", ()), ("hidden", (3, 0)),
    ("hidden", [3]), ("hvp", "magic"), ("max_kl", 0), ("fd_step", 0), ("workers", 0),
    ("task", "walker"), ("backtrack_ratio", 1.0), ("seed", -1), ("init_std", math.nan),
    ("eval_alpha", -1), ("first_order", 1), ("cg_iterations", 0)])
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


def test_two_threads_never_share_an_environment_and_each_makes_its_own_once():
    made = []
    family = dataclasses.replace(
        POINT2D, make_envs=lambda K: made.append(K) or mt.Point2D(K))
    both = threading.Barrier(2, timeout=10)

    def envs(_):
        both.wait()                     # so that both threads live at the same time
        return family.envs(3), family.envs(3), family.envs(4)

    with ThreadPoolExecutor(2) as pool:
        (a, again, other), (b, _, another) = pool.map(envs, range(2))
    assert a is again and a is not b and other is not another
    assert (a.num_envs, b.num_envs, other.num_envs) == (3, 3, 4)
    assert sorted(made) == [3, 3, 4, 4]


def test_replaced_make_envs_makes_the_environments_that_are_used():
    """A family that was used before, and the oracle's, which is made of it."""
    family = dataclasses.replace(POINT2D, make_envs=mt.Point2D)
    assert family.envs(3).single_observation_space.shape == (2,)
    assert mt.with_task_observed(family).envs(3).single_observation_space.shape == (4,)
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
def test_policy_of_a_run_equals_a_plain_loop_over_its_layers(activation):
    """And has the run's sizes and first std."""
    policy = mt.make_policy(POINT2D, tiny_config(activation=activation, init_std=0.3))
    theta = policy.init(torch.Generator().manual_seed(0), torch.float64)
    torch.testing.assert_close(theta[-2:].exp(), torch.full_like(theta[-2:], 0.3))
    sizes, at, obs = [2, 8, 6, 2], 0, torch.tensor([[0.4, -0.7], [0.1, 3.0]]).double()
    theta[:-2] += 0.1
    x = obs.T.numpy()
    for n_in, n_out in zip(sizes, sizes[1:]):
        if at:
            x = np.tanh(x) if activation == "tanh" else np.maximum(x, 0)
        weight = theta[at:at + n_in * n_out].reshape(n_out, n_in).numpy()
        at += n_in * n_out
        x = weight @ x + theta[at:at + n_out].numpy()[:, None]
        at += n_out
    np.testing.assert_allclose(policy.distribution(theta, obs).mean.T, x, rtol=1e-12)
    assert at + 2 == len(theta) == policy.num_params


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
    class Starts(gym.Env):
        observation_space = action_space = gym.spaces.Box(-1, 1, (2,))

        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            return self.np_random.random(2, np.float32), {}

        def step(self, action):
            return np.zeros(2, np.float32), 0.0, False, False, {}

    policy, envs = mt.GaussianPolicy(2, 2, hidden=(8, 6)), SyncVectorEnv([Starts] * 3)
    theta = policy.init(torch.Generator().manual_seed(0))

    def first(*seed):
        data = mt.task_rollout(envs, policy, theta, [0.3, 0.2], 9, seed)
        noise = data.act - policy.distribution(theta, data.obs).mean
        return torch.cat([data.obs[:, 0], noise[:, 0]], dim=1)                 # (3, 4)
    seeds = [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1),
             (0, 0), (0,)]
    every = torch.stack([first(*seed) for seed in seeds])
    assert torch.equal(every[0], first(*seeds[0]))
    for column in every.reshape(21, 4).T:
        assert len(set(column.tolist())) == 21


# %% Section 4: returns, baseline, advantages


def plain_baseline(data, gamma):
    """{(k, t): value} of the ridge regression: min ‖φw − R‖² + 1e-5‖w‖², by lstsq."""
    phi, returns, where = [], [], []
    for k, t in itertools.product(*map(range, data.mask.shape)):
        if data.mask[k, t]:
            x, s = np.clip(data.obs[k, t].double().numpy(), -10, 10), t / 100
            phi.append([*x, *(x * x), s, s * s, s**3, 1.0])
            returns.append(sum(gamma**(u - t) * float(data.rew[k, u])
                               for u in range(t, data.rew.shape[1])))
            where.append((k, t))
    n = len(phi[0])
    w = np.linalg.lstsq(np.vstack([phi, math.sqrt(1e-5) * np.eye(n)]),
                        np.append(returns, np.zeros(n)), rcond=None)[0]
    return dict(zip(where, np.array(phi) @ w))


def plain_gae(rew, values, gamma, lam):
    """{(k, t): Σ (γλ)ˡ δ}; `values` has the steps that happened, and V is 0 after."""
    delta = {(k, t): float(rew[k, t]) + gamma * values.get((k, t + 1), 0.0) - value
             for (k, t), value in values.items()}
    return {(k, t): sum((gamma * lam)**(u - t) * delta.get((k, u), 0.0)
                        for u in range(t, rew.shape[1])) for k, t in values}


def as_table(values, shape=(11, 13)):
    table = torch.zeros(shape, dtype=torch.float64)
    for (k, t), value in values.items():
        table[k, t] = value
    return table


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_advantages_equal_plain_loops_from_rewards_to_the_end(dtype):
    """R by γ, V by ridge on R, δ by γ, Σ(γλ)ˡδ, then mean 0 and std 1; γ ≠ λ ≠ 1.

    Also for θ of float32, where the sums of the features would not be exact.
    """
    data = random_trajectories(np.random.default_rng(8), K=11, H=13, S=3)
    data.obs[2, 1] = 50.0                                        # clipped to 10
    data = mt.Trajectories(*(x.to(dtype) for x in vars(data).values()))
    values = plain_baseline(data, 0.8)
    returns = mt.discounted_returns(data.rew, 0.8)
    ours = mt.LinearBaseline().fit(data.obs, returns, data.mask).predict(data.obs)
    tolerance = dict(rtol=0, atol=2e-6 if dtype == torch.float32 else 1e-7)
    ours = (ours * data.mask).double()
    torch.testing.assert_close(ours, as_table(values), **tolerance)
    raw = plain_gae(data.rew, values, 0.8, 0.5)
    adv = np.array(list(raw.values()))
    expected = as_table(dict(zip(raw, (adv - adv.mean()) / adv.std())))
    ours = mt.assign_credit(data, 0.8, 0.5).adv
    assert ours.dtype == dtype
    torch.testing.assert_close(ours.double(), expected, **tolerance)


def test_masked_mean_refuses_shapes_that_would_broadcast():
    with pytest.raises(ValueError, match="shapes"):
        mt.masked_mean(torch.ones(3, 1), torch.ones(3, 5))


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


def meta_objective(policy, data, alpha=ALPHA):
    """The surrogate as a plain function of θ, written out once more."""
    def function(theta):
        phi, outer = plain_adapt(policy, theta, data.inner, alpha), data.outer
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


def test_first_order_gradient_is_the_gradient_at_theta_prime():
    """--first-order: J = I, so g = ∇V(θ′)."""
    policy, theta, data = small_problem(seed=2, inner_steps=2)
    phi = plain_adapt(policy, theta, data.inner)
    still = mt.TaskData([], data.outer, data.old)
    expected = central_difference(meta_objective(policy, still), phi)
    torch.testing.assert_close(
        mt.meta_gradient(policy, theta, data, ALPHA, first_order=True), expected,
        rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("settings", [(), (True,), (False, "ratio")])
def test_surrogate_uses_the_importance_ratio_away_from_theta_old(settings):
    """Its value does not depend on how the gradient is estimated."""
    policy, theta, data = small_problem(seed=3)
    for away in (0.0, 0.1):
        surrogate, _ = mt.surrogate_and_kl(policy, theta + away, data, ALPHA, *settings)
        torch.testing.assert_close(surrogate,
                                   meta_objective(policy, data)(theta + away))


def plain_kl(policy, data, alpha=ALPHA):
    """KL(old adapted ‖ new adapted) as a function of θ, by torch.distributions."""
    def function(theta):
        phi = plain_adapt(policy, theta, data.inner, alpha, graph=theta.requires_grad)
        old = Independent(Normal(data.old.mean, data.old.stddev), 1)
        new = plain_policy(policy, phi, data.outer.obs)
        return plain_mean(kl_divergence(old, new), data.outer.mask)
    return function


@pytest.mark.parametrize("settings", [(), (True,), (False, "ratio")])
def test_kl_is_between_old_and_new_adapted_policies_on_post_update_states(settings):
    policy, theta, data = small_problem(seed=4)
    kl = mt.surrogate_and_kl(policy, theta + 0.1, data, ALPHA, *settings)[1]
    torch.testing.assert_close(kl, plain_kl(policy, data)(theta + 0.1))
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


def plain_hessian(policy, theta, data, alpha):
    """Of the mean over tasks of the KL's values, P × P; no estimator comes in."""
    return torch.autograd.functional.hessian(lambda t: sum(
        plain_kl(policy, d, alpha)(t) for d in data) / len(data), theta)


@pytest.mark.parametrize("hvp", HVPS)
@pytest.mark.parametrize("changes", [
    dict(inner_steps=2), dict(first_order=True), dict(inner_loss="ratio")])
def test_three_products_equal_the_dense_hessian(hvp, changes):
    """Two inner steps: J ≠ Jᵀ. What supplies g is not the metric's business."""
    config = tiny_config(hvp=hvp, hidden=(5,), alpha=1.0, activation="tanh",
                         fd_step=1e-5, **changes)
    policy, theta, data = sampled_problem(config)
    for d in data:
        d.outer.mask[0, -2:] = 0                                       # an early end
    H = plain_hessian(policy, theta, data, 1.0)
    assert torch.linalg.eigvalsh(H).min() > -1e-9 * H.norm()
    product = mt.kl_hessian_product(policy, theta, data, config)
    for v in torch.randn(3, len(theta), generator=torch.Generator().manual_seed(0),
                         dtype=torch.float64):
        tolerance = 1e-3 if hvp == "finite-difference" else 1e-8
        assert (product(v) - H @ v).norm() < tolerance * (H @ v).norm()
    v, (d, *_) = torch.ones_like(theta), data
    torch.testing.assert_close(                           # graphs are kept or made anew
        mt.gauss_newton_product(policy, theta, d, v, 1.0),
        plain_hessian(policy, theta, [d], 1.0) @ v, rtol=1e-7, atol=1e-10)


def test_hessian_vector_product_moves_theta_by_the_step_whatever_v_is():
    """On a cubic, where the one-sided error is known: H·v + ½ε·(third derivative)."""
    c = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    theta = torch.zeros(3, dtype=torch.float64)           # where the gradient is 0
    for length in (1e-3, 1.0, 1e3):
        v = length * torch.tensor([2.0, 1.0, -2.0], dtype=torch.float64)
        product = mt.hessian_vector_product(lambda t: t + c * t**2, theta, v, 0.01)
        torch.testing.assert_close(product, v + (0.01 / v.norm()) * c * v**2)


def spd(P, seed=0):
    a = torch.tensor(np.random.default_rng(seed).standard_normal((P, P)))
    return a @ a.T + 0.1 * torch.eye(P, dtype=torch.float64)


def test_conjugate_gradient_matches_dense_solve_and_returns_its_residual():
    H, b = spd(9), torch.arange(1.0, 10.0, dtype=torch.float64)
    x, r = mt.conjugate_gradient(lambda v: H @ v, b, iterations=60, tolerance=1e-24)
    torch.testing.assert_close(x, torch.linalg.solve(H, b), rtol=1e-8, atol=1e-8)
    for iterations in (1, 3, 5):
        x, r = mt.conjugate_gradient(lambda v: H @ v, b, iterations)
        torch.testing.assert_close(r, b - H @ x)


def test_conjugate_gradient_is_best_in_the_krylov_space():
    """After n steps: argmin of ½xᵀHx − bᵀx over span(b, Hb, …), by a dense solve."""
    H, b = spd(8, 1), torch.tensor(np.random.default_rng(2).standard_normal(8))
    for n in (1, 2, 4):
        basis = torch.linalg.qr(torch.stack(
            [torch.linalg.matrix_power(H, i) @ b for i in range(n)], dim=1))[0]
        best = basis @ torch.linalg.solve(basis.T @ H @ basis, basis.T @ b)
        calls = []
        x, _ = mt.conjugate_gradient(lambda v: calls.append(1) or H @ v, b, n)
        torch.testing.assert_close(x, best, rtol=1e-7, atol=1e-8)
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
    for surrogate, kl in (
            (lambda x: x, lambda x: 0.0), (lambda x: -x, lambda x: 1.0),
            (lambda x: math.nan, lambda x: 0.0), (lambda x: 0.0, lambda x: 0.0),
            (lambda x: -x, lambda x: math.nan)):
        (theta, s, k, trials), tried = quadratic_search(surrogate, kl, 1.0, trials=6)
        assert (float(theta), s, k, trials, len(tried)) == (0.0, 0.0, 0.0, 0, 6)


def dense_meta_step(policy, theta, data, config):
    """−√(2δ/xᵀHx)·x, written out, with H and g of the mean over tasks, P × P.

    Only g heeds the estimator: H is the Hessian of the KL's values.
    """
    def mean(each):
        return lambda t: sum(each(t, d) for d in data) / len(data)

    def surrogate(t, d):
        phi = plain_adapt(policy, t, d.inner, config.alpha, True, config)
        log_new = plain_policy(policy, phi, d.outer.obs).log_prob(d.outer.act)
        ratio = (log_new - d.old.log_prob(d.outer.act).detach()).exp()
        return -plain_mean(ratio * d.outer.adv, d.outer.mask)

    t = theta.clone().requires_grad_()
    g = torch.autograd.grad(mean(surrogate)(t), t)[0]
    H = plain_hessian(policy, theta, data, config.alpha)
    H = H + config.damping * torch.eye(len(theta))
    x = torch.linalg.solve(H, g)
    return -math.sqrt(2 * config.max_kl / float(x @ H @ x)) * x


@pytest.mark.parametrize("hvp", HVPS)
@pytest.mark.parametrize("changes", [
    dict(inner_steps=2), dict(first_order=True), dict(inner_loss="ratio")])
def test_trpo_step_equals_dense_solve_and_scale(hvp, changes):
    """x from the dense damped Hessian, scaled to ½sᵀHs = δ, shrunk by 0.9ʲ."""
    config = tiny_config(hvp=hvp, hidden=(4,), damping=0.2, cg_iterations=60, alpha=1.0,
                         cg_tolerance=1e-22, fd_step=1e-6, activation="tanh",
                         backtrack_ratio=0.9, **changes)
    policy, theta, data = sampled_problem(config)
    full = dense_meta_step(policy, theta, data, config)
    if "inner_steps" not in changes:
        other = dense_meta_step(policy, theta, data, dataclasses.replace(
            config, first_order=False, inner_loss="log-prob"))
        assert (full - other).norm() > 0.02 * full.norm(), "the test shows too little"
    new, stats = mt.trpo_meta_step(policy, theta, data, config)
    j = stats["line_search_steps"] - 1
    assert j >= 0
    tolerance = 1e-3 if hvp == "finite-difference" else 1e-6
    assert (new - theta - 0.9**j * full).norm() < tolerance * full.norm()
    before = sum(meta_objective(policy, d, 1.0)(theta) for d in data) / 3
    assert stats["surrogate_before"] == pytest.approx(float(before), abs=1e-9)
    for trial in range(j + 1):                        # the first that passes is taken
        at = theta + 0.9**trial * full
        surrogate = sum(float(meta_objective(policy, d, 1.0)(at)) for d in data) / 3
        kl = sum(float(plain_kl(policy, d, 1.0)(at)) for d in data) / 3
        assert (surrogate < before and kl <= config.max_kl) == (trial == j)
    assert (stats["surrogate_after"], stats["kl"]) == pytest.approx(
        (surrogate, kl), rel=1e-2 if hvp == "finite-difference" else 1e-5)


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


def test_training_draws_new_tasks_every_iteration():
    """Not a fixed list: p(T) is sampled anew."""
    seen = []
    family = dataclasses.replace(POINT2D, sample_tasks=lambda rng, M: seen.append(
        POINT2D.sample_tasks(rng, M)) or seen[-1])
    mt.train_maml(tiny_config(), family)
    drawn = [tuple(goal) for goals in seen[-2:] for goal in goals]
    assert len(set(drawn)) == 6


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


def test_training_rows_have_the_columns_and_the_parts_add_up(monkeypatch):
    """By a clock that only the parts move: sampling 1, gradients 10, and so on."""
    now = [0.0]
    for name, seconds in (("sample_task_data", 1), ("meta_gradient", 10),
                          ("conjugate_gradient", 100), ("backtrack_line_search", 1000)):
        def slower(*args, right=getattr(mt, name), seconds=seconds, **kw):
            now[0] += seconds
            return right(*args, **kw)
        monkeypatch.setattr(mt, name, slower)
    monkeypatch.setattr(mt, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    for row in mt.train_maml(tiny_config())[1]:
        assert tuple(row) == mt.PROGRESS_COLUMNS
        assert [value for name, value in row.items() if "seconds" in name] == [
            3, 30, 100, 1000, 1133]


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
    """Second of three by the return after adaptation, third by the one before.

    The training returns the last θ, and logs of each iteration the new θ's mean σ.
    """
    P = len(first_theta(tiny_config()))
    move = torch.linspace(0.1, 2.0, P)                       # the two σ differ
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
        std = ((i + 1) * move[-2:]).exp().mean().item()
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

BODIES = {"cheetah": ("HalfCheetah-v5", 8, 9), "ant": ("Ant-v5", 13, 14)}


def family_named(name):
    if name != "point2d":
        pytest.importorskip("mujoco")
    return mt.TASKS[name]


def raw_walker(name):
    """Gymnasium's own environment, without its time limit and its warning."""
    family_named(name).make_envs(1).close()      # tells MuJoCo what to keep to itself
    return gym.make(BODIES[name.split("-")[0]][0]).unwrapped


def raw_reward(name, task, env, info, action):
    """The authors' reward, from what Gymnasium's environment says of its step."""
    speed, cost = info["x_velocity"], sum(a * a for a in action.tolist())
    gain = task * speed if name.endswith("dir") else -abs(speed - task)
    if name.startswith("cheetah"):
        return gain - 0.05 * cost
    forces = sum(min(max(f, -1), 1)**2 for f in env.data.cfrc_ext.ravel().tolist())
    bonus = 1.0 if name == "ant-vel" else 0.0
    return gain + bonus - 0.005 * cost - 0.0005 * forces + 0.05


def a_tenth_of_velocities(name, obs):
    _, angles, speeds = BODIES[name.split("-")[0]]
    obs = np.array(obs)
    obs[..., angles:angles + speeds] /= 10
    return obs


def walker_config(name, **changes):
    return mt.complete(mt.Config(**dict(
        task=name, iterations=1, meta_batch_size=3, rollouts=2, horizon=7,
        hidden=(8, 9), cg_iterations=2, workers=1, eval_episodes=3) | changes))


@pytest.mark.parametrize("name", WALKERS)
def test_walkers_match_gymnasium_step_by_step_over_whole_episodes(name):
    """Same first states from the same seeds, then the same observations, but for the
    velocities, and ends; the authors' rewards; no more steps after an early end."""
    K, seeds, task = 3, [11, 5, 2024], -1.0
    twins, ended = [raw_walker(name) for _ in range(K)], np.zeros(K, bool)
    envs, rng = family_named(name).make_envs(K), np.random.default_rng(0)
    obs, _ = envs.reset(seed=seeds, options={"task": np.array([task])})
    expected = [twin.reset(seed=s)[0] for twin, s in zip(twins, seeds)]
    np.testing.assert_allclose(obs, a_tenth_of_velocities(name, expected), rtol=1e-15)
    assert obs.shape == (K, *twins[0].observation_space.shape)
    assert envs.single_action_space.shape == twins[0].action_space.shape
    for _ in range(200):
        actions = 0.8 * rng.standard_normal((K, *twins[0].action_space.shape))
        obs, reward, terminated, truncated, _ = envs.step(actions)
        for k, twin in enumerate(twins):
            a = np.clip(actions[k], -1, 1)
            if ended[k]:
                assert terminated[k] and reward[k] == 0
                continue
            o, _, ended[k], _, info = twin.step(a)
            o = a_tenth_of_velocities(name, o)
            np.testing.assert_allclose(obs[k], o, rtol=1e-15)
            assert terminated[k] == ended[k] and not truncated[k]
            assert reward[k] == pytest.approx(
                raw_reward(name, task, twin, info, a), rel=1e-12, abs=1e-12)
    assert ended.any() == name.startswith("ant")           # both ways were seen


@pytest.mark.parametrize("name", ("point2d", "cheetah-dir", "ant-vel"))
def test_same_seed_same_run_with_one_or_two_workers(name):
    """θ after an iteration, bit for bit; and another seed gives another θ."""
    family = family_named(name)

    def run(**changes):
        return mt.train_maml(walker_config(name, **changes), family)

    theta, rows = run()
    for workers in (1, 2):
        again, same = run(workers=workers)
        assert torch.equal(theta, again)
        assert without_seconds(rows) == without_seconds(same)
    assert not torch.equal(theta, run(seed=1)[0])
    first = [first_theta(walker_config(name, seed=seed)) for seed in (1, 1, 2)]
    assert torch.equal(first[0], first[1]) and (first[0] != first[2]).sum() > 100


@pytest.mark.parametrize("name", ALL_TASKS)
def test_only_the_oracle_sees_the_task(name):
    """Same seeds and actions, two tasks: the same observations and other rewards.

    The oracle sees what the others see, and the task behind it.
    """
    family, K = family_named(name), 3
    tasks = ([0.4, -0.3], [-0.2, 0.5]) if name == "point2d" else ([1.0], [-1.0])

    def episode(family, task):
        envs, rng = family.make_envs(K), np.random.default_rng(0)
        envs.reset(seed=[8, 9, 10], options={"task": tasks[1]})       # an earlier task
        obs = [envs.reset(seed=[1, 2, 3], options={"task": task})[0].copy()]
        actions = 0.3 * rng.standard_normal((6, K, *envs.single_action_space.shape))
        steps = [[x.copy() for x in envs.step(action)[:2]] for action in actions]
        obs += [step[0] for step in steps]
        assert envs.observation_space.shape == obs[0].shape
        obs.append(envs.reset(seed=1)[0].copy())             # that names no task
        steps.append([0, envs.step(actions[0])[1].copy()])
        return np.array(obs), np.array([reward for _, reward in steps])

    one, two = (episode(family, task) for task in tasks)
    np.testing.assert_array_equal(one[0], two[0])
    assert (np.abs(one[1] - two[1]) > 1e-6).all()
    for task, (obs, rewards) in zip(tasks, (one, two)):
        seen, same = episode(mt.with_task_observed(family), task)
        behind = np.broadcast_to(np.array(task, seen.dtype), (8, K, len(task)))
        np.testing.assert_array_equal(seen, np.concatenate([obs, behind], axis=2))
        np.testing.assert_array_equal(same, rewards)


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
            assert obs.shape[-1] == size
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


@pytest.mark.parametrize("name", ("cheetah-dir", "ant-dir"))
def test_direction_tasks_are_two_and_taken_in_turn(name):
    """Not drawn: half of each is the expectation, in training and at evaluation."""
    family, rng = mt.TASKS[name], np.random.default_rng(0)
    for tasks in (family.sample_tasks(rng, 5), family.test_tasks(5)):
        assert tasks.tolist() == [[1], [-1], [1], [-1], [1]]


@pytest.mark.parametrize("name, task", [
    ("cheetah-vel", [1.0, 2.0]), ("ant-dir", [np.nan]), ("ant-vel", 1.0),
    ("point2d", [1.0]), ("point2d", [0.0, math.nan]), ("point2d", 3)])
def test_a_task_that_is_no_task_is_refused(name, task):
    with pytest.raises(mt.BadInput, match="task"):
        family_named(name).make_envs(1).reset(seed=[1], options={"task": task})


def test_walkers_say_nothing_and_leave_no_file(tmp_path, monkeypatch, capfd):
    """MuJoCo warns of Gymnasium's model at each loading, and would keep a log."""
    monkeypatch.chdir(tmp_path)
    mt.train_maml(walker_config("cheetah-dir", rollouts=3), family_named("cheetah-dir"))
    assert capfd.readouterr() == ("", "") and not any(tmp_path.iterdir())


# %% Section 9: evaluation

# The numbers of the paper's figures, a second time: maml, pretrained, random, oracle.
PAPER = {
    "point2d": ("-40.41 -11.68 -3.33 -3.23", "-40.81 -19.73 -11.72 -8.47",
                "-82.66 -57.96 -53.84 -46.81", "-2.29"),
    "cheetah-dir": ("-50.69 293.19 313.48 315.65", "-43.03 -24.75 -12.85 19.57",
                    "-35.73 21.83 62.32 86.18", "442.69"),
    "cheetah-vel": ("-129.53 -78.57 -66.62 -60.78", "-158.00 -135.39 -128.47 -133.61",
                    "-254.83 -254.33 -246.79 -230.83", "-54.47"),
    "ant-vel": ("30.58 96.74 100.06 101.41", "-1.83 6.11 8.47 9.47",
                "-78.64 -62.81 -48.55 -35.56", "107.89"),
    "ant-dir": ("8.66 499.15 500.68 499.11", "3.16 1.27 6.51 6.86",
                "3.11 9.25 15.96 26.11", "524.80"),
}


def test_papers_numbers_are_these_and_stand_below_ours():
    for task, rows in PAPER.items():
        config, table = mt.complete(mt.Config(task=task)), np.zeros((40, 4))
        for method, row in zip(("maml", "pretrained", "random", "oracle"), rows):
            printed = mt.comparison_table(config, [(f"{method}, last θ", table)])
            (paper,) = [line for line in printed.splitlines()
                        if line.startswith(f"{method}, paper")]
            assert paper.split()[2:] == row.split()
    assert mt.PAPER.keys() == PAPER.keys()


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


def random_theta(config):
    policy = mt.make_policy(mt.family_of(config), config)
    return policy.init(torch.Generator().manual_seed(0))


def test_evaluation_equals_a_plain_loop_with_every_setting_of_the_run():
    """Fresh episodes after each step; α/2 from the second step on and no less later."""
    config = tiny_config(seed=5, alpha=0.1, eval_alpha=0.9, gamma=0.7, lam=0.6,
                         eval_steps=4, eval_tasks=3, eval_episodes=5)
    theta = random_theta(config)
    table = mt.evaluate(config, theta)
    assert table.shape == (3, 5)
    for m, goal in enumerate(POINT2D.test_tasks(3)):
        expected = [data.rew.sum(1).mean().item()
                    for _, data in plain_evaluation(config, theta, m, goal)]
        np.testing.assert_allclose(table[m], expected, atol=1e-5)




# %% The files of a run

# A run of a moment; later flags win.
TINY = ["--iterations", "2", "--meta-batch-size", "2", "--rollouts", "3", "--horizon",
        "4", "--hidden", "5,4", "--cg-iterations", "2", "--eval-tasks", "5",
        "--eval-episodes", "2", "--workers", "1"]
FIGURES = ("draw_learning_curve", "draw_adaptation", "draw_trajectories")


def without_figures(patch):
    for name in (*FIGURES, "render_gif"):
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


def test_evaluation_is_written_task_by_task_and_read_again(tmp_path):
    """Two tasks and three values, all different."""
    table = np.array([[1.5, -2.25, 3.125], [4.0, 5.0, -6.0625]])
    mt.write_evaluation(tmp_path / "evaluation.csv", "oracle", table)
    assert (tmp_path / "evaluation.csv").read_text().split() == [
        "method,task,step,return", "oracle,0,0,1.5", "oracle,0,1,-2.25",
        "oracle,0,2,3.125", "oracle,1,0,4.0", "oracle,1,1,5.0", "oracle,1,2,-6.0625"]
    (tmp_path / "config.json").write_text('{"task": "point2d"}')
    method, again = mt.read_evaluation(tmp_path, "point2d")
    assert method == "oracle" and np.array_equal(again, table)


def test_a_runs_files_hold_its_rows_its_settings_and_not_its_workers(trained):
    with open(trained / "progress.csv", newline="", encoding="utf-8") as f:
        header, *rows = csv.reader(f)
    state = mt.load_checkpoint(trained / "checkpoint.pt")[1]
    assert tuple(header) == mt.PROGRESS_COLUMNS and len(rows) == state.iteration == 2
    assert [[float(x) for x in row] for row in rows] == [
        list(row.values()) for row in state.rows]
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
    assert len(ax.lines) == len(ax.collections) == 2
    for returns, line, band in zip((PRE, POST), ax.lines, ax.collections):
        x, y = line.get_data()
        assert x.tolist() == [0, 1, 2] and y.tolist() == np.mean(returns, 1).tolist()
        corners = band.get_paths()[0].vertices
        for i, (low, high) in enumerate(np.percentile(returns, [25, 75], 1).T):
            heights = corners[corners[:, 0] == i][:, 1]
            assert (heights.min(), heights.max()) == pytest.approx((low, high))
    assert [text.get_text() for text in ax.get_legend().get_texts()] == [
        "before adaptation", "after adaptation"]


def plain_error(table):
    return table.std(axis=0, ddof=1) / math.sqrt(len(table))


@pytest.mark.parametrize("task", ["point2d", "cheetah-dir"])
def test_standard_error_leaves_out_what_lies_between_the_two_directions(drawn, task):
    """Printed and drawn: mean ± error of the mean by its definition, and the paper."""
    table = np.random.default_rng(0).normal(0, 500, (40, 3))
    table += 9000.0 * np.resize([1, -1], (40, 1))
    error, rows, config = plain_error(table), [], mt.complete(mt.Config(task=task))
    if task == "cheetah-dir":
        rows = [table[1::2], table[0::2]]                      # backward, forward
        error = np.hypot(*map(plain_error, rows)) / 2
    tables = [("maml, last θ", table), ("oracle, other", table[:, :1])]
    printed = mt.comparison_table(config, tables).splitlines()
    assert printed[0].split()[-3:] == ["0", "1", "2"]
    expected = [(table.mean(0), error), *((x.mean(0), plain_error(x)) for x in rows)]
    for line, numbers in zip(printed[1:], expected):
        cells = re.findall(r"(-?[\d.]+) ± +([\d.]+)", line)
        np.testing.assert_allclose(np.array(cells, float).T, numbers, atol=0.006)
    assert [line.split()[:2] for line in printed[2:2 + len(rows)]] == [
        ["task", "-1"], ["task", "+1"]][:len(rows)]
    mt.draw_adaptation(Path("adaptation.png"), config, tables)
    (ax,) = drawn["adaptation.png"].axes
    containers = {container.get_label(): container for container in ax.containers}
    ours, paper = containers["maml, last θ"].lines, containers["maml, paper"].lines[0]
    np.testing.assert_allclose(ours[0].get_ydata(), table.mean(0))
    bars = np.array(ours[2][0].get_segments())             # (3, both ends, x and y)
    np.testing.assert_allclose(bars[..., 1].T, [table.mean(0) - error,
                                                table.mean(0) + error])
    assert paper.get_ydata().tolist() == [float(x) for x in PAPER[task][0].split()]
    flat = [line.get_ydata()[0] for line in ax.lines if "oracle" in line.get_label()]
    np.testing.assert_allclose(flat, [table[:, 0].mean(), float(PAPER[task][3])])


@pytest.mark.parametrize("method", ["maml", "oracle"])
def test_trajectories_show_each_goals_own_walks(drawn, method):
    """The first episode of each step, as the evaluation played it; the oracle's one."""
    config = tiny_config(method=method, eval_steps=2, horizon=9)
    theta, goals = random_theta(config), POINT2D.test_tasks(4)
    mt.draw_trajectories(Path("trajectories.png"), config, theta)
    axes = drawn["trajectories.png"].axes
    assert len(axes) == 4
    for m, (ax, goal) in enumerate(zip(axes, goals)):
        *walks, star, origin = [np.array(line.get_data()) for line in ax.lines]
        expected = [data.obs[0, :, :2].T
                    for _, data in plain_evaluation(config, theta, m, goal)]
        assert len(walks) == len(expected) == (3 if method == "maml" else 1)
        for walk, path in zip(walks, expected):
            np.testing.assert_allclose(walk, path, atol=1e-5)
        np.testing.assert_allclose([star[:, 0], origin[:, 0]], [goal, [0, 0]])


def frames_of(path):
    """The pictures of a GIF: (frames, height, width, 3)."""
    from PIL import Image, ImageSequence
    with Image.open(path) as gif:
        return np.array([np.asarray(frame.convert("RGB"), int)
                         for frame in ImageSequence.Iterator(gif)])


@pytest.mark.parametrize("name", (
    "point2d", "cheetah-dir", pytest.param("ant-vel", marks=slow)))
def test_render_draws_an_episode_before_and_one_after_adaptation(name, tmp_path):
    family_named(name)
    for file, alpha in (("a.gif", 3.0), ("b.gif", 0.0)):
        config = walker_config(name, eval_alpha=alpha, horizon=6)
        try:
            mt.render_gif(tmp_path / file, config, random_theta(config))
        except mt.BadInput as error:
            pytest.skip(str(error))
        frames = frames_of(tmp_path / file)
        assert frames.shape[:2] == (3, 240)
        left, right = np.split(frames[:, 20:], 2, axis=2)           # below the titles
        assert np.abs(left[-1] - left[0]).sum() > 0                 # something moves
        if alpha:
            assert np.abs(left[-1] - right[-1]).sum() > 0           # and adapts
        else:
            assert np.abs(left - right).mean() < 2        # no step, no difference
    assert names_in(tmp_path) == ["a.gif", "b.gif"]


# %% Section 11: the command line, end to end


def test_command_line_trains_evaluates_draws_and_says_where(
        tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert mt.main(["--task", "point2d", *TINY]) == 0
    out, folder = capsys.readouterr().out, Path("runs/point2d-maml-seed0")
    assert names_in(folder) == sorted(mt.RUN_FILES)
    assert str(folder) in out.splitlines()[-1] and "maml, paper" in out
    for name in ("learning.png", "adaptation.png", "trajectories.png"):
        assert (folder / name).read_bytes()[:4] == b"\x89PNG"


def test_import_has_no_side_effects_and_point2d_needs_no_mujoco(tmp_path):
    """Without MuJoCo, what needs it is refused with what to install."""
    config = walker_config("cheetah-dir")
    policy = mt.GaussianPolicy(17, 6, config.hidden)
    mt.save_checkpoint(tmp_path / "walker.pt", config,
                       mt.TrainState.initial(policy, config))
    program = f"""
import sys, torch
sys.path.insert(0, {str(HERE)!r})
sys.modules["mujoco"], n = None, torch.get_num_threads()
import maml_trpo as mt
assert torch.get_num_threads() == n and "matplotlib" not in sys.modules
print([mt.main({[*TINY, "--out", "a"]!r}), mt.main({[*TINY, "--task", "ant-dir"]!r}),
       mt.main(["--evaluate", "walker.pt"])])"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, text=True,
                          capture_output=True, timeout=300)
    assert done.stdout.endswith("[0, 2, 2]\n"), done.stderr
    assert ["pip install" in line for line in done.stderr.splitlines()] == [True, True]
    assert names_in(tmp_path) == ["a", "walker.pt"]


def test_progress_line_shows_each_number_in_its_column():
    """A row of numbers all different; 5 iterations of 54.5 s are left: 272.5 s."""
    row = dict(zip(mt.PROGRESS_COLUMNS, (
        6, -31.25, -12.75, 0.01625, -0.21375, 0.0175, 3, 0.625, 0.875, 1.5, 2.5, 3.5,
        4.5, 13.25)))
    line = mt.progress_line(row, 12, 54.5)
    *numbers, left = line.replace("→", " ").split()
    np.testing.assert_allclose(
        [float(x) for x in numbers],
        [7, -31.25, -12.75, -0.21375, 0.0175, 3, 0.625, 0.875, 13.25], atol=1e-4)
    minutes, seconds = map(int, re.fullmatch(r"(\d+)m(\d+)s", left).groups())
    assert abs(60 * minutes + seconds - 272.5) <= 0.5 and seconds < 60
    titles = re.split(r"  +", mt.PROGRESS_HEADER.strip())
    assert titles == ["iter", "return before → after", "surrogate", "KL", "trials",
                      "CG left", "std", "s/it", "left"]
    assert mt.progress_line(row | {"iteration": 11}, 12, 54.5).split()[-1] == "0m00s"


def test_command_line_resumes_extends_compares_and_evaluates(
        tmp_path, no_figures, trained, capsys):
    a, b, e = tmp_path / "a", tmp_path / "b", str(tmp_path / "e")
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


def test_report_is_of_the_last_theta_and_with_best_of_the_best(
        trained, tmp_path, no_figures, capsys):
    config, state = mt.load_checkpoint(trained / "checkpoint.pt")
    assert not torch.equal(state.theta, state.best_theta)
    for more, theta, which in (([], state.theta, "last"),
                               (["--best"], state.best_theta, "best")):
        out = tmp_path / which
        assert mt.main(["--evaluate", str(trained / "checkpoint.pt"), "--out", str(out),
                        *more]) == 0
        assert f"maml, {which} θ" in capsys.readouterr().out
        np.testing.assert_array_equal(mt.read_evaluation(out, "point2d")[1],
                                      mt.evaluate(config, theta))
    np.testing.assert_array_equal(mt.read_evaluation(trained, "point2d")[1],
                                  mt.evaluate(config, state.theta))


def test_init_starts_from_the_last_theta_of_the_other_run(
        trained, tmp_path, no_figures, capsys):
    last = mt.load_checkpoint(trained / "checkpoint.pt")[1].theta
    init = ["--init", trained / "checkpoint.pt"]
    assert tiny_run(tmp_path / "a", *init, "--iter", "0", "--inner-l", "ratio") == 0
    config, state = mt.load_checkpoint(tmp_path / "a" / "checkpoint.pt")
    assert state.iteration == 0 and torch.equal(state.theta, last)
    assert config.inner_loss == "ratio"                   # flags may be shortened
    for more, words in ((["--activation", "tanh"], "activation"), (["--hidden", "5"],
                        "hidden"), (["--method", "oracle"], "oracle"),
                        (["--method", "random", "--iterations", "0"], "--init")):
        assert words in refused(capsys, *TINY, "--out", tmp_path / "b", *init, *more)
    assert not (tmp_path / "b").exists()


def other_value(f: dataclasses.Field, value) -> list[str]:
    """What a user might give in place of `value`."""
    if type(value) is bool:
        return []
    if f.name == "task" or f.metadata["choices"]:
        choices = f.metadata["choices"] or ALL_TASKS
        return [next(choice for choice in choices if choice != value)]
    return ["4,3" if type(value) is tuple else
            str(value + 1 if type(value) is int else value / 2)]


def test_resume_refuses_every_setting_but_iterations_and_workers(copied, capsys):
    """Each by its name, and nothing is changed; also fewer iterations than before."""
    config, before = mt.load_checkpoint(copied / "checkpoint.pt")[0], files_of(copied)
    resume = ["--resume", "--out", copied]
    for f in dataclasses.fields(mt.Config):
        if f.name in ("iterations", "workers"):
            continue
        flag = "--" + f.name.replace("_", "-")
        error = refused(capsys, *resume, flag, *other_value(f, getattr(config, f.name)))
        assert re.search(rf"\b{f.name}\b|{flag}\b", error) and "copied" in error, error
    assert "iterations" in refused(capsys, *resume, "--iterations", "1")
    assert "--init" in refused(capsys, *resume, "--init", copied / "checkpoint.pt")
    assert files_of(copied) == before


def test_resume_of_a_finished_run_evaluates_it_again(copied, no_figures, capsys):
    first = outcome(copied)
    (copied / "evaluation.csv").unlink()               # killed while it was evaluated
    with open(copied / "progress.csv", "a") as f:      # a row ahead of the checkpoint
        f.write("1,-0.3")
    assert mt.main(["--resume", "--out", str(copied), "--workers", "2"]) == 0
    assert "2 of 2 meta-iterations done" in capsys.readouterr().out
    assert outcome(copied) == first


def test_run_that_is_going_on_is_neither_resumed_nor_changed(
        tmp_path, no_figures, monkeypatch, capsys):
    """A second --resume comes while the first run is in its second iteration."""
    step, said = mt.trpo_meta_step, []

    def spy(*args):
        said.append("another run")
        if len(said) == 2:
            (tmp_path / "run" / ".checkpoint.pt.1.tmp").write_text("being written")
            before = files_of(tmp_path)
            said[1] = refused(capsys, "--resume", "--out", tmp_path / "run")
            assert files_of(tmp_path) == before
        return step(*args)
    monkeypatch.setattr(mt, "trpo_meta_step", spy)
    assert tiny_run(tmp_path / "run") == 0 and "going on" in said[1]
    assert mt.load_checkpoint(tmp_path / "run" / "checkpoint.pt")[1].iteration == 2


def test_two_runs_started_at_once_get_two_folders(tmp_path, no_figures, monkeypatch):
    """Both find the same name free, and come to make it at the same moment."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    both, mkdir, waited = threading.Barrier(2, timeout=10), os.mkdir, set()

    def together(path, *args, **kw):
        if threading.get_ident() not in waited:
            waited.add(threading.get_ident())
            both.wait()
        return mkdir(path, *args, **kw)
    monkeypatch.setattr(os, "mkdir", together)
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(mt.main, [TINY, TINY])) == [0, 0]
    one, two = (tmp_path / "runs" / f"point2d-maml-seed0{n}" for n in ("", "-2"))
    assert outcome(one) == outcome(two)
    assert mt.main(["--resume"]) == 2                       # there are several


@pytest.mark.parametrize("args, words", [
    (["--task", "walker"], "walker"), (["--meta-batch-size", "0"], "meta_batch_size"),
    (["--alpha", "-1"], r"\balpha"), (["--alpha", "nan"], r"\balpha"),
    (["--gamma", "1.5"], "gamma"), (["--iterations", "many"], "iterations"),
    (["--no-such-flag"], "no-such-flag"), (["--evaluate", "missing.pt"], "missing.pt"),
    (["--evaluate", "foreign.pt"], "foreign.pt"),
    (["--hidden", "64 64"], "64 64.*100,100"),
    (["--init", "foreign.pt"], "foreign.pt"), (["--compare", "nowhere"], "nowhere"),
    (["--resume", "--out", "nowhere"], "nowhere"), (["--out", "taken"], "taken"),
    (["--out", "foreign.pt"], "foreign.pt"), (["--best"], "--evaluate"),
    (["--eval", "2"], "ambiguous.*eval-tasks"), (["--meth", "magic"], "method"),
    (["--evaluate", "run/checkpoint.pt", "--resume"], "--resume"),
    (["--evaluate", "run/checkpoint.pt", "--render", "a.mp4"], ".gif"),
    (["--evaluate", "run/checkpoint.pt", "--alpha", "0.3"], "alpha"),
    (["--evaluate", "run/checkpoint.pt", "--task", "ant-vel"], "point2d.*ant-vel"),
    (["--compare", "run/evaluation.csv"], "run"), (["--compare", "ant"], "ant"),
    (["--compare", "gaps"], "gaps"), (["--compare", "header"], "header"),
    (["--out", "/proc/maml"], "/proc/maml"), (["--horizon", "1000000000"], "horizon"),
    (["--hidden", "100000,100000"], "hidden"),
    (["--resume", "--out", "run", "--iterations", "1"], "iterations"),
    (["--rollouts", "9999", "--meta-batch-size", "9999"], "meta_batch_size")])
def test_bad_input_is_one_sentence_and_status_2_and_changes_nothing(
        tmp_path, trained, monkeypatch, capsys, args, words):
    (tmp_path / "foreign.pt").write_bytes(b"not a checkpoint")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "config.json").write_text("{}")
    shutil.copytree(trained, tmp_path / "run")
    for name, old, new in (("gaps", ",1,2,", ",1,1,"), ("header", "method", "")):
        table = shutil.copytree(trained, tmp_path / name) / "evaluation.csv"
        table.write_text(table.read_text().replace(old, new))
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


def maps_rows():
    """The map of notes.md: [(line number, row text)]."""
    text = (HERE / "notes.md").read_text(encoding="utf-8")
    table = text.split("<!-- map begins -->")[1].split("<!-- map ends -->")[0]
    return [(int(m.group(1)), m.group(0)) for m in re.finditer(
        r"^\| (\d+) \|.*$", table, re.MULTILINE)]


# The lines of the listing that are not blank.
LISTING = [1, 3, 5, 7, 8, 10, 11, 13, 14, 17, *range(19, 23), 24, *range(27, 32), 33,
           34, 36, 37, *range(39, 43), 44, 45, *range(47, 50), *range(51, 58),
           *range(59, 64), *range(65, 70), 72, 73, 77, 78, 80]


@text
def test_map_has_exactly_one_row_for_every_line_and_names_existing_functions():
    rows = maps_rows()
    assert [number for number, _ in rows] == LISTING
    for number, row in rows:
        names = re.findall(r"`([A-Za-z_][\w.]*)`", row.split("|")[3])
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


TAG = re.compile(r"\[((?:MAML|TRPO|GAE|SpinUp|maml_rl|listing)\b[^\]…]*)\]")


@text
def test_source_tags_of_the_code_and_of_the_notes_index_are_the_same():
    code = (HERE / "maml_trpo.py").read_text(encoding="utf-8")
    notes = (HERE / "notes.md").read_text(encoding="utf-8")
    index = notes.split("Sources and tags\n")[1]
    in_code = {" ".join(tag.split()) for tag in TAG.findall(code)}
    patterns = {"listing l.N", "MAML Alg.3 l.N"}
    assert in_code - patterns == set(TAG.findall(index)) - patterns
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


@text
def test_every_public_function_has_a_docstring_and_lines_are_at_most_88_wide():
    source = (HERE / "maml_trpo.py").read_text(encoding="utf-8")
    for file in (source, (HERE / "test_maml_trpo.py").read_text(encoding="utf-8")):
        assert max(map(len, file.splitlines())) <= 88
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            doc = ast.get_docstring(node) or ""
            assert doc and doc.count("Q: ") <= 1, node.name


# %% Many machines: real processes, gloo on the loopback address


def in_ranks(ranks, function, **arguments):
    """What `function`, a name of this file, returns in `ranks` fresh processes, which
    find each other on the loopback address. Each ends itself after a minute."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = (f"import json, signal, sys; signal.alarm(180); "
            f"sys.path.insert(0, {str(HERE)!r}); import test_maml_trpo as t; "
            f"print(json.dumps(t.{function}(**json.loads(sys.argv[1]))))")
    started = [subprocess.Popen(
        [sys.executable, "-c", code, json.dumps(arguments)], stdout=subprocess.PIPE,
        env={**os.environ, "RANK": str(rank), "WORLD_SIZE": str(ranks),
             "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
        for rank in range(ranks)]
    said = [process.communicate()[0].decode() for process in started]
    assert [process.returncode for process in started] == [0] * ranks
    return [json.loads(text.splitlines()[-1]) for text in said]


def three_iterations(dtype, out):
    """θ, returns and evaluation of a small run, on one process or on several; then the
    command's status and what it printed."""
    config = tiny_config(iterations=3, meta_batch_size=5, horizon=9, eval_tasks=4,
                         cg_iterations=4, hvp="gauss-newton")
    with mt.process_group():
        policy = mt.make_policy(POINT2D, config)
        start = mt.TrainState.initial(policy, config)
        start = dataclasses.replace(start, theta=start.theta.to(getattr(torch, dtype)))
        theta, rows = mt.train_maml(config, start=start)
        table = mt.evaluate(config, theta)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        os.environ["MASTER_PORT"] = str(int(os.environ.get("MASTER_PORT", 0)) + 1)
        status = tiny_run(out, "--meta-batch-size", "3")
    return [theta.tolist(), [row["return_post"] for row in rows], table.tolist(),
            status, printed.getvalue()]


@pytest.mark.parametrize("dtype, tolerance, counts", [
    ("float64", 1e-9, (3,)), pytest.param("float64", 1e-9, (2,), marks=slow),
    pytest.param("float32", 1e-2, (2, 3), marks=slow)])
def test_ranks_compute_the_same_run(tmp_path, monkeypatch, dtype, tolerance, counts):
    """1, 2 and 3 processes: five tasks do not divide evenly. One of them writes."""
    monkeypatch.setenv("MASTER_PORT", "0")
    alone = three_iterations(dtype, tmp_path / "1")
    for ranks in counts:
        every = in_ranks(ranks, "three_iterations", dtype=dtype,
                         out=str(tmp_path / "n"))
        for one in every:
            for a, b in zip(alone[:3], one[:3]):
                a, b = (torch.tensor(x, dtype=torch.float64) for x in (a, b))
                assert (a - b).norm() <= tolerance * a.norm()
        assert [one[3] for one in every] == [0] * ranks
        assert [bool(one[4]) for one in every] == [True] + [False] * (ranks - 1)
        lines = [text.count("\n") for text in (every[0][4], alone[4])]
        assert lines[0] == lines[1]
        assert names_in(tmp_path / "n") == names_in(tmp_path / "1")
        with open(tmp_path / "n" / "progress.csv", encoding="utf-8") as f:
            assert [row["iteration"] for row in csv.DictReader(f)] == ["0", "1"]
        shutil.rmtree(tmp_path / "n")


def test_meta_step_sums_twice_and_once_for_each_product_and_each_trial():
    """What travels: P + 1 numbers a gradient or product, 3 a trial, all of float64."""
    config = tiny_config(cg_iterations=4)
    policy, theta, data = sampled_problem(config, dtype=torch.float32)
    with mock.patch("torch.distributed.is_initialized", return_value=True), (
            mock.patch("torch.distributed.all_reduce")) as all_reduce:
        _, stats = mt.trpo_meta_step(policy, theta, data, config)
    sent = [call.args[0] for call in all_reduce.call_args_list]
    assert stats["line_search_steps"] > 0
    assert [len(x) for x in sent] == [2] + [policy.num_params + 1] * (1 + 4) + (
        [3] * stats["line_search_steps"])
    assert all(x.dtype == torch.float64 for x in sent)


DYING_SCRIPT = """
import os, signal, sys, time
signal.alarm(180)
sys.path.insert(0, sys.argv[1])
import maml_trpo as mt
step, calls, dies = mt.trpo_meta_step, [], os.environ["RANK"] == sys.argv[2]

def trpo_meta_step(*args):
    calls.append(args)
    if len(calls) == 3:                         # in the middle of the third iteration
        if dies:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(float(sys.argv[3]))
    return step(*args)

mt.trpo_meta_step = trpo_meta_step
sys.exit(mt.main(sys.argv[4:]))
"""


@pytest.mark.parametrize("dies, seconds", [
    (0, 2), pytest.param(0, 0, marks=slow), pytest.param(1, 0, marks=slow),
    pytest.param(1, 5, marks=slow)])
def test_killed_rank_ends_the_run_with_a_sentence_and_it_can_go_on(
        tmp_path, no_figures, dies, seconds):
    """Under torchrun, SIGKILL: the other one is in gloo's call, or busy for a while."""
    script, out = tmp_path / "ranks.py", tmp_path / "out"
    script.write_text(DYING_SCRIPT)
    args = [*TINY, "--iterations", "5", "--hvp", "gauss-newton"]
    ended = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone",
         "--nproc-per-node=2", str(script), str(HERE), str(dies), str(seconds), *args,
         "--out", str(out)], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 1
    said = re.findall("^maml_trpo.py.*", ended.stderr, re.MULTILINE)
    assert len(said) == 1 and "another process of this run ended" in said[0]
    assert "--resume" in said[0] and 'maml_trpo.py", line' not in ended.stderr
    assert mt.load_checkpoint(out / "checkpoint.pt")[1].iteration == 2
    assert mt.main([*args, "--out", str(out), "--resume"]) == 0
    config, state = mt.load_checkpoint(out / "checkpoint.pt")
    theta, rows = mt.train_maml(config)                      # undisturbed, one process
    assert len(state.rows) == len(rows) == 5
    assert (state.theta - theta).norm() <= 1e-5 * theta.norm()


# %% Faults: kills, full disks, bad input

OLD_LOCALE = {name: value for name, value in os.environ.items()
              if name != "DISPLAY"} | dict(
    LC_ALL="C", PYTHONIOENCODING="latin-1", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0",
    MPLBACKEND="TkAgg")


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
        os._exit(tiny_run(folder, *more))

    assert start("whole", -1) == 0
    expected = outcome(Path("whole"))
    for n in itertools.count():
        if start(f"killed {n}", n) != -signal.SIGKILL:
            break                                           # it ended before that
        assert start(f"killed {n}", -1, "--resume") == 0, n
        assert outcome(Path(f"killed {n}")) == expected, n
        assert not any(Path(f"killed {n}").glob(".*.tmp"))
    print(f"killed {n} times")


def test_killed_runs_end_bit_identical_when_resumed(tmp_path):
    """In a folder with a space and an umlaut, where the locale knows only ASCII."""
    if not hasattr(os, "fork"):
        pytest.skip("needs os.fork")
    cwd = tmp_path / "Übung 1"
    cwd.mkdir()
    code = (f"import sys; sys.path.insert(0, {str(HERE)!r}); "
            f"import test_maml_trpo as t; t.kill_and_resume()")
    out = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True,
                         text=True, errors="replace", timeout=300, env=OLD_LOCALE)
    assert out.returncode == 0, out.stderr
    assert int(re.search(r"killed (\d+) times", out.stdout)[1]) >= 12


def interrupted_at(monkeypatch, call, action):
    """Before its `call`-th meta-step the program meets `action`."""
    step, calls = mt.trpo_meta_step, itertools.count(1)
    monkeypatch.setattr(mt, "trpo_meta_step", lambda *args: (
        action() if next(calls) == call else None, step(*args))[1])


def test_interrupted_run_says_how_to_go_on(tmp_path, no_figures, monkeypatch, capsys):
    interrupted_at(monkeypatch, 2, mock.Mock(side_effect=KeyboardInterrupt))
    assert tiny_run(tmp_path / "run") == 130
    assert "--resume" in "".join(capsys.readouterr())
    assert mt.load_checkpoint(tmp_path / "run" / "checkpoint.pt")[1].iteration == 1


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


class FullDisk(io.StringIO):
    def write(self, text):
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize("stdout", ["head", "full", "closed", "none"])
def test_training_goes_on_when_nothing_can_be_printed(
        tmp_path, no_figures, monkeypatch, stdout):
    stream = {"full": FullDisk(), "closed": io.StringIO(), "none": None}.get(stdout)
    if stdout == "head":
        reader, writer = os.pipe()
        os.close(reader)
        stream = open(writer, "w")
    if stdout == "closed":
        stream.close()
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
                dict(best_theta=theta[:-1]), dict(iteration="x"), dict(rows=[]),
                dict(spread=None), dict(best_return="x"), dict(config={}),
                dict(config={"no_such": 1}),
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


def test_gradient_that_is_not_finite_stops_in_its_iteration(monkeypatch):
    right, calls = mt.meta_gradient, itertools.count(1)
    monkeypatch.setattr(mt, "meta_gradient", lambda *args: right(*args) * (
        math.nan if next(calls) == 3 else 1))
    with pytest.raises(mt.Diverged, match="iteration 2: the meta-gradient"):
        train_toy(toy_family())


def test_numpy_warns_of_nothing_in_the_threads_of_the_pool(recwarn):
    """`main` silences its own thread; the checks name what is not finite."""
    with np.errstate(all="ignore"):
        mt.map_over_tasks(lambda x: x * x, [np.float32(1e30)] * 4, workers=2)
    assert not recwarn.list


@pytest.mark.parametrize("error", [
    MemoryError("Unable to allocate 9 GiB"), RuntimeError(
        "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")])
def test_out_of_memory_is_one_sentence(tmp_path, monkeypatch, capsys, error):
    monkeypatch.setattr(mt, "train_maml", mock.Mock(side_effect=error))
    assert tiny_run(tmp_path / "run") == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "out of memory" in error


def test_environments_own_error_keeps_its_traceback():
    with pytest.raises(KeyError, match="one's own"):
        train_toy(toy_family(raises=4))
    with pytest.raises(mt.BadInput, match="expected 5, got 4") as raised:
        train_toy(toy_family(results=4))
    assert isinstance(raised.value.__cause__, ValueError)


def test_family_that_breaks_its_promises_is_refused_in_one_sentence():
    """Among them the likeliest one: tasks that are no rows."""
    for changes, words in (
            (dict(make_envs=lambda K: gym.Env()), "VectorEnv of 2"),
            (dict(make_envs=lambda K: mt.Point2D(3)), "VectorEnv of 2"),
            (dict(sample_tasks=lambda rng, M: rng.uniform(size=M)), "rows? of numbers"),
            (dict(test_tasks=lambda n: np.zeros(n)), "rows? of numbers"),
            (dict(horizon=9), "9.*4")):
        with pytest.raises(mt.BadInput, match=f"^toy: .*({words})") as raised:
            train_toy(toy_family(**changes))
        assert "\n" not in str(raised.value)


# Input of every kind. Hypothesis draws it, always the same.

WORDS = ["", " ", "-1", "0", "1", "2", "0.5", "1e-300", "1e30", "1e400", "nan", "inf",
         "None", "true", "1,2", ",", "3,0", "a,b", "0x10", "1_0", "٣", "θ", "--", "-",
         "maml", "tanh", "ratio", "point2d", "gauss-newton", "9" * 20, "99999,9", "%s"]
PATHS = ["", ".", "missing", "kept", "kept/run", "kept/a/b", "kept/foreign.txt",
         "kept/foreign.txt/x", "kept/half.pt", "kept/run/checkpoint.pt", "/proc/x",
         "x" * 300, "θ 1", "new.gif", "kept/run/config.json", "-", "nowhere/x.gif"]


@pytest.fixture
def kept(trained, tmp_path, monkeypatch, no_figures):
    """A folder that holds what a student may name by mistake, and is guarded."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained, "kept/run")
    Path("kept/foreign.txt").write_bytes(b"\xff\xfenot a run")
    Path("kept/half.pt").write_bytes(Path("kept/run/checkpoint.pt").read_bytes()[:9999])
    return tmp_path / "kept"


def test_any_command_line_works_or_is_refused_in_one_sentence(kept, capsys):
    """Every flag, with words that fit and that do not: status 0, or 2 or 1 with one
    line. What was there before stays, unless the run was resumed."""
    names, seen = [f.name.replace("_", "-") for f in dataclasses.fields(mt.Config)], []
    setting = draw.tuples(draw.sampled_from(names), draw.sampled_from(WORDS))
    path = draw.tuples(draw.sampled_from([
        "out", "init", "evaluate", "compare", "render"]), draw.sampled_from(PATHS))
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
        reset=["without options", "old"], results=[4, 3], raises=[1, 2, 4],
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


# %% Changes that all the tests above had let pass


def test_point2d_declares_the_actions_that_it_takes():
    envs = mt.Point2D(3)
    assert envs.single_action_space == gym.spaces.Box(-1, 1, (2,), np.float32)
    assert envs.action_space.shape == envs.observation_space.shape == (3, 2)


def test_training_goals_fill_the_square_and_not_its_diagonal():
    goals = POINT2D.sample_tasks(np.random.default_rng(0), 2000)
    assert abs(np.corrcoef(goals.T)[0, 1]) < 0.1


def test_sample_trajectories_by_default_takes_the_familys_horizon():
    """And γ 0.99, λ 1."""
    family, (policy, theta, _) = dataclasses.replace(POINT2D, horizon=6), (
        sampled_problem(tiny_config()))
    data = mt.sample_trajectories(family, [0.3, 0.2], policy, theta, 3, seed=(0,))
    assert data.rew.shape == (3, 6)
    again = mt.assign_credit(dataclasses.replace(data, adv=None), 0.99, 1.0)
    assert torch.equal(data.adv, again.adv)


def test_logged_residual_is_a_share_of_the_gradients_length(monkeypatch):
    config = tiny_config()
    policy, theta, data = sampled_problem(config)
    monkeypatch.setattr(mt, "conjugate_gradient", lambda hvp, b, *_: (b, 0.25 * b))
    assert mt.trpo_meta_step(policy, theta, data, config)[1]["cg_residual"] == (
        pytest.approx(0.25))
    for d in data:
        d.outer.adv = 0 * d.outer.adv                  # rewards that do not differ
    new, stats = mt.trpo_meta_step(policy, theta, data, config)
    assert stats["cg_residual"] == 0 and torch.equal(new, theta)


def test_threads_do_the_work_that_they_are_for(monkeypatch):
    """Sampling (only where the family says so), gradients, products and trials."""
    here, seen = threading.get_ident(), {}
    for name in ("task_rollout", "surrogate_and_kl"):
        def spy(*args, right=getattr(mt, name), name=name, **kw):
            seen.setdefault(name, set()).add(threading.get_ident() == here)
            return right(*args, **kw)
        monkeypatch.setattr(mt, name, spy)
    config = tiny_config(workers=2, iterations=1)
    for threads in (True, False):
        family = dataclasses.replace(POINT2D, threads=threads)
        for work in (lambda: mt.train_maml(config, family),
                     lambda: mt.evaluate(config, first_theta(config), family)):
            seen.clear()
            work()
            assert seen.pop("task_rollout") == {not threads}
            assert seen in ({}, {"surrogate_and_kl": {False}})


def test_line_search_by_default_makes_fifteen_trials_of_four_fifths():
    _, tried = quadratic_search(lambda x: x, lambda x: 0.0, 1.0)
    np.testing.assert_allclose(tried, 0.8 ** np.arange(15), rtol=1e-6)


def test_conjugate_gradients_tolerance_is_absolute():
    H, b = spd(6), torch.ones(6, dtype=torch.float64)
    x, _ = mt.conjugate_gradient(lambda v: H @ v, 1e-3 * b, tolerance=1e-5)
    assert not x.any()                                 # r·r is 6e-6 from the start
    _, r = mt.conjugate_gradient(lambda v: H @ v, 1e3 * b, 60, tolerance=1e-5)
    assert r @ r < 1e-5


def test_bad_observation_is_the_environments_fault_and_bad_action_the_policys():
    family = toy_family(obs=lambda t: np.full(2, math.nan if t == 2 else 0, np.float32))
    with pytest.raises(mt.BadInput, match="observation at step 2"):
        train_toy(family)
    policy = mt.GaussianPolicy(2, 3, hidden=(4,))
    theta = torch.full((policy.num_params,), math.nan)
    with pytest.raises(mt.Diverged, match="action at step 0"):
        mt.task_rollout(toy_family().make_envs(2), policy, theta, [0.0], 4, (0,))


@pytest.fixture
def two_kernel_threads():
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def test_training_gives_back_the_threads_it_found(two_kernel_threads):
    seen = []
    mt.train_maml(tiny_config(iterations=1), after_iteration=lambda _: seen.append(
        torch.get_num_threads()))
    assert seen == [1] and torch.get_num_threads() == 2


def test_threads_of_the_pool_have_one_kernel_thread_each(two_kernel_threads):
    mt.thread_pool.cache_clear()
    assert mt.map_over_tasks(lambda _: torch.get_num_threads(), range(4), 3) == [1] * 4


def test_evaluation_may_take_no_step():
    config = tiny_config(eval_steps=0)
    assert mt.evaluate(config, random_theta(config)).shape == (5, 1)


@contextlib.contextmanager
def as_rank(rank, ranks, said=None):
    """This process believes it is one of several; `said` is what the first one sent."""
    with mock.patch.multiple(
            "torch.distributed", is_initialized=lambda: True, get_rank=lambda: rank,
            get_world_size=lambda: ranks, broadcast_object_list=lambda outcome: (
                outcome.__setitem__(0, said or outcome[0]))):
        yield


def test_only_the_first_rank_says_what_is_wrong():
    wrong = mt.BadInput("wrong")
    with as_rank(1, 2, wrong), pytest.raises(SystemExit) as stop:
        mt.from_first_rank(lambda: None)
    assert stop.value.code == 2
    with as_rank(0, 2), pytest.raises(mt.BadInput):
        mt.from_first_rank(mock.Mock(side_effect=wrong))


def test_more_processes_than_tasks_are_refused(tmp_path, capsys):
    with as_rank(0, 3):
        assert "meta_batch_size 2" in refused(capsys, *TINY, "--out", tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_workers_are_the_cores_or_a_ranks_share_of_them(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    for processes, workers in ((None, 6), ("2", 3), ("9", 1)):
        monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
        if processes:
            monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
        assert mt.complete(mt.Config()).workers == workers


def test_walkers_have_no_time_limit_of_gymnasiums():
    envs = family_named("cheetah-dir").make_envs(1)
    envs.reset(seed=[0], options={"task": [1.0]})
    ends = [envs.step(np.zeros((1, 6)))[3].item() for _ in range(1001)]
    assert not any(ends)


@pytest.mark.parametrize("name, high", [("cheetah-vel", 2), ("ant-vel", 3)])
def test_held_out_speeds_are_these(name, high):
    """Numpy's old generator, seed 1, by its digits."""
    np.testing.assert_allclose(mt.TASKS[name].test_tasks(40)[[0, 1, 2]].ravel(),
                               high * np.array([0.417022, 0.720324, 0.000114]),
                               atol=3e-6)


def test_file_is_whole_when_it_is_synced(tmp_path, monkeypatch):
    sizes = []
    monkeypatch.setattr(os, "fsync", lambda file: sizes.append(os.fstat(file).st_size))
    mt.write_atomically(tmp_path / "x", b"123456789")
    assert sizes == [9] and (tmp_path / "x").read_bytes() == b"123456789"


def test_checkpoint_with_a_best_theta_that_is_not_finite_is_refused(copied, capsys):
    path = copied / "checkpoint.pt"
    content = torch.load(path, weights_only=True)
    content["best_theta"] = content["best_theta"] * math.nan
    torch.save(content, path)
    assert "finite" in refused(capsys, "--evaluate", path, "--best")


def test_learning_curve_of_a_baseline_has_one_line(drawn, monkeypatch):
    config, states = constant_runs(monkeypatch, PRE, POST)
    config = dataclasses.replace(config, method="pretrained")
    mt.draw_learning_curve(Path("learning.png"), config, states[-1])
    (line,) = drawn["learning.png"].axes[0].lines
    assert line.get_ydata().tolist() == np.mean(POST, 1).tolist()


@pytest.mark.parametrize("task", ["point2d", "cheetah-dir"])
def test_table_says_where_the_papers_simulator_is_another(task):
    table = mt.comparison_table(mt.complete(mt.Config(task=task)),
                                [("maml, last θ", np.zeros((40, 4)))])
    assert ("simulator" in table) == (task != "point2d")


def test_walks_end_where_the_episode_ended(drawn, monkeypatch):
    config = tiny_config(eval_steps=0)
    right = mt.adaptation

    def shorter(*args):
        for phi, data in right(*args):
            data.mask[0, 3:] = data.obs[0, 3:] = 0
            yield phi, data
    monkeypatch.setattr(mt, "adaptation", shorter)
    mt.draw_trajectories(Path("trajectories.png"), config, random_theta(config))
    for ax in drawn["trajectories.png"].axes:
        assert len(ax.lines[0].get_xdata()) == 3


def test_two_rows_are_two_directions_and_one_row_has_no_error():
    config = mt.complete(mt.Config(task="cheetah-dir"))
    for n, kinds in ((1, 1), (2, 2), (3, 2)):
        table = np.arange(1.0, 2 * n + 1).reshape(n, 2)
        assert list(map(len, mt.by_task(config, table).values())) == [
            [1], [1, 1], [1, 2]][n - 1]
        printed = mt.comparison_table(config, [("maml, last θ", table)])
        if n < 3:
            assert set(re.findall(r"± +([\d.]+)", printed)) == {"0.00"}


def test_time_left_is_of_the_last_ten_iterations(tmp_path, monkeypatch):
    config, seen = tiny_config(), []
    zero = dict.fromkeys(mt.PROGRESS_COLUMNS, 0.0)
    rows = [zero | {"seconds_total": float(n)} for n in range(1, 15)]
    state = dataclasses.replace(mt.TrainState.initial(
        mt.make_policy(POINT2D, config), config), iteration=14, rows=rows)
    monkeypatch.setattr(mt, "train_maml", lambda config, start, after_iteration:
                        after_iteration(state))
    monkeypatch.setattr(mt, "progress_line",
                        lambda row, iterations, recent: seen.append(recent) or "")
    mt.train_in_folder(config, tmp_path, state)
    assert seen == [9.5]                                       # median of 5, …, 14


def test_evaluation_of_a_saved_theta_takes_every_flag_of_evaluation(
        trained, tmp_path, no_figures):
    given = {"eval_tasks": "3", "eval_steps": "1", "eval_episodes": "4", "seed": "6",
             "eval_alpha": "0.7", "workers": "2"}
    flags = [x for name, value in given.items()
             for x in ("--" + name.replace("_", "-"), value)]
    out = tmp_path / "e"
    assert mt.main(["--evaluate", str(trained / "checkpoint.pt"), "--out", str(out),
                    *flags]) == 0
    assert mt.read_evaluation(out, "point2d")[1].shape == (3, 2)
    kept = json.loads((out / "config.json").read_text())
    assert all(kept[name] == float(value) for name, value in given.items()
               if name != "workers")


def test_help_says_every_default(capsys):
    assert mt.main(["--help"]) == 0
    said = "".join(capsys.readouterr().out.split())
    for f in dataclasses.fields(mt.Config):
        begins = "".join(f.metadata["help"].split())
        assert begins in said, f.name
        default = "".join(f"; default {f.default}".split())
        rest = said[said.index(begins):said.index(begins) + len(begins) + 200]
        assert f.default is None or default in rest, f.name


def test_picture_of_the_plane_has_y_upwards():
    envs = mt.Point2D(1)
    envs.reset(options={"task": [0.3, 0.5]})
    envs.step(np.array([[-1.0, 1.0]]))
    picture = mt.plane_picture(envs)
    assert picture.shape == (240, 240, 3)
    for (x, y), there in (((0.3, 0.5), True), ((0.3, -0.5), False),
                          ((-0.1, 0.1), True), ((-0.1, -0.1), False)):
        pixel = picture[round(120 * (1 - y / 0.75)), round(120 * (1 + x / 0.75))]
        assert (pixel < 255).any() == there


def test_render_does_not_overwrite_a_file(tmp_path):
    (tmp_path / "old.gif").write_bytes(b"mine")
    with pytest.raises(mt.BadInput, match="new file"):
        mt.filmed("point2d", tmp_path / "old.gif")


def test_terminal_that_cannot_show_theta_gets_a_question_mark(
        tmp_path, no_figures, monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, "latin-1"))
    assert tiny_run(tmp_path / "run") == 0
    sys.stdout.flush()
    said = raw.getvalue().decode("latin-1")
    assert "before ? after" in said and "Done in" in said


def test_run_says_its_sizes(tmp_path, no_figures, capsys):
    assert tiny_run(tmp_path / "run") == 0
    assert re.search("0 of 2 meta-iterations done; tasks 2, episodes 3, steps 4, inner "
                     "steps 1, workers 1; ", capsys.readouterr().out)


# %% Proofs: what they share

hessian = functools.partial(torch.autograd.functional.hessian, vectorize=True)
jacobian = functools.partial(torch.autograd.functional.jacobian, vectorize=True)


def gap(a, b):
    """‖a − b‖/‖b‖ of two vectors or matrices."""
    return float((a - b).norm() / b.norm())


def order(steps, errors):
    """n in error ∝ stepⁿ: the slope on logarithmic axes."""
    return np.polyfit(np.log(steps), np.log(errors), 1)[0]


# %% Proofs: an MDP small enough to enumerate, expectations without sampling
#
# Every expectation below is a finite sum, over all trajectories or over all sets D of K
# trajectories. True gradients are central differences of `MdpTiny.value`, which
# knows no trajectory, no log π and no autograd.


class MdpTiny:
    """S states, A actions, H steps: start (S,), move (S, A, S), reward (S, A).

    It is its own policy, too: tabular, π_θ(a|s) ∝ exp θ[s, a].
    """

    def __init__(self, start, move, reward, H):
        self.start, self.move, self.reward = (
            torch.as_tensor(x, dtype=torch.float64) for x in (start, move, reward))
        (self.S, self.A), self.H = self.reward.shape, H
        self.P = self.S * self.A
        # All paths: states and actions (N, H), and the dynamics' part of p(τ), (N,).
        pairs = torch.cartesian_prod(*[torch.arange(self.P)] * H).reshape(-1, H)
        states, actions = pairs // self.A, pairs % self.A
        luck = self.start[states[:, 0]] * self.move[
            states[:, :-1], actions[:, :-1], states[:, 1:]].prod(1)
        self.states, self.actions, self.luck = (
            x[luck > 0] for x in (states, actions, luck))
        self.N = len(self.luck)
        self.rew = self.reward[self.states, self.actions]                       # (N, H)

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
        rew = self.rew[paths] * weight
        obs = torch.nn.functional.one_hot(self.states[paths], self.S).double()
        return mt.Trajectories(obs, self.actions[paths], rew, torch.ones_like(rew),
                               mt.discounted_returns(rew, gamma))

    def weighted(self, theta):
        """All paths, rewards times N·p_θ(τ): a mean over these N is an expectation."""
        return self.data(range(self.N), self.N * self.probability(theta)[:, None])

    def sets(self, K):
        """Every D of K paths, with θ ↦ p_θ(D): all orders in which D can be drawn."""
        for D in itertools.combinations_with_replacement(range(self.N), K):
            paths = list(D)
            orders = math.factorial(K) / math.prod(
                math.factorial(paths.count(n)) for n in set(paths))
            yield self.data(paths), (lambda theta, paths=paths, orders=orders:
                                     orders * self.probability(theta)[paths].prod())


def mdp_random(seed, S, A, H, starts=1, successors=1):
    """Random MDP and θ: `starts` first states, `successors` of each (state, action)."""
    rng = np.random.default_rng(seed)
    start, move = np.zeros(S), np.zeros((S, A, S))
    start[:starts] = rng.dirichlet(np.ones(starts))
    for s, a in itertools.product(range(S), range(A)):
        move[s, a, rng.permutation(S)[:successors]] = rng.dirichlet(np.ones(successors))
    reward, theta = rng.standard_normal((S, A)), 0.5 * rng.standard_normal(S * A)
    return MdpTiny(start, move, reward, H), torch.tensor(theta)


# 1,296 paths for H = 4, with chance in every move; 8 for H = 3, in the actions alone.
MDP_FOR_CREDIT = functools.partial(mdp_random, 3, S=3, A=2, starts=3, successors=3)
MDP_FOR_SETS = functools.partial(mdp_random, 3, S=5, A=2)


def mdp_expected(mdp, theta, credit):
    """E[Σ_t ∇log π_t·credit_t]/H through mt.inner_loss: credit (N, H), each path's."""
    data = mdp.weighted(theta)
    data.adv = credit * (mdp.N * mdp.probability(theta))[:, None]
    return -mt.gradient(lambda t: mt.inner_loss(mdp, t, data), theta)


def mdp_expected_over_sets(mdp, theta, K, credit):
    """The same, D of K paths at a time, each credited by credit(D), (K, H)."""
    total = 0.0
    for data, probability in mdp.sets(K):
        data.adv = credit(data)
        total = total - probability(theta) * mt.gradient(
            lambda t: mt.inner_loss(mdp, t, data), theta)
    return total


def test_mdp_probabilities_add_up_and_value_equals_sum_over_paths():
    """E[Σ γᵗ r_t]/H backwards in time, and by paths."""
    mdp, theta = MDP_FOR_CREDIT(H=4)
    assert mdp.N == 1296 and abs(mdp.probability(theta).sum() - 1) < 1e-14
    for gamma in (1.0, 0.7):
        total = mdp.rew @ gamma ** torch.arange(mdp.H, dtype=torch.float64)
        expected = (mdp.probability(theta) * total).sum() / mdp.H
        assert torch.allclose(mdp.value(theta, gamma), expected, rtol=1e-13)
    mdp, theta = MDP_FOR_SETS(H=3)
    assert abs(sum(probability(theta) for _, probability in mdp.sets(3)) - 1) < 1e-14


def test_reward_times_own_score_expectation_is_not_the_enumerated_gradient():
    """[listing l.11] E[Σ_t r_t ∇log π_t] is the gradient for H = 1, not for H = 4.

    It is the slope of each step's own reward, the visits of the states held fixed.
    """
    for H in (1, 4):
        mdp, theta = MDP_FOR_CREDIT(H=H)
        visits = torch.nn.functional.one_hot(mdp.states).sum(1).double()        # (N, S)
        visits = mdp.probability(theta) @ visits
        own = mdp_expected(mdp, theta, mdp.rew)
        frozen = central_difference(lambda x: (visits[:, None] * mdp.reward * x.view(
            mdp.S, mdp.A).softmax(-1)).sum() / mdp.H, theta)
        assert torch.allclose(own, frozen, atol=1e-9)
        error = gap(own, central_difference(mdp.value, theta))
        assert error < 1e-8 if H == 1 else error > 0.1


def test_reward_times_own_score_falls_for_the_bait_where_reward_to_go_does_not():
    """At the start action 0 pays 1 and leads to nothing, action 1 pays 3 a step later.

    A step along l.11's direction lowers the value, along reward-to-go raises it.
    """
    move = np.zeros((3, 2, 3))
    move[0, 0, 1] = move[0, 1, 2] = move[1, :, 1] = move[2, :, 2] = 1.0
    mdp = MdpTiny([1, 0, 0], move, [[1, 0], [0, 0], [3, 3]], H=2)
    theta, data = torch.zeros(6, dtype=torch.float64), mdp.data(range(mdp.N))
    for credit, sign in ((data.rew, -1), (data.adv, 1)):
        ahead = theta + 0.1 * mdp_expected(mdp, theta, credit)
        assert sign * (mdp.value(ahead) - mdp.value(theta)) > 1e-3


@pytest.mark.parametrize("gamma", [1.0, 0.7])
def test_discounted_reward_to_go_drops_gamma_to_the_t_of_the_enumerated_gradient(gamma):
    """E[Σ_t s_t γᵗG_t] is the gradient, as E[Σ_t s_t R(τ)] is; without γᵗ it is not.

    mt's estimator is without. At γ < 1 its Jacobian is not symmetric either: it is the
    gradient of no function.
    """
    mdp, theta = MDP_FOR_CREDIT(H=4)
    weight = gamma ** torch.arange(mdp.H, dtype=torch.float64)
    every, total = mdp.data(range(mdp.N), gamma=gamma), (mdp.rew @ weight)[:, None]
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
    mdp, theta = MDP_FOR_CREDIT(H=4)
    every, other = (mdp.data(paths, gamma=gamma)
                    for paths in (range(mdp.N), range(5, mdp.N, 321)))
    baseline = mt.LinearBaseline().fit(other.obs, other.adv, other.mask)
    values = baseline.predict(every.obs)
    without, exact, biased = (mdp_expected(mdp, theta, credit) for credit in (
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
    mdp, theta = MDP_FOR_SETS(H=3)
    true, errors = central_difference(mdp.value, theta), []
    for K in (1, 2, 3):
        assert torch.allclose(mdp_expected_over_sets(mdp, theta, K, less_mean),
                              (1 - 1 / K) * true, atol=1e-9)
        errors.append(gap(mdp_expected_over_sets(mdp, theta, K, less_fitted), true))
    assert errors[0] > errors[1] > errors[2] > 0.1


def test_standardising_by_the_same_paths_turns_the_expected_step():
    """mt.standardise takes mean and σ from D itself. H 1, K 2, rewards 0, 1, 10.

    Two different actions have Â = ±1, whatever their rewards: the expected step points
    along (−2, 0, 2), the gradient along (−11, −8, 19). As K grows the angle closes.
    """
    mdp = MdpTiny([1], np.ones((1, 3, 1)), [[0, 1, 10]], H=1)
    theta = torch.zeros(3, dtype=torch.float64)
    step, many = (mdp_expected_over_sets(mdp, theta, K, lambda data: mt.standardise(
        data.rew, data.mask)) for K in (2, 20))
    true = central_difference(mdp.value, theta)
    assert torch.allclose(9 * true, torch.tensor([-11.0, -8.0, 19.0]).double())
    assert torch.allclose(step / step[2], torch.tensor([-1.0, 0.0, 1.0]).double())
    cosine = functools.partial(torch.cosine_similarity, dim=0)
    assert abs(cosine(step, true) - 60 / math.sqrt(8 * 546)) < 1e-6          # 0.908
    assert cosine(many, true) > 0.99


# The dropped term, and two objectives: (II) is E_D[V(θ′(θ, D))], K paths in D, drawn
# with θ, as Algorithm 3 has it; (I) is V(θ + α∇V(θ)), the inner expectation exact.

MDP_ALPHA = 2.0


def emaml_term(policy, theta, inner, value, alpha):
    """value·∇_θ log p(D): with value = V(θ′), the term of ∇E_D[V(θ′)] that MAML drops.

    log p(D) = Σ_k Σ_t log π_{θ_i(θ)}(a|x) + what does not depend on θ: a *sum* over the
    K episodes of every inner step, where θ_i is what that step started from. Any number
    that has not seen D may be taken off the value.
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


def mdp_closed_step(mdp, theta, data):
    """θ′ without autograd or log π: in row s, ∇log π(a|s) is (indicator of a) − π."""
    credit = torch.zeros(mdp.S, mdp.A).double().index_put(            # Σ of Â by (s, a)
        (data.obs.argmax(-1), data.act), data.adv, accumulate=True)
    pi = theta.view(mdp.S, mdp.A).softmax(-1)
    ascent = credit - pi * credit.sum(-1, keepdim=True)
    return theta + MDP_ALPHA * ascent.flatten() / data.adv.numel()


class MdpSampled:
    """(II) by sums over all D, or all sequences of D for several inner steps."""

    def __init__(self, mdp, theta, K=1, steps=1, credit=lambda data: data.adv):
        self.mdp, self.theta, sets = mdp, theta, list(mdp.sets(K))
        for data, _ in sets:
            data.adv = credit(data)
        self.sequences = list(itertools.product(sets, repeat=steps))
        self.true = central_difference(lambda x: sum(
            p * mdp.value(theta_prime) for p, theta_prime, _ in self.outcomes(x)),
            theta)

    def outcomes(self, theta):
        """p(D…), θ′ and D… of each sequence, in closed form."""
        for sequence in self.sequences:
            p, theta_prime = 1.0, theta
            for data, probability in sequence:
                p = p * probability(theta_prime)
                theta_prime = mdp_closed_step(self.mdp, theta_prime, data)
            yield p, theta_prime, [data for data, _ in sequence]

    def mean(self, estimator):
        """E[Jᵀ∇V(θ′)]; or, for "term", of the E-MAML term with V(θ′) − 1.3 in it."""
        total, mdp, theta = 0.0, self.mdp, self.theta
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
    """(II): log π in the inner loss plus the E-MAML term is exact; neither is alone.

    With two inner steps the second D comes from θ_1(θ), and the term knows it.
    """
    case = MdpSampled(*MDP_FOR_SETS(H=2 if "steps" in how else 3), **how)
    log_prob, term = case.mean("log-prob"), case.mean("term")
    assert torch.allclose(log_prob + term, case.true, atol=1e-9)
    for wrong in (log_prob, case.mean("first order"), term,
                  log_prob + term / 2):                      # a mean over the K paths
        assert gap(wrong, case.true) > 0.05


def test_meta_gradient_expectation_equals_the_sampled_objective_with_sampling_frozen():
    """E[mt.meta_gradient] over D, D′ lacks exactly the E-MAML term of −∇ of (II).

    First order, it is −E[∇V(θ′)].
    """
    mdp, theta = mdp_random(2, S=3, A=2, H=3, starts=3)
    case = MdpSampled(mdp, theta)
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


def mdp_expected_true(mdp, theta):
    """∇ of (I), V(θ + α∇V(θ)): V is per step, as the inner loss is."""
    return central_difference(
        lambda x: mdp.value(x + MDP_ALPHA * mt.gradient(mdp.value, x)), theta)


@pytest.mark.parametrize("H, exact", [(4, ["DiCE"]), (1, ["DiCE", "ratio"])])
def test_dice_and_at_horizon_1_ratio_equal_differences_of_the_expected_objective(
        H, exact):
    """(I): DiCE is exact, the ratio (LVC) for H = 1; first order and log π are not."""
    mdp, theta = MDP_FOR_SETS(H=H)
    true, inner = mdp_expected_true(mdp, theta), [mdp.weighted(theta)]
    for name in ("first order", "log-prob", "ratio", "DiCE"):
        error = gap(mdp_gradient_through(mdp, theta, inner, name), true)
        assert error < 1e-8 if name in exact else error > 0.01


def test_inner_loss_hessian_misses_exactly_these_terms():
    """E[inner loss], twice derived: ratio misses the cross-time terms, log π more.

    With s_t = ∇log π_t and G_t the reward-to-go, ∇²E[R] is the ratio's Hessian plus
    E[Σ_{t<u} (s_t s_uᵀ + s_u s_tᵀ)G_u]; the ratio's is log π's + E[Σ_t s_t s_tᵀ G_t].
    A constant baseline b adds b·(Fisher matrix) to log π's and nothing to the ratio's.
    """
    mdp, theta = MDP_FOR_CREDIT(H=4)
    data, weight = mdp.weighted(theta), mdp.N * mdp.probability(theta)[:, None]
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
    """E-MAML is exact for (II), not (I); DiCE and ratio, at finite K, for neither.

    First order is nearer to (II) than log π or not: a constant in Â decides.
    """
    mdp, theta = MDP_FOR_SETS(H=3)
    expected = mdp_expected_true(mdp, theta)
    for K in (1, 2):
        case = MdpSampled(mdp, theta, K)
        term = case.mean("term")
        emaml = case.mean("log-prob") + term
        assert gap(emaml, case.true) < 1e-8 and gap(emaml, expected) > 0.1
        for mean in (case.mean("ratio"), case.mean("DiCE")):
            assert gap(mean, case.true) > 0.01 and gap(mean, expected) > 0.1
            assert gap(mean + term, case.true) > 0.2         # one effect, counted twice
    for shift, first_is_nearer in ((0.0, True), (2.0, False)):
        case = MdpSampled(mdp, theta, credit=lambda data: data.adv + shift)
        first, second = (gap(case.mean(name), case.true)
                         for name in ("first order", "log-prob"))
        assert (first < second) == first_is_nearer


def test_fitted_baseline_leaves_log_prob_no_second_derivative_in_a_table():
    """Tabular, one-hot states, baseline fitted on D: Σ Â over each state's visits is 0.

    ∇²log π(a|s) of a softmax is the same for all a, so that sum is all that survives.
    """
    (mdp, theta), sizes = MDP_FOR_SETS(H=4), []
    for data, _ in itertools.islice(mdp.sets(2), 0, None, 9):
        plain, fitted = (mt.standardise(data.adv, data.mask),
                         mt.assign_credit(data, 1.0, 1.0).adv)
        sizes.append([])
        for data.adv, estimator in ((fitted, "log-prob"), (plain, "log-prob"),
                                    (fitted, "ratio")):
            sizes[-1].append(float(hessian(lambda t: mt.inner_loss(
                mdp, t, data, estimator), theta).norm()))
    log_prob, not_fitted, ratio = map(max, zip(*sizes))
    assert log_prob < 1e-3 < 0.1 < min(not_fitted, ratio)


def test_surrogate_is_the_value_itself_at_horizon_1_and_log_prob_only_its_slope():
    """Away from θ_old, E[ratio·r] is V(θ) for H = 1; E[log π·r] is another function.

    The policy is a Categorical: its KL is Σ_a π_o log(π_o/π_n), averaged over states.
    """
    mdp, theta = mdp_random(3, S=4, A=3, H=1, starts=4)
    outer = mdp.weighted(theta)
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
    old, new = (x.view(mdp.S, mdp.A).softmax(-1) for x in (theta, moved))
    by_state = (old * (old / new).log()).sum(-1)
    kl = mt.surrogate_and_kl(mdp, moved, task, MDP_ALPHA)[1]
    assert torch.allclose(kl, by_state[mdp.states].mean(), rtol=1e-12) and kl > 0.1


# %% Proofs: the listing, run


def listing_run(copies=True, steps=True):
    """Listing l.36-55 for one task; `copies`, `steps` False leave out l.36, l.42.

    All weights of a model are one parameter. The episodes D and D′ are given: what is
    said below holds for any.
    """
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
        slopes=[central_difference(lambda x: loss(x, episodes), at)
                for episodes, at in ((D, theta), (D2, model.detach()))],
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
    assert torch.allclose(run.model.grad, sum(run.slopes), atol=1e-7)
    assert run.wanted.norm() > 0.1


def test_pseudocode_optimizer_step_alone_cuts_the_graph():
    """With no copy, θ is overwritten, and l.55's gradient has J = I, taken at θ′."""
    run = listing_run(copies=False)
    inner, outer = run.slopes
    assert torch.allclose(run.meta, run.theta - 0.3 * inner, atol=1e-8)
    assert torch.allclose(run.meta, run.adapted(run.theta.clone().requires_grad_()))
    assert torch.allclose(run.meta.grad, inner + outer, atol=1e-7)
    assert gap(outer, run.wanted) > 0.05


def test_pseudocode_kl_is_not_zero_and_its_hessian_is_not_the_metric():
    """l.48: KL(θ′ ‖ θ) > 0, its slope is not 0, its Hessian in θ is not JᵀFJ.

    Neither with θ′ held constant nor with θ′ as a function of θ.
    """
    run, obs = listing_run(), listing_run().D2.obs

    def kl(p, q):
        return kl_divergence(*(plain_policy(run.policy, x, obs) for x in (p, q))).mean()
    phi, J = run.model.detach(), jacobian(run.adapted, run.theta)
    metric = J.T @ hessian(lambda x: kl(phi, x), phi) @ J
    for k in (lambda t: kl(phi, t), lambda t: kl(run.adapted(t), t)):
        assert k(run.theta.clone().requires_grad_()) > 1e-3
        assert mt.gradient(k, run.theta).norm() > 0.01
        assert gap(hessian(k, run.theta), metric) > 0.1


# %% Proofs: one J. The trust region's metric is the Hessian of the KL that is measured

ESTIMATORS = pytest.mark.parametrize("estimator", [
    dict(), dict(first_order=True), dict(inner_loss="ratio")], ids=str)


def one_j_problem(**changes):
    """Three tasks of point2d; tanh, float64, an α so large that J is far from I."""
    config = tiny_config(activation="tanh", alpha=1.0, hidden=(4,), **changes)
    policy, theta, tasks = sampled_problem(config)

    def kl(t):                                          # values, never differentiated
        return sum(mt.surrogate_and_kl(policy, t, task, 1.0)[1] for task in tasks) / 3
    return config, policy, theta, tasks, kl


@ESTIMATORS
@pytest.mark.parametrize("inner_steps", [1, 2])
def test_products_equal_second_differences_of_kl_values(inner_steps, estimator):
    """vᵀHv from three KLs: the same for all products and all estimators.

    The metric that an estimator's own J would give is another one.
    """
    config, policy, theta, tasks, kl = one_j_problem(inner_steps=inner_steps,
                                                     fd_step=1e-6, **estimator)
    v = torch.randn(len(theta), generator=torch.Generator().manual_seed(0)).double()
    v, e = v / v.norm(), 1e-3
    measured = (kl(theta + e * v) - 2 * kl(theta) + kl(theta - e * v)) / e**2
    for hvp in HVPS:
        product = mt.kl_hessian_product(policy, theta, tasks,
                                        dataclasses.replace(config, hvp=hvp))
        assert abs(v @ product(v) - measured) < 1e-4 * measured, hvp
    own = 0.0
    for task in tasks:
        Jv = torch.autograd.functional.jvp(lambda t: mt.adapt(
            policy, t, task.inner, 1.0, not config.first_order, config.inner_loss),
            theta, v)[1]
        phi, still = plain_adapt(policy, theta, task.inner, 1.0), mt.TaskData(
            [], task.outer, task.old)
        own += Jv @ mt.gauss_newton_product(policy, phi, still, Jv, 1.0) / 3
    assert abs(own - measured) > 0.05 * measured or not estimator


@ESTIMATORS
@pytest.mark.parametrize("inner_steps", [1, 2])
@pytest.mark.parametrize("hvp", ["double-backprop", "gauss-newton"])
def test_full_step_has_the_kl_that_max_kl_allows(hvp, inner_steps, estimator):
    """A tiny δ, so that the KL is its quadratic model: KL(θ + full step) = δ."""
    config, policy, theta, tasks, kl = one_j_problem(
        inner_steps=inner_steps, hvp=hvp, max_kl=1e-6, damping=0.0, cg_iterations=5,
        cg_tolerance=0.0, **estimator)
    new, stats = mt.trpo_meta_step(policy, theta, tasks, config)
    full = (new - theta) / config.backtrack_ratio ** (stats["line_search_steps"] - 1)
    assert stats["line_search_steps"] and 0.97e-6 < kl(theta + full) < 1.03e-6


def test_meta_gradient_divides_each_tasks_gradient_by_its_own_sigma(monkeypatch):
    """g = (1/M) Σ (1/σ_i)∇U_i, with U_i of the raw advantages less their mean."""
    config, policy, theta, tasks, _ = one_j_problem()
    seen, slopes, sigmas = [], [], []
    monkeypatch.setattr(mt, "conjugate_gradient", lambda hvp, g, *_: (
        seen.append(g) or g, g))
    mt.trpo_meta_step(policy, theta, tasks, config)
    for task in tasks:
        data, mask = task.outer, task.outer.mask
        returns = mt.discounted_returns(data.rew, config.gamma)
        values = mt.LinearBaseline().fit(data.obs, returns, mask).predict(data.obs)
        raw = mt.gae(data.rew, values, mask, config.gamma, config.lam)
        sigmas.append(raw[mask.bool()].std(correction=0))
        outer = dataclasses.replace(data, adv=(raw - raw[mask.bool()].mean()) * mask)
        slopes.append(central_difference(meta_objective(
            policy, mt.TaskData(task.inner, outer, task.old), 1.0), theta))
    assert gap(seen[0], sum(U / sigma for U, sigma in zip(slopes, sigmas)) / 3) < 1e-5
    assert torch.cosine_similarity(seen[0], sum(slopes), dim=0) < 0.999


# %% Proofs: the KL's Hessian, where the third derivative is, what a product leaves out
#
# k(θ) = κ(θ′(θ)), κ(φ) = KL(π_old ‖ π_φ) averaged over D′. P = 99, so that every P × P
# derivative can be had in full; products are taken of four random vectors, V (P, 4).

HESS_ALPHA = 0.5


def hess_problem(inner_steps=2, activation="tanh", K=3):
    """A small problem with its J far from I, and θ′, κ, k written out once more."""
    policy, theta, data = small_problem(7, inner_steps, activation, K=K)
    adapted = plain_adapt(policy, theta, data.inner, HESS_ALPHA)
    old = policy.distribution(adapted, data.outer.obs)
    data = mt.TaskData(data.inner, data.outer, old)
    still = mt.TaskData([], data.outer, old)                        # nothing is adapted
    *V, away = torch.tensor(np.random.default_rng(0).standard_normal((5, len(theta))))
    return SimpleNamespace(
        policy=policy, theta=theta, data=data, adapted=adapted,
        theta_prime=lambda t: plain_adapt(policy, t, data.inner, HESS_ALPHA, True),
        kappa=plain_kl(policy, still), k=plain_kl(policy, data, HESS_ALPHA),
        kl=lambda t: mt.surrogate_and_kl(policy, t, data, HESS_ALPHA)[1],
        newton=lambda t, v, *graphs: mt.gauss_newton_product(
            policy, t, data, v, HESS_ALPHA, *graphs),
        graphs=mt.keep_graphs(policy, theta, data, HESS_ALPHA),
        V=torch.stack(V, dim=1), v=V[0], away=theta + 0.15 * away)


def times(product, V):
    """The product with each column of V."""
    return torch.stack([product(v) for v in V.T], dim=1)


def hess_actions(p, phi):
    """Actions (9, K, H, A) and weights (9,): E over π_φ, exactly, up to degree 5.

    Gauss and Hermite's points 0, ±√3 for each of the two actions: an expectation over
    actions by enumeration.
    """
    points = ((0.0, 2 / 3), (math.sqrt(3), 1 / 6), (-math.sqrt(3), 1 / 6))
    z, weights = (torch.tensor(x, dtype=torch.float64) for x in zip(*[
        ((a, b), v * w) for (a, v), (b, w) in itertools.product(points, repeat=2)]))
    normal = plain_policy(p.policy, phi.detach(), p.data.outer.obs)
    return normal.mean + normal.stddev * z[:, None, None, :], weights


def hess_fisher(p, phi):
    """F = E[score·scoreᵀ] over D′'s states and, exactly, over π_φ's actions: (P, P)."""
    (act, weights), outer = hess_actions(p, phi), p.data.outer
    scores = jacobian(lambda f: plain_policy(p.policy, f, outer.obs).log_prob(act),
                      phi.detach())                                       # (9, K, H, P)
    return torch.einsum("n,kt,nktp,nktq->pq", weights, outer.mask / outer.mask.sum(),
                        scores, scores)


@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_kl_hessian_at_theta_old_equals_jacobian_fisher_jacobian_by_three_routes(
        activation):
    """∇²k = JᵀFJ at θ_old: by autograd's hessian, by dense J and F, by the products."""
    p = hess_problem(activation=activation)
    whole = hessian(p.k, p.theta)
    J, F = jacobian(p.theta_prime, p.theta), hess_fisher(p, p.adapted)
    assert gap(J.T @ F @ J, whole) < 1e-12
    assert gap(J @ F @ J.T, whole) > 0.01                 # the transpose matters
    for tolerance, product in (
            (1e-12, lambda v: mt.double_backprop_product(p.kl, p.theta, v)),
            (1e-12, lambda v: p.newton(p.theta, v)),
            (1e-12, lambda v: p.newton(p.theta, v, p.graphs)),
            (1e-5, lambda v: mt.hessian_vector_product(
                lambda t: mt.gradient(p.kl, t), p.theta, v, 1e-6))):
        assert gap(times(product, p.V), whole @ p.V) < tolerance


def test_kl_hessian_at_theta_old_is_symmetric_positive_and_no_bigger_than_its_samples():
    """Symmetric, no negative eigenvalue, and rank ≤ samples × A + A, below P if few."""
    for K, samples in ((24, 122), (3, 17)):
        p = hess_problem(1, K=K)
        assert p.data.outer.mask.sum() == samples
        whole = dense(lambda v: p.newton(p.theta, v, p.graphs), len(p.theta))
        assert gap(whole.T, whole) < 1e-12
        eigenvalues = torch.linalg.eigvalsh((whole + whole.T) / 2)
        assert eigenvalues.min() > -1e-12 * eigenvalues.max()
        rank = int((eigenvalues > 1e-10 * eigenvalues.max()).sum())
        assert rank <= 2 * samples + 2 and (K == 24 or rank < len(p.theta) / 2)


@pytest.mark.parametrize("inner_steps", [1, 2])
def test_jacobian_is_the_product_of_its_steps_and_symmetric_only_for_one(inner_steps):
    """J = J₂J₁, J_i = I − α∇²L_i at θ_i: each is symmetric, their product is not."""
    p = hess_problem(inner_steps)
    J = jacobian(lambda t: mt.adapt(p.policy, t, p.data.inner, HESS_ALPHA, True),
                 p.theta)
    product, theta_i = torch.eye(len(p.theta)).double(), p.theta
    for data in p.data.inner:
        second = hessian(lambda t: mt.inner_loss(p.policy, t, data), theta_i)
        product = product - HESS_ALPHA * second @ product
        theta_i = plain_adapt(p.policy, theta_i, [data], HESS_ALPHA)
    assert gap(J, product) < 1e-12
    assert gap(J.T, J) < 1e-12 if inner_steps == 1 else gap(J.T, J) > 0.01


def test_difference_products_converge_with_order_one_and_two():
    """Error O(ε) one-sided; O(ε²) symmetric, written out here; tanh, float64.

    One-sided, ∇k is evaluated once, a `step` from θ: ∇k(θ_old) is 0. Away from θ_old
    the program's product wants ∇k(θ) taken off.
    """
    p, steps, asked = hess_problem(), np.geomspace(1e-3, 3e-2, 7), []
    mt.hessian_vector_product(lambda t: asked.append(t - p.theta) or t, p.theta, p.v,
                              0.01)
    assert [move.norm().item() for move in asked] == pytest.approx([0.01])
    for theta in (p.theta, p.away):
        exact, at_theta = hessian(p.k, theta) @ p.v, mt.gradient(p.k, theta)
        one_sided, symmetric = [], []
        for step in steps:
            one_sided.append(gap(mt.hessian_vector_product(
                lambda t: mt.gradient(p.kl, t) - at_theta, theta, p.v, step), exact))
            e = step / p.v.norm()
            ahead, behind = (mt.gradient(p.kl, theta + sign * e * p.v)
                             for sign in (1, -1))
            symmetric.append(gap((ahead - behind) / (2 * e), exact))
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
    data = mt.TaskData(data.inner, data.outer, policy.distribution(phi, data.outer.obs))
    v = mt.meta_gradient(policy, theta, data, 0.1)
    exact = mt.gauss_newton_product(policy, theta, data, v, 0.1)
    steps, errors = np.geomspace(1e-6, 1e-4, 5), []
    for step in steps:
        product = mt.hessian_vector_product(lambda t: mt.gradient(
            lambda s: mt.surrogate_and_kl(policy, s, data, 0.1)[1], t), theta, v, step)
        errors.append(gap(product, exact))
    assert abs(order(steps, errors) - expected) < 0.1
    assert errors[0] > 10 if expected == -1 else errors[0] < 1e-4


def test_relu_difference_product_errs_from_the_first_crossed_kink_on():
    """Until a unit of a sample in D crosses its kink the error is O(ε); then a jump."""
    p = hess_problem(1, "relu")
    obs = p.data.inner[0].obs[p.data.inner[0].mask.bool()]

    def active(theta):                               # which unit of which sample is on
        w1, b1, w2, b2, *_ = p.policy.unpack(theta)
        first = obs @ w1.T + b1
        return torch.cat([first, first.relu() @ w2.T + b2], 1) > 0

    low, high = 1e-9, 1.0                            # bisect for the first crossing
    for _ in range(60):
        middle = math.sqrt(low * high)
        ahead = active(p.theta + middle * p.v / p.v.norm())
        low, high = ((middle, high) if torch.equal(ahead, active(p.theta))
                     else (low, middle))
    exact, factors = p.newton(p.theta, p.v), (0.25, 0.5, 0.999, 1.001)
    errors = [gap(mt.hessian_vector_product(lambda t: mt.gradient(p.kl, t),
                                            p.theta, p.v, low * factor), exact)
              for factor in factors]
    assert abs(order(factors[:3], errors[:3]) - 1) < 0.1 and errors[3] > 10 * errors[2]


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
    double = times(lambda v: mt.double_backprop_product(p.kl, p.away, v), p.V)
    assert gap(double, whole @ p.V) < 1e-12
    assert gap(times(lambda v: p.newton(p.away, v), p.V), flat @ p.V) < 1e-12


def test_third_derivative_at_theta_old_is_not_zero_but_is_multiplied_by_zero():
    """∇²θ′_j = −α ∂_j∇²L ≠ 0 at θ_old; every ∂_jκ = 0, exactly."""
    p, e = hess_problem(1), 1e-5
    third = hessian(lambda t: p.v @ p.theta_prime(t), p.theta)       # Σ_j v_j ∇²θ′_j
    ahead, behind = (hessian(lambda t: mt.inner_loss(p.policy, t, p.data.inner[0]),
                             p.theta + sign * e * p.v) for sign in (1, -1))
    assert gap(-HESS_ALPHA * (ahead - behind) / (2 * e), third) < 1e-6
    assert third.norm() > 0.1
    rounded = p.policy.distribution(p.adapted.float().double(), p.data.outer.obs)
    for old in (p.data.old, rounded):             # `old` right only to rounding: not 0
        still = mt.TaskData([], p.data.outer, old)
        slope = mt.gradient(lambda phi: mt.surrogate_and_kl(
            p.policy, phi, still, HESS_ALPHA)[1], p.adapted)
        assert (slope == 0).all() == (old is p.data.old)


def test_kl_directions_have_the_same_hessian_at_theta_old_and_differ_in_third_order():
    """KL(old‖new), KL(new‖old): equal Hessians at θ_old; the gap falls as (move)³."""
    p = hess_problem()

    def kl_new_old(t):
        phi = mt.adapt(p.policy, t, p.data.inner, HESS_ALPHA, t.requires_grad)
        new = p.policy.distribution(phi, p.data.outer.obs)
        return mt.masked_mean(mt.kl_old_new(new, p.data.old), p.data.outer.mask)

    assert gap(hessian(kl_new_old, p.theta), hessian(p.k, p.theta)) < 1e-12
    assert gap(hessian(kl_new_old, p.away), hessian(p.k, p.away)) > 0.01
    steps, values, gaps = np.geomspace(1e-3, 1e-2, 5), [], []
    for step in steps:
        ours, other = (float(k(p.theta + step * p.v / p.v.norm()))
                       for k in (p.kl, kl_new_old))
        values.append(ours)
        gaps.append(abs(ours - other))
    assert abs(order(steps, gaps) - 3) < 0.1
    assert abs(order(steps, values) - 2) < 0.1            # the KL itself: ½ move² vᵀHv


def hess_sampled_kl(p, act, weights):
    """φ ↦ mean of log π_old(a) − log π_φ(a) over actions (n, K, H, A)."""
    outer = p.data.outer

    def function(phi):
        new = p.policy.distribution(phi, outer.obs)
        each = torch.einsum("n,nkt->kt", weights, p.data.old.log_prob(act)
                            - new.log_prob(act))
        return mt.masked_mean(each, outer.mask)
    return function


def test_sampled_kl_has_exact_value_but_gradient_and_hessian_only_in_expectation():
    """mean(log π_old − log π_new) at θ_old: 0; a gradient ∝ 1/√n; a Hessian near F.

    The expectation over actions is taken twice: exactly, by enumeration (gradient 0,
    Hessian F), and by large samples (both errors fall as 1/√n). A gradient that is not
    0 brings the third derivative back: the Hessian in θ is not Jᵀ(∇²κ̂)J any more.
    """
    p = hess_problem()
    F, J = hess_fisher(p, p.adapted), jacobian(p.theta_prime, p.theta)
    expected = hess_sampled_kl(p, *hess_actions(p, p.adapted))
    assert mt.gradient(expected, p.adapted).abs().max() < 1e-14
    assert gap(hessian(expected, p.adapted), F) < 1e-12

    sizes, hessians = (1, 10, 100), []
    for n in sizes:
        torch.manual_seed(n)
        kappa = hess_sampled_kl(p, p.data.old.sample((n,)), torch.ones(n).double() / n)
        slope, second = mt.gradient(kappa, p.adapted), hessian(kappa, p.adapted)
        assert kappa(p.adapted).item() == 0.0
        # E|mean score|² = trace(F)/(number of independent actions)
        by_chance = math.sqrt(F.trace() / (n * p.data.outer.mask.sum()))
        assert 0.3 < slope.norm() / by_chance < 3
        hessians.append(gap(second, F))
        whole = mt.double_backprop_product(lambda t: kappa(mt.adapt(
            p.policy, t, p.data.inner, HESS_ALPHA, True)), p.theta, p.v)
        without = J.T @ second @ J @ p.v
        third = hessian(lambda t: slope @ p.theta_prime(t), p.theta) @ p.v
        assert gap(without + third, whole) < 1e-11
        assert gap(without, whole) > 0.01 / math.sqrt(n)
    assert abs(order(sizes, hessians) + 0.5) < 0.15 and hessians[0] > 0.05


def test_line_search_differentiates_nothing_but_the_inner_loss(monkeypatch):
    """No third derivative in it, no second: a trial takes ∇L, a task and inner step."""
    config = tiny_config(inner_steps=2, meta_batch_size=3, backtrack_steps=4)
    policy, theta, tasks = sampled_problem(config)
    orders, grad, search = [], torch.autograd.grad, mt.backtrack_line_search

    def spy_grad(*args, create_graph=False, **keywords):
        orders.append(create_graph)
        return grad(*args, create_graph=create_graph, **keywords)

    def spy_search(evaluate, theta, full_step, before, max_kl, *how):
        monkeypatch.setattr(torch.autograd, "grad", spy_grad)
        return search(evaluate, theta, full_step, before, -1.0, *how)   # all fail

    monkeypatch.setattr(mt, "backtrack_line_search", spy_search)
    _, stats = mt.trpo_meta_step(policy, theta, tasks, config)
    assert stats["line_search_steps"] == 0
    assert orders == [False] * (4 * 3 * 2)              # trials × tasks × inner steps


# %% Long tests


@slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_main_job_reaches_its_returns(seed):
    """The defaults, at 0/1/2/3 steps on the paper's 40 goals."""
    config = mt.Config(task="point2d", seed=seed)
    theta, _ = mt.train_maml(config)
    returns = mt.evaluate(config, theta).mean(axis=0)
    assert (returns >= [-41.5, -12.5, -5.0, -5.0]).all(), returns
