"""The proofs of maml_trpo.py: every claim of its docstrings that a computer can check.

    python -m pytest                        the fast suite (under 2 minutes on two cores)
    MAML_SLOW=1 python -m pytest            the long tests too
    python test_maml_trpo.py                the other commands: benchmark, kills, …

Oracles are independent of the functions they test: plain loops, closed forms,
torch.distributions, dense solves, central finite differences in float64. Sizes are
pairwise different, so that a wrong axis cannot hide; inputs are random and seeded.
"""
import ast
import contextlib
import copy
import csv
import dataclasses
import functools
import importlib.util
import inspect
import io
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import traceback
import warnings
from concurrent.futures import ThreadPoolExecutor
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import gymnasium as gym
import hypothesis
import hypothesis.strategies
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from torch import Tensor
from torch.distributions import Distribution, Independent, Normal, kl_divergence

import maml_trpo as mt

HERE = Path(__file__).resolve().parent
slow = pytest.mark.skipif(os.environ.get("MAML_SLOW") != "1",
                          reason="takes minutes: set MAML_SLOW=1")
torch.set_num_threads(1)


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


def small_problem(seed=0, inner_steps=1, activation="tanh", K=3, H=5, S=4, A=2):
    """policy, θ_old (float64), TaskData whose `old` is the adapted policy at θ_old."""
    rng = np.random.default_rng(seed)
    policy = mt.GaussianPolicy(S, A, hidden=(7, 6), activation=activation, init_std=0.7)
    theta = policy.init(torch.Generator().manual_seed(seed), torch.float64)
    theta = theta + 0.1 * torch.tensor(rng.standard_normal(theta.shape))
    inner = [random_trajectories(rng, K, H, S, A) for _ in range(inner_steps)]
    outer = random_trajectories(rng, K + 1, H, S, A)
    theta_prime = theta
    for data in inner:                                       # θ′, written out once more
        t = theta_prime.detach().requires_grad_()
        log_prob = policy.distribution(t, data.obs).log_prob(data.act)
        loss = -(log_prob * data.adv * data.mask).sum() / data.mask.sum()
        theta_prime = t.detach() - ALPHA * torch.autograd.grad(loss, t)[0]
    old = policy.distribution(theta_prime.detach(), outer.obs)
    return policy, theta, mt.TaskData(inner, outer, old)


ALPHA = 0.1


def central_difference(function, theta, step=1e-5):
    """∇function by central finite differences, one coordinate at a time."""
    grad = torch.zeros_like(theta)
    for j in range(len(theta)):
        e = torch.zeros_like(theta)
        e[j] = step
        grad[j] = (function(theta + e) - function(theta - e)) / (2 * step)
    return grad


def dense(product, P):
    """The matrix of v ↦ product(v)."""
    return torch.stack([product(e) for e in torch.eye(P, dtype=torch.float64)], dim=1)


def tiny_config(**changes):
    """A run of a second: everything small."""
    return mt.Config(**{**dict(iterations=2, meta_batch_size=3, rollouts=4, horizon=7,
                               hidden=(8, 6), eval_tasks=5, eval_episodes=3, workers=1,
                               cg_iterations=3), **changes})


# %% Section 0: configuration


def test_config_fills_presets_and_keeps_what_is_given():
    config = mt.Config(task="point2d", alpha=0.05)
    assert (config.alpha, config.eval_alpha, config.horizon) == (0.05, 0.05, 100)
    assert config.rollouts == 20 and config.meta_batch_size == 20
    assert mt.Config(task="point2d").eval_alpha == 0.21
    assert mt.Config(task="cheetah-dir").eval_alpha == 0.1
    assert mt.Config(alpha=0.3, eval_alpha=0.4).eval_alpha == 0.4


def test_random_is_the_initial_policy_untrained():
    config = tiny_config(method="random", iterations=None)
    theta, rows = mt.train_maml(config)
    policy = mt.make_policy(mt.family_of(config), config)
    assert rows == [] and torch.equal(
        theta, policy.init(torch.Generator().manual_seed(config.seed)))
    with pytest.raises(mt.BadInput, match="random does not train: leave out iterations 3"):
        mt.Config(method="random", iterations=3)


@pytest.mark.parametrize("name, value", [
    ("alpha", -0.1), ("alpha", math.nan), ("alpha", math.inf), ("alpha", "much"),
    ("gamma", 1.5), ("lam", -1), ("meta_batch_size", 0), ("rollouts", 1.5),
    ("rollouts", True), ("horizon", -3), ("hidden", ()), ("hidden", (3, 0)),
    ("hidden", [3]), ("hvp", "magic"), ("max_kl", 0), ("fd_step", 0), ("workers", 0),
    ("task", "walker"), ("backtrack_ratio", 1.0), ("seed", -1), ("init_std", math.nan)])
def test_config_refuses_an_impossible_value_by_name(name, value):
    with pytest.raises(mt.BadInput, match=name.split("_")[0]):
        mt.Config(**{name: value})


def test_every_config_field_and_preset_has_help_and_source():
    names = {f.name for f in dataclasses.fields(mt.Config)}
    for f in dataclasses.fields(mt.Config):
        assert len(f.metadata["help"]) > 5, f.name
    for task, preset in mt.PRESETS.items():
        assert set(preset) <= names
        assert all(len(source) > 4 for _, source in preset.values()), task


# %% Section 1: Point2D against a scalar twin under Gymnasium's SyncVectorEnv


class ScalarPoint(gym.Env):
    """One point, written for itself: plain Python floats."""
    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = gym.spaces.Box(-1.0, 1.0, (2,), np.float32)

    def __init__(self):
        self.goal = (0.0, 0.0)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if options and "task" in options:
            self.goal = tuple(float(x) for x in options["task"])
        self.x = self.y = 0.0
        return np.array([self.x, self.y], np.float32), {}

    def step(self, action):
        self.x += 0.1 * max(-1.0, min(1.0, float(action[0])))
        self.y += 0.1 * max(-1.0, min(1.0, float(action[1])))
        dx, dy = self.x - self.goal[0], self.y - self.goal[1]
        done = abs(dx) < 0.01 and abs(dy) < 0.01
        return (np.array([self.x, self.y], np.float32), -math.sqrt(dx * dx + dy * dy),
                done, False, {})


def test_point2d_equals_scalar_twin_step_by_step():
    goal, K = np.array([0.15, -0.1]), 5
    ours, twin = mt.Point2D(K), SyncVectorEnv([ScalarPoint] * K)
    rng, ended = np.random.default_rng(3), 0
    for seed in (None, 4, list(range(K))):
        a, _ = ours.reset(seed=seed, options={"task": goal})
        b, _ = twin.reset(seed=seed, options={"task": goal})
        assert a.dtype == b.dtype and np.array_equal(a, b)
        for t in range(60):
            action = 2 * rng.standard_normal((K, 2)).astype(np.float32)
            if t % 20 == 0:                     # copy 2 walks into the goal, then resets
                action[2] = [1.0, -1.0]
            if t % 20 == 1:
                action[2] = [0.5, 0.0]
            for x, y in zip(ours.step(action)[:4], twin.step(action)[:4]):
                assert x.shape == y.shape and x.dtype == y.dtype
                np.testing.assert_allclose(x, y, rtol=0, atol=1e-6)
            ended += ours._ended.sum()
    assert ended >= 3, "no copy ever reached the goal: the test shows too little"


def test_point2d_ends_in_a_box_and_not_in_a_circle():
    """At (0.008, 0.008) from the goal an episode ends; at (0.011, 0.0) it does not."""
    envs = mt.Point2D(3)
    envs.reset(options={"task": np.array([0.008, 0.008])})
    _, _, ended, _, _ = envs.step(np.array([[0.0, 0.0], [-0.03, 0.08], [0.0, 0.17]]))
    assert ended.tolist() == [True, False, True]


def test_point2d_spaces_and_metadata_equal_those_of_sync_vector_env():
    ours, twin = mt.Point2D(3), SyncVectorEnv([ScalarPoint] * 3)
    for name in ("single_observation_space", "single_action_space", "observation_space",
                 "action_space", "num_envs"):
        assert getattr(ours, name) == getattr(twin, name), name
    assert ours.metadata["autoreset_mode"] == AutoresetMode.NEXT_STEP
    assert twin.metadata["autoreset_mode"] == AutoresetMode.NEXT_STEP


def test_point2d_seed_sets_its_generator():
    a, b = mt.Point2D(2), mt.Point2D(2)
    a.reset(seed=5), b.reset(seed=5)
    assert a.np_random.random() == b.np_random.random()


def test_point2d_refuses_a_task_that_is_no_goal():
    for task in ([1.0], [0.0, math.nan], 3):
        with pytest.raises(mt.BadInput, match="goal"):
            mt.Point2D(2).reset(options={"task": task})


def test_point2d_step_of_20_copies_takes_under_50_microseconds():
    envs, action = mt.Point2D(20), np.full((20, 2), 0.5, np.float32)
    envs.reset(options={"task": np.array([0.3, 0.3])})
    times = []
    for _ in range(20):
        started = time.perf_counter()
        for _ in range(50):
            envs.step(action)
        times.append((time.perf_counter() - started) / 50)
    assert min(times) < 50e-6, f"{min(times) * 1e6:.0f} µs"


def test_goals_are_the_papers_and_training_goals_fill_the_square():
    assert np.array_equal(mt.paper_goals(), _legacy_uniform())
    goals = mt.sample_goals(np.random.default_rng(0), 2000)
    assert goals.shape == (2000, 2) and np.abs(goals).max() <= 0.5
    np.testing.assert_allclose(goals.mean(0), 0, atol=0.03)
    np.testing.assert_allclose(goals.std(0), 1 / math.sqrt(12), atol=0.02)


def _legacy_uniform():
    np.random.seed(1)
    return np.random.uniform(-0.5, 0.5, (40, 2))


def test_standing_still_scores_what_the_docstring_says():
    returns = [-100 * math.hypot(*goal) for goal in mt.paper_goals()]
    assert round(np.mean(returns), 2) == -40.08


# %% Section 2: the policy


def test_policy_log_prob_equals_torch_distributions():
    policy, theta, data = small_problem()
    obs, act = data.outer.obs, data.outer.act
    ours = policy.distribution(theta, obs)
    assert ours.log_prob(act).shape == act.shape[:-1]
    expected = torch.distributions.Normal(ours.mean, theta[-2:].exp()).log_prob(act).sum(-1)
    torch.testing.assert_close(ours.log_prob(act), expected, rtol=1e-12, atol=1e-12)


def test_policy_mean_equals_plain_loop_over_layers():
    policy, theta, data = small_problem(activation="relu")
    sizes, at, layers = [4, 7, 6, 2], 0, []
    for n_in, n_out in zip(sizes, sizes[1:]):
        weight = theta[at:at + n_in * n_out].reshape(n_out, n_in).numpy()
        at += n_in * n_out
        layers.append((weight, theta[at:at + n_out].numpy()))
        at += n_out
    for k in range(data.outer.obs.shape[0]):
        for t in range(data.outer.obs.shape[1]):
            x = data.outer.obs[k, t].numpy()
            for n, (weight, bias) in enumerate(layers):
                x = weight @ x + bias
                x = np.maximum(x, 0) if n < 2 else x
            mean = policy.distribution(theta, data.outer.obs).mean[k, t]
            np.testing.assert_allclose(mean.numpy(), x, rtol=1e-12)
    assert at + 2 == len(theta) == policy.num_params


def test_policy_kl_equals_torch_distributions_and_monte_carlo():
    """Different means and stds; the reversed arguments give another number."""
    rng = torch.Generator().manual_seed(0)
    mean = torch.randn(2, 3, 4, generator=rng, dtype=torch.float64)
    log_std = torch.randn(2, 4, generator=rng, dtype=torch.float64) * 0.4
    old, new = (mt.DiagonalGaussian(mean[i], log_std[i]) for i in (0, 1))
    plain = [torch.distributions.Independent(torch.distributions.Normal(
        mean[i], log_std[i].exp().expand(3, 4)), 1) for i in (0, 1)]
    kl = mt.kl_old_new(old, new)
    assert kl.shape == (3,)
    torch.testing.assert_close(kl, torch.distributions.kl_divergence(*plain))
    assert (kl - mt.kl_old_new(new, old)).abs().min() > 1e-3
    torch.manual_seed(1)
    act = plain[0].sample((400_000,))
    estimate = (plain[0].log_prob(act) - plain[1].log_prob(act))
    error = estimate.std(0) / math.sqrt(len(act))
    assert ((estimate.mean(0) - kl).abs() < 5 * error).all()


def test_policy_sampler_draws_from_distribution():
    """The numpy twin of the network: its mean equals `distribution`'s, its noise is N(0, σ²)."""
    for activation in ("relu", "tanh"):
        policy, theta, _ = small_problem(activation=activation)
        obs = np.random.default_rng(0).standard_normal((9, 4))
        act = policy.sampler(theta, np.random.default_rng(1))
        draws = np.stack([act(obs) for _ in range(20_000)])
        expected = policy.distribution(theta, torch.tensor(obs))
        std = expected.base_dist.stddev.numpy()
        np.testing.assert_allclose(draws.mean(0), expected.mean, atol=5 * std.max() / 141)
        np.testing.assert_allclose(draws.std(0), std, rtol=0.03)


def test_policy_init_is_xavier_with_zero_biases():
    policy = mt.GaussianPolicy(30, 10, hidden=(50, 40), init_std=0.5)
    theta = policy.init(torch.Generator().manual_seed(0))
    *layers, log_std = policy.unpack(theta)
    assert theta.dtype == torch.float32 and theta.shape == (policy.num_params,)
    for weight in layers[::2]:
        bound = math.sqrt(6 / sum(weight.shape))
        assert 0.95 * bound < weight.abs().max() <= bound
        assert abs(float(weight.std()) - bound / math.sqrt(3)) < 0.1 * bound
    assert all((bias == 0).all() for bias in layers[1::2])
    torch.testing.assert_close(log_std.exp(), torch.full((10,), 0.5))


def test_policy_std_never_falls_below_its_minimum():
    policy, theta, data = small_problem()
    theta[-2:] = -100.0
    std = policy.distribution(theta, data.outer.obs).base_dist.stddev
    torch.testing.assert_close(std, torch.full_like(std, policy.MIN_STD))


# %% Section 3: rollouts


def test_rollout_records_what_the_environment_saw():
    """Replaying the recorded actions in the scalar twin gives the same episodes."""
    family = mt.TASKS["point2d"]
    policy = mt.GaussianPolicy(2, 2, hidden=(8, 6))
    theta = policy.init(torch.Generator().manual_seed(0), torch.float64)
    goal = np.array([0.1, -0.1])              # two clipped actions away: some end at once
    data = mt.task_rollout(family.envs(60), policy, theta, goal, 50, seed=(1, 2, 3))
    assert data.obs.shape == (60, 50, 2) and data.act.shape == (60, 50, 2)
    assert data.rew.shape == data.mask.shape == (60, 50)
    lengths = data.mask.sum(1).long().tolist()
    assert min(lengths) < 50, "no early end: choose another goal"
    for k, length in enumerate(lengths):
        env = ScalarPoint()
        obs, _ = env.reset(options={"task": goal})
        for t in range(length):
            np.testing.assert_allclose(data.obs[k, t], obs, atol=1e-6)
            obs, reward, done, _, _ = env.step(data.act[k, t].numpy())
            assert abs(reward - data.rew[k, t]) < 1e-6
            assert done == (t == length - 1 and length < 50)
        for x in (data.obs, data.act, data.rew, data.mask):
            assert (x[k, length:] == 0).all()


def test_rollout_depends_on_its_seed_and_on_nothing_before():
    family, policy = mt.TASKS["point2d"], mt.GaussianPolicy(2, 2, hidden=(8, 6))
    theta = policy.init(torch.Generator().manual_seed(0))
    goal = np.array([0.3, 0.2])

    def acts(*seed):
        return mt.task_rollout(family.envs(3), policy, theta, goal, 9, seed).act
    first = acts(0, 0, 0, 0)
    seeds = [(1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (0, 0), (0,)]
    others = [acts(*seed) for seed in seeds]
    assert torch.equal(first, acts(0, 0, 0, 0))
    every = [first, *others]
    noise = torch.stack(every).reshape(len(every) * 3, -1)        # every copy's own noise
    assert len({tuple(row.tolist()) for row in noise}) == len(every) * 3


def test_rollout_mean_return_is_undiscounted_sum_per_episode():
    data = random_trajectories(np.random.default_rng(0))
    expected = np.mean([sum(data.rew[k, t].item() for t in range(5) if data.mask[k, t])
                        for k in range(3)])
    assert abs(data.mean_return() - expected) < 1e-12


def test_rollout_refuses_numbers_that_are_not_finite():
    class Broken(ScalarPoint):
        def step(self, action):
            return np.zeros(2, np.float32), math.nan, False, False, {}
    policy = mt.GaussianPolicy(2, 2, hidden=(4,))
    theta = policy.init(torch.Generator())
    with pytest.raises(mt.BadInput, match="reward.*step"):
        mt.task_rollout(SyncVectorEnv([Broken] * 2), policy, theta, [0, 0], 3, (0,))


# %% Section 4: returns, baseline, advantages


@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
def test_discounted_returns_equal_double_loop(gamma):
    data = random_trajectories(np.random.default_rng(1))
    expected = torch.zeros(3, 5, dtype=torch.float64)
    for k in range(3):
        for t in range(5):
            expected[k, t] = sum(gamma ** (u - t) * data.rew[k, u] for u in range(t, 5))
    before = data.rew.clone()
    torch.testing.assert_close(mt.discounted_returns(data.rew, gamma), expected)
    assert torch.equal(before, data.rew)


@pytest.mark.parametrize("gamma, lam", [(0.9, 0.7), (0.99, 1.0), (1.0, 0.0)])
def test_gae_equals_sum_of_discounted_deltas(gamma, lam):
    """By the definition, episode by episode; V is 0 after the end, early or at H."""
    data = random_trajectories(np.random.default_rng(2))
    values = torch.tensor(np.random.default_rng(3).standard_normal((3, 5)))
    expected = torch.zeros(3, 5, dtype=torch.float64)
    for k in range(3):
        length = int(data.mask[k].sum())
        for t in range(length):
            for u in range(t, length):
                following = values[k, u + 1] if u + 1 < length else 0.0
                delta = data.rew[k, u] + gamma * following - values[k, u]
                expected[k, t] += (gamma * lam) ** (u - t) * delta
    torch.testing.assert_close(
        mt.gae(data.rew, values, data.mask, gamma, lam), expected)


def test_baseline_equals_ridge_solve_by_lstsq():
    """min ‖φw − R‖² + 1e-5‖w‖² as one least-squares problem with extra rows."""
    data = random_trajectories(np.random.default_rng(4), K=11, H=13, S=3)
    data.obs[2, 1] = 50.0                                        # clipped to 10
    returns = mt.discounted_returns(data.rew, 0.9)
    rows, targets = [], []
    for k in range(11):
        for t in range(13):
            if data.mask[k, t]:
                x = np.clip(data.obs[k, t].numpy(), -10, 10)
                s = t / 100
                rows.append([*x, *(x * x), s, s * s, s ** 3, 1.0])
                targets.append(returns[k, t].item())
    n = len(rows[0])
    w = np.linalg.lstsq(np.vstack([rows, math.sqrt(1e-5) * np.eye(n)]),
                        np.append(targets, np.zeros(n)), rcond=None)[0]
    baseline = mt.LinearBaseline().fit(data.obs, returns, data.mask)
    predicted = baseline.predict(data.obs)
    assert predicted.shape == (11, 13)
    np.testing.assert_allclose(predicted[data.mask.bool()], np.array(rows) @ w, atol=1e-7)


def test_standardise_gives_mean_0_and_std_1_over_the_steps_that_happened():
    data = random_trajectories(np.random.default_rng(5))
    kept = data.mask.bool()
    out = mt.standardise(3 + 2 * data.adv, data.mask)
    values = (3 + 2 * data.adv)[kept].numpy()
    np.testing.assert_allclose(out[kept], (values - values.mean()) / (values.std() + 1e-8))
    assert (out[~kept] == 0).all()


def test_masked_mean_refuses_shapes_that_would_broadcast():
    with pytest.raises(ValueError, match="shapes"):
        mt.masked_mean(torch.ones(3, 1), torch.ones(3, 5))


def test_padding_changes_nothing():
    """Two more padded steps and a different H: same loss, gradient, KL, products."""
    policy, theta, data = small_problem(inner_steps=2)

    def padded(d):
        more = lambda x: torch.cat([x, torch.zeros_like(x[:, :2])], dim=1)  # noqa: E731
        return mt.Trajectories(*(more(getattr(d, f.name))
                                 for f in dataclasses.fields(d)))
    inner, outer = [padded(d) for d in data.inner], padded(data.outer)
    theta_prime = mt.adapt(policy, theta, data.inner, ALPHA, False).detach()
    longer = mt.TaskData(inner, outer, policy.distribution(theta_prime, outer.obs))
    v = torch.randn(len(theta), generator=torch.Generator().manual_seed(0),
                    dtype=torch.float64)
    for a, b in zip(*(
            (*mt.surrogate_and_kl(policy, theta + 0.05, d, ALPHA),
             mt.meta_gradient(policy, theta, d, ALPHA),
             mt.gauss_newton_product(policy, theta, d, v, ALPHA)) for d in (data, longer))):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)
    returns, more = (mt.discounted_returns(d.rew, 0.9) for d in (data.outer, outer))
    torch.testing.assert_close(returns, more[:, :-2])
    a, b = (mt.assign_credit(d, 0.9, 0.8).adv for d in (data.outer, outer))
    torch.testing.assert_close(a, b[:, :-2])
    assert (b[:, -2:] == 0).all()


# %% Section 5: the inner update


def test_inner_loss_equals_plain_loop():
    """−(1/N) Σ log π·Â over the steps that happened; N counts timesteps, not episodes."""
    policy, theta, data = small_problem()
    d, total, count = data.inner[0], 0.0, 0
    for k in range(3):
        for t in range(5):
            if d.mask[k, t]:
                pi = policy.distribution(theta, d.obs[k, t])
                total += float(torch.distributions.Normal(pi.mean, theta[-2:].exp())
                               .log_prob(d.act[k, t]).sum() * d.adv[k, t])
                count += 1
    assert abs(float(mt.inner_loss(policy, theta, d)) + total / count) < 1e-12


@pytest.mark.parametrize("estimator", ["log-prob", "ratio"])
def test_inner_gradient_equals_central_differences_of_log_prob(estimator):
    """Both estimators have the same gradient, that of −mean log π·Â."""
    policy, theta, data = small_problem()
    expected = central_difference(
        lambda t: mt.inner_loss(policy, t, data.inner[0]), theta)
    t = theta.clone().requires_grad_()
    loss = mt.inner_loss(policy, t, data.inner[0], estimator)
    torch.testing.assert_close(torch.autograd.grad(loss, t)[0], expected,
                               rtol=1e-7, atol=1e-9)
    assert expected[-2:].abs().min() > 1e-4, "log σ must be adapted too"


def test_adapt_takes_each_step_on_its_own_data_from_the_last_theta():
    policy, theta, data = small_problem(inner_steps=2)
    expected = theta
    for d in data.inner:
        expected = expected - ALPHA * central_difference(
            lambda t: mt.inner_loss(policy, t, d), expected)
    for create_graph in (False, True):
        torch.testing.assert_close(
            mt.adapt(policy, theta, data.inner, ALPHA, create_graph).detach(), expected,
            rtol=1e-7, atol=1e-9)


def test_adapt_leaves_theta_as_it_was():
    policy, theta, data = small_problem()
    before = theta.clone()
    mt.adapt(policy, theta, data.inner, ALPHA, True)
    assert torch.equal(theta, before) and not theta.requires_grad


# %% Section 6: meta-objective and KL


def meta_objective(policy, data, alpha=ALPHA):
    """The surrogate as a plain function of θ, written out without the file's outer loss."""
    def function(theta):
        phi = mt.adapt(policy, theta, data.inner, alpha, create_graph=False).detach()
        outer = data.outer
        new = policy.distribution(phi, outer.obs)
        normal = torch.distributions.Normal(new.mean, phi[-2:].exp())
        log_new = normal.log_prob(outer.act).sum(-1)
        ratio = torch.exp(log_new - data.old.log_prob(outer.act))
        return -(ratio * outer.adv * outer.mask).sum() / outer.mask.sum()
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
    first = mt.meta_gradient(policy, theta, data, ALPHA, first_order=True)
    assert (first - exact).norm() > 0.02 * exact.norm()


def test_first_order_gradient_is_the_gradient_at_theta_prime():
    """--first-order: J = I, so g = ∇V(θ′)."""
    policy, theta, data = small_problem(seed=2)
    phi = mt.adapt(policy, theta, data.inner, ALPHA, False).detach()
    still = mt.TaskData([], data.outer, data.old)
    expected = central_difference(meta_objective(policy, still), phi)
    torch.testing.assert_close(
        mt.meta_gradient(policy, theta, data, ALPHA, first_order=True), expected,
        rtol=1e-6, atol=1e-9)


def test_surrogate_uses_the_importance_ratio_away_from_theta_old():
    policy, theta, data = small_problem(seed=3)
    for away in (0.0, 0.1):
        surrogate, _ = mt.surrogate_and_kl(policy, theta + away, data, ALPHA)
        torch.testing.assert_close(surrogate,
                                   meta_objective(policy, data)(theta + away))


def test_kl_is_between_old_and_new_adapted_policies_on_post_update_states():
    policy, theta, data = small_problem(seed=4)
    moved = theta + 0.1
    _, kl = mt.surrogate_and_kl(policy, moved, data, ALPHA)
    phi = mt.adapt(policy, moved, data.inner, ALPHA, False).detach()
    old_phi = mt.adapt(policy, theta, data.inner, ALPHA, False).detach()
    normal = [torch.distributions.Normal(
        policy.distribution(p, data.outer.obs).mean, p[-2:].exp()) for p in (old_phi, phi)]
    each = torch.distributions.kl_divergence(*normal).sum(-1)
    expected = (each * data.outer.mask).sum() / data.outer.mask.sum()
    torch.testing.assert_close(kl, expected)
    assert kl > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kl_and_its_gradient_are_exactly_zero_at_theta_old(dtype):
    """Not merely small: the one-sided difference leaves ∇k(θ_old) out."""
    config = tiny_config(rollouts=20, horizon=30, hidden=(100, 100))
    family = mt.TASKS["point2d"]
    policy = mt.make_policy(family, config)
    theta = policy.init(torch.Generator().manual_seed(0), dtype)
    theta += 0.05 * torch.randn(theta.shape, generator=torch.Generator().manual_seed(1),
                                dtype=dtype)
    data = mt.sample_task_data(policy, theta, family, np.array([0.3, -0.2]), config, (0,))
    _, kl = mt.surrogate_and_kl(policy, theta, data, config.alpha)
    grad = mt.gradient(
        lambda t: mt.surrogate_and_kl(policy, t, data, config.alpha)[1], theta)
    assert kl.item() == 0.0 and (grad == 0).all()


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_mean_over_tasks_equals_plain_mean_for_any_number_of_workers(workers):
    tasks = [torch.randn(5, generator=torch.Generator().manual_seed(i)) for i in range(7)]
    result = mt.mean_over_tasks(lambda x: 2 * x, tasks, workers)
    expected = (2 * torch.stack(tasks).double()).mean(0).float()
    assert result.dtype == torch.float32 and torch.equal(
        result, mt.mean_over_tasks(lambda x: 2 * x, tasks, 1))
    torch.testing.assert_close(result, expected)


# %% Section 7: the TRPO step


@pytest.mark.parametrize("inner_steps", [1, 2])
def test_three_products_equal_the_dense_hessian(inner_steps):
    """Two inner steps: J ≠ Jᵀ. The dense Hessian: central differences of ∇k."""
    policy, theta, data = small_problem(seed=5, inner_steps=inner_steps)
    P = len(theta)

    def k(t):
        return mt.surrogate_and_kl(policy, t, data, ALPHA)[1]

    hessian = torch.stack([
        (mt.gradient(k, theta + 1e-5 * e) - mt.gradient(k, theta - 1e-5 * e)) / 2e-5
        for e in torch.eye(P, dtype=torch.float64)])
    scale = hessian.abs().max()
    assert (hessian - hessian.T).abs().max() < 1e-6 * scale
    assert torch.linalg.eigvalsh(hessian).min() > -1e-6 * scale
    grad_k = lambda t: mt.gradient(k, t)                                    # noqa: E731
    for tolerance, product in (
            (1e-6, lambda v: mt.double_backprop_product(k, theta, v)),
            (1e-6, lambda v: mt.gauss_newton_product(policy, theta, data, v, ALPHA)),
            (1e-2, lambda v: mt.hessian_vector_product(grad_k, theta, v, 1e-3)),
            (1e-4, lambda v: mt.hessian_vector_product(grad_k, theta, v, 1e-3,
                                                       symmetric=True))):
        assert (dense(product, P) - hessian).abs().max() < tolerance * scale


def test_products_of_first_order_maml_are_the_fisher_matrix():
    """--first-order: J = I in the exact products."""
    policy, theta, data = small_problem(seed=6, inner_steps=2)
    phi = mt.adapt(policy, theta, data.inner, ALPHA, False).detach()
    still = mt.TaskData([], data.outer, data.old)
    fisher = dense(lambda v: mt.gauss_newton_product(policy, phi, still, v, ALPHA),
                   len(theta))
    ours = dense(lambda v: mt.gauss_newton_product(policy, theta, data, v, ALPHA,
                                                   first_order=True), len(theta))
    torch.testing.assert_close(ours, fisher, rtol=1e-9, atol=1e-12)
    k = lambda t: mt.surrogate_and_kl(policy, t, data, ALPHA, True)[1]      # noqa: E731
    double = dense(lambda v: mt.double_backprop_product(k, theta, v), len(theta))
    torch.testing.assert_close(double, fisher, rtol=1e-7, atol=1e-10)


def test_hessian_vector_product_moves_theta_by_the_step_whatever_v_is():
    """On a cubic, where the one-sided error is known: H·v + ½ε·(third derivative)."""
    c = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    theta = torch.tensor([0.5, 1.0, -1.0], dtype=torch.float64)
    grad_fn = lambda t: c * t ** 2                                          # noqa: E731
    for length in (1e-3, 1.0, 1e3):
        v = length * torch.tensor([2.0, 1.0, -2.0], dtype=torch.float64)
        eps = 0.01 / v.norm()
        exact = 2 * c * theta * v
        one = mt.hessian_vector_product(grad_fn, theta, v, 0.01, grad_fn(theta))
        torch.testing.assert_close(one, exact + eps * c * v ** 2)
        both = mt.hessian_vector_product(grad_fn, theta, v, 0.01, symmetric=True)
        torch.testing.assert_close(both, exact)


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


def test_conjugate_gradient_stops_at_curvature_that_is_not_positive():
    H = torch.diag(torch.tensor([1.0, -1.0, 1.0], dtype=torch.float64))
    b = torch.tensor([0.1, 5.0, 0.1], dtype=torch.float64)
    x, r = mt.conjugate_gradient(lambda v: H @ v, b)
    assert (x == 0).all() and torch.equal(r, b)
    x, _ = mt.conjugate_gradient(lambda v: v * math.nan, b)
    assert (x == 0).all()
    x, _ = mt.conjugate_gradient(lambda v: v, torch.zeros(3))
    assert (x == 0).all()


def quadratic_search(surrogate, kl, full_step, **kw):
    """A line search along one number; returns the accepted step, and what was tried."""
    tried = []

    def evaluate(theta):
        tried.append(float(theta))
        return surrogate(float(theta)), kl(float(theta))
    out = mt.backtrack_line_search(evaluate, torch.zeros(1), torch.tensor([full_step]),
                                   0.0, 0.01, **kw)
    return out, tried


def test_line_search_accepts_the_full_step_when_it_improves_within_the_kl():
    (theta, s, kl, trials), tried = quadratic_search(lambda x: -x, lambda x: 0.001, 1.0)
    assert (float(theta), s, kl, trials, len(tried)) == (1.0, -1.0, 0.001, 1, 1)


def test_line_search_backtracks_until_both_conditions_hold():
    """KL alone refuses two trials, the surrogate alone three."""
    (theta, _, kl, trials), tried = quadratic_search(
        lambda x: -x, lambda x: 0.01 * x, 1.5, ratio=0.8)
    assert trials == 3 and abs(float(theta) - 1.5 * 0.64) < 1e-6 and kl <= 0.01
    np.testing.assert_allclose(tried, [1.5, 1.2, 0.96], rtol=1e-6)
    (theta, s, _, trials), _ = quadratic_search(
        lambda x: x * (x - 0.6), lambda x: 0.0, 1.0, ratio=0.8)
    assert trials == 4 and s < 0


def test_line_search_restores_theta_when_nothing_is_accepted():
    for surrogate, kl in ((lambda x: x, lambda x: 0.0), (lambda x: -x, lambda x: 1.0),
                          (lambda x: math.nan, lambda x: 0.0), (lambda x: 0.0, lambda x: 0.0),
                          (lambda x: -x, lambda x: math.nan)):
        (theta, s, k, trials), tried = quadratic_search(surrogate, kl, 1.0, trials=6)
        assert (float(theta), s, k, trials, len(tried)) == (0.0, 0.0, 0.0, 0, 6)


def sampled_problem(config, seed=0, dtype=torch.float64):
    family = mt.TASKS["point2d"]
    policy = mt.make_policy(family, config)
    theta = policy.init(torch.Generator().manual_seed(seed), dtype)
    theta += 0.1 * torch.randn(theta.shape, generator=torch.Generator().manual_seed(9),
                               dtype=dtype)
    tasks = family.sample_tasks(np.random.default_rng(seed), config.meta_batch_size)
    return policy, theta, [mt.sample_task_data(policy, theta, family, task, config,
                                               (seed, m)) for m, task in enumerate(tasks)]


@pytest.mark.parametrize("hvp", mt.HVPS)
def test_trpo_step_equals_dense_solve_and_scale(hvp):
    """x from the dense damped Hessian, scaled to ½sᵀHs = δ, shrunk by ratioʲ."""
    config = tiny_config(hvp=hvp, hidden=(5, 4), damping=0.2, cg_iterations=80,
                         cg_tolerance=1e-22, fd_step=1e-6, activation="tanh")
    policy, theta, data = sampled_problem(config)
    new, stats = mt.trpo_meta_step(policy, theta, data, config)
    g = sum(mt.meta_gradient(policy, theta, d, config.alpha) for d in data) / len(data)
    H = dense(lambda v: sum(mt.double_backprop_product(
        lambda t: mt.surrogate_and_kl(policy, t, d, config.alpha)[1], theta, v)
        for d in data) / len(data), len(theta)) + 0.2 * torch.eye(len(theta))
    x = torch.linalg.solve(H, g)
    full = -math.sqrt(2 * config.max_kl / float(x @ H @ x)) * x
    j = stats["line_search_steps"] - 1
    assert j >= 0
    torch.testing.assert_close(new - theta, 0.8 ** j * full, rtol=1e-3, atol=1e-6)
    assert 0 < stats["kl"] <= config.max_kl
    assert stats["surrogate_after"] < stats["surrogate_before"]


def test_trpo_step_that_finds_no_curvature_is_skipped(monkeypatch):
    """xᵀHx ≤ 0 or NaN: θ stays, and the log says so."""
    config = tiny_config()
    policy, theta, data = sampled_problem(config)
    def skipped():
        new, stats = mt.trpo_meta_step(policy, theta, data, config)
        return (torch.equal(new, theta) and stats["line_search_steps"] == 0
                and stats["kl"] == 0)
    for bad in (-1.0, math.nan):
        monkeypatch.setattr(mt, "kl_hessian_product",
                            lambda *_: lambda v, bad=bad: bad * v)
        assert skipped()
    monkeypatch.setattr(mt, "conjugate_gradient", lambda hvp, b, *_: (b, 2 * b))
    assert skipped()                                         # xᵀHx = −b·b


# %% Section 8: meta-training


def without_seconds(rows):
    return [{k: v for k, v in row.items() if not k.startswith("seconds")} for row in rows]


def test_training_is_reproduced_bit_for_bit_by_seed_and_on_any_number_of_workers():
    theta, rows = mt.train_maml(tiny_config(seed=3))
    for workers in (1, 2, 3):
        again, rows_again = mt.train_maml(tiny_config(seed=3, workers=workers))
        assert torch.equal(theta, again)
        assert without_seconds(rows) == without_seconds(rows_again)
    other, _ = mt.train_maml(tiny_config(seed=4))
    assert not torch.equal(theta, other)


def test_training_draws_new_tasks_every_iteration():
    """Not a fixed list: p(T) is sampled anew."""
    seen = []
    family = dataclasses.replace(
        mt.TASKS["point2d"], sample_tasks=lambda rng, M: seen.append(
            mt.sample_goals(rng, M)) or seen[-1])
    mt.train_maml(tiny_config(), family)
    assert len(seen) == 2 and len({tuple(g) for goals in seen for g in goals}) == 6


def test_training_gives_every_task_and_phase_its_own_noise(monkeypatch):
    """(action − mean)/std of the first steps: all different, over tasks, D and D′."""
    seen, step = [], mt.trpo_meta_step

    def spy(policy, theta, data, config):
        for d in data:
            phi = mt.adapt(policy, theta, d.inner, config.alpha, False).detach()
            for t, part in ((theta, d.inner[0]), (phi, d.outer)):
                pi = policy.distribution(t, part.obs[:, 0])
                seen.append((part.act[:, 0] - pi.mean) / pi.base_dist.scale)
        return step(policy, theta, data, config)
    monkeypatch.setattr(mt, "trpo_meta_step", spy)
    mt.train_maml(tiny_config())
    noise = torch.cat(seen)                        # 2 iterations × 3 tasks × (D, D′) × 4
    assert noise.shape == (48, 2)
    assert (torch.cdist(noise, noise) + torch.eye(48)).min() > 1e-4


def test_training_rows_have_the_columns_and_the_parts_add_up():
    _, rows = mt.train_maml(tiny_config(rollouts=20, horizon=50, hidden=(100, 100)))
    for row in rows:
        assert tuple(row) == mt.PROGRESS_COLUMNS
        parts = sum(v for k, v in row.items()
                    if k.startswith("seconds") and k != "seconds_total")
        assert 0.95 * row["seconds_total"] < parts <= row["seconds_total"] * 1.001


def test_training_with_two_inner_steps_samples_each_with_its_own_policy():
    config = tiny_config(inner_steps=2)
    policy, theta, (data, *_) = sampled_problem(config)
    assert len(data.inner) == 2
    assert not torch.equal(data.inner[0].act, data.inner[1].act)
    phi = mt.adapt(policy, theta, data.inner, config.alpha, False).detach()
    torch.testing.assert_close(data.old.mean,
                               policy.distribution(phi, data.outer.obs).mean)
    task = mt.sample_goals(np.random.default_rng(0), config.meta_batch_size)[0]
    again = mt.sample_trajectories(mt.TASKS["point2d"], task, policy, phi,
                                   config.rollouts, seed=(0, 0, 2), horizon=7)
    torch.testing.assert_close(again.act, data.outer.act)          # D′ is sampled with θ′


def test_short_training_improves_the_return_after_adaptation():
    """Eight meta-iterations on the real task: from about −70 to above −40."""
    config = mt.Config(iterations=8, rollouts=10, meta_batch_size=10, seed=1)
    theta, rows = mt.train_maml(config)
    assert rows[0]["return_post"] < -60
    assert rows[-1]["return_post"] > -40
    assert sum(row["line_search_steps"] == 0 for row in rows) <= 1


# %% Section 9: evaluation


def test_adaptation_returns_equal_a_plain_loop_with_fresh_episodes():
    family, config = mt.TASKS["point2d"], tiny_config()
    policy = mt.make_policy(family, config)
    theta = policy.init(torch.Generator().manual_seed(0))
    tasks = mt.paper_goals(3)
    table = mt.adaptation_returns(policy, theta, family, tasks, 2, 4, 0.4, horizon=7,
                                  seed=5)
    assert table.shape == (3, 3)
    for m, goal in enumerate(tasks):
        phi, seen = theta, []
        for step, alpha in enumerate((0.4, 0.2, None)):
            data = mt.sample_trajectories(family, goal, policy, phi, 4, horizon=7,
                                          seed=(5, mt.EVALUATION, m, step))
            assert abs(table[m, step] - data.rew.sum(1).mean()) < 1e-5
            seen.append(tuple(data.act.flatten().tolist()))
            if alpha:
                g = mt.gradient(lambda t: mt.inner_loss(policy, t, data), phi)
                phi = phi - alpha * g
        assert len(set(seen)) == 3


# %% Section 11: the command line, end to end

TINY = ["--meta-batch-size", "3", "--rollouts", "4", "--horizon", "8", "--hidden", "8,6",
        "--cg-iterations", "3", "--eval-tasks", "4", "--eval-episodes", "3"]
FILES_OF_A_TRAINING = sorted({*mt.RUN_FILES} - {"evaluated.json"})


def command(*args, cwd, **kw):
    return subprocess.run([sys.executable, str(HERE / "maml_trpo.py"), *map(str, args)],
                          cwd=cwd, capture_output=True, text=True, timeout=120, **kw)


def test_command_line_trains_evaluates_draws_and_says_where(tmp_path):
    out = command("--task", "point2d", "--iterations", 2, *TINY, cwd=tmp_path)
    assert out.returncode == 0, out.stderr
    folder = tmp_path / "runs" / "point2d-maml-seed0"
    assert sorted(p.name for p in folder.iterdir()) == FILES_OF_A_TRAINING
    assert str(Path("runs/point2d-maml-seed0")) in out.stdout.splitlines()[-1]
    assert "maml, paper" in out.stdout and "-40.41" in out.stdout
    with open(folder / "progress.csv") as f:
        rows = list(csv.DictReader(f))
    assert list(rows[0]) == list(mt.PROGRESS_COLUMNS) and len(rows) == 2
    with open(folder / "evaluation.csv") as f:
        assert f.readline().strip() == "method,task,step,return"
        assert len(f.readlines()) == 4 * 4
    for name in ("learning.png", "adaptation.png", "trajectories.png"):
        assert (folder / name).read_bytes()[:4] == b"\x89PNG"
    assert json.loads((folder / "config.json").read_text())["rollouts"] == 4


def test_command_line_resumes_extends_compares_and_evaluates(
        tmp_path, no_figures, capsys):
    a, b = tmp_path / "a", tmp_path / "b"
    assert mt.main(["--iterations", "3", *TINY, "--out", str(a)]) == 0
    assert mt.main(["--iterations", "2", *TINY, "--out", str(b)]) == 0
    assert mt.main(["--iterations", "3", *TINY, "--out", str(b), "--resume"]) == 0
    states = [mt.load_checkpoint(x / "checkpoint.pt")[1] for x in (a, b)]
    assert torch.equal(states[0].theta, states[1].theta)
    assert (a / "evaluation.csv").read_text() == (b / "evaluation.csv").read_text()
    capsys.readouterr()
    assert mt.main(["--evaluate", str(a / "checkpoint.pt"), "--out", str(tmp_path / "e"),
                    "--compare", str(b)]) == 0
    assert mt.main(["--evaluate", str(a / "checkpoint.pt"), "--out", str(tmp_path / "f"),
                    "--compare", str(tmp_path / "e")]) == 0       # of an evaluation, too
    out = capsys.readouterr().out
    assert "maml, b" in out and f"{a / 'checkpoint.pt'}: point2d, maml, seed 0, θ after 3" in out
    assert mt.main(["--evaluate", str(a / "checkpoint.pt"), "--out", str(tmp_path / "g"),
                    "--eval-tasks", "2", "--compare", str(a / "evaluation.csv")]) == 0
    assert "maml, evaluation, 4 tasks" in capsys.readouterr().out
    assert (tmp_path / "e" / "evaluation.csv").read_text() == (
        a / "evaluation.csv").read_text()
    assert mt.main(["--iterations", "1", *TINY, "--init", str(a / "checkpoint.pt"),
                    "--out", str(tmp_path / "i")]) == 0


@pytest.mark.parametrize("args, words", [
    (["--task", "walker"], "walker"), (["--meta-batch-size", "0"], "meta_batch_size"),
    (["--alpha", "-1"], "alpha"), (["--alpha", "nan"], "alpha"),
    (["--gamma", "1.5"], "gamma"), (["--iterations", "many"], "iterations"),
    (["--no-such-flag"], "no-such-flag"), (["--evaluate", "missing.pt"], "missing.pt"),
    (["--evaluate", "foreign.pt"], "foreign.pt"), (["--hidden", "a,b"], "hidden"),
    (["--init", "foreign.pt"], "foreign.pt"), (["--compare", "nowhere"], "nowhere"),
    (["--resume", "--out", "nowhere"], "nowhere"),
    (["--out", "foreign.pt"], "foreign.pt"), (["--out", "taken"], "taken")])
def test_bad_input_is_one_sentence_and_status_2_and_changes_nothing(
        tmp_path, monkeypatch, capsys, args, words):
    (tmp_path / "foreign.pt").write_bytes(b"not a checkpoint")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "config.json").write_text("{}")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    monkeypatch.chdir(tmp_path)
    assert mt.main(args) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and words in error and "Traceback" not in error
    assert before == {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}


def test_resume_and_init_are_refused_where_they_are_ambiguous(
        tmp_path, no_figures, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert mt.main(FAULT_RUN) == 0 and mt.main(FAULT_RUN) == 0       # the second in …-2
    theta = str(tmp_path / "runs" / "point2d-maml-seed0" / "checkpoint.pt")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    capsys.readouterr()
    for args, words in ((["--resume"], "several runs/point2d-maml-seed0"),
                        (["--resume", "--out", "runs/point2d-maml-seed0", "--init", theta],
                         "--init"), (["--method", "random", "--init", theta], "--init"),
                        (["--evaluate", theta, "--render", "a.mp4"], ".gif")):
        assert mt.main(args) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and words in error
    assert before == {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert mt.main(["--resume", "--out", "runs/point2d-maml-seed0"]) == 0
    assert "1 meta-iterations, 1 of them done" in capsys.readouterr().out


def test_import_has_no_side_effects(tmp_path):
    code = ("import sys; sys.path.insert(0, sys.argv[1]); import torch; "
            "n = torch.get_num_threads(); import maml_trpo; "
            "assert torch.get_num_threads() == n; assert 'mujoco' not in sys.modules; "
            "assert 'matplotlib' not in sys.modules")
    subprocess.run([sys.executable, "-c", code, str(HERE)], cwd=tmp_path, check=True)
    assert not any(tmp_path.iterdir())


# %% The notes


def pseudocode_rows():
    """The map of notes.md: [(line number, row text)]."""
    text = (HERE / "notes.md").read_text(encoding="utf-8")
    table = text.split("<!-- map begins -->")[1].split("<!-- map ends -->")[0]
    return [(int(m.group(1)), m.group(0)) for m in re.finditer(
        r"^\| (\d+) \|.*$", table, re.MULTILINE)]


# The non-blank lines of the notes' listing, by number.
NOTES_LINES = [1, 3, 5, 7, 8, 10, 11, 13, 14, 17, 19, 20, 21, 22, 24, 27, 28, 29, 30, 31,
               33, 34, 36, 37, 39, 40, 41, 42, 44, 45, 47, 48, 49, 51, 52, 53, 54, 55, 56,
               57, 59, 60, 61, 62, 63, 65, 66, 67, 68, 69, 72, 73, 77, 78, 80]


def test_map_has_exactly_one_row_for_every_line_and_names_existing_functions():
    rows = pseudocode_rows()
    assert [number for number, _ in rows] == NOTES_LINES
    for number, row in rows:
        names = re.findall(r"`([A-Za-z_][\w.]*)`", row.split("|")[3])
        assert names, f"line {number} names no function"
        for name in names:
            target = mt
            for part in name.split("."):
                assert hasattr(target, part), f"line {number}: no {name} in maml_trpo.py"
                target = getattr(target, part)


def test_tests_named_in_notes_and_docstrings_exist():
    names = {name for name in globals() if name.startswith("test_")}
    for file in ("notes.md", "maml_trpo.py", "README.md"):
        text = (HERE / file).read_text(encoding="utf-8")
        named = set(re.findall(r"\btest_\w+", text)) - {"test_maml_trpo", "test_tasks"}
        assert named <= names, f"{file}: {sorted(named - names)}"
        assert file != "notes.md" or len(named) > 30


TAG = re.compile(r"\[((?:MAML|TRPO|GAE|SpinUp|maml_rl|notes)\b[^\]…]*)\]")


def test_source_tags_of_the_code_and_of_the_notes_index_are_the_same():
    code = (HERE / "maml_trpo.py").read_text(encoding="utf-8")
    index = (HERE / "notes.md").read_text(encoding="utf-8").split("Sources and tags\n")[1]
    in_code = {" ".join(tag.split()) for tag in TAG.findall(code)}
    in_notes = set(TAG.findall(index)) - {"notes l.N"}
    assert in_code - in_notes == set(), "used in the file, not in the notes' index"
    assert in_notes - in_code == set(), "in the notes' index, not used in the file"


QUESTIONS = {       # the function in whose docstring each of the readers' questions stands
    1: "kl_old_new surrogate_and_kl", 2: "adapt", 3: "adaptation_returns", 4: "",
    5: "adapt", 6: "backtrack_line_search",
    7: "conjugate_gradient hessian_vector_product", 8: "surrogate_and_kl",
    9: "adaptation_returns", 10: "LinearBaseline", 11: "inner_loss", 12: "kl_old_new",
    13: "inner_loss", 14: "TaskFamily", 15: ""}


@pytest.mark.parametrize("number", QUESTIONS)
def test_readers_question_is_answered_where_it_belongs(number):
    for name in QUESTIONS[number].split() or [None]:
        doc = getattr(mt, name).__doc__ if name else mt.__doc__
        asked = re.search(rf"^ *Q: .*?\(Q{number}\)\n *A: \S", doc,
                          re.MULTILINE | re.DOTALL)
        assert asked, f"Q{number} is not answered in {name or 'the header'}"


def test_own_environment_of_the_notes_runs():
    """The example as it stands, with two iterations in place of twenty."""
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
    with pytest.raises(mt.BadInput, match="corridor.* is 20, the settings' 100"):
        mt.train_maml(mt.Config(iterations=1), family)
    with pytest.raises(mt.BadInput, match="another task"):
        mt.evaluate(mt.Config(), theta)                       # θ is not point2d's


def test_estimators_with_another_jacobian_have_exact_products_by_default():
    """A difference is wrong for them: see the test of the estimator's J."""
    assert mt.Config().hvp == "finite-difference"
    assert mt.Config(first_order=True).hvp == "gauss-newton"
    assert mt.Config(inner_loss="ratio").hvp == "gauss-newton"
    assert mt.Config(first_order=True, hvp="double-backprop").hvp == "double-backprop"


def test_standard_error_leaves_out_what_lies_between_the_two_directions():
    rng = np.random.default_rng(0)
    table = rng.normal(size=(40, 3)) + 100.0 * np.resize([1, -1], (40, 1))
    groups = mt.by_task(mt.Config(task="cheetah-dir"), table)
    assert list(groups) == ["task -1", "task +1"]
    assert np.array_equal(groups["task +1"], table[0::2])
    error = mt.standard_error(*groups.values())
    # Two independent means of 20: the error of their mean, by its definition.
    parts = [table[k::2].std(axis=0, ddof=1) / math.sqrt(20) for k in (0, 1)]
    assert np.allclose(error, np.hypot(*parts) / 2) and (error < 0.25).all()
    groups = mt.by_task(mt.Config(), table)                # 40 goals: an ordinary sample
    assert np.array_equal(groups[""], table)
    assert np.allclose(mt.standard_error(*groups.values()),
                       table.std(axis=0, ddof=1) / math.sqrt(40))
    one = mt.comparison_table(mt.Config(), [("maml, last θ", table[:1])])
    assert "±" not in one and f"{table[0, 1]:.2f}" in one
    both = mt.comparison_table(mt.Config(task="ant-dir"), [("maml, last θ", table)])
    assert [line.split()[:2] for line in both.splitlines()[2:4]] == [
        ["task", "-1"], ["task", "+1"]]


def test_every_public_function_has_a_docstring_and_lines_are_at_most_88_wide():
    source = (HERE / "maml_trpo.py").read_text(encoding="utf-8")
    assert max(len(line) for line in source.splitlines()) <= 88
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            assert node.name.startswith("_") or ast.get_docstring(node), node.name


# %% Many machines: real processes, gloo on the loopback address

def in_ranks(ranks, function, **arguments):
    """What `function`, a name of this file, returns in `ranks` fresh processes that find
    each other on the loopback address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = (f"import json, sys; sys.path.insert(0, {str(HERE)!r}); "
            f"import test_maml_trpo as t; "
            f"print(json.dumps(t.{function}(**json.loads(sys.argv[1]))))")
    started = [subprocess.Popen(
        [sys.executable, "-c", code, json.dumps(arguments)], stdout=subprocess.PIPE,
        env={**os.environ, "RANK": str(rank), "WORLD_SIZE": str(ranks),
             "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
        for rank in range(ranks)]
    said = [process.communicate(timeout=600)[0] for process in started]
    assert [process.returncode for process in started] == [0] * ranks
    return [json.loads(text.splitlines()[-1]) for text in said]


def three_iterations(dtype):
    """θ, returns and evaluation of a small run, on one process or on several."""
    config = mt.Config(iterations=3, meta_batch_size=5, rollouts=4, horizon=9, workers=1,
                       hidden=(8, 6), cg_iterations=4, hvp="gauss-newton")
    with mt.process_group():
        policy = mt.make_policy(mt.family_of(config), config)
        start = mt.TrainState.initial(policy, config)
        start = dataclasses.replace(start, theta=start.theta.to(getattr(torch, dtype)))
        theta, rows = mt.train_maml(config, start=start)
        table = mt.adaptation_returns(policy, theta, mt.family_of(config),
                                      mt.paper_goals(4), 1, 3, 0.1, horizon=9)
    return theta.tolist(), [row["return_post"] for row in rows], table.tolist()


@pytest.mark.parametrize("dtype, tolerance, counts", [
    ("float64", 1e-9, (3,)), pytest.param("float64", 1e-9, (2,), marks=slow),
    pytest.param("float32", 1e-2, (2, 3), marks=slow)])
def test_ranks_compute_the_same_run(dtype, tolerance, counts):
    """1, 2 and 3 processes: five tasks do not divide evenly."""
    alone = three_iterations(dtype)
    for ranks in counts:
        for one in in_ranks(ranks, "three_iterations", dtype=dtype):
            for a, b in zip(alone, one):
                a, b = (torch.tensor(x, dtype=torch.float64) for x in (a, b))
                assert (a - b).norm() <= tolerance * a.norm()


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
    (0, 5), pytest.param(0, 0, marks=slow), pytest.param(1, 0, marks=slow),
    pytest.param(1, 5, marks=slow)])
def test_killed_rank_ends_the_run_with_a_sentence_and_it_can_go_on(
        tmp_path, no_figures, dies, seconds):
    """Under torchrun, SIGKILL: the other one is in gloo's call, or busy for 5 seconds."""
    script, out = tmp_path / "ranks.py", tmp_path / "out"
    script.write_text(DYING_SCRIPT)
    args = ["--iterations", "5", *TINY, "--hvp", "gauss-newton"]
    ended = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone",
         "--nproc-per-node=2", str(script), str(HERE), str(dies), str(seconds), *args,
         "--out", str(out)], cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert ended.returncode == 1
    said = [line for line in ended.stderr.splitlines() if line.startswith("maml_trpo.py")]
    assert len(said) == 1 and "another process of this run ended" in said[0]
    assert "--resume" in said[0] and 'maml_trpo.py", line' not in ended.stderr
    assert mt.load_checkpoint(out / "checkpoint.pt")[1].iteration == 2
    assert mt.main([*args, "--out", str(out), "--resume"]) == 0
    config, state = mt.load_checkpoint(out / "checkpoint.pt")
    theta, rows = mt.train_maml(config)                      # undisturbed, one process
    assert len(state.rows) == len(rows) == 5
    assert (state.theta - theta).norm() <= 1e-5 * theta.norm()


# %% An MDP small enough to enumerate: expectations without sampling
#
# Every expectation below is a finite sum, over all trajectories or over all sets D of K
# trajectories. True gradients are central differences of `MdpTiny.value`, which
# knows no trajectory, no log π and no autograd.


class MdpTiny:
    """S states, A actions, H steps: start (S,), move (S, A, S), reward (S, A)."""

    def __init__(self, start, move, reward, H):
        self.start, self.move, self.reward = map(torch.as_tensor, (start, move, reward))
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

    def probability(self, theta):
        """p_θ(τ) of each path: (N,)."""
        pi = theta.view(self.S, self.A).softmax(-1)
        return self.luck * pi[self.states, self.actions].prod(1)

    def value(self, theta, gamma=1.0):
        """E[Σ_t γᵗ r_t]/H from the visits of each state: theta (..., P) → (...).

        theta (..., H·P) is a policy with parameters of its own for each step.
        """
        pi = theta.unflatten(-1, (-1, self.S, self.A)).softmax(-1)
        pi = pi.expand(*pi.shape[:-3], self.H, self.S, self.A)
        visits, total = self.start, 0.0
        for t in range(self.H):
            joint = visits[..., None] * pi[..., t, :, :]
            total = total + gamma**t * (joint * self.reward).sum((-1, -2))
            visits = torch.einsum("...sa,san->...n", joint, self.move)
        return total / self.H

    def data(self, paths=None, weight=None):
        """`paths` (n,), default all, as n episodes; rewards times `weight` (n,)."""
        paths = torch.arange(self.N) if paths is None else paths
        states, actions = self.states[paths], self.actions[paths]
        rew = self.reward[states, actions]
        if weight is not None:
            rew = rew * weight[:, None]
        obs = torch.nn.functional.one_hot(states, self.S).double()
        return mt.Trajectories(obs, actions, rew, torch.ones_like(rew))

    def weighted(self, theta):
        """All paths, rewards times N·p_θ(τ): a mean over these N is an expectation."""
        return self.data(weight=self.N * self.probability(theta))

    def sets(self, K):
        """Every D of K paths: which (D, K), and in how many orders each is drawn."""
        paths = list(itertools.combinations_with_replacement(range(self.N), K))
        orders = [math.factorial(K) / math.prod(
            math.factorial(D.count(n)) for n in set(D)) for D in paths]
        return torch.tensor(paths), torch.tensor(orders, dtype=torch.float64)


class MdpPolicy:
    """Tabular softmax π_θ(a|s) ∝ exp θ[s, a]; obs one-hot (n, H, S), act (n, H).

    With D copies, θ (D·P,) is D policies side by side, each for n/D of the episodes.
    """

    def __init__(self, mdp, copies=1):
        self.shape = copies, 1, mdp.S, mdp.A

    def distribution(self, theta, obs):
        D, _, S, A = self.shape
        logits = obs.reshape(D, -1, obs.shape[-2], S) @ theta.view(self.shape)
        return torch.distributions.Categorical(
            logits=logits.reshape(*obs.shape[:-1], A), validate_args=False)


def mdp_random(seed, S, A, H, starts=1, successors=1):
    """Random MDP and θ: `starts` first states, `successors` of each (state, action)."""
    rng = np.random.default_rng(seed)
    start, move = np.zeros(S), np.zeros((S, A, S))
    start[:starts] = rng.dirichlet(np.ones(starts))
    for s, a in itertools.product(range(S), range(A)):
        move[s, a, rng.permutation(S)[:successors]] = rng.dirichlet(np.ones(successors))
    reward, theta = rng.standard_normal((S, A)), 0.5 * rng.standard_normal(S * A)
    return MdpTiny(start, move, reward, H), torch.tensor(theta)


def mdp_relative(x, y):
    """‖x − y‖/‖y‖."""
    return float((x - y).norm() / y.norm())


def mdp_ascent(mdp, theta, credit):
    """E[Σ_t ∇log π_t·credit_t]/H through mt.inner_loss: credit (N, H), each path's."""
    data = mdp.data()
    data.adv = credit * (mdp.N * mdp.probability(theta))[:, None]
    return -mt.gradient(lambda t: mt.inner_loss(MdpPolicy(mdp), t, data), theta)


def mdp_for_credit(H=4):
    """S 3, A 2, 1,296 paths for H = 4: chance in the first state and in every move."""
    return mdp_random(3, S=3, A=2, H=H, starts=3, successors=3)


def mdp_bait():
    """At the start action 0 pays 1 now and leads to nothing, action 1 pays 3 later."""
    move = np.zeros((3, 2, 3))
    move[0, 0, 1] = move[0, 1, 2] = 1.0
    move[1, :, 1] = move[2, :, 2] = 1.0
    return MdpTiny([1.0, 0, 0], move, [[1.0, 0.0], [0.0, 0.0], [3.0, 3.0]], H=2)


def test_mdp_probabilities_add_up_and_value_equals_sum_over_paths():
    """The two descriptions of the MDP agree: E[Σ γᵗ r_t]/H by visits and by paths."""
    mdp, theta = mdp_for_credit()
    assert mdp.N == 1296 and abs(mdp.probability(theta).sum() - 1) < 1e-14
    for gamma in (1.0, 0.7):
        total = sum(gamma**t * mdp.data().rew[:, t] for t in range(mdp.H))
        expected = (mdp.probability(theta) * total).sum() / mdp.H
        assert torch.allclose(mdp.value(theta, gamma), expected, rtol=1e-13)
        assert torch.allclose(mdp.value(theta.repeat(mdp.H), gamma), expected)


# %% The return: which credit makes Σ_t ∇log π_t·credit_t the policy gradient?


def test_reward_times_own_score_expectation_is_not_the_enumerated_gradient():
    """[notes l.11] E[Σ_t r_t ∇log π_t] is the gradient for H = 1, and not for H = 4."""
    for H, error in ((1, 0.0), (4, 0.578)):
        mdp, theta = mdp_for_credit(H)
        own = mdp_ascent(mdp, theta, mdp.data().rew)
        true = central_difference(mdp.value, theta)
        assert mdp_relative(own, true) == pytest.approx(
            error, abs=0.001 if error else 1e-8)


def test_reward_times_own_score_expectation_is_the_gradient_with_the_visits_frozen():
    """What l.11 estimates: the slope of each step's own reward, visits held fixed."""
    mdp, theta = mdp_for_credit()
    p = mdp.probability(theta)
    visits = torch.zeros(mdp.S).double()                  # summed over the H steps
    for t in range(mdp.H):
        visits.index_add_(0, mdp.states[:, t], p)

    def myopic(x):
        pi = x.view(mdp.S, mdp.A).softmax(-1)
        return (visits[:, None] * pi * mdp.reward).sum() / mdp.H
    assert torch.allclose(mdp_ascent(mdp, theta, mdp.data().rew),
                          central_difference(myopic, theta), atol=1e-9)


def test_reward_times_own_score_falls_for_the_bait_where_reward_to_go_does_not():
    """A step along l.11's direction lowers the value, along reward-to-go raises it."""
    mdp, theta = mdp_bait(), torch.zeros(6, dtype=torch.float64)
    rew = mdp.data().rew
    for credit, sign in ((rew, -1), (mt.discounted_returns(rew, 1.0), 1)):
        ahead = theta + 0.1 * mdp_ascent(mdp, theta, credit)
        assert sign * (mdp.value(ahead) - mdp.value(theta)) > 1e-3


def test_total_return_expectation_equals_enumerated_gradient():
    """E[Σ_t ∇log π_t·R(τ)], every reward credited to every action, is the gradient."""
    mdp, theta = mdp_for_credit()
    total = mdp.data().rew.sum(1, keepdim=True).expand(-1, mdp.H)
    assert torch.allclose(mdp_ascent(mdp, theta, total),
                          central_difference(mdp.value, theta), atol=1e-9)


def test_reward_to_go_expectation_equals_enumerated_gradient():
    """At γ = 1, rewards before an action add nothing: reward-to-go is exact."""
    mdp, theta = mdp_for_credit()
    assert torch.allclose(
        mdp_ascent(mdp, theta, mt.discounted_returns(mdp.data().rew, 1.0)),
        central_difference(mdp.value, theta), atol=1e-9)


def test_discounted_reward_to_go_drops_gamma_to_the_t_of_the_enumerated_gradient():
    """γ < 1: the usual estimator is Σ_t γ⁻ᵗ ∂_t E[Σ γᵗ r_t]; mt's is the usual one.

    ∂_t: the derivative for the parameters of step t alone, each step having its own.
    """
    gamma, (mdp, theta) = 0.7, mdp_for_credit()
    parts = central_difference(lambda x: mdp.value(x, gamma),
                               theta.repeat(mdp.H)).view(mdp.H, mdp.P)
    weight = gamma ** torch.arange(mdp.H, dtype=torch.float64)
    true, usual = parts.sum(0), (parts / weight[:, None]).sum(0)
    assert torch.allclose(
        true, central_difference(lambda x: mdp.value(x, gamma), theta), atol=1e-9)
    rew, ones = mdp.data().rew, torch.ones(mdp.N, mdp.H).double()
    for credit in (mt.discounted_returns(rew, gamma),
                   mt.gae(rew, 0 * rew, ones, gamma, 1.0)):
        ours = mdp_ascent(mdp, theta, credit)
        assert torch.allclose(ours, usual, atol=1e-9)
        assert torch.allclose(mdp_ascent(mdp, theta, credit * weight), true, atol=1e-9)
    cosine = torch.cosine_similarity(usual, true, dim=0)
    assert [mdp_relative(usual, true), usual.norm() / true.norm(), cosine] == (
        pytest.approx([0.707, 1.703, 0.998], abs=0.001))


def test_discounted_reward_to_go_is_the_gradient_of_no_function():
    """γ < 1: the usual estimator's Jacobian is not symmetric; the gradient's is."""
    gamma, (mdp, theta) = 0.7, mdp_for_credit()
    credit = mt.discounted_returns(mdp.data().rew, gamma)
    weight = gamma ** torch.arange(mdp.H, dtype=torch.float64)
    for kept, asymmetry in ((1.0, 0.156), (weight, 0.0)):
        jacobian = torch.stack([
            mdp_ascent(mdp, theta + e, credit * kept)
            - mdp_ascent(mdp, theta - e, credit * kept)
            for e in 1e-5 * torch.eye(mdp.P, dtype=torch.float64)]) / 2e-5
        assert mdp_relative(jacobian, jacobian.T) == pytest.approx(
            asymmetry, abs=0.001 if asymmetry else 1e-8)


@pytest.mark.parametrize("gamma, bias", [(1.0, 0.102), (0.7, 0.060)])
def test_baseline_fitted_on_other_paths_leaves_the_expectation_unchanged(gamma, bias):
    """E[∇log π_t·V(x_t, t)] = 0 if V has not seen these paths; λ = .5 biases."""
    mdp, theta = mdp_for_credit()
    every, other = mdp.data(), mdp.data(torch.arange(5, mdp.N, 321))
    returns = mt.discounted_returns(other.rew, gamma)
    values = mt.LinearBaseline().fit(other.obs, returns, other.mask).predict(every.obs)
    without = mdp_ascent(mdp, theta, mt.discounted_returns(every.rew, gamma))
    assert values.std() > 0.1
    credit = [mt.gae(every.rew, values, every.mask, gamma, lam) for lam in (1.0, 0.5)]
    assert torch.allclose(mdp_ascent(mdp, theta, credit[0]), without, atol=1e-12)
    if gamma == 1.0:
        assert torch.allclose(without, central_difference(mdp.value, theta), atol=1e-9)
    assert mdp_relative(mdp_ascent(mdp, theta, credit[1]), without) == (
        pytest.approx(bias, abs=0.001))


# %% Sets D of K paths: what is computed from a whole D


def mdp_for_sets(K=3, seed=3):
    """S 5, A 2, H 4: 16 paths (chance only in the actions), and all sets of K of them.

    → mdp, θ, D as one Trajectories of the D·K episodes, paths (D, K), p_θ(D) (D,) as a
    function of θ.
    """
    mdp, theta = mdp_random(seed, S=5, A=2, H=4)
    paths, orders = mdp.sets(K)
    return mdp, theta, mdp.data(paths.flatten()), paths, (
        lambda x: orders * mdp.probability(x)[paths].prod(1))


def mdp_set_gradients(mdp, theta, data, D):
    """−∇mt.inner_loss of each of D sets: (D, P), from D copies of θ side by side."""
    return -D * mt.gradient(lambda x: mt.inner_loss(MdpPolicy(mdp, D), x, data),
                            theta.repeat(D)).view(D, -1)


def test_mdp_side_by_side_equals_one_by_one():
    """D copies of θ in one vector take the steps that D calls of mt.adapt take."""
    mdp, theta, data, paths, probability = mdp_for_sets(K=3)
    assert len(paths) == 816 and abs(probability(theta).sum() - 1) < 1e-14
    data.adv = mt.discounted_returns(data.rew, 0.9)
    for estimator in ("log-prob", "ratio"):
        gradients, values = mdp_meta_gradients(mdp, theta, data, len(paths), estimator)
        for d in (0, 77, 815):
            one, t = mdp.data(paths[d]), theta.clone().requires_grad_()
            one.adv = mt.discounted_returns(one.rew, 0.9)
            value = mdp.value(mt.adapt(MdpPolicy(mdp), t, [one], MDP_ALPHA, True,
                                       estimator))
            assert torch.allclose(values[d], value.detach(), rtol=1e-12)
            assert torch.allclose(gradients[d], torch.autograd.grad(value, t)[0],
                                  atol=1e-12)


def test_mean_of_the_same_paths_as_baseline_shrinks_the_gradient_by_one_over_K():
    """Total return minus the mean over the same K paths: E is (1 − 1/K)·gradient."""
    for K in (1, 2, 3):
        mdp, theta, data, paths, probability = mdp_for_sets(K)
        total = data.rew.sum(1).view(-1, K)
        data.adv = (total - total.mean(1, keepdim=True)).view(-1, 1).expand(-1, mdp.H)
        expected = probability(theta) @ mdp_set_gradients(mdp, theta, data, len(paths))
        true = central_difference(mdp.value, theta)
        assert torch.allclose(expected, (1 - 1 / K) * true, atol=1e-9)


def test_baseline_fitted_on_the_same_paths_biases_the_expectation():
    """mt.LinearBaseline fitted on the K paths it then predicts: by how much, K 1-3."""
    errors = []
    for K in (1, 2, 3):
        mdp, theta, data, paths, probability = mdp_for_sets(K)
        credit = []
        for one in map(mdp.data, paths):
            returns = mt.discounted_returns(one.rew, 1.0)
            fitted = mt.LinearBaseline().fit(one.obs, returns, one.mask)
            values = fitted.predict(one.obs)
            credit.append(mt.gae(one.rew, values, one.mask, 1.0, 1.0))
        data.adv = torch.cat(credit)
        expected = probability(theta) @ mdp_set_gradients(mdp, theta, data, len(paths))
        errors.append(mdp_relative(expected, central_difference(mdp.value, theta)))
    assert errors == pytest.approx([0.925, 0.466, 0.311], abs=0.001)


# %% The dropped term, and two objectives
#
# With V(φ) = mdp.value(φ): (II) is E_{D~π_θ}[V(θ′(θ, D))], K paths in D, as Algorithm 3
# has it; (I) is V(θ + α∇E[R]), the inner expectation exact.

MDP_ALPHA = 2.0


def emaml_term(policy, theta, inner, value, alpha):
    """V(θ′)·∇_θ log p(D): the part of ∇E_D[V(θ′(θ, D))] that MAML drops; (P,).

    log p(D) = Σ_k Σ_t log π_{θ_i(θ)}(a|x) + what does not depend on θ: a *sum* over the
    K episodes of every inner step, where θ_i is what that step started from, itself a
    function of θ. `value`: a number, the return after adaptation, or that less any
    baseline that has not seen D.
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


def mdp_adapt(policy, theta, data, alpha, estimator):
    """mt.adapt for "first order", "log-prob", "ratio" and (as inner_loss) "DiCE"."""
    with pytest.MonkeyPatch.context() as patch:
        if estimator == "DiCE":
            patch.setattr(mt, "inner_loss", mdp_dice_loss)
        return mt.adapt(policy, theta, [data], alpha, estimator != "first order",
                        "ratio" if estimator == "ratio" else "log-prob")


def mdp_meta_gradients(mdp, theta, data, D, estimator):
    """Jᵀ∇V(θ′) of each of D sets, (D, P), and V(θ′), (D,)."""
    copies = theta.repeat(D).requires_grad_()
    theta_prime = mdp_adapt(MdpPolicy(mdp, D), copies, data, MDP_ALPHA * D, estimator)
    value = mdp.value(theta_prime.view(D, -1))
    return torch.autograd.grad(value.sum(), copies)[0].view(D, -1), value.detach()


def mdp_closed_step(mdp, theta, data, D):
    """θ′ of each of D sets without autograd or log π: (D, P).

    ∇log π(a|s) is, in row s, the indicator of a minus π(·|s), and 0 in other rows.
    """
    credit = torch.zeros(D, mdp.S, mdp.A).double()           # Σ of Â where (s, a) was
    set_of = torch.arange(D).repeat_interleave(data.adv.numel() // D)
    credit.index_put_((set_of, data.obs.argmax(-1).flatten(), data.act.flatten()),
                      data.adv.flatten(), accumulate=True)
    pi = theta.view(mdp.S, mdp.A).softmax(-1)
    ascent = credit - pi * credit.sum(-1, keepdim=True)
    return theta + MDP_ALPHA * ascent.flatten(1) / (data.adv.numel() // D)


@functools.lru_cache
def mdp_sampled_case(K, credit="reward-to-go", shift=0.0, seed=3):
    """(II) over all sets of K paths; every value in the result is a sum over them.

    true: its gradient. mean, std: by estimator, E[Jᵀ∇V(θ′)] and the standard deviation
    of one D's; E-MAML is log π and the term, "less E[V]" with V(θ′) − E[V(θ′)] in it.
    """
    mdp, theta, data, paths, probability = mdp_for_sets(K, seed)
    D, p = len(paths), probability(theta)
    if credit == "reward-to-go":
        data.adv = mt.discounted_returns(data.rew, 1.0) + shift
    else:
        data.adv = torch.cat([mt.assign_credit(one, 1.0, 1.0).adv
                              for one in map(mdp.data, paths)])

    def objective(x):
        return probability(x) @ mdp.value(mdp_closed_step(mdp, x, data, D))

    def spread(x):
        return float((p @ ((x - p @ x) ** 2).sum(1)).sqrt())
    per_set = {}
    for estimator in ("first order", "log-prob", "ratio", "DiCE"):
        if estimator == "DiCE" and (credit != "reward-to-go" or shift):
            continue                                    # its θ′ would be another one
        per_set[estimator], value = mdp_meta_gradients(mdp, theta, data, D, estimator)
    scores = torch.stack([emaml_term(MdpPolicy(mdp), theta, [one], 1.0, MDP_ALPHA)
                          for one in map(mdp.data, paths)])
    terms, centred = (v[:, None] * scores for v in (value, value - p @ value))
    per_set["E-MAML"] = per_set["log-prob"] + terms
    per_set["E-MAML, less E[V]"] = per_set["log-prob"] + centred
    return dict(true=central_difference(objective, theta), term=p @ terms,
                mean={name: p @ x for name, x in per_set.items()},
                std={name: spread(x) for name, x in per_set.items()})


@pytest.mark.parametrize("K, credit", [(3, "reward-to-go"), (2, "assign_credit")])
def test_emaml_term_and_log_prob_equal_differences_of_the_sampled_objective(K, credit):
    """(II): log π in the inner loss plus the E-MAML term is exact; neither is alone."""
    case = mdp_sampled_case(K, credit)
    log_prob, term, true = case["mean"]["log-prob"], case["term"], case["true"]
    assert torch.allclose(log_prob + term, true, atol=1e-9)
    for wrong in (log_prob, case["mean"]["first order"], term,
                  log_prob + term / K):                      # a mean over the K paths
        assert mdp_relative(wrong, true) > 0.05


def test_emaml_term_through_two_inner_steps_equals_differences():
    """(II), two inner steps: the second D comes from θ_1(θ), and the term knows it."""
    mdp, theta = mdp_random(5, S=4, A=3, H=2)
    N, policy, alpha = mdp.N, MdpPolicy(mdp), MDP_ALPHA
    one = mdp.data()
    one.adv = mt.discounted_returns(one.rew, 1.0)

    def objective(x):
        first = mdp_closed_step(mdp, x, one, N)                              # (N, P)
        total = 0.0
        for p, theta_1 in zip(mdp.probability(x), first):
            value = mdp.value(mdp_closed_step(mdp, theta_1, one, N))
            total = total + p * (mdp.probability(theta_1) @ value)
        return total
    exact, without = torch.zeros_like(theta), torch.zeros_like(theta)
    for i, j in itertools.product(range(N), repeat=2):
        inner = [mdp.data(torch.tensor([n])) for n in (i, j)]
        for data in inner:
            data.adv = mt.discounted_returns(data.rew, 1.0)
        t = theta.clone().requires_grad_()
        value = mdp.value(mt.adapt(policy, t, inner, alpha, True))
        theta_1 = mt.adapt(policy, theta, inner[:1], alpha, False).detach()
        p = mdp.probability(theta)[i] * mdp.probability(theta_1)[j]
        path = p * torch.autograd.grad(value, t)[0]
        without += path
        exact += path + p * emaml_term(policy, theta, inner, value.detach(), alpha)
    true = central_difference(objective, theta)
    assert torch.allclose(exact, true, atol=1e-9)
    assert mdp_relative(without, true) > 0.05


def test_meta_gradient_expectation_equals_the_sampled_objective_with_sampling_frozen():
    """E[mt.meta_gradient] over D, D′ is −∇ of (II) with p(D) held: the term is dropped.

    With the E-MAML term it is −∇ of (II); first order, it is −E[∇V(θ′)].
    """
    mdp, theta = mdp_random(2, S=3, A=2, H=4, starts=3)
    policy, p, every = MdpPolicy(mdp), mdp.probability(theta), mdp.data()
    every.adv = mt.discounted_returns(every.rew, 1.0)
    second, first, term = torch.zeros(3, mdp.P, dtype=torch.float64)
    for d in range(mdp.N):                                           # D: one path (K 1)
        inner = mdp.data(torch.tensor([d]))
        inner.adv = mt.discounted_returns(inner.rew, 1.0)
        theta_prime = mt.adapt(policy, theta, [inner], MDP_ALPHA, False).detach()
        outer = mdp.weighted(theta_prime)                            # all D′, by p_θ′
        outer.adv = mt.discounted_returns(outer.rew, 1.0)
        task = mt.TaskData([inner], outer, policy.distribution(theta_prime, outer.obs))
        second += p[d] * mt.meta_gradient(policy, theta, task, MDP_ALPHA)
        first += p[d] * mt.meta_gradient(policy, theta, task, MDP_ALPHA, True)
        term += p[d] * emaml_term(policy, theta, [inner], mdp.value(theta_prime), 0.0)

    def value(x):
        return mdp.value(mdp_closed_step(mdp, x, every, mdp.N))
    frozen = central_difference(lambda x: p @ value(x), theta)
    true = central_difference(lambda x: mdp.probability(x) @ value(x), theta)
    ends = mdp_closed_step(mdp, theta, every, mdp.N)
    slopes = torch.stack([central_difference(mdp.value, end) for end in ends])
    assert torch.allclose(-second, frozen, atol=1e-9)
    assert torch.allclose(-first, p @ slopes, atol=1e-9)
    assert torch.allclose(-second + term, true, atol=1e-9)
    assert mdp_relative(frozen, true) > 0.05 and mdp_relative(first, second) > 0.05


def mdp_expected_gradient(mdp, theta, estimator, baseline=0.0):
    """∇V(θ′) with the inner step taken on all paths, each by its probability at θ."""
    data, weight = mdp.weighted(theta), mdp.N * mdp.probability(theta)[:, None]
    data.adv = mt.discounted_returns(data.rew, 1.0) - baseline * weight
    t = theta.clone().requires_grad_()
    theta_prime = mdp_adapt(MdpPolicy(mdp), t, data, MDP_ALPHA, estimator)
    return torch.autograd.grad(mdp.value(theta_prime), t)[0]


def mdp_expected_true(mdp, theta):
    """∇ of (I), V(θ + α∇V(θ)): V is per step, as the inner loss is."""
    def objective(x):
        x = x.detach().requires_grad_()
        (slope,) = torch.autograd.grad(mdp.value(x), x)
        return mdp.value(x + MDP_ALPHA * slope).detach()
    return central_difference(objective, theta)


def test_dice_equals_differences_of_the_expected_objective_and_log_prob_does_not():
    """(I), H = 4: DiCE is exact; first order, log π, ratio (LVC) miss, by how much."""
    mdp, theta = mdp_random(3, S=5, A=2, H=4)
    true = mdp_expected_true(mdp, theta)
    errors = {name: mdp_relative(mdp_expected_gradient(mdp, theta, name), true)
              for name in ("first order", "log-prob", "ratio", "DiCE")}
    assert errors.pop("DiCE") < 1e-8
    assert list(errors.values()) == pytest.approx([0.339, 0.440, 0.0249], abs=0.001)


def test_ratio_equals_differences_of_the_expected_objective_at_horizon_1():
    """(I), H = 1: the ratio (LVC) is exact with any constant baseline, log π is not."""
    mdp, theta = mdp_random(3, S=4, A=3, H=1, starts=4)
    true = mdp_expected_true(mdp, theta)
    for baseline in (0.0, 1.3):
        ratio, log_prob = (mdp_expected_gradient(mdp, theta, name, baseline)
                           for name in ("ratio", "log-prob"))
        assert torch.allclose(ratio, true, atol=1e-9)
        assert mdp_relative(log_prob, true) > 0.1


def test_inner_loss_hessian_misses_exactly_these_terms():
    """E[inner loss], twice derived: ratio misses the cross-time terms, log π more.

    With s_t = ∇log π_t and G_t the reward-to-go, ∇²E[R] is the ratio's Hessian plus
    E[Σ_{t<u} (s_t s_uᵀ + s_u s_tᵀ)G_u]; the ratio's is log π's + E[Σ_t s_t s_tᵀ G_t].
    A constant baseline b adds b·(Fisher matrix) to log π's and nothing to the ratio's.
    """
    mdp, theta = mdp_for_credit()
    data, weight = mdp.weighted(theta), mdp.N * mdp.probability(theta)[:, None]
    to_go = mt.discounted_returns(data.rew, 1.0)

    def second(estimator, baseline=0.0):
        data.adv = to_go - baseline * weight
        return torch.autograd.functional.hessian(
            lambda t: -mt.inner_loss(MdpPolicy(mdp), t, data, estimator), theta)
    pi = theta.view(mdp.S, mdp.A).softmax(-1)
    score = torch.zeros(mdp.N, mdp.H, mdp.S, mdp.A).double()         # s_t, closed form
    for n, t in itertools.product(range(mdp.N), range(mdp.H)):
        s, a = mdp.states[n, t], mdp.actions[n, t]
        score[n, t, s] = -pi[s]
        score[n, t, s, a] += 1
    score = score.flatten(2)
    same = torch.einsum("nti,ntj,nt->ij", score, score, to_go) / to_go.numel()
    fisher = torch.einsum("nti,ntj,n->ij", score, score, weight[:, 0]) / to_go.numel()
    cross = sum(torch.einsum("ni,nj,n->ij", score[:, t], score[:, u], to_go[:, u])
                for u in range(mdp.H) for t in range(u)) / to_go.numel()
    whole = torch.einsum("nti,nuj,nu->ij", score, score, to_go) / to_go.numel()
    # α·E[Σ_t s_t (Σ_u s_u G_u)ᵀ]·∇V is E-MAML's term to first order: what log π lacks.
    assert torch.allclose(whole, same + cross + cross.T, atol=1e-12)
    true = torch.autograd.functional.hessian(mdp.value, theta)
    assert torch.allclose(second("ratio") + cross + cross.T, true, atol=1e-12)
    assert torch.allclose(second("log-prob") + same, second("ratio"), atol=1e-12)
    assert torch.allclose(second("ratio", 1.3), second("ratio"), atol=1e-12)
    assert torch.allclose(second("log-prob", 1.3), second("log-prob") + 1.3 * fisher,
                          atol=1e-12)
    assert [mdp_relative(second(x), true) for x in ("ratio", "log-prob")] == (
        pytest.approx([0.502, 2.903], abs=0.002))


# By estimator, each for K = 1, 2, 3: the mean's relative error against (II), then
# against (I), then one D's standard deviation over the norm of (II)'s gradient.
MDP_ERRORS = {
    "first order": ((.144, .275, .301), (.538, .444, .412), (0.422, 0.239, 0.191)),
    "log-prob": ((.732, .497, .470), (.156, .150, .240), (0.539, 0.543, 0.422)),
    "ratio": ((.355, .052, .033), (.347, .206, .149), (0.587, 0.302, 0.228)),
    "DiCE": ((.386, .098, .060), (.330, .163, .110), (1.028, 0.643, 0.514)),
    "E-MAML": ((0, 0, 0), (.527, .237, .160), (1.715, 1.626, 1.592)),
    "E-MAML, less E[V]": ((0, 0, 0), (.527, .237, .160), (1.351, 1.308, 1.213))}


def test_neither_family_is_exact_for_the_other_objective():
    """E-MAML is exact for (II), not (I); DiCE and ratio, at finite K, for neither."""
    mdp, theta, *_ = mdp_for_sets(1)
    expected = mdp_expected_true(mdp, theta)
    for K in (1, 2, 3):
        case = mdp_sampled_case(K)
        assert set(case["mean"]) == set(MDP_ERRORS)
        for name, x in case["mean"].items():
            row = [mdp_relative(x, case["true"]), mdp_relative(x, expected),
                   case["std"][name] / float(case["true"].norm())]
            table = [numbers[K - 1] for numbers in MDP_ERRORS[name]]
            assert row == pytest.approx(table, abs=0.001)
        for name in ("ratio", "DiCE"):                    # nor with the E-MAML term
            assert mdp_relative(case["mean"][name] + case["term"], case["true"]) > 0.3


def test_more_derivatives_are_not_always_nearer_to_the_sampled_gradient():
    """(II), K = 2: first order is nearer than log π or not: a constant in Â decides."""
    for shift, errors in ((0.0, (0.275, 0.497)), (2.0, (0.341, 0.106))):
        case = mdp_sampled_case(2, shift=shift)
        first, second = (mdp_relative(case["mean"][name], case["true"])
                         for name in ("first order", "log-prob"))
        assert (first, second) == pytest.approx(errors, abs=0.001)


def test_nearest_estimator_to_the_sampled_gradient_counted_on_eight_mdps():
    """(II), K 2: DiCE is nearest on 6, ratio on 2; first order beats log π on 6."""
    nearest, first_order = [], 0
    for seed in range(8):
        case = mdp_sampled_case(2, seed=seed)
        error = {name: mdp_relative(mean, case["true"])
                 for name, mean in case["mean"].items()}
        assert error.pop("E-MAML") < 1e-8 and error.pop("E-MAML, less E[V]") < 1e-8
        nearest.append(min(error, key=error.get))
        first_order += error["first order"] < error["log-prob"]
    assert nearest.count("DiCE") == 6 and nearest.count("ratio") == 2
    assert first_order == 6


def test_fitted_baseline_leaves_log_prob_no_second_derivative_in_a_table():
    """Tabular, one-hot states, baseline fitted on D: Σ Â over each state's visits is 0.

    ∇²log π(a|s) of a softmax is the same for all a, so that sum is all that survives.
    """
    mdp, theta, _, paths, _ = mdp_for_sets(2)
    size = {}
    for credit in ("fitted", "none"):
        for one in map(mdp.data, paths[::9]):
            one.adv = (mt.assign_credit(one, 1.0, 1.0).adv if credit == "fitted" else
                       mt.standardise(mt.discounted_returns(one.rew, 1.0), one.mask))
            for estimator in ("log-prob", "ratio"):
                hessian = torch.autograd.functional.hessian(
                    lambda t: mt.inner_loss(MdpPolicy(mdp), t, one, estimator), theta)
                key = credit, estimator
                size[key] = max(size.get(key, 0.0), float(hessian.norm()))
    assert size["fitted", "log-prob"] < 1e-3 < 0.1 < min(
        size["none", "log-prob"], size["fitted", "ratio"])


def test_surrogate_and_kl_of_tabular_policies_equal_sums_over_actions():
    """A Categorical policy in mt.surrogate_and_kl; oracle: Σ_a π_o log(π_o/π_n)."""
    mdp, theta = mdp_random(2, S=3, A=2, H=4, starts=3)
    policy, inner, outer = MdpPolicy(mdp), mdp.data(torch.tensor([7])), mdp.data()
    inner.adv, outer.adv = inner.rew, outer.rew
    moved = theta + torch.linspace(-1, 1, mdp.P).double()
    pi_o, pi_n = (mdp_closed_step(mdp, x, inner, 1).view(mdp.S, mdp.A).softmax(-1)
                  for x in (theta, moved))
    old = mt.adapted_distribution(policy, theta, [inner], outer.obs, MDP_ALPHA)
    surrogate, kl = mt.surrogate_and_kl(policy, moved, mt.TaskData([inner], outer, old),
                                        MDP_ALPHA)
    ratio = (pi_n / pi_o)[mdp.states, mdp.actions]
    by_state = (pi_o * (pi_o / pi_n).log()).sum(-1)
    assert torch.allclose(surrogate, -(ratio * outer.rew).mean(), rtol=1e-12)
    assert torch.allclose(kl, by_state[mdp.states].mean(), rtol=1e-12) and kl > 5e-3


def test_surrogate_is_the_value_itself_at_horizon_1_and_log_prob_only_its_slope():
    """Away from θ_old, E[ratio·r] is V(θ) for H = 1; E[log π·r] is another function."""
    mdp, theta = mdp_random(3, S=4, A=3, H=1, starts=4)
    policy, outer = MdpPolicy(mdp), mdp.weighted(theta)
    outer.adv = outer.rew
    task = mt.TaskData([], outer, policy.distribution(theta, outer.obs))

    def ratio(x):
        return -mt.surrogate_and_kl(policy, x, task, MDP_ALPHA)[0]

    def log_prob(x):                                                   # [notes l.11,54]
        new = policy.distribution(x, outer.obs)
        return (new.log_prob(outer.act) * outer.rew).mean()
    moved = theta + torch.linspace(-4, 4, mdp.P).double()
    true = central_difference(mdp.value, theta)
    assert torch.allclose(ratio(moved), mdp.value(moved), rtol=1e-12)
    gain, other = (f(moved) - f(theta) for f in (mdp.value, log_prob))
    assert abs(other / gain - 1) > 0.2
    for f in (ratio, log_prob):
        assert torch.allclose(mt.gradient(f, theta), true, atol=1e-9)


# %% The pseudocode, run


class PseudoNetwork(torch.nn.Module):
    """The notes' torch_network(): observations (n, 2) → Normal over actions (n, 2)."""

    def __init__(self):
        super().__init__()
        self.first, self.last = torch.nn.Linear(2, 3), torch.nn.Linear(3, 2)
        self.log_std = torch.nn.Parameter(torch.tensor([-0.2, 0.1]))
        self.double()

    def forward(self, obs):
        hidden = torch.tanh(self.first(torch.as_tensor(obs).double()))
        return torch.distributions.Normal(self.last(hidden), self.log_std.exp())

    def flat(self, what=lambda p: p.detach()):
        """θ (19,) in GaussianPolicy's order; with `what`, another part of each."""
        return torch.cat([what(p).flatten() for p in (
            *self.first.parameters(), *self.last.parameters(), self.log_std)])


class PseudoMaml:
    """The notes' program as it stands, on the 2D task; l.N is its line N.

    Filled in, since it is left open: an action is a sample, `optim` is SGD over the
    copy made for each task, and l.48 compares both policies on the last observation.
    `copies`, `steps` False leave out l.36's deepcopy, l.42's optimizer step.
    """
    POLICY = mt.GaussianPolicy(2, 2, hidden=(3,), activation="tanh")
    ALPHA, GAMMA, K, RUN_LENGTH = 0.05, 0.9, 4, 5

    def __init__(self, copies=True, steps=True):
        torch.manual_seed(7)
        self.copies, self.steps, self.record = copies, steps, []
        self.env, self.tasks = mt.Point2D(1), [(0.5, -0.2), (-0.4, 0.1), (0.1, 0.3)]
        self.meta = PseudoNetwork()                                              # l.67
        self.model = None                                                        # l.68

    def step(self, distribution):
        """l.10: the environment gives numbers; log π is the only thing with a graph."""
        action = distribution.sample()
        self.observation, reward, ended, _, _ = self.env.step(action.numpy())
        return action, float(reward[0]), distribution.log_prob(action).sum(), ended[0]

    def task_rollout(self, task):                                                # l.1
        cumulative_disc_rew = 0                                                  # l.3
        self.observation, _ = self.env.reset(options={"task": task})
        self.record.append([])
        for i in range(self.RUN_LENGTH):                                         # l.5
            observation = self.observation                                       # l.7
            distribution = self.model(observation)                               # l.8
            action, reward, log_prob, ended = self.step(distribution)            # l.10
            disc_reward = self.GAMMA**i * reward
            cumulative_disc_rew += disc_reward * log_prob                        # l.11
            self.record[-1].append((observation[0], action[0].numpy(), disc_reward))
            if ended or i == self.RUN_LENGTH - 1:                                # l.13
                return cumulative_disc_rew                                       # l.14

    def sample_trajectories(self, task, K):                                      # l.17
        rewards_for_task = torch.zeros(K, dtype=torch.float64)                   # l.19
        for i in range(K):                                                       # l.20
            rewards_for_task[i] = self.task_rollout(task)                        # l.21
        return rewards_for_task                                                  # l.24

    def train_maml(self, iterations):                                            # l.27
        self.kl_div, self.updated_model_reward = [], []                          # l.30
        for _ in range(iterations):                                              # l.33
            for task in self.tasks:                                              # l.34
                self.adapt_to(task)
            self.backward()
            self.trpo()

    def adapt_to(self, task):
        self.model = copy.deepcopy(self.meta) if self.copies else self.meta      # l.36
        self.optim = torch.optim.SGD(self.model.parameters(), lr=self.ALPHA)
        loss = -self.sample_trajectories(task, self.K).mean()                    # l.40
        loss.backward()                                                          # l.41
        if self.steps:
            self.optim.step()                                                    # l.42
        self.updated_model_reward.append(self.sample_trajectories(task, self.K)) # l.44
        kl = torch.distributions.kl_divergence(                                  # l.48
            self.model(self.observation), self.meta(self.observation))
        self.kl_div.append(kl)                                                   # l.49

    def backward(self):
        self.meta_grad = 0                                                       # l.52
        for exp_rew in self.updated_model_reward:                                # l.53
            self.meta_grad += -exp_rew.mean()                                    # l.54
        self.meta_grad.backward()                                                # l.55

    def trpo(self):
        self.kl_average = self.kl_div.mean(axis=1)                               # l.60

    def trajectories(self, which):
        """The recorded episodes `which` (K of them), credited as l.11 credits them."""
        obs, act, rew = (torch.tensor(np.array(x)).double() for x in zip(*[
            [np.array(x) for x in zip(*episode)] for episode in self.record[which]]))
        return mt.Trajectories(obs, act, rew, torch.ones_like(rew), rew)

    def loss(self, phi, which):
        """−mean over K of Σ_t r_t log π_φ of recorded episodes: l.40 and l.54."""
        data = self.trajectories(which)
        log_prob = self.POLICY.distribution(phi, data.obs).log_prob(data.act)
        return -(log_prob * data.rew).sum(1).mean()


PSEUDO_D, PSEUDO_D2 = slice(0, PseudoMaml.K), slice(PseudoMaml.K, 2 * PseudoMaml.K)


def pseudo_first_task(**how):
    """The program after its first task (l.34-49) and l.52-55; θ as it was before."""
    program = PseudoMaml(**how)
    program.tasks, theta = program.tasks[:1], program.meta.flat()
    with pytest.raises(AttributeError, match="mean"):                  # l.60, after all
        program.train_maml(iterations=1)
    return program, theta


def test_pseudocode_rendering_computes_what_its_lines_say():
    """The network, l.11, l.40 and l.42, against mt.GaussianPolicy and differences."""
    program, theta = pseudo_first_task()
    assert len(program.record) == 2 * program.K and theta.shape == (19,)
    obs = torch.linspace(-1, 1, 6).double().view(3, 2)
    ours = program.POLICY.distribution(program.model.flat(), obs)
    assert torch.allclose(program.model(obs).mean, ours.mean)
    assert torch.allclose(program.model(obs).stddev.log(), ours.log_std.expand(3, 2))
    step = central_difference(lambda x: program.loss(x, PSEUDO_D), theta)
    assert torch.allclose(program.model.flat(), theta - program.ALPHA * step, atol=1e-8)
    assert torch.allclose(program.meta_grad.detach(),
                          program.loss(program.model.flat(), PSEUDO_D2))


def test_pseudocode_backward_leaves_the_meta_parameters_without_a_gradient():
    """l.55 as written: no meta parameter has a grad, silently; the copy's do."""
    program = PseudoMaml()
    with pytest.raises(AttributeError, match="mean"):
        program.train_maml(iterations=1)
    assert len(program.updated_model_reward) == 3
    assert all(p.grad is None for p in program.meta.parameters())
    assert all(p.grad.norm() > 0 for p in program.model.parameters())


def test_pseudocode_deepcopy_alone_cuts_the_graph():
    """First cause: without any optimizer step, the copy still does not know θ."""
    program, theta = pseudo_first_task(steps=False)
    assert torch.equal(program.model.flat(), theta)
    assert all(p.grad is None for p in program.meta.parameters())
    inner = program.trajectories(PSEUDO_D)
    t = theta.clone().requires_grad_()
    theta_prime = mt.adapt(program.POLICY, t, [inner], 0.0, create_graph=True)  # θ
    gradient = torch.autograd.grad(program.loss(theta_prime, PSEUDO_D2), t)[0]
    assert gradient.norm() > 0.1                       # what l.55 should have delivered


def test_pseudocode_without_zero_grad_adds_inner_and_outer_gradient_in_each_copy():
    """l.41, l.55: both gradients end in one grad; a new copy starts without any."""
    program, theta = pseudo_first_task(steps=False)
    both = sum(central_difference(lambda x: program.loss(x, which), theta)
               for which in (PSEUDO_D, PSEUDO_D2))
    assert torch.allclose(program.model.flat(lambda p: p.grad), both, atol=1e-7)
    assert all(p.grad is None for p in copy.deepcopy(program.model).parameters())


def test_pseudocode_optimizer_step_alone_cuts_the_graph():
    """Second cause: with no copy, l.55's gradient has J = I and is taken at a moved θ.

    And it is added to the inner gradient of l.41, since nothing sets grad to zero.
    """
    program, theta = pseudo_first_task(copies=False)
    moved = program.meta.flat()                          # θ itself is gone: θ′ is there
    inner = central_difference(lambda x: program.loss(x, PSEUDO_D), theta)
    outer = central_difference(lambda x: program.loss(x, PSEUDO_D2), moved)
    assert torch.allclose(moved, theta - program.ALPHA * inner, atol=1e-8)
    assert torch.allclose(program.meta.flat(lambda p: p.grad), inner + outer, atol=1e-7)
    data, alpha = program.trajectories(PSEUDO_D), program.ALPHA * program.RUN_LENGTH
    t = theta.clone().requires_grad_()                     # mean over H in place of sum
    theta_prime = mt.adapt(program.POLICY, t, [data], alpha, create_graph=True)
    assert torch.allclose(theta_prime, moved)
    true = torch.autograd.grad(program.loss(theta_prime, PSEUDO_D2), t)[0]
    print("J = I, and not Jᵀ: off by", mdp_relative(outer, true))
    assert mdp_relative(outer, true) > 0.05
    with pytest.raises(ValueError, match="non-leaf"):      # nor can it be given a graph
        torch.optim.SGD([theta.requires_grad_() * 1.0], lr=0.1)


def test_pseudocode_optimizer_made_once_never_moves_the_copies():
    """`self.optim` over meta's parameters, read literally: each copy's θ′ stays θ."""
    program = PseudoMaml()
    optim = torch.optim.SGD(program.meta.parameters(), lr=0.1)
    theta = program.meta.flat()
    program.model = copy.deepcopy(program.meta)
    (-program.sample_trajectories(program.tasks[0], program.K).mean()).backward()
    optim.step()
    assert program.model.flat(lambda p: p.grad).norm() > 0.1
    assert torch.equal(program.model.flat(), theta) and torch.equal(
        program.meta.flat(), theta)


def test_pseudocode_second_iteration_runs_backward_through_a_freed_graph():
    """l.30-31 outside the loop: with l.60-66 left out, iteration 2 fails at l.55."""
    program = PseudoMaml()
    program.trpo = lambda: None
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        program.train_maml(iterations=2)
    assert len(program.updated_model_reward) == 2 * len(program.tasks)
    program = PseudoMaml()                                     # emptied, it goes on
    program.trpo = lambda: [x.clear() for x in (
        program.kl_div, program.updated_model_reward)]
    program.train_maml(iterations=2)


def test_pseudocode_mean_of_a_list_is_an_error_and_of_a_tensor_one_per_task():
    """l.60: a list has no mean; stacked, axis 1 leaves M numbers, and so M Hessians."""
    program = PseudoMaml()
    with pytest.raises(AttributeError, match="'list' object has no attribute 'mean'"):
        program.train_maml(iterations=1)
    per_task = torch.stack(program.kl_div).flatten(1).mean(axis=1)
    assert per_task.shape == (len(program.tasks),)
    with pytest.raises(RuntimeError, match="scalar outputs"):
        torch.autograd.grad(per_task, list(program.meta.parameters()))


def test_pseudocode_names_that_do_not_exist_fail_at_once():
    """l.48: no torch.kl_divergence; no _distrib in meta, and l.36 cannot copy one."""
    assert not hasattr(torch, "kl_divergence")
    program = PseudoMaml()
    assert not hasattr(program.meta, "_distrib")         # meta never acts: l.8 is model
    program.meta._distrib = program.meta(np.zeros((1, 2)))
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(program.meta)


def test_pseudocode_reward_of_a_sampled_action_carries_no_graph():
    """l.10, l.54: a reward is a number; without log π nothing is left to derive."""
    program = PseudoMaml()
    program.model = copy.deepcopy(program.meta)
    with_score = program.sample_trajectories(program.tasks[0], program.K)
    assert with_score.requires_grad
    mean_reward = torch.stack([torch.tensor(sum(r for _, _, r in episode))
                               for episode in program.record]).mean()
    assert not mean_reward.requires_grad
    with pytest.raises(RuntimeError, match="does not require grad"):
        (-mean_reward).backward()


def test_pseudocode_inverse_times_meta_grad_is_a_matrix():
    """l.56, l.62: meta_grad is the loss, a number; inverse(H)*it is P×P, no step."""
    program, theta = pseudo_first_task()
    assert program.meta_grad.shape == ()
    hessian = torch.eye(len(theta), dtype=torch.float64)
    assert (torch.inverse(hessian) * program.meta_grad).shape == (19, 19)
    gradient = program.model.flat(lambda p: p.grad)
    assert torch.linalg.solve(hessian, gradient).shape == (19,)
    assert (torch.inverse(hessian) * gradient).shape == (19, 19)       # `*` broadcasts


def test_pseudocode_kl_is_not_zero_and_its_hessian_is_not_the_metric():
    """l.48: KL(θ′ ‖ θ) > 0, its slope is not 0, its Hessian in θ is not JᵀFJ.

    Held against mt's KL(old adapted ‖ new adapted): 0, slope 0, Hessian JᵀFJ.
    """
    program, theta = pseudo_first_task()
    assert all((kl > 1e-3).all() for kl in program.kl_div)
    policy, alpha = program.POLICY, program.ALPHA * program.RUN_LENGTH
    inner, outer = program.trajectories(PSEUDO_D), program.trajectories(PSEUDO_D2)
    theta_prime = mt.adapt(policy, theta, [inner], alpha, False).detach()
    assert torch.allclose(theta_prime, program.model.flat())

    def kl(phi, psi):
        p, q = (torch.distributions.Normal(d.mean, d.log_std.exp()) for d in (
            policy.distribution(x, outer.obs) for x in (phi, psi)))
        return torch.distributions.kl_divergence(p, q).sum(-1).mean()

    def adapted(t):
        return mt.adapt(policy, t, [inner], alpha, t.requires_grad)
    hessian = torch.autograd.functional.hessian
    J = torch.autograd.functional.jacobian(adapted, theta)
    F = hessian(lambda phi: kl(theta_prime, phi), theta_prime)
    metric = J.T @ F @ J
    readings = {"as written, θ′ a constant": lambda t: kl(theta_prime, t),
                "θ′ as a function of θ": lambda t: kl(adapted(t), t)}
    for name, k in readings.items():
        slope = torch.autograd.functional.jacobian(k, theta)
        off = mdp_relative(hessian(k, theta), metric)
        print(f"{name}: Hessian off by {off:.2f}")
        assert k(theta) > 1e-3 and slope.norm() > 0.01
        assert off > 0.1, name
    data = mt.TaskData([inner], outer, policy.distribution(theta_prime, outer.obs))

    def ours(t):
        return mt.surrogate_and_kl(policy, t, data, alpha)[1]
    assert ours(theta) == 0
    assert torch.autograd.functional.jacobian(ours, theta).norm() < 1e-12
    assert mdp_relative(hessian(ours, theta), metric) < 1e-10


# %% The KL's Hessian: where the third derivative is, and what each product leaves out
#
# k(θ) = κ(θ′(θ)), κ(φ) = KL(π_old ‖ π_φ) averaged over D′. The oracle is written here a
# second time, from one flat vector up: network, log-density, inner loss, inner step (by
# torch.func, where the file uses torch.autograd), KL. S 3, A 2, hidden 5 and 4, K 6,
# H 7; P = 56, so that every P × P (and P × P × P) derivative can be had in full.


HESS_SIZES, HESS_ALPHA = (3, 5, 4, 2), 0.3


def hess_gaussian(theta, obs, activation):
    """π_θ on rows of observations (N, S), as torch.distributions has it."""
    x, at = obs, 0
    for layer, (n_in, n_out) in enumerate(zip(HESS_SIZES, HESS_SIZES[1:])):
        weight = theta[at:at + n_in * n_out].reshape(n_out, n_in)
        bias = theta[at + n_in * n_out:at + n_in * n_out + n_out]
        at += n_in * n_out + n_out
        x = x @ weight.T + bias
        if layer < len(HESS_SIZES) - 2:
            x = {"tanh": torch.tanh, "relu": torch.relu}[activation](x)
    return torch.distributions.Normal(x, theta[at:].exp().expand_as(x),
                                      validate_args=False)


def hess_rows(data):
    """The N steps that happened: obs (N, S), act (N, A), adv (N,)."""
    there = data.mask.bool()
    return data.obs[there], data.act[there], data.adv[there]


def hess_problem(inner_steps=2, activation="tanh", seed=0, K=6, H=7):
    """Random D and D′, and θ′, L, K, k written out without maml_trpo."""
    rng = np.random.default_rng([7, seed])
    S, A = HESS_SIZES[0], HESS_SIZES[-1]
    policy = mt.GaussianPolicy(S, A, HESS_SIZES[1:-1], activation, init_std=0.7)

    def trajectories():
        mask = np.ones((K, H))
        mask[0, H - 3:], mask[1, H - 1:] = 0, 0
        return mt.Trajectories(*(torch.tensor(x) for x in (
            rng.standard_normal((K, H, S)), rng.standard_normal((K, H, A)),
            rng.standard_normal((K, H)), mask, rng.standard_normal((K, H)))))

    theta = policy.init(torch.Generator().manual_seed(seed), torch.float64)
    theta = theta + 0.3 * torch.tensor(rng.standard_normal(theta.shape))
    inner, outer = [trajectories() for _ in range(inner_steps)], trajectories()

    def loss(i):                                             # φ ↦ L_i(φ)
        obs, act, adv = hess_rows(inner[i])
        return lambda phi: -(hess_gaussian(phi, obs, activation).log_prob(act).sum(1)
                             * adv).mean()

    def theta_prime(t, steps=inner_steps):
        for i in range(steps):
            t = t - HESS_ALPHA * torch.func.grad(loss(i))(t)
        return t

    obs = hess_rows(outer)[0]
    adapted = theta_prime(theta).detach()
    normal_old = hess_gaussian(adapted, obs, activation)

    def K_of(phi):
        return torch.distributions.kl_divergence(
            normal_old, hess_gaussian(phi, obs, activation)).sum(1).mean()

    data = mt.TaskData(inner, outer, policy.distribution(adapted, outer.obs))
    return SimpleNamespace(
        policy=policy, theta=theta, data=data, activation=activation, loss=loss,
        obs=obs, theta_prime=theta_prime, K=K_of, k=lambda t: K_of(theta_prime(t)),
        P=len(theta), kl=lambda t: mt.surrogate_and_kl(policy, t, data, HESS_ALPHA)[1],
        away=theta + 0.15 * torch.tensor(rng.standard_normal(theta.shape)),
        v=torch.tensor(rng.standard_normal(theta.shape)))


def hess_dense(function, theta):
    """∇²function, P × P."""
    return torch.autograd.functional.hessian(function, theta, vectorize=True)


def hess_columns(product, P, every=1):
    """The matrix of v ↦ product(v), or each `every`-th of its columns."""
    return torch.stack([product(e) for e in torch.eye(P, dtype=torch.float64)[::every]],
                       dim=1)


def hess_jacobian(p, theta, steps=None):
    """J = ∂θ′/∂θ, P × P, of the first `steps` inner steps (default: all)."""
    steps = len(p.data.inner) if steps is None else steps
    return torch.autograd.functional.jacobian(lambda t: p.theta_prime(t, steps), theta,
                                              vectorize=True)


def hess_nodes(A):
    """Points z (3ᴬ, A) and weights (3ᴬ,): E over N(0, I) of polynomials to degree 5.

    Gauss and Hermite's three points 0, ±√3: an expectation over actions by enumeration.
    """
    points = ((0.0, 2 / 3), (math.sqrt(3), 1 / 6), (-math.sqrt(3), 1 / 6))
    picks = list(itertools.product(points, repeat=A))
    return (torch.tensor([[z for z, _ in pick] for pick in picks], dtype=torch.float64),
            torch.tensor([math.prod(w for _, w in pick) for pick in picks],
                         dtype=torch.float64))


def hess_fisher(p, phi):
    """F = E[score·scoreᵀ] over D′'s states and, exactly, over π_φ's actions: (P, P)."""
    nodes, weights = hess_nodes(HESS_SIZES[-1])
    fisher = torch.zeros(p.P, p.P, dtype=torch.float64)
    normal = hess_gaussian(phi, p.obs, p.activation)
    for z, weight in zip(nodes, weights):
        act = (normal.mean + normal.stddev * z).detach()
        scores = torch.autograd.functional.jacobian(                           # (N, P)
            lambda f, act=act: hess_gaussian(
                f, p.obs, p.activation).log_prob(act).sum(1), phi, vectorize=True)
        fisher += weight * scores.T @ scores / len(scores)
    return fisher


def hess_third(function, phi):
    """All third derivatives of a function, (P, P, P), symmetric in the three."""
    with warnings.catch_warnings():        # torch's forward mode complains of itself
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.func.jacfwd(torch.func.hessian(function))(phi)


def hess_second_of_theta_prime(p, theta):
    """∇²θ′_j for every j, (P, P, P), from third derivatives of the inner losses alone.

    One step: −α ∂_j∇²L. A second step adds its own, seen through the first step's J₁:
    ∇²θ′_j = J₁ᵀ(−α ∂_j∇²L₂)J₁ + Σ_i (J₂)_ji (−α ∂_i∇²L₁).
    """
    phi, J = theta, torch.eye(p.P, dtype=torch.float64)
    second = torch.zeros(p.P, p.P, p.P, dtype=torch.float64)
    for i in range(len(p.data.inner)):
        step_J = torch.eye(p.P) - HESS_ALPHA * hess_dense(p.loss(i), phi)
        third = -HESS_ALPHA * hess_third(p.loss(i), phi)
        second = (torch.einsum("jab,ac,bd->jcd", third, J, J)
                  + torch.einsum("ji,icd->jcd", step_J, second))
        J, phi = step_J @ J, phi - HESS_ALPHA * torch.func.grad(p.loss(i))(phi)
    return second


def hess_gap(a, b):
    """Relative distance of two vectors or matrices."""
    return ((a - b).norm() / b.norm()).item()


def hess_order(steps, errors):
    """n in error ∝ stepⁿ: the slope on logarithmic axes."""
    return np.polyfit(np.log(steps), np.log(errors), 1)[0]


@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_kl_hessian_at_theta_old_equals_jacobian_fisher_jacobian_by_three_routes(
        activation):
    """∇²k = JᵀFJ at θ_old: by autograd's hessian, by dense J and F, by the products."""
    p = hess_problem(activation=activation)
    assert p.P == 56 and len({*HESS_SIZES, 6, 7}) == 6
    hessian = hess_dense(p.k, p.theta)
    J, F = hess_jacobian(p, p.theta), hess_fisher(p, p.theta_prime(p.theta))
    assert hess_gap(J.T @ F @ J, hessian) < 1e-12
    assert hess_gap(J @ F @ J.T, hessian) > 0.01          # the transpose matters
    grad = lambda t: mt.gradient(p.kl, t)                                   # noqa: E731
    for tolerance, every, product in (
            (1e-12, 1, lambda v: mt.double_backprop_product(p.kl, p.theta, v)),
            (1e-12, 1, lambda v: mt.gauss_newton_product(p.policy, p.theta, p.data, v,
                                                         HESS_ALPHA)),
            (1e-5, 5, lambda v: mt.hessian_vector_product(grad, p.theta, v, 1e-6)),
            (1e-8, 5, lambda v: mt.hessian_vector_product(grad, p.theta, v, 1e-5,
                                                          symmetric=True))):
        columns = hess_columns(product, p.P, every)
        assert hess_gap(columns, hessian[:, ::every]) < tolerance


def test_kl_hessian_at_theta_old_is_symmetric_positive_and_no_bigger_than_its_samples():
    """Symmetric, no negative eigenvalue, and rank ≤ samples × A + A, below P if few."""
    for K, samples in ((6, 38), (2, 10)):
        p = hess_problem(K=K)
        assert len(p.obs) == samples
        hessian = hess_columns(lambda v: mt.gauss_newton_product(
            p.policy, p.theta, p.data, v, HESS_ALPHA), p.P)
        assert hess_gap(hessian.T, hessian) < 1e-12
        eigenvalues = torch.linalg.eigvalsh((hessian + hessian.T) / 2)
        assert eigenvalues.min() > -1e-12 * eigenvalues.max()
        rank = int((eigenvalues > 1e-10 * eigenvalues.max()).sum())
        assert rank <= 2 * samples + 2 and (K == 6 or rank < p.P / 2)


@pytest.mark.parametrize("inner_steps", [1, 2])
def test_jacobian_is_the_product_of_its_steps_and_symmetric_only_for_one(inner_steps):
    """J = J₂J₁, J_i = I − α∇²L_i at θ_i: each is symmetric, their product is not."""
    p = hess_problem(inner_steps)
    J = torch.autograd.functional.jacobian(
        lambda t: mt.adapt(p.policy, t, p.data.inner, HESS_ALPHA, True), p.theta)
    product = torch.eye(p.P, dtype=torch.float64)
    for i in range(inner_steps):
        L_hessian = hess_dense(p.loss(i), p.theta_prime(p.theta, i))
        product = (torch.eye(p.P) - HESS_ALPHA * L_hessian) @ product
    assert hess_gap(J, product) < 1e-12
    asymmetry = hess_gap(J.T, J)
    assert asymmetry < 1e-12 if inner_steps == 1 else asymmetry > 0.01


def test_difference_products_converge_with_order_one_and_two():
    """Error O(ε) one-sided, O(ε²) symmetric: slopes over seven steps; tanh, float64.

    At θ_old without ∇k(θ_old), elsewhere with it.
    """
    p = hess_problem()
    grad = lambda t: mt.gradient(p.kl, t)                                   # noqa: E731
    steps = np.geomspace(1e-3, 3e-2, 7)
    for theta, at_theta in ((p.theta, None), (p.away, grad(p.away))):
        exact = hess_dense(p.k, theta) @ p.v
        for symmetric, order in ((False, 1), (True, 2)):
            errors = [hess_gap(mt.hessian_vector_product(
                grad, theta, p.v, step, at_theta, symmetric), exact) for step in steps]
            assert abs(hess_order(steps, errors) - order) < 0.1


def test_difference_product_costs_one_gradient_one_sided_and_two_symmetric():
    """∇k(θ_old) = 0 saves a gradient: ∇k is evaluated once, never at θ_old itself."""
    p, asked = hess_problem(), []

    def grad(t):
        asked.append((t - p.theta).norm().item())
        return mt.gradient(p.kl, t)

    mt.hessian_vector_product(grad, p.theta, p.v, 0.01)
    assert asked == pytest.approx([0.01])
    mt.hessian_vector_product(grad, p.theta, p.v, 0.01, symmetric=True)
    assert asked[1:] == pytest.approx([0.01, 0.01])


def hess_point2d(activation, dtype=torch.float64, inner_steps=1, seed=0, **changes):
    """Episodes of point2d with a fresh θ: config, policy, θ, TaskData."""
    config = mt.Config(**{**dict(
        hidden=(8, 6), rollouts=4, horizon=9, activation=activation, workers=1,
        inner_steps=inner_steps), **changes})
    family = mt.TASKS["point2d"]
    policy = mt.make_policy(family, config)
    theta = policy.init(torch.Generator().manual_seed(seed), dtype)
    data = mt.sample_task_data(policy, theta, family, np.array([0.4, -0.3]), config,
                               (seed, 0))
    return config, policy, theta, data


@pytest.mark.parametrize("activation, moved, order", [
    ("relu", False, -1), ("tanh", False, 1), ("relu", True, 1)])
def test_difference_product_fails_at_initial_kinks_but_not_with_tanh_or_moved_biases(
        activation, moved, order):
    """At zero biases every episode's first sample lies on every ReLU's kink.

    There the one-sided error *grows* as 1/step, in float64 too. With tanh, or once the
    biases have moved, it falls with the step.
    """
    config, policy, theta, data = hess_point2d(activation)
    if moved:
        theta = theta + 0.1 * torch.randn(len(theta), dtype=torch.float64,
                                          generator=torch.Generator().manual_seed(1))
        phi = mt.adapt(policy, theta, data.inner, config.alpha, False).detach()
        data = mt.TaskData(data.inner, data.outer,
                           policy.distribution(phi, data.outer.obs))
    assert (data.inner[0].obs[:, 0] == 0).all()
    v = mt.meta_gradient(policy, theta, data, config.alpha)
    exact = mt.gauss_newton_product(policy, theta, data, v, config.alpha)
    steps = np.geomspace(1e-6, 1e-4, 5)
    errors = [hess_gap(mt.hessian_vector_product(lambda t: mt.gradient(
        lambda s: mt.surrogate_and_kl(policy, s, data, config.alpha)[1], t),
        theta, v, step), exact) for step in steps]
    assert abs(hess_order(steps, errors) - order) < 0.1
    assert errors[0] > 10 if order == -1 else errors[0] < 1e-4


def test_relu_difference_product_errs_from_the_first_crossed_kink_on():
    """Until a unit of a sample in D crosses its kink the error is O(ε); then a jump."""
    p = hess_problem(1, "relu")
    obs = hess_rows(p.data.inner[0])[0]

    def active(theta):                               # which unit of which sample is on
        x, at, on = obs, 0, []
        for n_in, n_out in zip(HESS_SIZES, HESS_SIZES[1:-1]):
            end = at + n_in * n_out
            x = x @ theta[at:end].reshape(n_out, n_in).T + theta[end:end + n_out]
            at, x = end + n_out, x.relu()
            on.append(x > 0)
        return torch.cat(on, 1)

    move = p.v / p.v.norm()
    low, high = 1e-9, 1.0                            # bisect for the first crossing
    for _ in range(60):
        middle = math.sqrt(low * high)
        same = torch.equal(active(p.theta + middle * move), active(p.theta))
        low, high = (middle, high) if same else (low, middle)
    exact = mt.gauss_newton_product(p.policy, p.theta, p.data, p.v, HESS_ALPHA)
    errors = [hess_gap(mt.hessian_vector_product(
        lambda t: mt.gradient(p.kl, t), p.theta, p.v, low * factor), exact)
        for factor in (0.25, 0.5, 0.999, 1.001)]
    assert abs(hess_order((0.25, 0.5, 0.999), errors[:3]) - 1) < 0.1
    assert errors[3] > 10 * errors[2]


@pytest.mark.parametrize("inner_steps, activation", [(2, "tanh"), (1, "relu")])
def test_kl_hessian_away_from_theta_old_is_the_sum_of_three_parts(inner_steps,
                                                                  activation):
    """∇²k = JᵀFJ + Jᵀ(∇²K − F)J + Σ_j ∂_jK ∇²θ′_j, the last two not zero.

    Each on its own: F from scores, ∇²K in φ alone, ∇²θ′_j from third derivatives of L.
    Double backprop has all three; the Gauss–Newton product leaves the third out.
    """
    p = hess_problem(inner_steps, activation)
    phi = p.theta_prime(p.away)
    J, F = hess_jacobian(p, p.away), hess_fisher(p, phi)
    K_hessian = hess_dense(p.K, phi)
    flat = J.T @ F @ J
    curved = J.T @ (K_hessian - F) @ J
    third = torch.einsum("j,jab->ab", torch.func.grad(p.K)(phi),
                         hess_second_of_theta_prime(p, p.away))
    whole = hess_dense(p.k, p.away)
    assert min(curved.norm(), third.norm()) > 0.01 * whole.norm()
    assert hess_gap(flat + curved + third, whole) < 1e-12
    double = hess_columns(lambda v: mt.double_backprop_product(p.kl, p.away, v), p.P)
    newton = hess_columns(lambda v: mt.gauss_newton_product(
        p.policy, p.away, p.data, v, HESS_ALPHA), p.P)
    assert hess_gap(double, whole) < 1e-12
    assert hess_gap(newton, flat + curved) < 1e-12
    assert hess_gap(double - newton, third) < 1e-10


def test_third_derivative_at_theta_old_is_not_zero_but_is_multiplied_by_zero():
    """∇²θ′_j ≠ 0 at θ_old; every ∂_jK = 0, exactly; double backprop adds nothing."""
    p = hess_problem()
    second = hess_second_of_theta_prime(p, p.theta)
    step = 1e-5                 # the same tensor, by differences of J in two directions
    for j in (0, 31):
        e = torch.zeros(p.P, dtype=torch.float64).index_fill(0, torch.tensor([j]), step)
        slope = hess_jacobian(p, p.theta + e) - hess_jacobian(p, p.theta - e)
        assert hess_gap(slope / (2 * step), second[:, :, j]) < 1e-6
    assert second.norm() > 0.1
    phi = mt.adapt(p.policy, p.theta, p.data.inner, HESS_ALPHA, False).detach()
    old = p.policy.distribution(phi, p.data.outer.obs)

    def K(f):
        new = p.policy.distribution(f, p.data.outer.obs)
        return mt.masked_mean(mt.kl_old_new(old, new), p.data.outer.mask)

    factors = mt.gradient(K, phi)                                              # ∂_jK
    assert (factors == 0).all()
    assert (torch.einsum("j,jab->ab", factors, second) == 0).all()
    double = mt.double_backprop_product(p.kl, p.theta, p.v)
    newton = mt.gauss_newton_product(p.policy, p.theta, p.data, p.v, HESS_ALPHA)
    assert hess_gap(double, newton) < 1e-12


@pytest.mark.parametrize("inner_steps", [1, 2])
@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_one_sided_difference_may_leave_out_a_gradient_that_is_zero_in_float32(
        inner_steps, activation):
    """∇k(θ_old) is 0.0 in every bit, if `old` comes from θ by the same operations.

    From a θ′ that is right only to rounding it is not, and a small step divides by it.
    """
    config, policy, theta, data = hess_point2d(activation, torch.float32, inner_steps,
                                               hidden=(40, 30), rollouts=20, horizon=30)

    def grad(data):
        return lambda t: mt.gradient(
            lambda s: mt.surrogate_and_kl(policy, s, data, config.alpha)[1], t)

    at_old = grad(data)(theta)
    assert at_old.dtype == torch.float32 and (at_old == 0.0).all()
    v = mt.meta_gradient(policy, theta, data, config.alpha)
    assert torch.equal(mt.hessian_vector_product(grad(data), theta, v),
                       mt.hessian_vector_product(grad(data), theta, v, 0.01, at_old))
    in_float64 = [mt.Trajectories(*(x.double() for x in vars(d).values()))
                  for d in data.inner]
    phi = mt.adapt(policy, theta.double(), in_float64, config.alpha, False).detach()
    rounded = mt.TaskData(data.inner, data.outer,
                          policy.distribution(phi.float(), data.outer.obs))
    assert grad(rounded)(theta).norm() > 0


def test_kl_directions_have_the_same_hessian_at_theta_old_and_differ_in_third_order():
    """KL(old‖new), KL(new‖old): equal Hessians at θ_old; the gap falls as (move)³."""
    p = hess_problem()

    def kl_new_old(t):
        phi = mt.adapt(p.policy, t, p.data.inner, HESS_ALPHA, True)
        new = p.policy.distribution(phi, p.data.outer.obs)
        return mt.masked_mean(mt.kl_old_new(new, p.data.old), p.data.outer.mask)

    there = hess_dense(p.k, p.theta)
    assert hess_gap(hess_dense(kl_new_old, p.theta), there) < 1e-12
    assert hess_gap(hess_dense(kl_new_old, p.away), hess_dense(p.k, p.away)) > 0.01
    steps = np.geomspace(1e-3, 1e-2, 5)
    move = p.v / p.v.norm()
    values, gaps = [], []
    for step in steps:
        both = [k(p.theta + step * move).item() for k in (p.kl, kl_new_old)]
        values.append(both[0])
        gaps.append(abs(both[0] - both[1]))
    assert abs(hess_order(steps, gaps) - 3) < 0.1
    assert abs(hess_order(steps, values) - 2) < 0.1       # the KL itself: ½ move² vᵀHv


def hess_sampled_kl(p, act, weights=None):
    """φ_old, and φ ↦ mean of log π_old(a) − log π_φ(a) over act (n, N, A)."""
    obs = p.obs.expand(len(act), *p.obs.shape)
    weights = torch.full((len(act),), 1 / len(act)) if weights is None else weights
    phi_old = mt.adapt(p.policy, p.theta, p.data.inner, HESS_ALPHA, False).detach()
    log_old = p.policy.distribution(phi_old, obs).log_prob(act)                # (n, N)
    return phi_old, lambda phi: weights.to(act) @ (
        log_old - p.policy.distribution(phi, obs).log_prob(act)).mean(1)


def hess_actions(p, z):
    """Actions of π_old from standard normal z (n, N or 1, A): (n, N, A)."""
    normal = hess_gaussian(p.theta_prime(p.theta).detach(), p.obs, p.activation)
    return (normal.mean + normal.stddev * z).detach()


def test_sampled_kl_has_exact_value_but_gradient_and_hessian_only_in_expectation():
    """mean(log π_old − log π_new) at θ_old: 0; a gradient ∝ 1/√n; a Hessian near F.

    The expectation over actions is taken twice: exactly, by enumerating a quadrature's
    nodes (gradient 0, Hessian F), and by large samples (both errors fall as 1/√n).
    """
    p = hess_problem()
    F = hess_fisher(p, p.theta_prime(p.theta))
    nodes, weights = hess_nodes(HESS_SIZES[-1])
    phi, expected = hess_sampled_kl(p, hess_actions(p, nodes[:, None, :]), weights)
    assert mt.gradient(expected, phi).abs().max() < 1e-14
    assert hess_gap(hess_dense(expected, phi), F) < 1e-12

    sizes, gradients, hessians = (1, 10, 100), [], []
    for n in sizes:
        z = torch.randn(n, len(p.obs), HESS_SIZES[-1], dtype=torch.float64,
                        generator=torch.Generator().manual_seed(n))
        phi, sampled = hess_sampled_kl(p, hess_actions(p, z))
        assert sampled(phi).item() == 0.0
        # E|mean score|² = trace(F)/(number of independent actions)
        by_chance = math.sqrt(float(F.trace()) / (n * len(p.obs)))
        gradients.append(float(mt.gradient(sampled, phi).norm()) / by_chance)
        hessians.append(hess_gap(hess_dense(sampled, phi), F))
    assert all(0.3 < g < 3 for g in gradients)       # not 0: as large as chance says
    assert abs(hess_order(sizes, hessians) + 0.5) < 0.15 and hessians[0] > 0.05


def test_sampled_kl_brings_the_third_derivative_back():
    """Its gradient at θ_old is not 0, so its Hessian in θ is not Jᵀ(∇²K̂)J any more."""
    p = hess_problem()
    z = torch.randn(1, len(p.obs), HESS_SIZES[-1], dtype=torch.float64,
                    generator=torch.Generator().manual_seed(3))
    phi, K_hat = hess_sampled_kl(p, hess_actions(p, z))

    def k_hat(t):
        return K_hat(mt.adapt(p.policy, t, p.data.inner, HESS_ALPHA, True))

    J = hess_jacobian(p, p.theta)
    without = J.T @ hess_dense(K_hat, phi) @ J
    third = torch.einsum("j,jab->ab", mt.gradient(K_hat, phi),
                         hess_second_of_theta_prime(p, p.theta))
    whole = hess_columns(lambda v: mt.double_backprop_product(k_hat, p.theta, v), p.P)
    assert hess_gap(without, whole) > 0.01
    assert hess_gap(without + third, whole) < 1e-11


def test_line_search_differentiates_nothing_but_the_inner_loss(monkeypatch):
    """No third derivative in it, no second: a trial takes ∇L, a task and inner step."""
    config, policy, theta, data = hess_point2d("tanh", inner_steps=2, backtrack_steps=3)
    searching, orders = [], []
    grad, search = torch.autograd.grad, mt.backtrack_line_search

    def spy_grad(*args, create_graph=False, **kw):
        if searching:
            orders.append(create_graph)
        return grad(*args, create_graph=create_graph, **kw)

    def spy_search(evaluate, theta, full_step, before, max_kl, *how):
        searching.append(True)
        return search(evaluate, theta, full_step, before, -1.0, *how)   # all fail

    monkeypatch.setattr(torch.autograd, "grad", spy_grad)
    monkeypatch.setattr(mt, "backtrack_line_search", spy_search)
    _, stats = mt.trpo_meta_step(policy, theta, [data, data], config)
    assert stats["line_search_steps"] == 0
    assert orders == [False] * (3 * 2 * 2)              # trials × tasks × inner steps


class HessCountProducts(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts matrix products (n × n)·(n × samples), the work of the hidden layers."""

    def __init__(self, n):
        super().__init__()
        self.n, self.count = n, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            a, b = args[-2:]
            self.count += (*a.shape, b.shape[1]).count(self.n) >= 2
        return func(*args, **(kwargs or {}))


def hess_products(policy, theta, data, alpha, v):
    """Name → a function that computes it once, for one task and one inner step."""
    def kl(t):
        return mt.surrogate_and_kl(policy, t, data, alpha)[1]

    def kl_gradient(t):
        return mt.gradient(kl, t)

    return {
        "one plain gradient": lambda: mt.gradient(
            lambda t: mt.inner_loss(policy, t, data.inner[0]), theta),
        "meta-gradient": lambda: mt.meta_gradient(policy, theta, data, alpha),
        "one-sided difference": lambda: mt.hessian_vector_product(
            kl_gradient, theta, v),
        "symmetric difference": lambda: mt.hessian_vector_product(
            kl_gradient, theta, v, symmetric=True),
        "double backprop": lambda: mt.double_backprop_product(kl, theta, v),
        "Gauss–Newton": lambda: mt.gauss_newton_product(policy, theta, data, v, alpha),
    }


def test_products_cost_the_matrix_products_that_the_table_says():
    """100×100 products a sample (here 13×13), counted as torch carries them out."""
    config, policy, theta, data = hess_point2d("relu", torch.float32, hidden=(13, 13))
    v = mt.meta_gradient(policy, theta, data, config.alpha)
    counts = {}
    for name, function in hess_products(policy, theta, data, config.alpha, v).items():
        with HessCountProducts(13) as counter:
            function()
        counts[name] = counter.count
    assert counts == {
        "one plain gradient": 3, "meta-gradient": 12, "one-sided difference": 12,
        "symmetric difference": 24, "double backprop": 36, "Gauss–Newton": 24}


# %% The paper's locomotion tasks (Gymnasium's bodies, MuJoCo)

MJ_TASKS = ("cheetah-vel", "cheetah-dir", "ant-vel", "ant-dir")
ALL_TASKS = ("point2d", *MJ_TASKS)


def mj_envs(name, K):
    pytest.importorskip("mujoco")
    return mt.TASKS[name].make_envs(K).unwrapped


def mj_family(name):
    if name != "point2d":
        pytest.importorskip("mujoco")
    return mt.TASKS[name]


def mj_gymnasium(name):
    """Gymnasium's own environment, one copy, without its time limit."""
    return gym.make("Ant-v5" if name.startswith("ant") else "HalfCheetah-v5").unwrapped


def mj_reward(name, task, twin, info, action):
    """The authors' reward, from what Gymnasium's environment says of its step."""
    speed, cost = info["x_velocity"], sum(a * a for a in action)
    closeness = task * speed if name.endswith("dir") else -abs(speed - task)
    if name.startswith("cheetah"):
        return closeness - 0.05 * cost
    forces = sum(min(max(f, -1), 1) ** 2 for f in twin.data.cfrc_ext.ravel().tolist())
    bonus = 1.0 if name == "ant-vel" else 0.0
    return closeness + bonus - 0.005 * cost - 0.0005 * forces + 0.05


def mj_config(name, **changes):
    return mt.Config(**dict(task=name, iterations=1, meta_batch_size=3, rollouts=2,
                            horizon=7, hidden=(8, 9), cg_iterations=2, workers=1)
                     | changes)


@pytest.mark.parametrize("name", MJ_TASKS)
def test_walkers_match_gymnasium_step_by_step_over_whole_episodes(name):
    """Same first states from the same seeds, then the same states, observations, ends;
    rewards after the change of terms; rest after an early end, then the same new start."""
    K, H, seeds, task = 3, mt.TASKS[name].horizon, [11, 5, 2024], -1.0
    envs, ended = mj_envs(name, K), np.zeros(K, bool)
    twins = [mj_gymnasium(name) for _ in range(K)]
    obs, _ = envs.reset(seed=seeds, options={"task": np.array([task])})
    expected = [twin.reset(seed=s)[0] for twin, s in zip(twins, seeds)]
    np.testing.assert_array_equal(obs, np.stack(expected))
    assert obs.shape == (K, *twins[0].observation_space.shape)
    rng, ends = np.random.default_rng(0), 0
    for _ in range(H):
        actions = 0.8 * rng.standard_normal((K, *twins[0].action_space.shape))
        obs, reward, terminated, truncated, _ = envs.step(actions)
        for k, twin in enumerate(twins):
            a = np.clip(actions[k], -1, 1)
            if ended[k]:                                    # it rests until a reset
                o, r, done = twin._get_obs(), 0.0, True
            else:
                o, _, done, _, info = twin.step(a)
                r = mj_reward(name, task, twin, info, a)
            np.testing.assert_array_equal(obs[k], o)
            np.testing.assert_array_equal(envs.copies[k].qpos, twin.data.qpos)
            np.testing.assert_array_equal(envs.copies[k].qvel, twin.data.qvel)
            assert terminated[k] == done and not truncated[k]
            assert reward[k] == pytest.approx(r, rel=1e-12, abs=1e-12)
            ended[k] = done
        if ended.sum() > 1:                             # those two start anew, alone
            obs, _ = envs.reset(options={"reset_mask": ended})
            for k in range(K):
                o = twins[k].reset()[0] if ended[k] else twins[k]._get_obs()
                np.testing.assert_array_equal(obs[k], o)
            ends, ended = ends + 1, np.zeros(K, bool)
    assert (ends > 2) == name.startswith("ant")           # both ways were seen


@pytest.mark.parametrize("name, angles, speeds", [("cheetah-vel", 8, 9), ("ant-dir", 13, 14)])
def test_policy_sees_a_tenth_of_each_velocity_and_all_else_as_gymnasium_gives_it(
        name, angles, speeds):
    envs = mt.TASKS[name].make_envs(2)
    seen, _ = envs.reset(seed=[1, 2], options={"task": [1.0]})
    for _ in range(5):
        state = np.stack([d.qvel for d in envs.unwrapped.copies])
        raw = envs.unwrapped.observe(envs.unwrapped.read(envs.unwrapped._state))
        np.testing.assert_allclose(seen[:, angles:angles + speeds], state / 10, rtol=1e-12)
        np.testing.assert_array_equal(seen[:, :angles], raw[:, :angles])
        np.testing.assert_array_equal(seen[:, angles + speeds:], raw[:, angles + speeds:])
        seen = envs.step(np.full((2, envs.unwrapped.model.nu), 0.5))[0]


@pytest.mark.parametrize("name", ("cheetah-dir", "ant-vel"))
def test_a_walker_that_is_no_longer_finite_ends_and_rests_until_a_reset(name):
    envs = mj_envs(name, 3)
    envs.reset(seed=[1, 2, 3], options={"task": [1.0]})
    envs.copies[1].qvel[0] = np.nan
    actions = np.zeros((3, envs.model.nu))
    obs, reward, terminated, _, _ = envs.step(actions)
    assert terminated.tolist() == [False, True, False]
    assert reward[1] == 0 and np.isfinite(reward).all() and np.isfinite(obs).all()
    obs, reward, terminated, _, _ = envs.step(actions)
    assert terminated.tolist() == [False, True, False] and reward[1] == 0
    obs, _ = envs.reset(options={"reset_mask": terminated})
    assert not envs.step(actions)[2].any() and np.isfinite(obs).all()
    assert np.abs(obs[1]).sum() > 0 and np.isfinite(envs.copies[1].qpos).all()


@pytest.mark.parametrize("height, done", [
    (0.19, True), (0.2, False), (1.0, False), (1.01, True)])
def test_ant_episode_ends_outside_its_heights(height, done):
    envs = mj_envs("ant-dir", 2)
    envs.reset(seed=[1, 2], options={"task": [1.0]})

    def advance(d):                      # in place of the physics: where the step ends
        d.qpos[2] = height if d is envs.copies[1] else 0.6

    envs.advance = advance
    assert envs.step(np.zeros((2, 8)))[2].tolist() == [False, done]


def test_masks_of_ants_that_end_early_match_a_replay_in_gymnasium():
    """`task_rollout`'s episodes, replayed one by one from their seeds and actions."""
    envs, K, H, seeds = mj_envs("ant-vel", 5), 5, 40, []
    reset = envs.reset
    envs.reset = lambda **how: (seeds.extend(how["seed"]), reset(**how))[1]
    policy = mt.GaussianPolicy(105, 8, hidden=(7, 6))
    theta = policy.init(torch.Generator().manual_seed(0))
    data = mt.task_rollout(envs, policy, theta, [1.5], H, seed=(0, 1))
    twin, lengths = mj_gymnasium("ant-vel"), []
    for k in range(K):
        o, rewards, done = twin.reset(seed=seeds[k])[0], [], False
        while not done and len(rewards) < H:
            t = len(rewards)
            np.testing.assert_allclose(data.obs[k, t], o, rtol=1e-6)
            a = np.clip(data.act[k, t].double().numpy(), -1, 1)
            o, _, done, _, info = twin.step(a)
            rewards.append(mj_reward("ant-vel", 1.5, twin, info, a))
        n = len(rewards)
        assert data.mask[k].tolist() == [1.0] * n + [0.0] * (H - n)
        np.testing.assert_allclose(data.rew[k, :n], rewards, rtol=1e-5, atol=1e-5)
        for padding in (data.rew[k, n:], data.obs[k, n:], data.act[k, n:]):
            assert not padding.any()
        lengths.append(n)
    assert len(set(lengths)) > 2 and min(lengths) < H
    adv = mt.assign_credit(data, 0.99, 1.0).adv
    assert not adv[data.mask == 0].any()
    assert mt.masked_mean(adv, data.mask).item() == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("name", ALL_TASKS)
def test_same_seed_same_run_with_one_or_two_workers(name):
    """θ after an iteration, bit for bit; and another seed gives another θ."""
    family = mj_family(name)

    def run(**changes):
        fresh = dataclasses.replace(family, _cache=mt.threading.local())
        return mt.train_maml(mj_config(name, **changes), fresh)

    theta, rows = run()
    for workers in (1, 2):
        again, same = run(workers=workers)
        assert torch.equal(theta, again)
        assert [same[0][c] for c in ("return_pre", "return_post", "kl")] == [
            rows[0][c] for c in ("return_pre", "return_post", "kl")]
    assert not torch.equal(theta, run(seed=1)[0])


@pytest.mark.parametrize("name", ALL_TASKS)
def test_draws_do_not_depend_on_what_was_drawn_before(name):
    """Environments that were used before give the episodes that new ones give."""
    family, K = mj_family(name), 3
    config = mj_config(name, rollouts=K)
    policy = mt.make_policy(family, config)
    theta = policy.init(torch.Generator().manual_seed(0))
    used, new = family.make_envs(K), family.make_envs(K)
    task, other = family.sample_tasks(np.random.default_rng(0), 2)
    mt.task_rollout(used, policy, theta, other, 9, seed=(7, 7))
    first, second = (mt.task_rollout(envs, policy, theta, task, 7, seed=(0, 1))
                     for envs in (used, new))
    for name in ("obs", "act", "rew", "mask"):
        assert torch.equal(getattr(first, name), getattr(second, name))


@pytest.mark.parametrize("name", MJ_TASKS)
def test_every_task_copy_and_phase_has_its_own_noise(name):
    """First states and action noise: copies, tasks, phases, iterations all differ."""
    family, K = mj_family(name), 3
    config = mj_config(name, rollouts=K, horizon=2)
    policy = mt.make_policy(family, config)
    theta = policy.init(torch.Generator().manual_seed(0))
    task = family.test_tasks(1)[0]                  # the same task, drawn several times
    starts, noise = [], []
    for seed in ((0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0)):
        data = mt.sample_task_data(policy, theta, family, task, config, seed)
        inner, outer = data.inner[0], data.outer
        starts += inner.obs[:, 0].tolist() + outer.obs[:, 0].tolist()
        for episodes, old in ((inner, policy.distribution(theta, inner.obs)),
                              (outer, data.old)):
            noise += (episodes.act - old.mean)[:, 0].tolist()
    for rows in (np.array(starts), np.array(noise)):
        gaps = np.linalg.norm(rows[:, None] - rows, axis=-1) + np.eye(len(rows))
        assert len(rows) == 8 * K and gaps.min() > 1e-3
    spread = np.array(starts)[:, 1:5].std(0)        # uniform in ±0.1
    assert (0.01 < spread).all() and (spread < 0.2).all()


@pytest.mark.parametrize("name", MJ_TASKS)
def test_walkers_obey_gymnasiums_rules_for_seeds(name):
    envs = mj_envs(name, 3)
    a, _ = envs.reset(seed=5)                                    # means 5, 6, 7
    b, _ = envs.reset(seed=[7, 6, 5])
    np.testing.assert_array_equal(a, b[::-1])
    c, _ = envs.reset()                                          # goes on drawing
    assert not np.isclose(b, c).all(1).any()
    envs.reset(seed=[7, 6, 5])
    np.testing.assert_array_equal(c, envs.reset()[0])
    fresh, _ = mj_envs(name, 3).reset()                        # no seed: no fixed noise
    assert not np.isclose(fresh, mj_envs(name, 3).reset()[0]).all(1).any()


@pytest.mark.parametrize("name", ALL_TASKS)
def test_only_the_oracle_sees_the_task(name):
    """Same seeds and actions, two tasks: the same observations and other rewards."""
    family, K = mj_family(name), 3
    one, two = ([0.4, -0.3], [-0.2, 0.5]) if name == "point2d" else ([1.0], [-1.0])
    oracle = mt.with_task_observed(family)

    def observed(make_envs, task, steps=6):
        envs, rng = make_envs(K), np.random.default_rng(0)
        envs.reset(seed=[8, 9, 10], options={"task": two})       # an earlier task
        obs, rewards = [envs.reset(seed=[1, 2, 3], options={"task": task})[0]], []
        for _ in range(steps):
            act = 0.3 * rng.standard_normal((K, *envs.single_action_space.shape))
            o, r, *_ = envs.step(act)
            obs.append(o), rewards.append(r)
        return np.array(obs), np.array(rewards), envs

    obs, reward, envs = observed(family.make_envs, one)
    obs_two, reward_two, _ = observed(family.make_envs, two)
    np.testing.assert_array_equal(obs, obs_two)
    assert (np.abs(reward - reward_two) > 1e-6).all()
    for task in (one, two):
        seen, rewards, wrapped = observed(oracle.make_envs, task)
        S, n = obs.shape[-1], len(task)
        np.testing.assert_array_equal(seen[..., :S], obs)
        np.testing.assert_array_equal(
            seen[..., S:], np.broadcast_to(np.array(task, seen.dtype), (7, K, n)))
        np.testing.assert_array_equal(rewards, reward if task is one else reward_two)
        assert wrapped.single_observation_space.shape == (S + n,)
        assert wrapped.observation_space.shape == (K, S + n)
    assert (oracle.name, oracle.horizon) == (family.name, family.horizon)


@pytest.mark.parametrize("name, low, high", [("cheetah-vel", 0, 2), ("ant-vel", 0, 3)])
def test_velocity_tasks_are_uniform_and_the_held_out_ones_fixed(name, low, high):
    family = mt.TASKS[name]
    drawn = family.sample_tasks(np.random.default_rng(0), 4000)
    assert drawn.shape == (4000, 1) and low <= drawn.min() and drawn.max() <= high
    quarters = np.histogram(drawn, 4, (low, high))[0]
    assert (abs(quarters - 1000) < 150).all()
    held_out = family.test_tasks(40)
    np.testing.assert_array_equal(held_out[:7], family.test_tasks(7))
    assert len(np.unique(held_out)) == 40 and held_out.max() <= high
    assert abs(held_out.mean() - high / 2) < high / 8


@pytest.mark.parametrize("name", ("cheetah-dir", "ant-dir"))
def test_direction_tasks_are_two_and_alternate_at_evaluation(name):
    family = mt.TASKS[name]
    drawn = family.sample_tasks(np.random.default_rng(0), 1000)
    assert drawn.shape == (1000, 1) and set(drawn.ravel()) == {-1, 1}
    assert abs(drawn.mean()) < 0.1
    assert family.test_tasks(5).tolist() == [[1], [-1], [1], [-1], [1]]


@pytest.mark.parametrize("name", MJ_TASKS)
def test_locomotion_presets_are_the_papers_where_it_states_them_and_ours_elsewhere(name):
    config = mt.Config(task=name)
    assert (config.meta_batch_size, config.horizon, config.alpha) == (40, 200, 0.1)
    assert config.rollouts == (40 if name == "ant-dir" else 20)
    assert (config.max_kl, config.gamma, config.init_std) == (0.05, 0.95, 0.5)
    assert mt.TASKS[name].horizon == 200 and mt.TASKS[name].threads


@pytest.mark.parametrize("task", ([1.0, 2.0], [np.nan], 1.0, []))
def test_a_task_that_is_no_task_is_refused(task):
    with pytest.raises(mt.BadInput, match="HalfCheetahVel"):
        mj_envs("cheetah-vel", 2).reset(seed=[1, 2], options={"task": task})


def test_point2d_needs_no_mujoco_and_the_others_say_what_to_install(tmp_path):
    small = ("--iterations 1 --meta-batch-size 2 --rollouts 2 --horizon 5 --workers 1 "
             "--eval-tasks 4 --eval-episodes 2 --eval-steps 1 --hidden 5,5").split()
    program = (
        "import sys; sys.modules['mujoco'] = None; import maml_trpo as mt\n"
        f"small = {small!r}\n"
        f"out = {str(tmp_path)!r}\n"
        "a = mt.main(['--task', 'point2d', '--out', out + '/a', *small])\n"
        "b = mt.main(['--task', 'cheetah-dir', '--out', out + '/b', *small])\n"
        "sys.exit(10 * a + b)")
    done = subprocess.run([sys.executable, "-c", program], cwd=HERE, text=True,
                          capture_output=True)
    assert done.returncode == 2, done.stderr
    assert (tmp_path / "a" / "evaluation.csv").exists()
    assert done.stderr.count("\n") == 1 and "pip install" in done.stderr
    assert not (tmp_path / "b" / "checkpoint.pt").exists()


def mj_frames(path):
    """The pictures of a GIF: (frames, height, width, 3)."""
    from PIL import Image
    with Image.open(path) as gif:
        frames = []
        for t in range(gif.n_frames):
            gif.seek(t)
            frames.append(np.asarray(gif.convert("RGB")))
        return np.array(frames)


@pytest.mark.parametrize("name", ("point2d", "cheetah-dir", "ant-vel"))
def test_render_draws_an_episode_before_and_one_after_adaptation(name, tmp_path):
    family, K = mj_family(name), 3
    if name != "point2d":
        try:
            mt.walker_camera(family.make_envs(1).unwrapped.XML, 32, 24)
        except mt.BadInput as error:
            pytest.skip(str(error))
    config = mj_config(name, eval_episodes=K, eval_alpha=3.0, horizon=6)
    theta = mt.make_policy(family, config).init(torch.Generator().manual_seed(0))
    mt.render_gif(tmp_path / "a.gif", config, theta)
    frames = mj_frames(tmp_path / "a.gif").astype(int)
    assert list(tmp_path.iterdir()) == [tmp_path / "a.gif"]
    assert frames.ndim == 4 and frames.shape[0] == 3 and frames.shape[1] == 240
    left, right = np.split(frames[:, 20:], 2, axis=2)           # below the titles
    assert np.abs(left[-1] - left[0]).sum() > 0                  # something moves
    assert np.abs(left[-1] - right[-1]).sum() > 0                # and adapts
    config = dataclasses.replace(config, eval_alpha=0.0)       # no step, no difference
    mt.render_gif(tmp_path / "b.gif", config, theta)
    left, right = np.split(mj_frames(tmp_path / "b.gif").astype(int)[:, 20:], 2, axis=2)
    assert np.abs(left - right).mean() < 2


def test_render_without_a_renderer_says_so_in_one_sentence(monkeypatch):
    pytest.importorskip("mujoco")
    for backend in ("egl", "osmesa", "glfw"):
        monkeypatch.setitem(sys.modules, f"mujoco.{backend}", None)
    with pytest.raises(mt.BadInput, match="install EGL or OSMesa"):
        mt.walker_camera("ant.xml")


# %% What a careless port gets wrong: settings, seeds, states that are passed on


def dense_meta_step(policy, theta, data, config):
    """−√(2δ/xᵀHx)·x, written out: g and H of the mean over tasks by autograd, P × P."""
    def adapted(t, inner):
        for d in inner:
            log_prob = policy.distribution(t, d.obs).log_prob(d.act)
            if config.inner_loss == "ratio":
                log_prob = (log_prob - log_prob.detach()).exp()
            loss = -(log_prob * d.adv * d.mask).sum() / d.mask.sum()
            grad = torch.autograd.grad(loss, t, create_graph=True)[0]
            t = t - config.alpha * (grad.detach() if config.first_order else grad)
        return t

    def mean(each):
        def function(t):
            total = 0
            for d in data:
                phi = adapted(t, d.inner)
                new = torch.distributions.Normal(
                    policy.distribution(phi, d.outer.obs).mean, phi[-2:].exp())
                old = torch.distributions.Normal(
                    d.old.mean.detach(), d.old.log_std.detach().exp())
                x = each(old, new, d.outer)
                total += (x * d.outer.mask).sum() / d.outer.mask.sum() / len(data)
            return total
        return function

    t = theta.clone().requires_grad_()
    g = torch.autograd.grad(mean(lambda old, new, d: -d.adv * (
        new.log_prob(d.act) - old.log_prob(d.act)).sum(-1).exp())(t), t)[0]
    H = torch.autograd.functional.hessian(mean(
        lambda old, new, d: torch.distributions.kl_divergence(old, new).sum(-1)), theta)
    H = H + config.damping * torch.eye(len(theta))
    x = torch.linalg.solve(H, g)
    return -math.sqrt(2 * config.max_kl / float(x @ H @ x)) * x


@pytest.mark.parametrize("hvp", ["double-backprop", "gauss-newton"])
@pytest.mark.parametrize("changes", [dict(first_order=True), dict(inner_loss="ratio")])
def test_meta_step_of_first_order_and_of_ratio_equals_dense_solve(hvp, changes):
    """Gradient and product both heed --first-order and --inner-loss."""
    config = tiny_config(hvp=hvp, hidden=(4,), damping=0.2, cg_iterations=60, alpha=1.0,
                         cg_tolerance=1e-22, activation="tanh", **changes)
    policy, theta, data = sampled_problem(config)
    full = dense_meta_step(policy, theta, data, config)
    other = dense_meta_step(policy, theta, data, dataclasses.replace(
        config, first_order=False, inner_loss="log-prob"))
    assert (full - other).norm() > 0.02 * full.norm(), "the test shows too little"
    new, stats = mt.trpo_meta_step(policy, theta, data, config)
    j = stats["line_search_steps"] - 1
    assert j >= 0
    assert (new - theta - 0.8**j * full).norm() < 1e-6 * full.norm()


@pytest.mark.parametrize("changes", [dict(first_order=True), dict(inner_loss="ratio")])
def test_difference_product_has_the_estimators_J_on_its_left_only(changes):
    """A difference moves θ′ by its true J, log π's: the product is J_estᵀ F J.

    For log π that is JᵀFJ. For the ratio, and with --first-order, it is not symmetric
    and not what the two exact products compute.
    """
    config = tiny_config(hidden=(4,), alpha=1.0, activation="tanh", fd_step=1e-6,
                         meta_batch_size=1, hvp="finite-difference", **changes)
    policy, theta, (data,) = sampled_problem(config)
    P = len(theta)

    def jacobian(first_order, estimator):
        return torch.eye(P).double() if first_order else torch.autograd.functional.jacobian(
            lambda t: mt.adapt(policy, t, data.inner, 1.0, True, estimator), theta)

    phi = mt.adapt(policy, theta, data.inner, 1.0, False).detach()
    F = torch.autograd.functional.hessian(
        lambda t: mt.mean_kl(policy.distribution(t, data.outer.obs), data), phi)
    true, own = jacobian(False, "log-prob"), jacobian(config.first_order, config.inner_loss)
    product = mt.kl_hessian_product(policy, theta, [data], config)
    got = torch.stack([product(e) for e in torch.eye(P).double()], dim=1)
    assert (got - own.T @ F @ true).norm() < 1e-4 * got.norm()
    assert (got - own.T @ F @ own).norm() > 0.02 * got.norm()


def test_meta_step_takes_the_first_trial_within_max_kl_by_the_given_ratio(monkeypatch):
    """x = g and xᵀHx by decree: a full step of known length, mostly too long."""
    config, trials = tiny_config(backtrack_ratio=0.9, max_kl=0.02), []
    for seed, length in ((0, 0.1), (0, 0.3), (1, 0.2), (2, 0.4)):
        policy, theta, data = sampled_problem(config, seed)
        c = 2 * 0.02 / length**2
        monkeypatch.setattr(mt, "conjugate_gradient",
                            lambda hvp, b, *_, c=c: (b, (1 - c) * b))
        new, stats = mt.trpo_meta_step(policy, theta, data, config)
        g = torch.stack([mt.meta_gradient(policy, theta, d, config.alpha)
                         for d in data]).mean(0)
        full = -length * g / g.norm()
        trials.append(stats["line_search_steps"])
        torch.testing.assert_close(new - theta, 0.9**(trials[-1] - 1) * full)
        for j in range(trials[-1]):
            surrogate, kl = torch.tensor([mt.surrogate_and_kl(
                policy, theta + 0.9**j * full, d, config.alpha) for d in data]).mean(0)
            passes = surrogate < stats["surrogate_before"] and kl <= 0.02
            assert passes == (j == trials[-1] - 1)
    assert trials[0] == 1 and min(trials[1:]) > 1


def test_meta_step_hands_tolerance_and_iterations_to_cg(monkeypatch):
    """A tolerance above g·g: no product is made, the step is skipped."""
    config, calls = tiny_config(cg_tolerance=1e9), []
    policy, theta, data = sampled_problem(config)
    product = mt.kl_hessian_product(policy, theta, data, config)
    monkeypatch.setattr(mt, "kl_hessian_product",
                        lambda *args: lambda v: calls.append(1) or product(v))
    new, stats = mt.trpo_meta_step(policy, theta, data, config)
    assert torch.equal(new, theta) and not calls
    assert (stats["line_search_steps"], stats["cg_residual"]) == (0, 1.0)
    for n in (1, 3):
        calls.clear()
        mt.trpo_meta_step(policy, theta, data, dataclasses.replace(
            config, cg_tolerance=0.0, cg_iterations=n))
        assert len(calls) == n


def test_every_inner_step_has_its_own_policy_and_noise_and_the_runs_credit():
    """Three inner steps; γ and λ that are not the defaults."""
    config = tiny_config(inner_steps=3, alpha=0.8, gamma=0.7, lam=0.6)
    policy, theta, _ = sampled_problem(config)
    family, goal = mt.TASKS["point2d"], np.array([0.3, -0.2])
    data, phi = mt.sample_task_data(policy, theta, family, goal, config, (5, 6)), theta
    for phase, episodes in enumerate([*data.inner, data.outer]):
        again = mt.task_rollout(family.envs(4), policy, phi, goal, 7, (5, 6, phase))
        torch.testing.assert_close(episodes.act, again.act, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(
            episodes.adv, mt.assign_credit(again, 0.7, 0.6).adv, rtol=1e-6, atol=1e-6)
        if phase < 3:
            phi = phi - 0.8 * mt.gradient(
                lambda t, d=episodes: mt.inner_loss(policy, t, d), phi)


def test_advantages_equal_plain_loops_from_rewards_to_the_end():
    """R by γ, V by ridge on R, δ by γ, Σ(γλ)ˡδ, then mean 0 and std 1; γ ≠ λ ≠ 1."""
    gamma, lam, K, H = 0.8, 0.5, 11, 13
    data = random_trajectories(np.random.default_rng(8), K=K, H=H, S=3)
    phi, returns, where = [], [], []
    for k in range(K):
        for t in range(H):
            if data.mask[k, t]:
                x, s = data.obs[k, t].numpy(), t / 100
                phi.append([*x, *(x * x), s, s * s, s**3, 1.0])
                returns.append(sum(gamma**(u - t) * float(data.rew[k, u])
                                   for u in range(t, H)))
                where.append((k, t))
    n = len(phi[0])
    w = np.linalg.lstsq(np.vstack([phi, math.sqrt(1e-5) * np.eye(n)]),
                        np.append(returns, np.zeros(n)), rcond=None)[0]
    V = dict(zip(where, np.array(phi) @ w))
    delta = {(k, t): float(data.rew[k, t]) + gamma * V.get((k, t + 1), 0.0) - V[k, t]
             for k, t in where}
    adv = np.array([sum((gamma * lam)**(u - t) * delta.get((k, u), 0.0)
                        for u in range(t, H)) for k, t in where])
    expected = torch.zeros(K, H, dtype=torch.float64)
    for (k, t), value in zip(where, (adv - adv.mean()) / adv.std()):
        expected[k, t] = value
    torch.testing.assert_close(mt.assign_credit(data, gamma, lam).adv, expected,
                               rtol=1e-6, atol=1e-6)


def test_evaluation_equals_a_plain_loop_with_every_setting_of_the_run():
    """α/2 from the second step on and no less later; eval_alpha, γ, λ, seed; and the
    figures show the same episodes."""
    config = tiny_config(seed=5, alpha=0.1, eval_alpha=0.9, gamma=0.7, lam=0.6,
                         eval_steps=4, eval_tasks=3, eval_episodes=5)
    family, policy = mt.family_of(config), mt.make_policy(mt.family_of(config), config)
    theta = policy.init(torch.Generator().manual_seed(0))
    table = mt.evaluate(config, theta)
    assert table.shape == (3, 5)
    for m, goal in enumerate(mt.paper_goals(3)):
        phi = theta
        for step in range(5):
            data = mt.task_rollout(family.envs(5), policy, phi, goal, 7,
                                   (5, mt.EVALUATION, m, step))
            assert abs(table[m, step] - float(data.rew.sum(1).mean())) < 1e-5
            mt.assign_credit(data, 0.7, 0.6)
            phi = phi - (0.9 if step == 0 else 0.45) * mt.gradient(
                lambda t, d=data: mt.inner_loss(policy, t, d), phi)
        assert table[m].tolist() == [
            data.mean_return() for _, data in mt.adaptation_of(config, theta, m, 4)]


def test_no_stream_of_random_numbers_is_used_twice_and_all_have_the_runs_seed(monkeypatch):
    """Tasks and episodes of a training with two inner steps, and the evaluation's."""
    right, keys = mt.random_stream, []
    monkeypatch.setattr(mt, "random_stream", lambda *key: keys.append(key) or right(*key))
    config = tiny_config(seed=7, inner_steps=2)
    theta, _ = mt.train_maml(config)
    assert len(keys) == 2 * (1 + 3 * 3)              # tasks; 3 tasks × (D, D, D′)
    mt.evaluate(config, theta)
    assert len(keys) == 20 + 5 * 4 and len(set(keys)) == len(keys)
    assert {key[0] for key in keys} == {7}


def test_first_theta_is_a_function_of_the_seed():
    a, b, c = (mt.TrainState.initial(mt.GaussianPolicy(2, 2), tiny_config(seed=seed)).theta
               for seed in (1, 1, 2))
    assert torch.equal(a, b) and (a != c).float().mean() > 0.9


def test_only_maml_adapts_in_training_and_the_oracle_not_at_evaluation():
    for method, inner, columns, S in (("maml", 1, 4, 2), ("pretrained", 0, 4, 2),
                                      ("random", 0, 4, 2), ("oracle", 0, 1, 4)):
        config = tiny_config(method=method, iterations=0)
        family = mt.family_of(config)
        policy = mt.make_policy(family, config)
        theta = policy.init(torch.Generator().manual_seed(0))
        data = mt.sample_task_data(policy, theta, family, mt.paper_goals(1)[0], config, (0,))
        assert (len(data.inner), data.outer.obs.shape[-1]) == (inner, S), method
        torch.testing.assert_close(data.outer.act, mt.sample_task_data(
            policy, theta, family, mt.paper_goals(1)[0], config, (0,)).outer.act)
        assert mt.evaluate(config, theta).shape == (5, columns), method


def test_oracle_and_plain_family_have_copies_of_their_own():
    family = dataclasses.replace(mt.TASKS["point2d"], _cache=mt.threading.local())
    assert family.envs(3).single_observation_space.shape == (2,)
    assert mt.with_task_observed(family).envs(3).single_observation_space.shape == (4,)
    assert family.envs(3).single_observation_space.shape == (2,)


def test_episode_ends_at_the_environments_own_time_limit():
    class Limited(gym.Env):
        observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)
        action_space = gym.spaces.Box(-1, 1, (2,), np.float32)

        def reset(self, *, seed=None, options=None):
            self.t = 0
            return np.zeros(2, np.float32), {}

        def step(self, action):
            self.t += 1
            return np.full(2, self.t, np.float32), 1.0, False, self.t == 3, {}
    policy = mt.GaussianPolicy(2, 2, hidden=(4,))
    theta = policy.init(torch.Generator().manual_seed(0))
    data = mt.task_rollout(SyncVectorEnv([Limited] * 2), policy, theta, None, 8, (0,))
    assert data.mask.tolist() == [[1] * 3 + [0] * 5] * 2
    assert data.mean_return() == 3.0


def test_point2d_reset_forgets_which_points_had_ended():
    envs = mt.Point2D(2)
    for _ in range(2):                  # the second time, both ended just before
        envs.reset(options={"task": np.array([0.05, 0.0])})
        obs, reward, ended, _, _ = envs.step(np.array([[0.5, 0.0], [1.0, 0.0]]))
        np.testing.assert_allclose(obs, [[0.05, 0], [0.1, 0]], atol=1e-7)
        np.testing.assert_allclose(reward, [0, -0.05], atol=1e-7)
        assert ended.tolist() == [True, False]


def test_walker_that_ended_rests_while_another_is_reset():
    envs = mj_envs("ant-dir", 3)
    envs.reset(seed=[1, 2, 3], options={"task": [1.0]})
    action, advance = np.full((3, 8), 0.3), envs.advance
    envs.advance = lambda d: d.qpos.put(2, 0.6 if d is envs.copies[2] else 0.1)
    assert envs.step(action)[2].tolist() == [True, True, False]    # two lie on the ground
    envs.advance = advance
    envs.reset(options={"reset_mask": np.array([True, False, False])})
    before = envs.copies[1].qpos.copy()
    _, reward, ended, _, _ = envs.step(action)
    assert np.array_equal(envs.copies[1].qpos, before)
    assert reward[1] == 0 and ended.tolist() == [False, True, False]


def test_sampler_and_log_have_the_same_least_std_as_the_distribution():
    policy = mt.GaussianPolicy(4, 2, hidden=(7, 6))
    theta = policy.init(torch.Generator().manual_seed(0), torch.float64)
    theta[-2:] = -100.0
    act = policy.sampler(theta, np.random.default_rng(0))(np.zeros((4000, 4)))
    np.testing.assert_allclose(act.std(0), 1e-6, rtol=0.1)
    np.testing.assert_allclose(policy.std(theta), 1e-6, rtol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_recorded_actions_are_those_the_environment_got_to_the_last_bit(dtype):
    envs, given = mt.Point2D(3), []
    step = envs.step
    envs.step = lambda actions: given.append(actions.copy()) or step(actions)
    policy = mt.GaussianPolicy(2, 2, hidden=(4,))
    theta = policy.init(torch.Generator().manual_seed(0), dtype)
    data = mt.task_rollout(envs, policy, theta, np.array([0.4, 0.4]), 5, (0,))
    np.testing.assert_array_equal(np.stack(given, 1), data.act.numpy())


@pytest.mark.parametrize("std", [[1.0, 1e-6], [1e7, 1.0]])
def test_one_std_out_of_bounds_is_enough_to_stop(std):
    with pytest.raises(mt.Diverged, match="std"):
        mt.check_std(torch.tensor(std))


def constant_runs(monkeypatch, pre, post, move=1.0):
    """Training in which task m of iteration i returns pre[i][m], post[i][m]; no sampling,
    and a meta-step that adds `move` to θ."""
    def sample(policy, theta, family, task, config, seed):
        _, i, m = seed
        later = SimpleNamespace(mean_return=lambda: 1e6)
        return SimpleNamespace(
            inner=[SimpleNamespace(mean_return=lambda: pre[i][m]), later],
            outer=SimpleNamespace(mean_return=lambda: post[i][m]))
    stats = {name: 0.0 for name in mt.PROGRESS_COLUMNS}
    monkeypatch.setattr(mt, "sample_task_data", sample)
    monkeypatch.setattr(mt, "trpo_meta_step", lambda policy, theta, *_: (theta + move, {
        name: 0.0 for name in stats if name.startswith(("surr", "kl", "line", "cg"))
        or name in ("seconds_gradient", "seconds_cg", "seconds_line_search")}))
    states, config = [], tiny_config(iterations=len(pre), meta_batch_size=len(pre[0]),
                                     inner_steps=2)
    mt.train_maml(config, after_iteration=states.append)
    return states


def test_best_theta_is_the_one_that_was_sampled_when_the_return_after_was_highest(
        monkeypatch):
    """Second of three by the return after adaptation, third by the one before."""
    pre = [[-9, -8, -4], [-7, -6, -5], [-3, -2, -1]]
    post = [[-6, -5, -4], [5, 1, 3], [2, 1, 0]]
    states = constant_runs(monkeypatch, pre, post)
    first = states[0].theta - 1.0
    torch.testing.assert_close(states[-1].best_theta, first + 1.0)
    torch.testing.assert_close(states[-1].theta, first + 3.0)
    assert [state.best_return for state in states] == [-5, 3, 3]
    for i, row in enumerate(states[-1].rows):
        assert (row["return_pre"], row["return_post"]) == (np.mean(pre[i]), np.mean(post[i]))
        assert states[-1].spread[i] == [*np.percentile(pre[i], [25, 75]),
                                        *np.percentile(post[i], [25, 75])]
        assert row["std_mean"] == pytest.approx(math.exp(i + 1), rel=1e-5)    # the new θ's


def test_std_that_collapses_in_a_step_stops_in_that_iteration(monkeypatch):
    with pytest.raises(mt.Diverged, match="^iteration 1: .*std"):
        constant_runs(monkeypatch, [[0.0]], [[0.0]], move=-50.0)


def test_training_returns_the_last_theta_and_not_the_best(monkeypatch):
    monkeypatch.setattr(mt, "trpo_meta_step", lambda policy, theta, *_: (
        theta + 0.1, {name: 0.0 for name in mt.PROGRESS_COLUMNS}))
    config, states = tiny_config(iterations=3), []
    theta, _ = mt.train_maml(config, after_iteration=states.append)
    first = mt.TrainState.initial(
        mt.make_policy(mt.family_of(config), config), config).theta
    torch.testing.assert_close(theta, first + 0.3)
    assert not torch.equal(theta, states[-1].best_theta)


def test_policy_of_a_run_has_its_activation_and_std():
    config = tiny_config(activation="tanh", init_std=0.3)
    policy = mt.make_policy(mt.family_of(config), config)
    theta = policy.init(torch.Generator().manual_seed(0))
    obs = torch.tensor([[0.4, -0.7]])
    *layers, log_std = policy.unpack(theta)
    (W1, W2, W3), (b1, b2, b3) = layers[::2], layers[1::2]
    expected = W3 @ torch.tanh(W2 @ torch.tanh(W1 @ obs[0] + b1) + b2) + b3
    torch.testing.assert_close(policy.distribution(theta, obs).mean[0], expected)
    torch.testing.assert_close(log_std.exp(), torch.tensor([0.3, 0.3]))


def test_oracle_goes_on_seeing_its_task_after_a_reset_that_names_none():
    envs = mt.with_task_observed(mt.TASKS["point2d"]).make_envs(2)
    envs.reset(seed=0, options={"task": [0.3, -0.2]})
    np.testing.assert_allclose(envs.reset(seed=1)[0], [[0, 0, 0.3, -0.2]] * 2, rtol=1e-6)
    assert envs.step(np.zeros((2, 2)))[1] == pytest.approx([-math.hypot(0.3, 0.2)] * 2)


# %% Mutants: one-line wrong changes, each of which the suite must catch

# (name, old text, new text); the old text stands exactly once in maml_trpo.py.
MUTANTS = [
    # tasks
    ("reward is the squared distance", "reward = -np.hypot(offset[:, 0], offset[:, 1])",
     "reward = -np.hypot(offset[:, 0], offset[:, 1]) ** 2"),
    ("reward before the move", "        self._position += move\n        offset = "
     "self._position - self.goal", "        offset = self._position - self.goal\n"
     "        self._position += move"),
    ("actions are not clipped", "np.minimum(np.maximum(actions, -1.0), 1.0)      # (K, 2)",
     "actions      # (K, 2)"),
    ("the goal box is a radius", "terminated = inside[:, 0] & inside[:, 1]",
     "terminated = -reward < self.GOAL_BOX"),
    ("the goal leaks into the observation", "return self._position.astype(np.float32), {}",
     "return (self._position + 1e-3 * self.goal).astype(np.float32), {}"),
    # policy
    ("log-prob averaged over action dimensions", "return (-0.5 * (z * z).sum(-1)",
     "return (-0.5 * (z * z).mean(-1)"),
    ("log-prob without the normaliser",
     "- (self.log_std + 0.5 * math.log(2 * math.pi)).sum())", "- 0)"),
    ("log-std frozen: the graph to it is cut", "log_std.clamp(min=math.log(self.MIN_STD)))",
     "log_std.detach().clamp(min=math.log(self.MIN_STD)))"),
    ("KL with its arguments swapped", "return torch.distributions.kl_divergence(old, new)",
     "return torch.distributions.kl_divergence(new, old)"),
    ("KL with the std ratio upside down", "0.5 * torch.exp(-2 * log_ratio) - 0.5",
     "0.5 * torch.exp(2 * log_ratio) - 0.5"),
    ("KL scaled by the old std", "z = (old.mean - new.mean) / new.log_std.exp()",
     "z = (old.mean - new.mean) / old.log_std.exp()"),
    ("sampler draws with twice the noise", "return mean + std * rng.standard_normal",
     "return mean + 2 * std * rng.standard_normal"),
    # rollouts
    ("every rollout draws the same noise", "act_on = policy.sampler(theta, rng)",
     "act_on = policy.sampler(theta, random_stream(0))"),
    ("the seed's later numbers are ignored",
     "np.random.default_rng([len(key), *(int(k) for k in key)])",
     "np.random.default_rng([len(key), int(key[0])])"),
    ("the step that ends an episode is masked out",
     "all_rew[t], mask[t] = obs, action, reward, running",
     "all_rew[t], mask[t] = obs, action, reward, running & ~terminated"),
    ("episodes never end", "running = running & ~ended",
     "running = running & ~truncated"),
    ("the observation after the action is stored",
     "all_rew[t], mask[t] = obs, action,", "all_rew[t], mask[t] = next_obs, action,"),
    ("the clipped action is stored",
     "all_rew[t], mask[t] = obs, action,",
     "all_rew[t], mask[t] = obs, np.clip(action, -1, 1),"),
    # credit
    ("masked mean divides by all steps", "return (x * mask).sum() / mask.sum()",
     "return (x * mask).mean()"),
    ("discount off by one", "out[:, t] += gamma * out[:, t + 1]",
     "out[:, t] = gamma * (out[:, t] + out[:, t + 1])"),
    ("GAE without λ", "return discounted_returns(deltas, gamma * lam) * mask",
     "return discounted_returns(deltas, gamma) * mask"),
    ("GAE bootstraps past the end of an episode", "    values = values * mask\n", ""),
    ("GAE's δ forgets γ", "deltas = (rew + gamma * next_values - values) * mask",
     "deltas = (rew + next_values - values) * mask"),
    ("baseline without the ridge", "phi.T @ phi + self.RIDGE * torch",
     "phi.T @ phi + 100 * self.RIDGE * torch"),
    ("baseline fitted on padding too", "phi = self.features(obs)[mask.bool()]",
     "phi = self.features(obs)[mask >= 0]; mask = mask >= 0"),
    ("baseline's time runs over the whole batch",
     "t = (torch.arange(H, dtype=torch.float64) / 100).expand(K, H)[..., None]",
     "t = (torch.arange(K * H, dtype=torch.float64) / 100).view(K, H)[..., None]"),
    ("baseline does not clip", "x = obs.double().clamp(-self.CLIP, self.CLIP)",
     "x = obs.double()"),
    ("advantages divided by the variance", "return (adv - mean) / (std + 1e-8) * mask",
     "return (adv - mean) / (std ** 2 + 1e-8) * mask"),
    ("advantages not standardised",
     "data.adv = standardise(gae(data.rew, values, data.mask, gamma, lam), data.mask)",
     "data.adv = gae(data.rew, values, data.mask, gamma, lam)"),
    ("baseline not subtracted", "gae(data.rew, values, data.mask, gamma, lam)",
     "gae(data.rew, 0 * values, data.mask, gamma, lam)"),
    # inner update
    ("inner loss with the wrong sign",
     "return -masked_mean(log_prob * trajectories.adv, trajectories.mask)",
     "return masked_mean(log_prob * trajectories.adv, trajectories.mask)"),
    ("ratio without its gradient", "log_prob = (log_prob - log_prob.detach()).exp()",
     "log_prob = log_prob.exp()"),
    ("ascent in place of descent", "theta_prime = theta_prime - alpha * grad\n    return",
     "theta_prime = theta_prime + alpha * grad\n    return"),
    ("every inner step starts from θ", "theta_prime = theta_prime - alpha * grad\n    return",
     "theta_prime = theta - alpha * grad\n    return"),
    ("inner gradient detached", "theta_prime = theta_prime - alpha * grad\n    return",
     "theta_prime = theta_prime - alpha * grad.detach()\n    return"),
    ("first-order flag ignored", "second_order = theta.requires_grad and not first_order",
     "second_order = theta.requires_grad"),
    # meta-objective
    ("surrogate with the wrong sign",
     "surrogate = -masked_mean(ratio * outer.adv, outer.mask)",
     "surrogate = masked_mean(ratio * outer.adv, outer.mask)"),
    ("no importance ratio: log π in the outer loss",
     "ratio = (new.log_prob(outer.act) - old.log_prob(outer.act)).exp()",
     "ratio = 1 + new.log_prob(outer.act) - old.log_prob(outer.act)"),
    ("ratio upside down",
     "ratio = (new.log_prob(outer.act) - old.log_prob(outer.act)).exp()",
     "ratio = (old.log_prob(outer.act) - new.log_prob(outer.act)).exp()"),
    ("surrogate and KL on the pre-update episodes",
     "    outer, old = task_data.outer, task_data.old\n    ratio",
     "    outer, old = task_data.outer, task_data.old\n"
     "    new = policy.distribution(theta, outer.obs)\n    ratio"),
    ("a sum over tasks", "return (total[:-1] / total[-1]).reshape",
     "return total[:-1].reshape"),
    # the TRPO step
    ("symmetric difference divides by ε only",
     "grad_fn(theta - eps * v)) / (2 * eps)", "grad_fn(theta - eps * v)) / eps"),
    ("difference ignores the gradient at θ",
     "return (ahead if grad_at_theta is None else ahead - grad_at_theta) / eps",
     "return ahead / eps"),
    ("difference step not scaled by ‖v‖", "eps = step / v.norm()", "eps = step"),
    ("J for Jᵀ", "for factor in reversed(factors):", "for factor in factors:"),
    ("Jᵀ left out", "    for factor in reversed(factors):\n        v = times(factor, v)"
     "                                                # Jᵀ(F(J·v))\n", ""),
    ("J with the wrong sign",
     "return u - alpha * torch.autograd.grad(grad, theta_i, u, retain_graph=True)[0]",
     "return u + alpha * torch.autograd.grad(grad, theta_i, u, retain_graph=True)[0]"),
    ("Fisher matrix at θ, not at θ′", "theta_prime = (theta_i - alpha * grad).detach()",
     "theta_prime = theta_i.detach()"),
    ("CG keeps going along negative curvature", "        if not pHp > 0:\n", "        if False:\n"),
    ("CG with the residual's sign lost", "r = r - (rr / pHp) * Hp", "r = r + (rr / pHp) * Hp"),
    ("CG's direction update upside down", "p = r + (rr / rr_before) * p",
     "p = r + (rr_before / rr) * p"),
    ("line search that never looks at the KL",
     "if surrogate < surrogate_before and kl <= max_kl:",
     "if surrogate < surrogate_before:"),
    ("line search that never looks at the surrogate",
     "if surrogate < surrogate_before and kl <= max_kl:", "if kl <= max_kl:"),
    ("θ not restored when the search fails",
     "    return theta, surrogate_before, 0.0, 0\n",
     "    return candidate, surrogate_before, 0.0, 0\n"),
    ("the first trial is already shrunk", "candidate = theta + ratio**trial * full_step",
     "candidate = theta + ratio**(trial + 1) * full_step"),
    ("damping with the wrong sign", "lambda v: hvp(v) + config.damping * v",
     "lambda v: hvp(v) - config.damping * v"),
    ("no square root in the step's scale", "return math.sqrt(2 * max_kl / xHx)",
     "return 2 * max_kl / xHx"),
    ("the factor 2 is missing in the step's scale", "return math.sqrt(2 * max_kl / xHx)",
     "return math.sqrt(max_kl / xHx)"),
    ("uphill", "full_step = -step_scale(xHx, config.max_kl) * x",
     "full_step = step_scale(xHx, config.max_kl) * x"),
    ("a step of negative curvature is taken", "if 0 < xHx < math.inf:", "if xHx != 0:"),
    # training and evaluation
    ("D′ sampled with θ", "outer = sample(theta_prime, config.inner_updates)",
     "outer = sample(theta, config.inner_updates)"),
    ("D and D′ share their random numbers", "outer = sample(theta_prime, config.inner_updates)",
     "outer = sample(theta_prime, 0)"),
    ("the same tasks every iteration", "random_stream(config.seed, i),",
     "random_stream(config.seed, 0),"),
    ("all tasks share their random numbers", "(config.seed, i, m)),", "(config.seed, i, 0)),"),
    ("evaluation with α for every step", "alpha if step == 0 else alpha / 2, False,",
     "alpha, False,"),
    ("evaluation reuses one stream of random numbers",
     "            seed=(*seed, step))\n        yield", "            seed=(*seed, 0))\n        yield"),
    # faults
    ("numbers of a rollout are not checked",
     "    check_rollout(task, all_obs, all_act, all_rew[..., None])\n", ""),
    ("advantages are not checked", "    check_finite(f\"task {task}: the advantage\", data.adv)\n",
     ""),
    ("a collapsed std goes on", "    check_std(policy.std(new_theta))\n", ""),
    ("a damaged checkpoint is read", "if zipfile.ZipFile(path).testzip():", "if False:"),
    ("half-written files pile up", "            path.unlink()\n", "            pass\n"),
    ("files are written in place", "        write(beside)\n",
     "        write(path)\n        write(beside)\n"),
    # most of these once slipped past the suite: see "What a careless port gets wrong"
    # settings that the command line promises and the meta-step must pass on
    ("the Hessian product ignores --first-order and the estimator",
     "policy, t, data.inner, data.outer.obs, *settings), data)",
     "policy, t, data.inner, data.outer.obs, config.alpha), data)"),
    ("the Gauss-Newton product is not told --first-order and the estimator",
     "gauss_newton_product(policy, theta, data, v, *settings)),",
     "gauss_newton_product(policy, theta, data, v, config.alpha)),"),
    ("the meta-gradient is not told --first-order and the estimator",
     "meta_gradient(policy, theta, data, *settings),",
     "meta_gradient(policy, theta, data, config.alpha),"),
    ("Gauss-Newton: J is always log π's",
     "loss = inner_loss(policy, theta_i, trajectories, estimator)",
     "loss = inner_loss(policy, theta_i, trajectories)"),
    ("adapt: J is always log π's",
     "loss = inner_loss(policy, theta_prime, trajectories, estimator)",
     "loss = inner_loss(policy, theta_prime, trajectories)"),
    ("the adapted policy forgets the estimator",
     "theta_prime = adapt(policy, theta, inner, alpha, second_order, estimator)",
     "theta_prime = adapt(policy, theta, inner, alpha, second_order)"),
    ("the meta-gradient forgets the estimator",
     "policy, t, task_data, alpha, first_order, estimator)[0], theta)",
     "policy, t, task_data, alpha, first_order)[0], theta)"),
    ("training ignores λ", "horizon=config.horizon, gamma=config.gamma, lam=config.lam)\n\n",
     "horizon=config.horizon, gamma=config.gamma)\n\n"),
    ("training ignores γ", "horizon=config.horizon, gamma=config.gamma, lam=config.lam)\n\n",
     "horizon=config.horizon, lam=config.lam)\n\n"),
    ("evaluation's steps ignore λ", "horizon=horizon, gamma=gamma, lam=lam,\n            seed=(*seed, step))",
     "horizon=horizon, gamma=gamma,\n            seed=(*seed, step))"),
    ("evaluation's steps ignore γ", "horizon=horizon, gamma=gamma, lam=lam,\n            seed=(*seed, step))",
     "horizon=horizon, lam=lam,\n            seed=(*seed, step))"),
    ("the line search's KL bound is 1.5 δ",
     "full_step, before, config.max_kl, config.backtrack_ratio,\n            config",
     "full_step, before, 1.5 * config.max_kl,\n            config.backtrack_ratio, config"),
    ("the line search ignores --backtrack-ratio",
     "evaluate, theta, full_step, before, config.max_kl, config.backtrack_ratio,",
     "evaluate, theta, full_step, before, config.max_kl, 0.8,"),
    ("the meta-step ignores --cg-tolerance",
     "config.cg_iterations, config.cg_tolerance)\n    xHx", "config.cg_iterations)\n    xHx"),
    ("the step's scale leaves damping out of xᵀHx",
     "xHx = float(x @ (g - residual))",
     "xHx = float(x @ (g - residual - config.damping * x))"),
    # several inner steps
    ("each D of several inner steps is sampled with θ",
     "inner.append(sample(theta_prime, step))", "inner.append(sample(theta, step))"),
    ("the D of several inner steps share their random numbers",
     "inner.append(sample(theta_prime, step))", "inner.append(sample(theta_prime, 0))"),
    ("return_pre is of the last inner step", "[[(d.inner or [d.outer])[0].mean_return(),",
     "[[(d.inner or [d.outer])[-1].mean_return(),"),
    # evaluation
    ("α is halved again at every later step of evaluation",
     "alpha if step == 0 else alpha / 2, False,", "alpha / 2**step, False,"),
    ("α is halved from the third step on only",
     "alpha if step == 0 else alpha / 2, False,", "alpha if step < 2 else alpha / 2, False,"),
    ("evaluation shares its random numbers with the first iteration",
     "EVALUATION = 2**31 ", "EVALUATION = 0 "),
    ("the run's evaluation uses the training's α",
     "config.eval_alpha, horizon=config.horizon, gamma=config.gamma,\n            lam",
     "config.alpha, horizon=config.horizon, gamma=config.gamma,\n            lam"),
    ("the run's evaluation ignores the seed",
     "lam=config.lam, estimator=config.inner_loss, seed=config.seed,\n",
     "lam=config.lam, estimator=config.inner_loss,\n"),
    ("the run's evaluation ignores γ",
     "config.eval_alpha, horizon=config.horizon, gamma=config.gamma,\n            lam",
     "config.eval_alpha, horizon=config.horizon,\n            lam"),
    ("the oracle is adapted at evaluation",
     "steps = 0 if config.method == \"oracle\" else config.eval_steps",
     "steps = config.eval_steps"),
    ("the figures adapt to the first held-out task", "family.test_tasks(m + 1)[m], steps,",
     "family.test_tasks(m + 1)[0], steps,"),
    # baselines
    ("the oracle adapts in training",
     "return self.inner_steps if self.method == \"maml\" else 0",
     "return self.inner_steps if self.method != \"pretrained\" else 0"),
    ("the pretrained baseline sees the task",
     "return with_task_observed(family) if config.method == \"oracle\" else family",
     "return with_task_observed(family) if config.method != \"maml\" else family"),
    ("the oracle's family shares its copies with the plain one",
     "make_envs=lambda K: TaskObserved(family.make_envs(K), task_size),\n        _cache=threading.local())",
     "make_envs=lambda K: TaskObserved(family.make_envs(K), task_size))"),
    # credit
    ("the baseline is fitted on returns discounted by γλ",
     "    returns = discounted_returns(data.rew, gamma)\n    values",
     "    returns = discounted_returns(data.rew, gamma * lam)\n    values"),
    ("the baseline is fitted on undiscounted returns",
     "    returns = discounted_returns(data.rew, gamma)\n    values",
     "    returns = discounted_returns(data.rew, 1.0)\n    values"),
    ("the baseline is fitted on rewards", "    returns = discounted_returns(data.rew, gamma)\n    values",
     "    returns = data.rew\n    values"),
    ("γ and λ change places on the way to GAE",
     "gae(data.rew, values, data.mask, gamma, lam), data.mask)",
     "gae(data.rew, values, data.mask, lam, gamma), data.mask)"),
    ("advantages standardised over every step, padding too",
     "data.mask, gamma, lam), data.mask)", "data.mask, gamma, lam),\n                           torch.ones_like(data.mask))"),
    ("mean return divides by the steps, not the episodes",
     "return (self.rew * self.mask).sum(1).mean().item()",
     "return masked_mean(self.rew, self.mask).item()"),
    # seeds
    ("a run's tasks do not depend on its seed", "random_stream(config.seed, i), ", "random_stream(i), "),
    ("a run's episodes do not depend on its seed", "(config.seed, i, m)),", "(i, m)),"),
    ("every iteration repeats the episodes' random numbers", "(config.seed, i, m)),", "(config.seed, m)),"),
    ("θ's initial value does not depend on the seed",
     "theta = policy.init(torch.Generator().manual_seed(config.seed))",
     "theta = policy.init(torch.Generator().manual_seed(0))"),
    ("all copies of a rollout start from one seed",
     "seed=rng.integers(2**31, size=K).tolist(),", "seed=[int(rng.integers(2**31))] * K,"),
    # ends
    ("a time limit of the environment's own is passed over",
     "running = running & ~ended", "running = running & ~terminated"),
    ("point2d remembers over a reset which points had ended",
     "        self._ended = np.zeros(self.num_envs, bool)\n        return self._position",
     "        return self._position"),
    ("walkers: a reset of some wakes all", "self._ended = self._ended & ~mask",
     "self._ended = np.zeros(self.num_envs, bool)"),
    ("walkers: the solver's warm start survives a reset",
     "        self._mujoco.mj_resetData(self.model, d)\n",
     "        d.qpos[:], d.qvel[:] = self.model.qpos0, 0\n"),
    ("walkers: the cost is of the actions before clipping",
     "actions = np.minimum(np.maximum(np.asarray(actions, float), -1.0), 1.0)",
     "actions = np.asarray(actions, float)"),
    # std
    ("the sampler's std has no floor", "std = np.exp(np.maximum(log_std, math.log(policy.MIN_STD)))",
     "std = np.exp(log_std)"),
    ("the logged std has no floor", ".exp().clamp(min=self.MIN_STD)", ".exp()"),
    ("check_std passes if one of the stds is sound", "math.log(GaussianPolicy.MIN_STD)).all():",
     "math.log(GaussianPolicy.MIN_STD)).any():"),
    ("check_std looks at the old θ", "check_std(policy.std(new_theta))", "check_std(policy.std(theta))"),
    ("the logged std is of the old θ", "std_mean=float(policy.std(new_theta).mean())",
     "std_mean=float(policy.std(theta).mean())"),
    # float32
    ("the baseline is fitted in float32", "x = obs.double().clamp(-self.CLIP, self.CLIP)",
     "x = obs.clamp(-self.CLIP, self.CLIP)"),
    ("advantages in float64 whatever θ is", "return (self.features(obs) @ self.weights).to(obs.dtype)",
     "return self.features(obs) @ self.weights"),
    ("the sampler's noise is float64 whatever θ is",
     "rng.standard_normal(mean.shape, std.dtype)", "rng.standard_normal(mean.shape)"),
    # bookkeeping
    ("the best θ is the one after the step", "self.theta if better else self.best_theta,",
     "theta if better else self.best_theta,"),
    ("the best θ is chosen by the return before adaptation",
     "better = post > self.best_return", "better = pre > self.best_return"),
    ("the quartiles are grouped by percentile, not by return",
     "[25, 75], 0).T.flatten().tolist()],", "[25, 75], 0).flatten().tolist()],"),
    ("CG's logged residual is squared", "cg_residual=float(residual.norm() / g.norm()",
     "cg_residual=float(residual @ residual / g.norm()"),
    ("under torchrun the tasks are returned in the order of the ranks",
     "return np.array([row for _, row in sorted(sum(everyone, []))])",
     "return np.array([row for _, row in sum(everyone, [])])"),
    # added in a second round
    ("the run's evaluation samples as many episodes as training does",
     "steps, config.eval_episodes,\n            config.eval_alpha,",
     "steps, config.rollouts,\n            config.eval_alpha,"),
    ("the run's evaluation draws its tasks in place of the held-out ones",
     "family.test_tasks(config.eval_tasks), steps,",
     "family.sample_tasks(random_stream(0), config.eval_tasks),\n            steps,"),
    ("the run's evaluation ignores --horizon",
     "config.eval_alpha, horizon=config.horizon, gamma=config.gamma,\n            lam",
     "config.eval_alpha, horizon=None, gamma=config.gamma,\n            lam"),
    ("training ignores --horizon",
     "horizon=config.horizon, gamma=config.gamma, lam=config.lam)\n\n",
     "gamma=config.gamma, lam=config.lam)\n\n"),
    ("the policy ignores --activation",
     "config.hidden, config.activation,\n                          config.init_std)",
     "config.hidden,\n                          init_std=config.init_std)"),
    ("the policy ignores --init-std",
     "config.hidden, config.activation,\n                          config.init_std)",
     "config.hidden, config.activation)"),
    ("train_maml returns the best θ, not the last", "return state.theta, state.rows",
     "return state.best_theta, state.rows"),
    ("the oracle forgets the task at a reset that names none",
     "get(\"task\", self.task), float)", "get(\"task\", 0 * self.task), float)"),
    ("the second inner step learns from the first D",
     "adapt(policy, theta_prime, inner[-1:], config.alpha,",
     "adapt(policy, theta_prime, inner[:1], config.alpha,"),
    ("the Hessian is of the first task alone",
     "return mean_over_tasks(function, task_data, config.workers)",
     "return mean_over_tasks(function, task_data[:1], config.workers)"),
    ("training adapts with the α of evaluation",
     "adapt(policy, theta_prime, inner[-1:], config.alpha,  # l.6, l.7",
     "adapt(policy, theta_prime, inner[-1:], config.eval_alpha,  # l.6"),
    ("first order is given products that are wrong for it",
     "config.first_order or config.inner_loss == \"ratio\"\n    preset",
     "False\n    preset"),
    ("the two directions' difference counts as an error",
     "if len(kinds) == len(tasks):", "if True:"),
    ("the error of two directions is not that of their mean",
     "/ sum(map(len, groups))", "/ len(groups[0])"),
    ("what a family's horizon is does not matter",
     "family.name not in TASKS and config.horizon", "False and config.horizon"),
    ("an episode that is truncated goes on", "ended = terminated | truncated",
     "ended = terminated.copy()"),
    ("the mask clears only what needs no clearing", "if not mask.all():",
     "if mask.all():"),
    ("one finite record is enough",
     "if not all(np.isfinite(x).all() for x in recorded):",
     "if not any(np.isfinite(x).all() for x in recorded):"),
]

# Changed, yet the same program: named here with the reason.
EQUIVALENT = {
}


def test_every_mutant_applies_to_exactly_one_place():
    source = (HERE / "maml_trpo.py").read_text(encoding="utf-8")
    for name, old, new in MUTANTS:
        assert source.count(old) == 1, f"{name}: {source.count(old)} places"
        assert old != new
    assert len({name for name, _, _ in MUTANTS}) == len(MUTANTS) >= 40


def run_suite(folder: Path, *selection: str) -> str:
    """The fast suite in `folder`, stopped at the first failure: → the test that failed."""
    out = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider",
         "-W", "ignore", *selection], cwd=folder, capture_output=True, text=True,
        env={**os.environ, "MAML_SLOW": "0", "MAML_MUTANT": "1"}, timeout=600)
    failed = re.search(r"^(?:FAILED|ERROR) \S*?(?:::(\S+))?(?: |$)", out.stdout, re.MULTILINE)
    return "" if out.returncode == 0 else (failed and failed.group(1) or "the import")


def mutants(*names: str) -> None:
    """Apply each mutant to a copy, run the fast suite on it, and list who caught it."""
    source = (HERE / "maml_trpo.py").read_text(encoding="utf-8")
    chosen = [m for m in MUTANTS if not names or m[0] in names]

    def judge(mutant) -> tuple[str, str]:
        name, old, new = mutant
        with tempfile.TemporaryDirectory() as folder:
            for file in ("test_maml_trpo.py", "notes.md", "README.md", "requirements.txt"):
                shutil.copy(HERE / file, folder)
            (Path(folder) / "maml_trpo.py").write_text(source.replace(old, new),
                                                       encoding="utf-8")
            careless = run_suite(Path(folder), "-k", names_of_tests("What a careless"))
            return name, careless or run_suite(Path(folder), "-k", QUICK) or run_suite(
                Path(folder))

    survivors = []
    with ThreadPoolExecutor(mt.available_cores()) as pool:
        for name, caught in pool.map(judge, chosen):
            why = EQUIVALENT.get(name)
            print(f"{'caught' if caught else 'equivalent' if why else 'SURVIVED':10} "
                  f"{name}  [{caught or why or ''}]", flush=True)
            if not caught and not why:
                survivors.append(name)
    print(f"{len(chosen)} mutants, {len(survivors)} survived")
    sys.exit(1 if survivors else 0)


def names_of_tests(title: str) -> str:
    """The tests of one section of this file, as pytest's -k wants them."""
    section = Path(__file__).read_text(encoding="utf-8").split(f"\n# %% {title}")[1]
    return " or ".join(re.findall(r"^def (test_\w+)", section.split("\n# %% ")[0], re.M))


# Tests that are run first on a mutant: those that take no time.
QUICK = ("not command and not short_training and not exercise and not every_mutant "
         "and not ranks and not killed and not any_ and not mdp and not pseudocode")


# %% Exercises 1: what a grader can say
#
# A grader calls the student's function on seeded random inputs of pairwise different sizes
# and compares with an oracle: plain loops, closed forms, torch.distributions, dense
# solves, differences in float64. Beside the right answer it computes wrong ones, each with
# a name, so that it can say what was done instead.


class ExWrong(Exception):
    """What is wrong with the student's function, in a sentence."""


class ExUnwritten(Exception):
    """The function is still the stub."""


def ex_tensors(value, path: str):
    """Every tensor inside an argument: (where, tensor)."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, Distribution):
        yield from ((path + ".mean", value.mean), (path + ".stddev", value.stddev))
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from ex_tensors(item, f"{path}[{i}]")
    elif isinstance(value, (mt.Trajectories, mt.TaskData)):
        for name, item in vars(value).items():
            yield from ex_tensors(item, f"{path}.{name}")


def ex_describe(error: BaseException, file: str) -> str:
    """An exception in a sentence, with the last line of the student's file it passed."""
    text = (str(error).strip().splitlines() or [""])[0][:200]
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == file]
    line = f" (line {frames[-1].lineno}: {frames[-1].line})" if frames else ""
    if isinstance(error, SystemExit):
        return f"ends the program (SystemExit) and returns nothing{line}"
    return f"raises {type(error).__name__}: {text}{line}"


def ex_call(function, *args):
    """function(*args); whatever goes wrong in it becomes an ExWrong."""
    name, inner = function.__name__, inspect.unwrap(function)
    named = list(zip([*inspect.signature(inner).parameters, *["argument"] * 9], args))

    def tensors():
        return [part for where, value in named for part in ex_tensors(value, where)]

    before = [(where, x, x.detach().clone()) for where, x in tensors()]
    try:
        result = function(*args)
    except BaseException as error:
        if isinstance(error, NotImplementedError) and str(error).startswith("ex"):
            raise ExUnwritten(f"{name} is not written yet") from None
        raise ExWrong(f"{name} {ex_describe(error, inner.__code__.co_filename)}") from None
    after = dict(tensors())
    for where, x, copy in before:
        if not (where in after and torch.equal(x, copy)
                and torch.equal(after[where], copy)):
            raise ExWrong(f"{name} changes its argument {where} in place: the caller "
                          f"still needs the old one, so compute a new tensor")
    return result


def ex_close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(
        (a - b).abs().max() <= 1e-6 * (1e-2 + b.abs().max()))


def ex_compare(what: str, got, right: Tensor, wrong: dict | None = None) -> None:
    """Type, dtype, NaN, shape, values; `wrong`: how it was done instead → what that gives."""
    if not isinstance(got, Tensor):
        raise ExWrong(f"{what} is None: is a `return` missing?" if got is None else
                      f"{what} is a {type(got).__name__}, not a torch.Tensor")
    got, right = got.detach(), right.detach()
    if got.dtype != right.dtype:
        raise ExWrong(f"{what} has dtype {got.dtype}: {right.dtype} is right here")
    if not torch.isfinite(got).all():
        raise ExWrong(f"{what} has NaN or infinity in it: {got.flatten()[:3].tolist()} …")
    if ex_close(got, right):
        return
    for how, value in ((wrong or {}) | {"with the sign flipped": -right}).items():
        if ex_close(got, torch.as_tensor(value).detach().to(right.dtype)):
            raise ExWrong(f"{what}: this equals the right answer {how}")
    if got.shape != right.shape:
        raise ExWrong(f"{what} has shape {tuple(got.shape)}: {tuple(right.shape)} is right")
    if not got.any():
        raise ExWrong(f"{what} is 0 throughout")
    factor = (got * right).sum() / (right * right).sum()
    if right.numel() > 2 and factor != 0 and ex_close(got / factor, right):
        raise ExWrong(f"{what}: this equals the right answer times {factor:.6g}")
    off = (got - right).abs()
    at = tuple(int(i) for i in np.unravel_index(int(off.argmax()), tuple(got.shape)))
    raise ExWrong(f"{what} is wrong: {float(got[at]):.6g} where {float(right[at]):.6g} is "
                  f"right" + (f", at index {list(at)}; {int((off > 1e-6).sum())} of the "
                              f"{off.numel()} numbers are off" if at else ""))


def ex_several(name: str, got, parts: str) -> tuple:
    """A result that must be a tuple."""
    if not isinstance(got, (tuple, list)) or len(got) != len(parts.split(", ")):
        raise ExWrong(f"{name} must return ({parts}), not "
                      f"{'None' if got is None else type(got).__name__}")
    return tuple(got)


def ex_gradient(what: str, output, theta: Tensor) -> Tensor:
    """∂output/∂θ of something the student's function returned."""
    grad = torch.autograd.grad(output, theta, allow_unused=True, create_graph=True)[0] \
        if output.requires_grad else None
    if grad is None:
        raise ExWrong(f"{what}: the value is right, but no gradient can reach θ: is there "
                      f"a detach, no_grad, item, numpy or copy on the way?")
    return grad


# %% Exercises 2: inputs and oracles


def ex_randn(seed: int):
    """A function of sizes → that many normal numbers, float64."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


def ex_jacobian(function, theta: Tensor, step: float = 1e-4) -> Tensor:
    """d function/dθ by central differences: (..., P)."""
    return torch.stack([(function(theta + step * e) - function(theta - step * e)).detach()
                        / (2 * step) for e in torch.eye(len(theta)).double()], dim=-1)


def ex_case(seed: int) -> SimpleNamespace:
    """A small tanh policy, θ_old, another θ, and a task's data: two inner steps."""
    randn, (K, H, S, A) = ex_randn(seed), [(4, 5, 3, 2), (5, 7, 2, 3)][seed]
    policy = mt.GaussianPolicy(S, A, (4,), "tanh")
    theta_old, alpha = 0.5 * randn(policy.num_params), 0.3

    def episodes():                              # all but the first end early
        mask = torch.tensor([[1.0 * (k == 0 or t < 1 + k % (H - 1)) for t in range(H)]
                             for k in range(K)]).double()
        return mt.Trajectories(randn(K, H, S) * mask[..., None], randn(K, H, A)
                               * mask[..., None], randn(K, H) * mask, mask,
                               randn(K, H) * mask)
    inner, outer = [episodes(), episodes()], episodes()
    old = policy.distribution(ex_adapted(policy, theta_old, inner, alpha), outer.obs)
    return SimpleNamespace(
        policy=policy, theta_old=theta_old, theta=theta_old + 0.2 * randn(len(theta_old)),
        alpha=alpha, inner=inner, outer=outer, data=mt.TaskData(inner, outer, old),
        keep=outer.mask.bool(), u=randn(len(theta_old)), randn=randn)


def ex_normal(policy, theta: Tensor, obs: Tensor) -> Independent:
    """π_θ as torch's own distribution."""
    pi = policy.distribution(theta, obs)
    return Independent(Normal(pi.mean, pi.log_std.exp()), 1)


def ex_loss(policy, theta: Tensor, data, ratio_to: Tensor | None = None) -> Tensor:
    """The inner loss; with `ratio_to` = θ₀, π_θ/π_θ₀ in place of log π."""
    score = ex_normal(policy, theta, data.obs).log_prob(data.act)
    if ratio_to is not None:
        score = (score - ex_normal(policy, ratio_to, data.obs).log_prob(data.act)).exp()
    return -(score * data.adv)[data.mask.bool()].mean()


def ex_adapted(policy, theta: Tensor, inner, alpha: float, at=None) -> Tensor:
    """θ′, without a graph; `at`: one θ for the gradients of all steps."""
    for data in inner:
        t = (theta if at is None else at).detach().clone().requires_grad_()
        theta = theta.detach() - alpha * torch.autograd.grad(
            ex_loss(policy, t, data), t)[0]
    return theta.detach()


# %% Exercises 3: the graders, one for each function


@functools.lru_cache
def ex_dense(seed: int) -> SimpleNamespace:
    """What takes long: J = J₂J₁ and the KL's Hessian F at θ′, both of θ_old."""
    c = ex_case(seed)

    def theta_prime(t, inner=c.inner):
        return ex_adapted(c.policy, t, inner, c.alpha)

    def fisher(at, keep=c.keep):                 # of the KL's second policy
        p = ex_normal(c.policy, theta_prime(c.theta_old), c.outer.obs)

        def grad(t):
            t = t.clone().requires_grad_()
            kl = kl_divergence(p, ex_normal(c.policy, t, c.outer.obs))[keep].mean()
            return torch.autograd.grad(kl, t)[0]
        return ex_jacobian(grad, at)
    J, J1 = ex_jacobian(theta_prime, c.theta_old), ex_jacobian(
        lambda t: theta_prime(t, c.inner[:1]), c.theta_old)
    return SimpleNamespace(
        J=J, J1=J1, J2=J @ torch.linalg.inv(J1), F=fisher(theta_prime(c.theta_old)),
        F_at_theta=fisher(c.theta_old),
        F_unmasked=fisher(theta_prime(c.theta_old), c.keep | True))


def ex_check_returns(student):
    for seed, gamma in enumerate((0.8, 0.6)):
        rew = ex_case(seed).outer.rew
        t = torch.arange(rew.shape[1]).double()
        ahead = t[None, :] - t[:, None]          # row t, column t′: t′ − t
        later, weight = (ahead >= 0).double(), gamma**ahead
        right = rew @ (later * weight).T
        ex_compare("discounted_returns", ex_call(
            student.discounted_returns, rew, gamma), right, {
            "without the discount": rew @ later.T,
            "with one power of γ too many": gamma * right,
            "with the discount counted from the episode's start, not from t":
                rew @ (later * gamma**t).T,
            "with the rewards before t, where those after it belong":
                rew @ (later * weight),
            "without the step's own reward": right - rew})


def ex_check_gae(student):
    for seed, gamma, lam in ((0, 0.9, 0.7), (1, 0.8, 0.6)):
        c = ex_case(seed)
        rew, mask, values = c.outer.rew, c.outer.mask, c.randn(*c.outer.rew.shape)
        H, ends = rew.shape[1], mask.sum(1).int().tolist()

        def loop(decay, after=lambda k, n: 0.0, ends=ends, gamma=gamma):
            out = torch.zeros_like(rew)
            for k, n in enumerate(ends):
                v = [*values[k, :n].tolist(), after(k, n)]
                delta = [float(rew[k, t]) + gamma * v[t + 1] - v[t] for t in range(n)]
                for t in range(n):
                    out[k, t] = sum(decay**(i - t) * delta[i] for i in range(t, n))
            return out
        leak = loop(gamma * lam, ends=[H] * len(ends))
        ex_compare("gae", ex_call(student.gae, rew, values, mask, gamma, lam),
                   loop(gamma * lam), {
            "with the mask forgotten": leak,
            "with the mask put on at the end only: V from after the end leaks in":
                leak * mask,
            "with a V from after the episode's end in the last step's δ":
                loop(gamma * lam, lambda k, n: float(values[k, n]) if n < H else 0.0),
            "with the last step's own V taken for what follows it":
                loop(gamma * lam, lambda k, n: float(values[k, n - 1])),
            "with γ in place of γλ in the sum": loop(gamma),
            "with λ in place of γλ in the sum": loop(lam),
            "with one term only: this is δ": loop(0.0),
            "with γ forgotten in δ": loop(gamma * lam, gamma=1.0)})


def ex_check_log_prob(student):
    for c in map(ex_case, range(2)):
        pi, act = c.policy.distribution(c.theta, c.outer.obs), c.outer.act
        inputs = [x.clone().requires_grad_() for x in (pi.mean, pi.log_std)]
        mean, log_std = inputs
        each = Normal(mean, log_std.exp()).log_prob(act)                       # (K, H, A)
        got = ex_call(student.DiagonalGaussian(mean, log_std).log_prob, act)
        ex_compare("log_prob", got, each.sum(-1), {
            "with the mean over the action's dimensions, not the sum": each.mean(-1),
            "before the sum over the action's dimensions": each,
            "without −½ log 2π": (each + 0.5 * np.log(2 * np.pi)).sum(-1),
            "without −log σ": (each + log_std).sum(-1),
            "with exp(log_std) taken for the variance":
                Normal(mean, (0.5 * log_std).exp()).log_prob(act).sum(-1),
            "without the logarithm: this is the density": each.sum(-1).exp()})
        for x, name in zip(inputs, ("μ", "log σ")):
            ex_compare(f"log_prob: its gradient by {name}",
                       ex_gradient("log_prob", got.sum(), x),
                       torch.autograd.grad(each.sum(), x, retain_graph=True)[0])


def ex_check_kl(student):
    for c in map(ex_case, range(2)):
        theta = c.theta.clone().requires_grad_()
        old, new = (c.policy.distribution(t, c.outer.obs) for t in (c.theta_old, theta))
        p, q = (Normal(pi.mean, pi.log_std.exp()) for pi in (old, new))
        each, means = kl_divergence(p, q), 0.5 * ((p.loc - q.loc) / q.scale)**2
        got = ex_call(student._kl_gaussian, old, new)
        ex_compare("_kl_gaussian", got, each.sum(-1), {
            "with the two policies of the KL swapped": kl_divergence(q, p).sum(-1),
            "with the mean over the action's dimensions, not the sum": each.mean(-1),
            "before the sum over the action's dimensions": each,
            "without the −½": (each + 0.5).sum(-1),
            "without the part of the means": (each - means).sum(-1),
            "without the part of the two σ": means.sum(-1),
            "with σ_o under the distance of the means, where σ_n belongs":
                (each - means + means * (q.scale / p.scale)**2).sum(-1)})
        ex_compare("_kl_gaussian: its gradient by the new θ",
                   ex_gradient("_kl_gaussian", got.sum(), theta),
                   torch.autograd.grad(each.sum(), theta)[0])


def ex_check_inner_loss(student):
    for c in map(ex_case, range(2)):
        theta, data = c.theta.clone().requires_grad_(), c.inner[0]
        log_prob = ex_normal(c.policy, theta, data.obs).log_prob(data.act)
        product, keep = log_prob * data.adv, data.mask.bool()
        got, right = (ex_call(student.inner_loss, c.policy, theta, data),
                      ex_loss(c.policy, theta, data))
        ex_compare("inner_loss", got, right, {
            "with the mask forgotten: padding counts as steps": -product.mean(),
            "with the sign flipped: a loss falls where the return rises": -right,
            "with the sum over the steps, not their mean": -product.sum(),
            "with the sum over an episode's steps, then the mean over episodes":
                -product.sum(1).mean(),
            "with the mean of every episode's mean: short episodes weigh too much":
                -(product.sum(1) / data.mask.sum(1)).mean(),
            "with rewards, where advantages belong": -(log_prob * data.rew)[keep].mean(),
            "before the mean over the steps": -product})
        ex_compare("inner_loss: the value is right; its gradient by θ",
                   ex_gradient("inner_loss", got, theta),
                   torch.autograd.grad(right, theta)[0])


def ex_check_adapt(student):
    for seed in range(2):
        c, dense = ex_case(seed), ex_dense(seed)
        theta, u = c.theta_old, c.u

        def after(inner=c.inner, alpha=c.alpha, at=None):
            return ex_adapted(c.policy, theta, inner, alpha, at)
        wrong = {
            "with a step up the loss, θ + α∇L": after(alpha=-c.alpha),
            "after the first inner step only": after(c.inner[:1]),
            "with every step starting from θ: only the last one counts":
                after(c.inner[1:]),
            "with every step's gradient taken at the first θ": after(at=theta),
            "without α": after(alpha=1.0), "without any step: this is θ": theta,
            "without θ: this is the change alone": after() - theta}
        for second in (True, False):
            name, t = f"adapt (create_graph={second})", theta.clone().requires_grad_()
            got = ex_call(student.adapt, c.policy, t, c.inner, c.alpha, second)
            ex_compare(name, got, after(), wrong)
            ex_compare(f"{name}: θ′ is right; its derivative Jᵀu", ex_gradient(
                name, got @ u, t), u @ dense.J if second else u, {
                "with the inner gradient detached: J = I, first-order MAML": u,
                "of the last inner step alone: the earlier ones are cut off": u @ dense.J2,
            } if second else {
                "with create_graph ignored: --first-order would change nothing":
                    u @ dense.J})
        ex_compare("adapt (θ does not require grad, as in the line search)", ex_call(
            student.adapt, c.policy, theta, c.inner, c.alpha, False), after())


def ex_check_surrogate(student):
    for seed in range(2):
        c = ex_case(seed)
        act, adv, keep, obs = c.outer.act, c.outer.adv, c.keep, c.outer.obs
        here, there = c.theta_old, c.theta       # the θ it is called with, and `old`'s
        data = mt.TaskData(c.inner, c.outer, c.policy.distribution(
            ex_adapted(c.policy, there, c.inner, c.alpha), obs))

        def pi(theta, steps=2):                  # after this many inner steps
            phi = ex_adapted(c.policy, theta, c.inner[:steps], c.alpha)
            return ex_normal(c.policy, phi, obs)

        def samples(p, q, adv=adv):              # at each sample: loss, KL
            return (-(q.log_prob(act) - p.log_prob(act)).exp() * adv,
                    kl_divergence(p, q))
        p, q, meta = pi(there), pi(here), pi(here, 0)
        loss, kl = samples(p, q)
        same = "with a ratio of 1: nothing compares with task_data.old"
        wrong = [{
            "with the mask forgotten": loss.mean(),
            "with π_θ, where the adapted policy belongs": samples(p, meta)[0][keep].mean(),
            "with the first inner step only": samples(p, pi(here, 1))[0][keep].mean(),
            "with the ratio to the policy before its inner step":
                samples(pi(there, 0), q)[0][keep].mean(),
            "with log π in place of the ratio": -(q.log_prob(act) * adv)[keep].mean(),
            "with the ratio upside down": samples(q, p)[0][keep].mean(), same:
                -adv[keep].mean(),
            "with D's advantages, where those of D′ belong":
                samples(p, q, c.inner[-1].adv)[0][keep].mean(),
            "with surrogate and KL in the wrong order": kl[keep].mean(),
            "before the mean over the steps": loss}, {
            "with the two policies of the KL swapped": samples(q, p)[1][keep].mean(),
            "with the mask forgotten": kl.mean(),
            "with π_θ, where the adapted policy belongs": samples(p, meta)[1][keep].mean(),
            "for the KL of adapted and meta-policy: that bounds the inner step":
                samples(q, meta)[1][keep].mean(),
            "for the KL of meta- and adapted policy: that bounds the inner step":
                samples(meta, q)[1][keep].mean(),
            "with the first inner step only": samples(p, pi(here, 1))[1][keep].mean(),
            "for a policy and itself: nothing compares with task_data.old": 0.0,
            "before the mean over the steps": kl}]
        right = torch.stack([loss[keep].mean(), kl[keep].mean()])
        cut = ex_jacobian(lambda t: torch.stack([                              # if J = I
            x[keep].mean() for x in samples(p, ex_normal(c.policy, t, obs))]),
            ex_adapted(c.policy, here, c.inner, c.alpha))
        full = cut @ ex_dense(seed).J
        for first_order, graph in ((False, True), (True, True), (False, False)):
            theta = here.clone().requires_grad_(graph)
            got = ex_several("surrogate_and_kl", ex_call(
                student.surrogate_and_kl, c.policy, theta, data, c.alpha, first_order),
                "surrogate, KL")
            for i, name in enumerate(("the surrogate", "the KL")):
                what = f"surrogate_and_kl (first_order={first_order}): {name}"
                ex_compare(what, got[i], right[i], wrong[i])
                if graph:
                    ex_compare(f"{what} is right; its gradient by θ", ex_gradient(
                        what, got[i], theta), (cut if first_order else full)[i], {
                        "with first_order ignored": full[i]} if first_order else {
                        "with the inner gradient detached: first-order MAML": cut[i]})


def ex_check_hvp(student):
    for seed, P, step in ((0, 5, 0.02), (1, 8, 0.05)):
        randn = ex_randn(seed)
        matrix, theta, v, g = randn(P, P), randn(P), 7 * randn(P), randn(P)
        matrix, calls, eps = matrix + matrix.T, [], step / v.norm()
        for symmetric, known, offset in ((False, None, 0 * g), (False, g, g),
                                         (True, None, g)):
            def grad_fn(t):                      # ∇k: `offset` at θ, its Hessian `matrix`
                calls.append(t)
                return offset + matrix @ (t - theta) + (t - theta)**2 + (t - theta)**3

            def difference(eps, back):           # ∇k(θ + εv) − ∇k(θ − back·εv)
                return grad_fn(theta + eps * v) - grad_fn(theta - back * eps * v)
            n = 2 if symmetric else 1
            one, two = difference(eps, 0), difference(eps, 1)
            right = (two / 2 if symmetric else one) / eps
            assert (right - matrix @ v).norm() < 0.2 * right.norm()
            wrong = {
                "with 1/ε, where the two points are 2ε apart": two / eps,
                "with 1/(2ε), where the two points are ε apart": one / (2 * eps),
                "with the one-sided difference, where `symmetric` is asked": one / eps,
                "with the symmetric difference, where one gradient would do":
                    two / (2 * eps),
                "with ε = step: θ then moves by step·‖v‖, not by step":
                    difference(step, n - 1) / (n * step),
                "divided by step, not by ε: this is H·v/‖v‖": right * eps / step,
                "before the division by ε": right * n * eps,
                "without subtracting ∇k(θ)": grad_fn(theta + eps * v) / eps}
            calls.clear()
            got, what = ex_call(student.hessian_vector_product, grad_fn, theta, v, step,
                                known, symmetric), "hessian_vector_product (" + (
                "symmetric)" if symmetric else "one-sided, ∇k(θ) "
                f"{'known to be 0' if known is None else 'given'})")
            made = len(calls)
            ex_compare(what, got, right, wrong)
            if made > n:
                raise ExWrong(f"{what}: the value is right, but it calls grad_fn {made} "
                              f"times, where {n} will do")


def ex_check_gauss_newton(student):
    for seed in range(2):
        c, d = ex_case(seed), ex_dense(seed)
        v, F, J, one = c.u, d.F, d.J, torch.eye(len(c.u))
        up, right = (2 * one - d.J2) @ (2 * one - d.J1), J.T @ F @ J @ v
        for first_order in (False, True):
            name = f"gauss_newton_product (first_order={first_order})"
            got = ex_call(student.gauss_newton_product, c.policy, c.theta_old, c.data, v,
                          c.alpha, first_order)
            ex_compare(name, got, F @ v if first_order else right, {
                "with first_order ignored": right} if first_order else {
                "with J left out: this is F·v": F @ v,
                "with Jᵀ left out: this is F(J·v)": F @ J @ v,
                "with F left out: this is Jᵀ(J·v)": J.T @ J @ v,
                "with J for Jᵀ: on the way back the steps come in reverse order":
                    J @ F @ J @ v,
                "with Jᵀ for J: the first inner step comes first": J.T @ F @ J.T @ v,
                "with J = I + α∇²L": up.T @ F @ up @ v,
                "with the first inner step only": d.J1.T @ F @ d.J1 @ v,
                "with F at θ, where θ′ belongs": J.T @ d.F_at_theta @ J @ v,
                "with the mask forgotten": J.T @ d.F_unmasked @ J @ v})


def ex_check_conjugate_gradient(student):
    for seed, P in enumerate((5, 8)):
        randn = ex_randn(seed)
        root, b = randn(P, P) / P**0.5, randn(P)
        H, calls = root @ root.T + torch.eye(P), []

        def product(p):
            calls.append(p)
            return H @ p

        def krylov(n):                           # the best x within b, Hb, …, Hⁿ⁻¹b
            Q = torch.linalg.qr(torch.stack([torch.linalg.matrix_power(H, i) @ b
                                             for i in range(n)], dim=1))[0]
            return Q @ torch.linalg.solve(Q.T @ H @ Q, Q.T @ b)

        def variant(n, beta, alias=False):
            x, r, p = 0 * b, b.clone(), b.clone()
            p = r if alias else p
            for _ in range(n):
                Hp, rr = H @ p, r @ r
                size = rr / (p @ Hp)
                x = x + size * p
                r -= size * Hp
                p = r + beta(r @ r / rr) * p
            return x
        for n in (1, 3, P):
            right, name = krylov(n), f"conjugate_gradient ({n} iterations)"
            calls.clear()
            x, r = ex_several("conjugate_gradient", ex_call(
                student.conjugate_gradient, product, b, n, 0.0), "x, r")
            ex_compare(f"{name}: x", x, right, {
                "with p = r every time: this is steepest descent":
                    variant(n, lambda beta: 0),
                "with r and p one tensor, changed in place: copy it":
                    variant(n, lambda beta: beta, alias=True),
                "with β upside down": variant(n, lambda beta: 1 / beta),
                "after the first iteration only": krylov(1),
                "with one iteration too few": krylov(n - 1) if n > 1 else 0 * b,
                "with x and r in the wrong order": b - H @ right})
            ex_compare(f"{name}: r", r, b - H @ right, {"before any iteration: b": b})
            if len(calls) > n:
                raise ExWrong(f"{name}: x is right, but it makes {len(calls)} products "
                              f"H·p, where one an iteration will do")
        rr = [float((b - H @ krylov(n)).square().sum()) for n in (1, 2)]
        tiny = (1e-6 / (rr[0] * rr[1])**0.5)**0.5        # ‖r‖ and r·r then lie far apart
        ones, bent = torch.ones(P).double(), torch.ones(P).double()
        ones[1], bent[1] = 1.2, -1.0             # pᵀHp > 0 at first, then not
        for what, f, b_, tolerance, right in (
                ("r·r < tolerance", product, b * tiny, 1e-6, krylov(2) * tiny),
                ("b = 0", product, 0 * b, 1e-10, 0 * b),
                ("pᵀHp not positive", lambda p: bent * p, ones, 0.0,
                 ones * (ones @ ones) / (ones @ (bent * ones))),
                ("H·p = NaN", lambda p: p * np.nan, b, 0.0, 0 * b)):
            x, _ = ex_several("conjugate_gradient", ex_call(
                student.conjugate_gradient, f, b_, P, tolerance), "x, r")
            ex_compare(f"conjugate_gradient, stopped by {what}: x", x, right, {
                "with the tolerance ignored, or ‖r‖ compared with it in place of r·r":
                    krylov(P) * tiny})


EX_SCALE = "step_scale" if hasattr(mt, "step_scale") else "trpo_meta_step"


def ex_check_scale(student):
    def from_meta_step(xHx, max_kl):             # what trpo_meta_step multiplies x with
        c, steps = ex_case(0), []
        x, settings = torch.ones_like(c.theta), dict(max_kl=max_kl, alpha=c.alpha)
        student.conjugate_gradient = lambda _, b, *__: (x, b - xHx / len(x))
        student.backtrack_line_search = lambda _, theta, step, *__: (
            steps.append(step), (theta, 0.0, 0.0, 0))[1]
        ex_call(student.trpo_meta_step, c.policy, c.theta_old, [c.data],
                mt.Config(**settings, workers=1))
        return -float(steps[0][0]) if steps else 0.0

    for xHx, d in ((0.3, 0.01), (7.0, 0.05)):
        got = ex_call(student.step_scale, xHx, d) if EX_SCALE == "step_scale" else \
            from_meta_step(xHx, d)
        if isinstance(got, (int, float, np.number)) or (
                isinstance(got, Tensor) and got.numel() == 1):
            got = torch.tensor(float(got)).double()
        ex_compare(EX_SCALE, got, torch.tensor((2 * d / xHx)**0.5).double(), {
            "with the square root missing": 2 * d / xHx,
            "with the 2 missing": (d / xHx)**0.5,
            "upside down": (xHx / (2 * d))**0.5,
            "with xᵀHx multiplied, not divided": (2 * d * xHx)**0.5,
            "with the root of 2δ only": (2 * d)**0.5 / xHx})


def ex_check_line_search(student):
    randn, nan, ratio, n, before, max_kl = ex_randn(0), float("nan"), 0.6, 5, -1.0, 0.01
    theta, step = randn(7), randn(7)
    points = [theta + ratio**j * step for j in range(n + 1)]
    # what is tested; surrogate and KL of trials 0 to 4; which is right (None: none of them)
    for what, loss, kl, right in (
            ("the full step is good", [-3, -2, -2, -2, -2], [.001] * 5, 0),
            ("the KL is too large at first", [-5, -4, -3, -2, 0], [.1, .05, .02, .01, 0], 3),
            ("the surrogate does not fall at first", [9, -1, -2, -3, -4], [.001] * 5, 2),
            ("no trial has both", [-5, -4, -3, 2, 3], [.09, .08, .07, .001, .001], None),
            ("the surrogate is NaN at first", [nan, nan, -2, -2, -2], [.001] * 5, 2),
            ("the KL is NaN at first", [-3, -3, -2, -2, -2], [nan] + [.001] * 4, 1)):
        tried = []

        def evaluate(t):
            tried.append(t)
            return next(((loss[j], kl[j]) for j in range(n) if torch.allclose(
                t, points[j])), (5.0, 1.0))
        got = ex_several("backtrack_line_search", ex_call(
            student.backtrack_line_search, evaluate, theta, step, before, max_kl, ratio, n),
            "θ, surrogate, KL, trials")
        fell = next((j for j in range(n) if loss[j] < before), n)
        small = next((j for j in range(n) if kl[j] <= max_kl), n)
        fine = [j for j in range(n) if loss[j] < before and kl[j] <= max_kl]
        what = f"backtrack_line_search, where {what}"
        ex_compare(f"{what}: θ", got[0], theta if right is None else points[right], {
            "without the check of the KL": points[fell],
            "without the check of the surrogate": points[small],
            "with a NaN accepted": points[0],
            "with θ not restored: this is the last trial": points[n - 1],
            "for a case in which no trial passes": theta,
            "with the last step that passes: the first is wanted": points[(fine or [n])[-1]],
            "with the full step left out: j starts at 0": points[(right or 0) + 1],
            "with the step's sign flipped": 2 * theta - points[right or 0],
            "without θ: this is the step alone": points[right or 0] - theta})
        for name, value, good in zip(("surrogate", "KL", "number of trials"), got[1:],
                                     (before, 0.0, 0) if right is None else
                                     (loss[right], kl[right], right + 1)):
            if not isinstance(value, (int, float, Tensor)) or value != good:
                raise ExWrong(f"{what}: θ is right, but the {name} returned is {value}, "
                              f"where {good} is right")
        if len(tried) > (n if right is None else right + 1):
            raise ExWrong(f"{what}: θ is right, but it calls evaluate {len(tried)} times")


def ex_phi(obs: Tensor, clip=10.0, unit=100.0, first=0, batch=0) -> Tensor:
    """The baseline's features, number by number: (K, H, 2S+4)."""
    rows = []
    for k, episode in enumerate(obs.double().tolist()):
        for t, x in enumerate(episode):
            x = [min(max(a, -clip), clip) for a in x]
            u = (t + first + batch * k * len(episode)) / unit
            rows.append([*x, *(a * a for a in x), u, u**2, u**3, 1.0])
    return torch.tensor(rows).double().reshape(*obs.shape[:2], -1)


def ex_baseline(seed: int):
    """Data with observations beyond the clip."""
    c = ex_case(seed)
    c.outer.obs[0, 0, 0], c.outer.obs[0, 1, 1] = 25.0, -31.0
    return c.outer, c.keep, c.randn


def ex_check_features(student):
    for seed in range(2):
        obs = ex_baseline(seed)[0].obs.float()
        right, S = ex_phi(obs), obs.shape[-1]
        ex_compare("features", ex_call(student.LinearBaseline().features, obs), right, {
            "without the clip to ±10": ex_phi(obs, clip=1e9),
            "with time not divided by 100": ex_phi(obs, unit=1.0),
            "with time running on over the batch: it starts anew in each episode":
                ex_phi(obs, batch=1),
            "with time counted from 1": ex_phi(obs, first=1),
            "with the square taken before the clip": torch.cat(
                [right[..., :S], obs.double()**2, right[..., 2 * S:]], dim=-1),
            "without the constant 1": right[..., :-1]})


def ex_check_fit(student):
    def ridge(phi, y, size=1e-5):                # least squares with extra rows
        rows = np.vstack([phi.numpy(), size**0.5 * np.eye(phi.shape[1])])
        y = np.concatenate([y.numpy(), np.zeros(phi.shape[1])])
        return torch.from_numpy(np.linalg.lstsq(rows, y, rcond=None)[0])

    for seed in range(2):
        (data, keep, randn), baseline = ex_baseline(seed), student.LinearBaseline()
        returns, phi = (randn(*data.rew.shape) + 3) * data.mask, ex_phi(data.obs)
        got = ex_call(baseline.fit, data.obs, returns, data.mask)
        if got is not baseline:
            raise ExWrong("fit must return self, so that fit(…).predict(…) can be written; "
                          f"it returns {'None' if got is None else type(got).__name__}")
        ex_compare("fit: the weights", baseline.weights, ridge(phi[keep], returns[keep]), {
            "with the mask forgotten: padding is fitted too":
                ridge(phi.flatten(0, 1), returns.flatten()),
            "without the ridge": ridge(phi[keep], returns[keep], 1e-14),
            "with a ridge of 1": ridge(phi[keep], returns[keep], 1.0),
            "with a mean in place of the sum: the ridge then weighs N times as much":
                ridge(phi[keep], returns[keep], 1e-5 * int(keep.sum()))})


def ex_check_predict(student):
    for seed in range(2):
        data, _, randn = ex_baseline(seed)
        for obs in (data.obs, data.obs.float()):
            baseline, phi = student.LinearBaseline(), ex_phi(obs)
            baseline.weights = randn(phi.shape[-1])
            right = (phi * baseline.weights).sum(-1).to(obs.dtype)
            ex_compare("predict", ex_call(baseline.predict, obs), right, {
                "before the sum over the features": phi * baseline.weights,
                "with the clip to ±10 left out":
                    (ex_phi(obs, clip=1e9) * baseline.weights).sum(-1),
                "with one axis too many": right[..., None]})


def ex_check_ratio(student):
    for c in map(ex_case, range(2)):
        data, theta, v = c.inner[0], c.theta.clone().requires_grad_(), c.u
        keep = data.mask.bool()

        def derivatives(loss):                   # its value, ∇ and ∇²·v at θ
            grad = torch.autograd.grad(value := loss(theta), theta, create_graph=True)[0]
            return value, grad, torch.autograd.grad(grad @ v, theta)[0]

        def episodes(t):                         # the ratio of all steps so far (DiCE)
            new, old = (ex_normal(c.policy, x, data.obs).log_prob(data.act)
                        for x in (t, c.theta))
            return -((new - old).cumsum(1).exp() * data.adv)[keep].mean()
        right = derivatives(lambda t: ex_loss(c.policy, t, data, ratio_to=c.theta))
        plain, dice = derivatives(lambda t: ex_loss(c.policy, t, data)), derivatives(episodes)
        prob = ex_normal(c.policy, theta, data.obs).log_prob(data.act).exp()
        name = "inner_loss (estimator=\"ratio\")"
        got = ex_call(student.inner_loss, c.policy, theta, data, "ratio")
        ex_compare(name, got, right[0], {
            "for log π: the estimator is not looked at": plain[0],
            "with π in place of π/stop_grad(π)": -(prob * data.adv)[keep].mean(),
            "with the mask forgotten": -data.adv.mean(),
            "with the logarithm of the ratio, which is 0": 0.0,
            "with the sum over the steps, not their mean": -data.adv.sum(),
            "before the mean over the steps": -data.adv})
        grad = ex_gradient(name, got, theta)
        all_steps = "with the ratio of all steps so far (DiCE), not each step's own"
        ex_compare(f"{name}: the value is right; its gradient", grad, right[1], {
            "for π/π with nothing detached: always 1": 0 * v,
            "with the numerator detached, not the denominator": -right[1],
            all_steps: dice[1]})
        hvp = torch.autograd.grad(grad @ v, theta)[0] if grad.requires_grad else 0 * v
        ex_compare(f"{name}: value and gradient are right; its Hessian times v", hvp,
                   right[2], {"for log π, which differs from the ratio just here": plain[2],
                              all_steps: dice[2]})


# %% Exercises 4: the list


@dataclasses.dataclass(frozen=True)
class Exercise:
    title: str
    minutes: int
    difficulty: int                              # 1 to 5
    source: str
    checks: dict                                 # function, or Class.method → its grader


EXERCISES = {f"ex{i}": Exercise(*row) for i, row in enumerate((
    ("returns and advantages", 20, 1, "SpinUp VPG l.4, GAE Eq.16", {
        "discounted_returns": ex_check_returns, "gae": ex_check_gae}),
    ("log-probability and KL", 20, 1, "MAML §5.3, TRPO Eq.12", {
        "DiagonalGaussian.log_prob": ex_check_log_prob, "_kl_gaussian": ex_check_kl}),
    ("the inner step with its graph", 25, 2, "MAML Eq.4, Alg.3 l.6-7", {
        "inner_loss": ex_check_inner_loss, "adapt": ex_check_adapt}),
    ("the surrogate and the meta-gradient", 25, 3, "MAML Alg.3 l.10, TRPO Eq.14", {
        "surrogate_and_kl": ex_check_surrogate}),
    ("H·v by finite differences", 15, 2, "MAML §5.3", {
        "hessian_vector_product": ex_check_hvp}),
    ("H·v as JᵀFJ·v", 45, 5, "notes.md, section 5", {
        "gauss_newton_product": ex_check_gauss_newton}),
    ("conjugate gradient", 25, 3, "TRPO App.C, SpinUp TRPO l.8", {
        "conjugate_gradient": ex_check_conjugate_gradient}),
    ("the step's scale and the line search", 20, 2, "TRPO App.C, SpinUp TRPO l.9", {
        EX_SCALE: ex_check_scale, "backtrack_line_search": ex_check_line_search}),
    ("the linear baseline", 25, 2, "Duan et al. 2016", {
        "LinearBaseline.features": ex_check_features, "LinearBaseline.fit": ex_check_fit,
        "LinearBaseline.predict": ex_check_predict}),
    ("the ratio inner loss (LVC)", 20, 4, "ProMP", {"inner_loss": ex_check_ratio}),
), 1)}

# %% Exercises 5: grading a module in this process


class ExPrinted(io.StringIO):
    """The beginning of what was printed."""

    def write(self, text: str) -> int:
        return super().write(text) if self.tell() < 1000 else len(text)


def ex_load(path):
    """The student's file as a module; ExWrong if it cannot be imported."""
    loader = SourceFileLoader("ex_student", str(path))
    module = importlib.util.module_from_spec(
        importlib.util.spec_from_loader("ex_student", loader))
    sys.modules["ex_student"] = module           # dataclasses look there
    try:
        loader.exec_module(module)
    except BaseException as error:
        where = f" in its line {error.lineno}" if isinstance(error, SyntaxError) else ""
        raise ExWrong(f"the file cannot be imported{where}: it "
                      f"{ex_describe(error, str(path))}") from None
    return module


def ex_find(module, function: str):
    """"gae", or "LinearBaseline.fit" → the plain function, None if there is none."""
    head, *rest = function.split(".")
    found = getattr(module, head, None)
    return vars(found).get(rest[0]) if rest and isinstance(found, type) else found


def ex_isolate(student, theirs: dict, own: dict, only: str) -> None:
    """In the student's module, everything but `only` is replaced by the reference's."""
    head = only.split(".")[0]
    for name, value in vars(mt).items():
        if getattr(value, "__module__", "") == mt.__name__:
            setattr(student, name, value)
    setattr(student, head, theirs[head])
    for function in own:                         # the methods of one class
        if function.startswith(head + "."):
            setattr(theirs[head], function.split(".")[1],
                    own[function] if function == only else ex_find(mt, function))


def ex_grade(student, names=EXERCISES) -> dict[str, tuple[str, str]]:
    """Exercise → ("pass", "FAIL" or "not written", what there is to say)."""
    theirs, results = dict(vars(student)), {}
    own = {function: ex_find(student, function)
           for exercise in EXERCISES.values() for function in exercise.checks}
    for ex in names:
        wrong, right, unwritten, printed = [], [], [], ExPrinted()
        for function, check in EXERCISES[ex].checks.items():
            if not inspect.isfunction(own[function]):
                wrong.append(f"there is no function {function} in the file")
                continue
            ex_isolate(student, theirs, own, function)
            try:
                with contextlib.redirect_stdout(printed):
                    check(student)
                right.append(f"{function.split('.')[-1]} is right")
            except ExUnwritten as error:
                unwritten.append(str(error))
            except ExWrong as error:
                wrong.append(str(error))
            except Exception as error:           # the grader's own arithmetic
                wrong.append(f"{function} returns what cannot be used "
                             f"({type(error).__name__}: {str(error)[:100]})")
        status = "FAIL" if wrong else "not written" if unwritten else "pass"
        say = [] if status == "pass" else [*wrong, *right, *unwritten]
        if printed.getvalue():
            say.append(f"note: it prints {printed.getvalue()[:40]!r}")
        results[ex] = status, "\n".join(say)
    return results


def ex_whole_numbers(m) -> list[Tensor]:
    """What module `m` computes in four short trainings and an evaluation, in float64."""
    out, family = [], m.TaskFamily("near", m.Point2D, lambda rng, M: rng.uniform(
        -0.06, 0.06, (M, 2)), m.paper_goals, horizon=9)
    for changes in (dict(alpha=0.5), dict(inner_steps=2, hvp="gauss-newton", lam=0.9),
                    dict(inner_loss="ratio", hvp="double-backprop", max_kl=0.3),
                    dict(first_order=True, gamma=0.7)):
        config = m.Config(iterations=2, meta_batch_size=2, rollouts=4, horizon=9,
                          hidden=(5,), activation="tanh", init_std=0.4, workers=1,
                          cg_iterations=4, **changes)
        policy = m.make_policy(family, config)
        start = m.TrainState.initial(policy, config)
        theta, rows = m.train_maml(config, family, dataclasses.replace(
            start, theta=start.theta.double()))
        out += [theta, torch.tensor([[value for name, value in row.items()
                                      if "seconds" not in name] for row in rows])]
    out.append(torch.from_numpy(m.adaptation_returns(
        policy, theta, family, family.test_tasks(2), steps=2, episodes=3)))
    return out


@functools.lru_cache
def ex_whole_reference() -> list[Tensor]:
    return ex_whole_numbers(mt)


def ex_whole(path) -> tuple[str, str]:
    """Does the whole file train as the reference does? Exercises alone do not show it."""
    try:
        got = ex_whole_numbers(ex_load(path))
    except BaseException as error:
        if isinstance(error, NotImplementedError):
            return "not written", ""
        return "FAIL", f"a short training {ex_describe(error, str(path))}"
    same = all(a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-6)
               for a, b in zip(got, ex_whole_reference()))
    return ("pass", "") if same else (
        "FAIL", "short trainings give other numbers than with the reference")


# %% Exercises 6: grading a file in another process, with a time limit

EX_SECONDS = 8.0                                 # for an exercise, once Python has started
EX_ALL = (*EXERCISES, "whole")


def ex_child(path: str, verdicts: str, names: list[str]) -> None:
    """The grading process: a line of JSON to `verdicts` at every step."""
    sys.dont_write_bytecode = True
    torch.set_num_threads(1)
    with open(verdicts, "a", encoding="utf-8") as f, \
            contextlib.redirect_stdout(ExPrinted()):
        def tell(*what):
            print(json.dumps(what), file=f, flush=True)
        tell("begin", "importing the file")
        try:
            ex_load(path)
        except ExWrong as error:
            for name in names:
                tell(name, "FAIL", str(error))
            names = []
        for name in names:
            tell("begin", name)
            tell(name, *(ex_whole(path) if name == "whole" else
                         ex_grade(ex_load(path), [name])[name]))
    os._exit(0)                                  # whatever threads were left running


def ex_run_child(path, verdicts: Path, names, seconds: float) -> str:
    """Run `ex_child` until it ends, or writes nothing for `seconds`: → how it ended."""
    here = Path(__file__).resolve()
    code = (f"import sys; sys.path[0] = {str(here.parent)!r}; import {here.stem} as tests; "
            f"tests.ex_child{(str(Path(path).resolve()), str(verdicts), list(names))!r}")
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, cwd=verdicts.parent, start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"})
    size, deadline = 0, time.monotonic() + 60    # Python may take long to start
    try:
        while child.poll() is None:
            time.sleep(0.02)
            if verdicts.stat().st_size != size:
                size, deadline = verdicts.stat().st_size, time.monotonic() + seconds
            if time.monotonic() > deadline:
                return f"is not done after {seconds:.0f} s: an endless loop?"
    finally:
        try:                                     # it, and whatever it may have started
            os.killpg(child.pid, signal.SIGKILL)
        except (AttributeError, OSError):
            child.kill()
        child.wait()
    return f"ended the whole process (exit status {child.returncode})"


def ex_grade_file(path, names=EX_ALL, seconds=EX_SECONDS) -> dict[str, tuple[str, str]]:
    """Exercise → (status, what there is to say), whatever the file does."""
    results: dict[str, tuple[str, str]] = {}
    while left := [name for name in names if name not in results]:
        with tempfile.TemporaryDirectory() as folder:
            verdicts, last = Path(folder) / "verdicts", "starting Python"
            verdicts.touch()
            end = ex_run_child(path, verdicts, left, seconds)
            for line in verdicts.read_text(encoding="utf-8").splitlines():
                name, *verdict = json.loads(line)
                if name == "begin":
                    last = verdict[0]
                else:
                    results[name] = tuple(verdict)
        for name in [last] if last in left else left:
            results.setdefault(name, ("FAIL", f"{last} {end}"))
    return {name: results[name] for name in names}


# %% Exercises 7: the command line

EX_USAGE = """python test_maml_trpo.py exercises                  list them
python test_maml_trpo.py make  ex5|all FILE         write a file to fill in
python test_maml_trpo.py check ex5|all FILE|FOLDER  grade it
python test_maml_trpo.py bug   N FILE               write a file with one bug in it"""
EX_MARK = "# One bug is hidden in this file, number "


class ExUsage(Exception):
    """Bad usage, in a sentence: exit status 2."""


def ex_source() -> str:
    return Path(mt.__file__).read_text(encoding="utf-8")


def ex_stub(names) -> str:
    """maml_trpo.py without the bodies of these exercises' functions; docstrings stay."""
    lines, nodes = ex_source().splitlines(keepends=True), {}
    for node in ast.parse(ex_source()).body:
        nodes[getattr(node, "name", "")] = node
        for item in node.body if isinstance(node, ast.ClassDef) else []:
            nodes[f"{node.name}.{getattr(item, 'name', '')}"] = item
    functions = {function for ex in names for function in EXERCISES[ex].checks}
    for function in sorted(functions, key=lambda f: -nodes[f].lineno):   # the last first
        body, asked = nodes[function].body, [
            ex for ex in names if function in EXERCISES[ex].checks]
        first = body[0].end_lineno if ast.get_docstring(nodes[function]) else \
            body[0].lineno - 1
        lines[first:nodes[function].end_lineno] = [
            " " * body[0].col_offset + f'raise NotImplementedError("{" and ".join(asked)}: '
            f'write {function}, see notes.md")\n']
    return "".join(lines)


def ex_write(path, text: str) -> None:
    try:
        with open(path, "x", encoding="utf-8") as f:
            f.write(text)
    except FileExistsError:
        raise ExUsage(f"{path} is there already and is left as it is: choose another name")
    except OSError as error:
        raise ExUsage(f"{path} cannot be written: {error.strerror}")


def ex_bug(number: int, path: str) -> None:
    """Write a copy with a planted bug, one that `check all` can see."""
    source = ex_source()
    mutants = sorted(m for m in MUTANTS if source.count(m[1]) == 1)
    random.Random(0).shuffle(mutants)
    for turn in range(len(mutants)):
        _, old, new, *_ = mutants[(number + turn) % len(mutants)]
        text = source.replace(old, new) + f"\n{EX_MARK}{number}\n"
        with tempfile.TemporaryDirectory() as folder:
            ex_write(Path(folder) / "bug.py", text)
            results = ex_grade_file(Path(folder) / "bug.py")
        if any(status != "pass" for status, _ in results.values()):
            return ex_write(path, text)
    raise ExUsage("the graders see none of the bugs there are")


def ex_check_file(path: Path, names) -> int:
    """Grade one file and print what there is to say: → exit status."""
    results = ex_grade_file(path, names)
    passed = sum(status == "pass" for status, _ in results.values())
    if names == EX_ALL and EX_MARK in path.read_text(encoding="utf-8", errors="replace"):
        print("The bug is mended." if passed == len(results) else
              "The bug is not mended yet. (`check ex1` and so on tell more.)")
    else:
        for name, (status, message) in results.items():
            title = EXERCISES[name].title if name in EXERCISES else "the whole at work"
            print(f"{name:6} {title:38} {status}")
            if status != "not written" or names != EX_ALL or "\n" in message:
                for line in message.splitlines():
                    print(f"       {line}")
        print(f"{passed} of {len(results)} passed")
    return int(passed < len(results))


def ex_check_folder(folder: Path, names) -> int:
    """Grade every *.py in a folder into its next free grades.csv: → exit status."""
    files, n, all_good = sorted(folder.rglob("*.py")), 1, True
    if not files:
        raise ExUsage(f"{folder} holds no .py file")
    while (out := folder / (f"grades-{n}.csv" if n > 1 else "grades.csv")).exists():
        n += 1
    with open(out, "x", newline="", encoding="utf-8") as f:
        csv.writer(f).writerow(["file", "passed", *names, "messages"])
        for path in files:
            results, short = ex_grade_file(path, names), str(path.relative_to(folder))
            passed = sum(status == "pass" for status, _ in results.values())
            all_good &= passed == len(names)
            csv.writer(f).writerow([
                short, passed, *(status for status, _ in results.values()),
                " | ".join(f"{name}: {'; '.join(message.splitlines())}" for name, (
                    status, message) in results.items() if status == "FAIL")])
            f.flush()
            print(f"{short}: {passed} of {len(names)} passed", flush=True)
    print(f"Written to {out}")
    return int(not all_good)


def ex_command(argv: list[str]) -> int:
    match argv:
        case ["exercises"]:
            for name, e in EXERCISES.items():
                print(f"{name:5} {e.title:37} {e.minutes} min {'*' * e.difficulty:5} "
                      f"{', '.join(e.checks)} [{e.source}]")
            return 0
        case ["make" | "check" as command, which, path]:
            if which not in (*EXERCISES, "all"):
                raise ExUsage(f"there is no exercise {which!r}: choose from "
                              f"{', '.join(EXERCISES)}, all")
            if command == "make":
                ex_write(path, stub := ex_stub(EXERCISES if which == "all" else [which]))
                for number, line in enumerate(stub.splitlines(), 1):
                    if 'NotImplementedError("ex' in line:
                        print(f"{path}, line {number}:", line.split('"')[1])
                print(f"Then: python test_maml_trpo.py check {which} {path}")
                return 0
            if not Path(path).exists():
                raise ExUsage(f"there is no file {path}")
            check = ex_check_folder if Path(path).is_dir() else ex_check_file
            return check(Path(path), EX_ALL if which == "all" else (which,))
        case ["bug", number, path] if number.isdecimal():
            if Path(path).exists():
                raise ExUsage(f"{path} is there already and is left as it is")
            ex_bug(int(number), path)
            print(f"Written to {path}. Find the bug, mend it, then: python "
                  f"test_maml_trpo.py check all {path}")
            return 0
    what = f"{' '.join(argv)!r} cannot be understood" if argv else "what is to be done?"
    raise ExUsage(f"{what}; there are\n{EX_USAGE}")


def exercises_main(argv: list[str]) -> int:
    """exercises | make | check | bug → 0 passed or done, 1 failed, 2 bad usage."""
    for stream in (sys.stdout, sys.stderr):      # a terminal that cannot show θ gets ?
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        return ex_command(list(argv))
    except ExUsage as error:
        print(f"test_maml_trpo.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


# %% Exercises: wrong bodies that students write
# exercise, what was done, function, its body, words that the grader's message must have

EX_WRONG_BODIES = [
    ("ex1", "no_discount", "discounted_returns",
     "return rew.flip(1).cumsum(1).flip(1)", "without the discount"),
    ("ex1", "off_by_one_discount", "discounted_returns", """
        out, R = torch.zeros_like(rew), 0
        for t in reversed(range(rew.shape[1])):
            R = gamma * (rew[:, t] + R)
            out[:, t] = R
        return out""", "one power of γ too many"),
    ("ex1", "discounted_from_the_start", "discounted_returns", """
        powers = gamma ** torch.arange(rew.shape[1], dtype=rew.dtype)
        return (rew * powers).flip(1).cumsum(1).flip(1)""", "from the episode's start"),
    ("ex1", "looks_back", "discounted_returns", """
        out = rew.clone()
        for t in range(1, rew.shape[1]):
            out[:, t] += gamma * out[:, t - 1]
        return out""", "the rewards before t"),
    ("ex1", "in_place", "discounted_returns", """
        for t in reversed(range(rew.shape[1] - 1)):
            rew[:, t] += gamma * rew[:, t + 1]
        return rew""", "changes its argument rew in place"),
    ("ex1", "mask_forgotten", "gae", """
        zero = torch.zeros_like(values[:, :1])
        deltas = rew + gamma * torch.cat([values[:, 1:], zero], 1) - values
        return discounted_returns(deltas, gamma * lam)""", "mask forgotten"),
    ("ex1", "mask_at_the_end_only", "gae", """
        zero = torch.zeros_like(values[:, :1])
        deltas = rew + gamma * torch.cat([values[:, 1:], zero], 1) - values
        return discounted_returns(deltas, gamma * lam) * mask""", "at the end only"),
    ("ex1", "bootstraps_past_the_end", "gae", """
        zero = torch.zeros_like(values[:, :1])
        deltas = (rew + gamma * torch.cat([values[:, 1:], zero], 1) - values) * mask
        return discounted_returns(deltas, gamma * lam) * mask""",
     "a V from after the episode's end"),
    ("ex1", "gamma_for_gamma_lambda", "gae", """
        values = values * mask
        zero = torch.zeros_like(values[:, :1])
        deltas = (rew + gamma * torch.cat([values[:, 1:], zero], 1) - values) * mask
        return discounted_returns(deltas, gamma) * mask""", "γ in place of γλ"),

    ("ex2", "mean_over_action", "DiagonalGaussian.log_prob", """
        z = (act - self.mean) / self.log_std.exp()
        return (-0.5 * z**2 - self.log_std - 0.5 * math.log(2 * math.pi)).mean(-1)""",
     "mean over the action's dimensions"),
    ("ex2", "no_sum", "DiagonalGaussian.log_prob", """
        z = (act - self.mean) / self.log_std.exp()
        return -0.5 * z**2 - self.log_std - 0.5 * math.log(2 * math.pi)""",
     "before the sum over the action's dimensions"),
    ("ex2", "no_constant", "DiagonalGaussian.log_prob", """
        z = (act - self.mean) / self.log_std.exp()
        return (-0.5 * z**2 - self.log_std).sum(-1)""", "without −½ log 2π"),
    ("ex2", "log_variance", "DiagonalGaussian.log_prob",
     "return Normal(self.mean, (0.5 * self.log_std).exp()).log_prob(act).sum(-1)",
     "taken for the variance"),
    ("ex2", "detached", "DiagonalGaussian.log_prob",
     "return Normal(self.mean, self.log_std.exp()).log_prob(act).sum(-1).detach()",
     "no gradient can reach"),
    ("ex2", "kl_swapped", "_kl_gaussian", """
        old, new = new, old
        z = (old.mean - new.mean) / new.log_std.exp()
        ratio = new.log_std - old.log_std
        return (ratio + 0.5 * torch.exp(-2 * ratio) - 0.5 + 0.5 * z * z).sum(-1)""",
     "the two policies of the KL swapped"),
    ("ex2", "kl_mean_over_action", "_kl_gaussian", """
        z = (old.mean - new.mean) / new.log_std.exp()
        ratio = new.log_std - old.log_std
        return (ratio + 0.5 * torch.exp(-2 * ratio) - 0.5 + 0.5 * z * z).mean(-1)""",
     "mean over the action's dimensions"),
    ("ex2", "kl_of_means_only", "_kl_gaussian", """
        z = (old.mean - new.mean) / new.log_std.exp()
        return 0.5 * (z * z).sum(-1)""", "without the part of the two σ"),
    ("ex2", "kl_old_sigma", "_kl_gaussian", """
        z = (old.mean - new.mean) / old.log_std.exp()
        ratio = new.log_std - old.log_std
        return (ratio + 0.5 * torch.exp(-2 * ratio) - 0.5 + 0.5 * z * z).sum(-1)""",
     "σ_o under the distance"),

    ("ex3", "mask_forgotten", "inner_loss", """
        pi = policy.distribution(theta, trajectories.obs)
        return -(pi.log_prob(trajectories.act) * trajectories.adv).mean()""",
     "mask forgotten"),
    ("ex3", "sign", "inner_loss", """
        pi = policy.distribution(theta, trajectories.obs)
        return masked_mean(pi.log_prob(trajectories.act) * trajectories.adv,
                           trajectories.mask)""", "sign flipped"),
    ("ex3", "rewards", "inner_loss", """
        pi = policy.distribution(theta, trajectories.obs)
        return -masked_mean(pi.log_prob(trajectories.act) * trajectories.rew,
                            trajectories.mask)""", "with rewards"),
    ("ex3", "sum_of_an_episode", "inner_loss", """
        pi = policy.distribution(theta, trajectories.obs)
        return -(pi.log_prob(trajectories.act) * trajectories.adv).sum(1).mean()""",
     "then the mean over episodes"),
    ("ex3", "graph_cut", "inner_loss", """
        pi = policy.distribution(theta.detach(), trajectories.obs)
        return -masked_mean(pi.log_prob(trajectories.act) * trajectories.adv,
                            trajectories.mask)""", "no gradient can reach θ"),
    ("ex3", "detached_inner_gradient", "adapt", """
        theta_prime = theta if theta.requires_grad else theta.detach().requires_grad_()
        for data in inner_data:
            grad = torch.autograd.grad(inner_loss(policy, theta_prime, data), theta_prime)
            theta_prime = theta_prime - alpha * grad[0]
        return theta_prime""", "inner gradient detached: J = I"),
    ("ex3", "flag_ignored", "adapt", """
        theta_prime = theta if theta.requires_grad else theta.detach().requires_grad_()
        for data in inner_data:
            grad = torch.autograd.grad(inner_loss(policy, theta_prime, data), theta_prime,
                                       create_graph=True)
            theta_prime = theta_prime - alpha * grad[0]
        return theta_prime""", "create_graph ignored"),
    ("ex3", "copy_and_step", "adapt", """
        theta_prime = theta.detach().clone().requires_grad_()
        for data in inner_data:
            loss = inner_loss(policy, theta_prime, data)
            grad = torch.autograd.grad(loss, theta_prime, create_graph=create_graph)
            theta_prime = theta_prime - alpha * grad[0]
        return theta_prime""", "no gradient can reach θ"),
    ("ex3", "first_step_only", "adapt", """
        theta = theta if theta.requires_grad else theta.detach().requires_grad_()
        loss = inner_loss(policy, theta, inner_data[0])
        return theta - alpha * torch.autograd.grad(
            loss, theta, create_graph=create_graph)[0]""", "first inner step only"),
    ("ex3", "ascent", "adapt", """
        theta_prime = theta if theta.requires_grad else theta.detach().requires_grad_()
        for data in inner_data:
            grad = torch.autograd.grad(inner_loss(policy, theta_prime, data), theta_prime,
                                       create_graph=create_graph)
            theta_prime = theta_prime + alpha * grad[0]
        return theta_prime""", "up the loss"),
    ("ex3", "all_gradients_at_theta", "adapt", """
        theta = theta if theta.requires_grad else theta.detach().requires_grad_()
        return theta - alpha * sum(torch.autograd.grad(
            inner_loss(policy, theta, data), theta, create_graph=create_graph)[0]
            for data in inner_data)""", "gradient taken at the first θ"),
    ("ex3", "in_place", "adapt", """
        t = theta if theta.requires_grad else theta.detach().requires_grad_()
        for data in inner_data:
            grad = torch.autograd.grad(inner_loss(policy, t, data), t)
            t.data -= alpha * grad[0]
        return t""", "changes its argument theta in place"),

    ("ex4", "kl_swapped", "surrogate_and_kl", """
        new = adapted_distribution(policy, theta, task_data.inner, task_data.outer.obs,
                                   alpha, first_order, estimator)
        outer, old = task_data.outer, task_data.old
        ratio = (new.log_prob(outer.act) - old.log_prob(outer.act)).exp()
        return (-masked_mean(ratio * outer.adv, outer.mask),
                masked_mean(kl_old_new(new, old), outer.mask))""",
     "the two policies of the KL swapped"),
    ("ex4", "mask_forgotten", "surrogate_and_kl", """
        new = adapted_distribution(policy, theta, task_data.inner, task_data.outer.obs,
                                   alpha, first_order, estimator)
        outer, old = task_data.outer, task_data.old
        ratio = (new.log_prob(outer.act) - old.log_prob(outer.act)).exp()
        return -(ratio * outer.adv).mean(), kl_old_new(old, new).mean()""",
     "mask forgotten"),
    ("ex4", "no_adaptation", "surrogate_and_kl", """
        outer, old = task_data.outer, task_data.old
        new = policy.distribution(theta, outer.obs)
        ratio = (new.log_prob(outer.act) - old.log_prob(outer.act)).exp()
        return (-masked_mean(ratio * outer.adv, outer.mask),
                masked_mean(kl_old_new(old, new), outer.mask))""",
     "with π_θ, where the adapted policy belongs"),
    ("ex4", "log_prob_for_ratio", "surrogate_and_kl", """
        new = adapted_distribution(policy, theta, task_data.inner, task_data.outer.obs,
                                   alpha, first_order, estimator)
        outer, old = task_data.outer, task_data.old
        return (-masked_mean(new.log_prob(outer.act) * outer.adv, outer.mask),
                masked_mean(kl_old_new(old, new), outer.mask))""",
     "log π in place of the ratio"),
    ("ex4", "ratio_with_itself", "surrogate_and_kl", """
        new = adapted_distribution(policy, theta, task_data.inner, task_data.outer.obs,
                                   alpha, first_order, estimator)
        outer, log_prob = task_data.outer, new.log_prob(task_data.outer.act)
        return (-masked_mean((log_prob - log_prob.detach()).exp() * outer.adv, outer.mask),
                masked_mean(kl_old_new(task_data.old, new), outer.mask))""",
     "nothing compares with task_data.old"),
    ("ex4", "kl_to_the_meta_policy", "surrogate_and_kl", """
        new = adapted_distribution(policy, theta, task_data.inner, task_data.outer.obs,
                                   alpha, first_order, estimator)
        outer, old = task_data.outer, task_data.old
        ratio = (new.log_prob(outer.act) - old.log_prob(outer.act)).exp()
        meta = policy.distribution(theta, outer.obs)
        return (-masked_mean(ratio * outer.adv, outer.mask),
                masked_mean(kl_old_new(new, meta), outer.mask))""",
     "bounds the inner step"),
    ("ex4", "inner_gradient_detached", "surrogate_and_kl", """
        new = adapted_distribution(policy, theta, task_data.inner, task_data.outer.obs,
                                   alpha, True, estimator)
        outer, old = task_data.outer, task_data.old
        ratio = (new.log_prob(outer.act) - old.log_prob(outer.act)).exp()
        return (-masked_mean(ratio * outer.adv, outer.mask),
                masked_mean(kl_old_new(old, new), outer.mask))""",
     "inner gradient detached"),
    ("ex4", "first_order_ignored", "surrogate_and_kl", """
        new = adapted_distribution(policy, theta, task_data.inner, task_data.outer.obs,
                                   alpha, False, estimator)
        outer, old = task_data.outer, task_data.old
        ratio = (new.log_prob(outer.act) - old.log_prob(outer.act)).exp()
        return (-masked_mean(ratio * outer.adv, outer.mask),
                masked_mean(kl_old_new(old, new), outer.mask))""",
     "first_order ignored"),

    ("ex5", "symmetric_over_eps", "hessian_vector_product", """
        eps = step / v.norm()
        if symmetric:
            return (grad_fn(theta + eps * v) - grad_fn(theta - eps * v)) / eps
        ahead = grad_fn(theta + eps * v)
        return (ahead if grad_at_theta is None else ahead - grad_at_theta) / eps""",
     "with 1/ε, where the two points are 2ε apart"),
    ("ex5", "v_not_normalised", "hessian_vector_product", """
        if symmetric:
            return (grad_fn(theta + step * v) - grad_fn(theta - step * v)) / (2 * step)
        ahead = grad_fn(theta + step * v)
        return (ahead if grad_at_theta is None else ahead - grad_at_theta) / step""",
     "not by step"),
    ("ex5", "theta_not_restored", "hessian_vector_product", """
        eps = step / v.norm()
        theta += eps * v
        ahead = grad_fn(theta)
        if symmetric:
            theta -= 2 * eps * v
            return (ahead - grad_fn(theta)) / (2 * eps)
        return (ahead if grad_at_theta is None else ahead - grad_at_theta) / eps""",
     "changes its argument theta in place"),
    ("ex5", "always_two_gradients", "hessian_vector_product", """
        eps = step / v.norm()
        behind = grad_fn(theta - eps * v if symmetric else theta)
        return (grad_fn(theta + eps * v) - behind) / (2 * eps if symmetric else eps)""",
     "calls grad_fn 2 times, where 1 will do"),
    ("ex5", "given_gradient_ignored", "hessian_vector_product", """
        eps = step / v.norm()
        if symmetric:
            return (grad_fn(theta + eps * v) - grad_fn(theta - eps * v)) / (2 * eps)
        return grad_fn(theta + eps * v) / eps""", "without subtracting ∇k(θ)"),
    ("ex5", "divided_by_step", "hessian_vector_product", """
        eps = step / v.norm()
        if symmetric:
            return (grad_fn(theta + eps * v) - grad_fn(theta - eps * v)) / (2 * step)
        ahead = grad_fn(theta + eps * v)
        return (ahead if grad_at_theta is None else ahead - grad_at_theta) / step""",
     "H·v/‖v‖"),

    *[("ex6", name, "gauss_newton_product", f"""
        def kl(phi):
            new = policy.distribution(phi, task_data.outer.obs)
            return {kl}
        t, steps = theta.detach(), []
        for data in [] if {no_steps} else task_data.inner:
            t = t.detach().requires_grad_()
            loss = inner_loss(policy, t, data, estimator)
            grad = torch.autograd.grad(loss, t, create_graph=True)[0]
            steps.append((t, grad))
            t = t - alpha * grad
        if first_order:
            t = adapt(policy, theta, task_data.inner, alpha, False, estimator)
        def times(t, grad, u):
            return u {sign} alpha * torch.autograd.grad(grad, t, u, retain_graph=True)[0]
        for t_i, grad in {there}:
            v = times(t_i, grad, v)
        v = double_backprop_product(kl, {at}, v)
        for t_i, grad in {back}:
            v = times(t_i, grad, v)
        return v""", words) for name, words, kl, no_steps, sign, there, at, back in (
            (name, words, *[changes.get(key, usual) for key, usual in (
                ("kl", "masked_mean(kl_old_new(task_data.old, new), task_data.outer.mask)"),
                ("no_steps", "first_order"), ("sign", "-"), ("there", "steps"),
                ("at", "t.detach()"), ("back", "reversed(steps)"))])
            for name, words, changes in (
                ("j_left_out", "this is F·v", dict(there="[]", back="[]")),
                ("j_transposed_left_out", "this is F(J·v)", dict(back="[]")),
                ("order_not_reversed", "in reverse order", dict(back="steps")),
                ("sign_of_the_hessian", "I + α∇²L", dict(sign="+")),
                ("f_at_theta", "F at θ", dict(at="theta.detach()")),
                ("mask_forgotten", "mask forgotten",
                 dict(kl="kl_old_new(task_data.old, new).mean()")),
                ("first_order_ignored", "first_order ignored", dict(no_steps="False"))))],

    *[("ex7", name, "conjugate_gradient", f"""
        x, r = torch.zeros_like(b), {r}
        p = {p}
        rr = r @ r
        for _ in range({iterations}):
            if {small} < tolerance:
                break
            Hp = hvp(p)
            if {curved}:
                break
            size = rr / (p @ Hp)
            x = x + size * p
            {update}
            old, rr = rr, r @ r
            p = r + {beta} * p
        return x, r""", words) for name, words, r, p, iterations, small, curved, update,
        beta in ((name, words, *[changes.get(key, usual) for key, usual in (
            ("r", "b.clone()"), ("p", "r.clone()"), ("iterations", "iterations"),
            ("small", "rr"), ("curved", "not p @ Hp > 0"), ("update", "r = r - size * Hp"),
            ("beta", "(rr / old)"))]) for name, words, changes in (
                ("r_and_p_alias", "r and p one tensor", dict(p="r", update="r -= size * Hp")),
                ("b_changed", "changes its argument b in place",
                 dict(r="b", update="r -= size * Hp")),
                ("steepest_descent", "steepest descent", dict(beta="0")),
                ("beta_upside_down", "β upside down", dict(beta="(old / rr)")),
                ("one_iteration_short", "one iteration too few",
                 dict(iterations="iterations - 1")),
                ("norm_for_square", "‖r‖ compared", dict(small="r.norm()")),
                ("curvature_not_looked_at", "pᵀHp not positive", dict(curved="False"))))],

    ("ex8", "no_root", "step_scale", "return 2 * max_kl / xHx", "square root missing"),
    ("ex8", "no_two", "step_scale", "return math.sqrt(max_kl / xHx)", "the 2 missing"),
    ("ex8", "upside_down", "step_scale", "return math.sqrt(xHx / (2 * max_kl))",
     "upside down"),
    *[("ex8", name, "backtrack_line_search", f"""
        for trial in range({trials}):
            candidate = theta + ratio**trial * full_step
            surrogate, kl = evaluate(candidate)
            if {test}:
                return candidate, surrogate, kl, trial + {plus}
        return {fallback}, surrogate_before, 0.0, 0""", words)
      for name, words, trials, test, plus, fallback in (
          ("no_kl_check", "without the check of the KL", "trials",
           "surrogate < surrogate_before", "1", "theta"),
          ("no_loss_check", "without the check of the surrogate", "trials", "kl <= max_kl",
           "1", "theta"),
          ("theta_not_restored", "θ not restored", "trials",
           "surrogate < surrogate_before and kl <= max_kl", "1", "candidate"),
          ("no_full_step", "the full step left out", "1, trials",
           "surrogate < surrogate_before and kl <= max_kl", "1", "theta"),
          ("nan_accepted", "NaN", "trials",
           "not (surrogate >= surrogate_before or kl > max_kl)", "1", "theta"),
          ("count_from_0", "number of trials returned is 0", "trials",
           "surrogate < surrogate_before and kl <= max_kl", "0", "theta"))],

    *[("ex9", name, "LinearBaseline.features", f"""
        K, H, _ = obs.shape
        x = {x}
        t = {t}
        t = t.expand(K, H)[..., None]
        return torch.cat([x, x**2, t, t**2, t**3, torch.ones_like(t)], dim=-1)""", words)
      for name, words, x, t in (
          ("time_runs_on", "time running on", "obs.double().clamp(-10, 10)",
           "torch.arange(K * H).double().reshape(K, H) / 100"),
          ("no_clip", "without the clip", "obs.double()", "torch.arange(H).double() / 100"),
          ("time_in_steps", "not divided by 100", "obs.double().clamp(-10, 10)",
           "torch.arange(H).double()"))],
    ("ex9", "float32", "LinearBaseline.features", """
        K, H, _ = obs.shape
        x = obs.clamp(-10, 10)
        t = (torch.arange(H) / 100).expand(K, H)[..., None]
        return torch.cat([x, x**2, t, t**2, t**3, torch.ones_like(t)], dim=-1)""",
     "torch.float64 is right"),
    *[("ex9", name, "LinearBaseline.fit", f"""
        phi, y = {data}
        gram = phi.T @ phi + {ridge} * torch.eye(phi.shape[1]).double()
        self.weights = torch.linalg.solve(gram, phi.T @ y)
        {end}""", words) for name, words, data, ridge, end in (
            ("mask_forgotten", "mask forgotten",
             "self.features(obs).flatten(0, 1), returns.flatten()", "1e-5", "return self"),
            ("no_ridge", "without the ridge",
             "self.features(obs)[mask.bool()], returns[mask.bool()]", "1e-14",
             "return self"),
            ("self_not_returned", "must return self",
             "self.features(obs)[mask.bool()], returns[mask.bool()]", "1e-5", ""))],
    ("ex9", "no_sum", "LinearBaseline.predict",
     "return (self.features(obs) * self.weights).to(obs.dtype)", "before the sum"),
    ("ex9", "float64_back", "LinearBaseline.predict",
     "return self.features(obs) @ self.weights", "torch.float32 is right"),

    *[("ex10", name, "inner_loss", f"""
        log_prob = policy.distribution(theta, trajectories.obs).log_prob(trajectories.act)
        score = {score}
        return -masked_mean(score * trajectories.adv, trajectories.mask)""", words)
      for name, words, score in (
          ("estimator_ignored", "the estimator is not looked at", "log_prob"),
          ("nothing_detached", "nothing detached", "(log_prob - log_prob).exp()"),
          ("probability", "π in place of π/stop_grad(π)", "log_prob.exp()"),
          ("numerator_detached", "numerator detached",
           "(log_prob.detach() - log_prob).exp()"),
          ("all_detached", "no gradient can reach θ",
           "(log_prob - log_prob).detach().exp()"),
          ("dice", "DiCE", "(log_prob - log_prob.detach()).cumsum(1).exp()"),
          ("log_prob_in_disguise", "differs from the ratio just here",
           "1 + log_prob - log_prob.detach()"))],
]


@functools.lru_cache
def ex_stub_of_part_one() -> str:
    stub = ex_stub(list(EXERCISES))
    return stub[:stub.index("# %% 9. Evaluation")]


def ex_with_bodies(bodies: dict[str, str]) -> str:
    """Part I of maml_trpo.py with other bodies for these functions, stubs for the rest."""
    stub = ex_stub_of_part_one()
    for function, body in bodies.items():
        lines, at = stub.splitlines(keepends=True), None
        at = next(i for i, line in enumerate(lines) if "raise NotImplementedError" in line
                  and f": write {function}," in line)
        indent = " " * (len(lines[at]) - len(lines[at].lstrip()))
        lines[at] = textwrap.indent(textwrap.dedent(body.strip("\n")), indent) + "\n"
        stub = "".join(lines)
    return stub


def ex_graded(tmp_path, text: str, names=EXERCISES) -> dict:
    (tmp_path / "student.py").write_text(text, encoding="utf-8")
    return ex_grade(ex_load(tmp_path / "student.py"), names)


def ex_functions(ex):
    return list(EXERCISES[ex].checks)


def test_untouched_solution_passes_every_grader_and_the_whole():
    path = Path(mt.__file__)
    assert {v for v, _ in ex_grade(ex_load(path)).values()} == {"pass"}
    assert ex_whole(path) == ("pass", "")


@pytest.mark.parametrize("ex, name, function, body, words", EX_WRONG_BODIES,
                         ids=[f"{row[0]}-{row[1]}" for row in EX_WRONG_BODIES])
def test_wrong_body_is_rejected_with_a_message_that_recognises_it(
        ex, name, function, body, words, tmp_path):
    if function not in EXERCISES[ex].checks:
        pytest.skip("maml_trpo.py has no step_scale")
    status, message = ex_graded(tmp_path, ex_with_bodies({function: body}), [ex])[ex]
    assert status == "FAIL"
    assert message.startswith(function.split(".")[-1]) and words in message


def test_every_exercise_has_at_least_three_wrong_bodies():
    for ex in EXERCISES:
        assert sum(row[0] == ex for row in EX_WRONG_BODIES) >= 3


@pytest.mark.parametrize("body", [
    "pass", "return 0.0", "return torch.ones(4, 5).double()", "return 0.0, 0.0",
    "return list(locals().values())[0]", "return list(locals().values())[1]",
    "return list(locals().values())[-1]", "return tuple(locals().values())",
    "import sys; sys.exit(0)", "raise KeyError('x')"])
def test_constants_inputs_and_nothing_fail_every_function(body, tmp_path):
    """Each function by itself: the others are the reference's."""
    every = {f: body for ex in EXERCISES for f in ex_functions(ex)}
    text = ex_with_bodies(every)
    for ex, (status, message) in ex_graded(tmp_path, text).items():
        assert status == "FAIL"
        names = [function.split(".")[-1] for function in ex_functions(ex)]
        lines = message.splitlines()
        assert len(lines) == len(names) and not {f"{name} is right" for name in names} & {
            *lines}
        assert all(line.startswith(name) for line, name in zip(lines, names))


def test_stub_is_the_source_with_only_those_bodies_replaced():
    def outline(text, blank):
        tree = ast.parse(text)
        for node in ast.walk(tree):
            for item in getattr(node, "body", []) if isinstance(
                    node, (ast.Module, ast.ClassDef)) else []:
                name = (f"{node.name}." if isinstance(node, ast.ClassDef) else "") + \
                    getattr(item, "name", "")
                if name in blank:
                    item.body = item.body[:1]                    # the docstring
        return ast.dump(tree)
    for names in ("ex9", "ex10"), tuple(EXERCISES):
        blank = {f for ex in names for f in ex_functions(ex)}
        stub = ex_stub(names)
        assert outline(stub, blank) == outline(ex_source(), blank)
        assert outline(stub, set()) != outline(ex_source(), set())
        assert set(stub.splitlines()) - set(ex_source().splitlines()) == {
            line for line in stub.splitlines() if 'NotImplementedError("ex' in line}
        assert stub.count('NotImplementedError("ex') == len(blank)


def test_docstrings_of_blanked_functions_do_not_hold_their_code():
    for ex in EXERCISES:
        for function in ex_functions(ex):
            found = ex_find(mt, function)
            doc = " ".join(found.__doc__.split())
            body = inspect.getsource(found).split('"""')[2]
            for line in body.splitlines():
                code = " ".join(line.split("#")[0].split())
                assert len(code) < 20 or code not in doc


def test_unwritten_exercise_is_said_to_be_so(tmp_path):
    results = ex_graded(tmp_path, ex_stub(list(EXERCISES)))
    assert {status for status, _ in results.values()} == {"not written"}
    half = ex_with_bodies({"discounted_returns": "return rew"})
    assert "gae is not written yet" in ex_graded(tmp_path, half, ["ex1"])["ex1"][1]


def test_exercises_do_not_depend_on_each_other(tmp_path):
    """One right function among broken ones passes."""
    every = {f: "return None" for ex in EXERCISES for f in ex_functions(ex)}
    for ex, function in (("ex4", "surrogate_and_kl"), ("ex6", "gauss_newton_product"),
                         ("ex7", "conjugate_gradient")):
        body = inspect.getsource(ex_find(mt, function)).split('"""')[2]
        assert ex_graded(tmp_path, ex_with_bodies(every | {function: body}), [ex])[ex] == (
            "pass", "")


def test_print_is_mentioned_and_does_not_harm(tmp_path):
    text = ex_source().replace("    rr = r @ r\n", "    rr = r @ r\n    print('hello')\n", 1)
    status, message = ex_graded(tmp_path, text, ["ex7"])["ex7"]
    assert status == "pass" and "it prints 'hello" in message


def test_scale_is_graded_through_the_meta_step_where_there_is_no_step_scale(
        tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "EX_SCALE", "trpo_meta_step")
    student = ex_load(mt.__file__)
    ex_check_scale(student)
    text = ex_source().replace("math.sqrt(2 * max_kl / xHx)", "2 * max_kl / xHx").replace(
        "math.sqrt(2 * config.max_kl / xHx)", "(2 * config.max_kl / xHx)")
    (tmp_path / "student.py").write_text(text, encoding="utf-8")
    student = ex_load(tmp_path / "student.py")
    with pytest.raises(ExWrong, match="square root missing"):
        ex_check_scale(student)


# %% Exercises: through the command line, and other processes


def test_make_never_overwrites_and_bad_usage_is_status_2(tmp_path, capsys):
    file = tmp_path / "student.py"
    assert exercises_main(["make", "ex5", str(file)]) == 0
    assert "ex5: write hessian_vector_product" in file.read_text(encoding="utf-8")
    file.write_text("mine")
    capsys.readouterr()
    for argv in (["make", "ex5", str(file)], ["make", "all", str(file)],
                 ["bug", "3", str(file)], ["make", "ex99", str(tmp_path / "new.py")],
                 ["make", "ex1", str(tmp_path / "no" / "folder.py")], ["make"], [],
                 ["check", "ex1", str(tmp_path / "missing.py")], ["bug", "x", "y"]):
        assert exercises_main(argv) == 2
        out = capsys.readouterr()
        assert out.err.startswith("test_maml_trpo.py: ") and not out.out
    assert file.read_text() == "mine" and list(tmp_path.iterdir()) == [file]
    assert exercises_main(["exercises"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [
        *EXERCISES]


def test_command_line_grades_a_file_and_returns_a_real_exit_status(tmp_path):
    (tmp_path / "student.py").write_text(ex_with_bodies({
        "conjugate_gradient": "print('hello')\nraise ValueError('oh')"}), encoding="utf-8")
    done = subprocess.run([sys.executable, __file__, "check", "ex7", "student.py"],
                          cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and not done.stderr
    assert [line.strip() for line in done.stdout.splitlines()][1:] == [
        "conjugate_gradient raises ValueError: oh (line " + done.stdout.split("(line ")[1]
        .split(":")[0] + ": raise ValueError('oh'))", "note: it prints 'hello\\n'",
        "0 of 1 passed"]


def test_endless_loop_is_answered_in_time_with_the_exercise_named(tmp_path):
    file, started = tmp_path / "student.py", time.monotonic()
    file.write_text(ex_with_bodies({"conjugate_gradient": "while True: pass"}),
                    encoding="utf-8")
    results = ex_grade_file(file, ["ex7"], seconds=1.0)
    assert results == {"ex7": ("FAIL", "ex7 is not done after 1 s: an endless loop?")}
    assert time.monotonic() - started + EX_SECONDS - 1 < 15


def test_folder_is_graded_into_a_csv_whatever_is_in_the_files(
        tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(sys.modules[__name__], "EX_ALL", ("ex5", "ex7"))
    (tmp_path / "anna").mkdir()
    for name, text in {
            "anna/good.py": ex_source(), "syntax.py": "def f(:\n",
            "dies.py": ex_with_bodies({"conjugate_gradient": "import os; os._exit(0)"}),
            }.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert exercises_main(["check", "all", str(tmp_path)]) == 1
    out, err = capfd.readouterr()
    assert not err and out.splitlines()[-1] == f"Written to {tmp_path / 'grades.csv'}"
    with open(tmp_path / "grades.csv", newline="", encoding="utf-8") as f:
        rows = {Path(row["file"]).name: row for row in csv.DictReader(f)}
    assert list(rows["good.py"]) == ["file", "passed", "ex5", "ex7", "messages"]
    assert {name: (row["passed"], row["ex5"], row["ex7"]) for name, row in rows.items()} \
        == {"good.py": ("2", "pass", "pass"), "dies.py": ("0", "not written", "FAIL"),
            "syntax.py": ("0", "FAIL", "FAIL")}
    assert "ex7 ended the whole process" in rows["dies.py"]["messages"]
    assert "cannot be imported in its line 1" in rows["syntax.py"]["messages"]
    assert len(list(tmp_path.iterdir())) == 4


def test_planted_bug_is_not_told_and_check_all_says_when_it_is_mended(
        tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ex_grade_file", lambda path, names=(): ex_grade(
        ex_load(path), ("ex7", "ex8")))
    monkeypatch.setattr(sys.modules[__name__], "MUTANTS", [           # the second is none, and is passed over
        ("no_kl", " and kl <= max_kl:", ":"), ("same", "ratio**trial", "ratio ** trial")])
    file = tmp_path / "bug.py"
    assert exercises_main(["bug", "0", str(tmp_path / "0.py")]) == 0
    assert exercises_main(["bug", "1", str(file)]) == 0
    assert " and kl <= max_kl" not in (tmp_path / "0.py").read_text(encoding="utf-8")
    assert "no_kl" not in file.read_text(encoding="utf-8")
    assert exercises_main(["check", "all", str(file)]) == 1
    assert "δ" not in (out := capsys.readouterr().out) and "not mended yet" in out
    file.write_text(file.read_text(encoding="utf-8").replace(
        "if surrogate < surrogate_before:",
        "if kl <= max_kl and surrogate < surrogate_before:"), encoding="utf-8")
    assert exercises_main(["check", "all", str(file)]) == 0
    assert "The bug is mended." in capsys.readouterr().out


# %% Faults: kills, full disks, bad input

FAULT_RUN = ["--meta-batch-size", "2", "--rollouts", "2", "--horizon", "4", "--hidden",
             "4", "--cg-iterations", "2", "--eval-tasks", "2", "--eval-episodes", "2",
             "--iterations", "1", "--workers", "1"]
NO_FIGURES = ("draw_learning_curve", "draw_adaptation", "draw_trajectories")


@pytest.fixture
def no_figures(monkeypatch):
    """Runs without drawing and waiting for the disk, which take most of their time."""
    for name in NO_FIGURES:
        monkeypatch.setattr(mt, name, lambda *args: None)
    monkeypatch.setattr(mt, "render_gif", lambda *args: None)
    monkeypatch.setattr(mt.os, "fsync", lambda file: None)


def fault_run(folder, *more) -> int:
    return mt.main([*FAULT_RUN, "--out", str(folder), *map(str, more)])


def outcome(folder: Path) -> list:
    """All that a run computed: its whole state and tables, without the seconds."""
    config, state = mt.load_checkpoint(folder / "checkpoint.pt")
    with open(folder / "progress.csv", newline="", encoding="utf-8") as f:
        progress = without_seconds(csv.DictReader(f))
    return [config, state.iteration, state.theta.tolist(), without_seconds(state.rows),
            state.spread, state.best_theta.tolist(), state.best_return, progress,
            (folder / "evaluation.csv").read_text(encoding="utf-8"),
            (folder / "config.json").read_text(encoding="utf-8")]


OLD_LOCALE = {name: value for name, value in os.environ.items() if name != "DISPLAY"} | dict(
    LC_ALL="C", PYTHONIOENCODING="latin-1", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0",
    MPLBACKEND="TkAgg")


def kills(count: str = "50") -> None:
    """Kill a run at random moments, each second time while it writes a checkpoint, and
    resume it."""
    if not count.isdigit():
        raise mt.BadInput(f"how often? {count!r} is not a whole number")
    args = [*FAULT_RUN, "--iterations", "25"]
    for name in NO_FIGURES:
        setattr(mt, name, lambda *args: None)

    def start(folder, *more) -> int:
        if pid := os.fork():
            return pid
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        os._exit(mt.main([*args, "--out", str(folder), *more]))

    def ended(pid, how=0) -> bool:
        return os.waitpid(pid, how)[0] == pid

    rng, half_written = random.Random(0), ".checkpoint.pt.*.tmp"
    same, killed, in_a_write, at = 0, 0, 0, []
    with tempfile.TemporaryDirectory(dir=os.getcwd()) as folder:
        whole, began = Path(folder) / "whole", time.perf_counter()
        ended(start(whole))
        expected, seconds = outcome(whole), time.perf_counter() - began
        while killed < int(count):
            run = Path(folder) / f"killed {killed}"
            run.mkdir()
            pid, began = start(run), time.perf_counter()
            moment = began + rng.uniform(0, 1.6 * seconds)        # being watched costs time
            while not (done := ended(pid, os.WNOHANG)) and not (
                    time.perf_counter() > moment
                    and (killed % 2 == 0 or any(run.glob(half_written)))):
                time.sleep(1e-4)
            if done:                                       # it was faster: once more
                shutil.rmtree(run)
                continue
            os.kill(pid, signal.SIGKILL)
            ended(pid)
            killed += 1
            in_a_write += any(run.glob(half_written))
            at.append(mt.load_checkpoint(run / "checkpoint.pt")[1].iteration
                      if (run / "checkpoint.pt").exists() else -1)
            ended(start(run, "--resume"))
            same += outcome(run) == expected and not any(run.glob(".*.tmp"))
    print(f"{same} of {killed} ended bit-identical; {in_a_write} were killed while they "
          f"wrote a checkpoint; the last whole one was of iteration {sorted(at)} (-1: none)")
    sys.exit(same < killed)


@pytest.mark.parametrize("count", [2, pytest.param(50, marks=slow)])
def test_killed_runs_end_bit_identical_when_resumed(tmp_path, count):
    """In a folder with a space and an umlaut, where the locale knows only ASCII."""
    if not hasattr(os, "fork"):
        pytest.skip("needs os.fork")
    cwd = tmp_path / "Übung 1"
    cwd.mkdir()
    out = subprocess.run([sys.executable, __file__, "kills", str(count)], cwd=cwd,
                         capture_output=True, text=True, timeout=900, env=OLD_LOCALE)
    assert out.returncode == 0, out.stderr
    assert f"{count} of {count} ended bit-identical" in out.stdout


@slow
def test_ranks_end_when_one_is_killed_and_resume_to_rounding(tmp_path):
    """Two processes of which one is killed; then both go on, to what one alone does."""
    args = [*FAULT_RUN, "--iterations", "40", "--meta-batch-size", "3", "--hvp",
            "gauss-newton", "--out"]

    def start(*more):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        return [subprocess.Popen(
            [sys.executable, str(HERE / "maml_trpo.py"), *args, "both", *more],
            cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "RANK": str(rank), "WORLD_SIZE": "2",
                 "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
            for rank in range(2)]
    assert command(*args, "alone", cwd=tmp_path).returncode == 0
    first, second = start()
    progress = tmp_path / "both" / "progress.csv"
    while not progress.exists() or progress.read_text().count("\n") < 4:
        time.sleep(0.001)
    second.kill()
    error = first.communicate(timeout=100)[1]
    second.communicate()
    assert first.returncode == 1 and "go on with --resume" in error
    assert "Traceback" not in error
    state = mt.load_checkpoint(tmp_path / "both" / "checkpoint.pt")[1]
    assert 3 <= state.iteration < 40
    assert [process.wait(timeout=100) for process in start("--resume")] == [0, 0]
    a, b = (mt.load_checkpoint(tmp_path / name / "checkpoint.pt")[1].theta
            for name in ("alone", "both"))
    assert (a - b).norm() <= 1e-2 * a.norm()
    refused = start()
    errors = [process.communicate(timeout=100)[1] for process in refused]
    assert [process.returncode for process in refused] == [2, 2]
    assert sum("already holds a run" in error for error in errors) == 1


def test_resume_starts_a_run_that_was_killed_before_its_first_checkpoint(
        tmp_path, no_figures, capsys):
    """An empty folder, one with a half-written file, one with a config: all the same."""
    assert fault_run(tmp_path / "whole") == 0
    for name in (None, ".checkpoint.pt.123.tmp", "config.json"):
        run = tmp_path / str(name)
        run.mkdir()
        if name:
            shutil.copy(tmp_path / "whole" / "config.json", run / name)
        assert fault_run(run, "--resume") == 0
        assert outcome(run) == outcome(tmp_path / "whole")
        assert sorted(p.name for p in run.iterdir()) == [
            "checkpoint.pt", "config.json", "evaluation.csv", "progress.csv"]


def test_resume_evaluates_extends_and_refuses_by_name(tmp_path, no_figures, capsys):
    run, other = tmp_path / "run", tmp_path / "not a run"
    assert fault_run(run) == 0
    first = outcome(run)
    (run / "evaluation.csv").unlink()                  # killed while it was evaluated
    with open(run / "progress.csv", "a") as f:         # a row ahead of the checkpoint
        f.write("1,-0.3")
    assert fault_run(run, "--resume") == 0 and outcome(run) == first
    other.mkdir()
    (other / "homework.txt").write_text("precious")
    for args, words in (
            ([run, "--resume", "--alpha", "0.3"], "alpha"), ([run], "--resume"),
            ([run, "--resume", "--iterations", "0"], "iterations"),
            ([other, "--resume"], "no run"), ([run / "homework", "--resume"], "no folder"),
            ([run, "--resume", "--gamma", "0.5"], "gamma")):
        capsys.readouterr()
        assert fault_run(*args) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and words in error
    assert outcome(run) == first and [p.name for p in other.iterdir()] == ["homework.txt"]
    assert fault_run(run, "--resume", "--iterations", "2") == 0
    assert fault_run(tmp_path / "two", "--iterations", "2") == 0
    assert outcome(run) == outcome(tmp_path / "two")


def test_interrupted_run_says_how_to_go_on_and_does(tmp_path, monkeypatch, capsys):
    """Ctrl-C in the second iteration: status 130, checkpoint of the first, a figure."""
    step, calls = mt.trpo_meta_step, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return step(*args)
    monkeypatch.setattr(mt, "trpo_meta_step", interrupted)
    assert fault_run(tmp_path / "run", "--iterations", "3") == 130
    assert "--resume" in capsys.readouterr().out
    assert mt.load_checkpoint(tmp_path / "run" / "checkpoint.pt")[1].iteration == 1
    assert (tmp_path / "run" / "learning.png").exists()
    for name in NO_FIGURES:
        monkeypatch.setattr(mt, name, lambda *args: None)
    assert fault_run(tmp_path / "run", "--iterations", "3", "--resume") == 0
    assert fault_run(tmp_path / "whole", "--iterations", "3") == 0
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


def test_checkpoint_of_another_kind_is_refused_and_left(tmp_path, no_figures, capsys):
    """Content that only a foreign or newer program would write, one change at a time."""
    assert fault_run(tmp_path / "run") == 0
    path, theta = tmp_path / "run" / "checkpoint.pt", torch.zeros(31)
    good = torch.load(path, weights_only=True)
    assert {"format", "version", "config", "iteration", "theta", "task"} <= set(good)
    for changes in (
            dict(version=2), dict(format="other"), dict(theta=theta), dict(theta=None),
            dict(theta=good["theta"] * math.nan), dict(best_theta=good["theta"].long()),
            dict(iteration=7), dict(iteration="x"), dict(rows=[]), dict(spread=None),
            dict(best_return="x"), dict(config={}), dict(config={"no_such": 1}),
            dict(config=good["config"] | {"alpha": -1.0})):
        torch.save(good | changes, path)
        before = path.read_bytes()
        for args in (["--out", str(tmp_path / "run"), "--resume"],
                     ["--evaluate", str(path), "--out", str(tmp_path / "e")],
                     ["--init", str(path), "--out", str(tmp_path / "i")]):
            capsys.readouterr()
            assert mt.main(args) == 2, changes
            assert capsys.readouterr().err.count("\n") == 1
        assert path.read_bytes() == before
    torch.save(good, path)
    for more, words in ((["--activation", "tanh"], "activation"), (["--hidden", "5"],
                        "hidden"), (["--method", "oracle"], "oracle")):
        assert fault_run(tmp_path / "i", "--init", path, *more) == 2
        assert words in capsys.readouterr().err
    class Command:                              # what a pickle may do, and ours may not
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "broken in"),)
    torch.save(Command(), path)
    assert mt.main(["--evaluate", str(path)]) == 2
    assert not (tmp_path / "broken in").exists()


@pytest.mark.parametrize("room", [0, 1000])
def test_full_disk_is_one_sentence_and_keeps_the_last_checkpoint(
        tmp_path, no_figures, capsys, room):
    """The disk is full from the second iteration on: files end after `room` bytes."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    run, save = tmp_path / "run", mt.save_checkpoint

    def save_then_fill(path, config, state):
        save(path, config, state)
        if state.iteration == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    with mock.patch.object(mt, "save_checkpoint", save_then_fill):
        try:
            assert fault_run(run, "--iterations", "3") == 1
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "File too large" in error and "--resume" in error
    assert mt.load_checkpoint(run / "checkpoint.pt")[1].iteration == 1
    assert not any(run.glob(".*.tmp"))
    assert fault_run(run, "--iterations", "3", "--resume") == 0
    assert fault_run(tmp_path / "whole", "--iterations", "3") == 0
    assert outcome(run) == outcome(tmp_path / "whole")


def test_read_only_folder_is_refused_before_the_training(tmp_path, capsys):
    for folder in ("/proc/maml", "/dev/null/run"):       # not writable for root either
        assert fault_run(folder) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "--out" in error and "cannot be written" in error


class FullDisk(io.StringIO):
    def write(self, text):
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize("stdout", ["head", "full", "closed", "none"])
def test_training_goes_on_when_nothing_can_be_printed(
        tmp_path, no_figures, monkeypatch, stdout):
    if stdout == "head":
        reader, writer = os.pipe()
        os.close(reader)
        stream = open(writer, "w")
    else:
        stream = {"full": FullDisk(), "closed": io.StringIO(), "none": None}[stdout]
        if stdout == "closed":
            stream.close()
    monkeypatch.setattr(sys, "stdout", stream)
    assert fault_run(tmp_path / "run") == 0
    assert mt.load_checkpoint(tmp_path / "run" / "checkpoint.pt")[1].iteration == 1
    with contextlib.suppress(OSError):
        stream and stream.close()


@slow
@pytest.mark.parametrize("tail", ["| head -n 1", ">&-", "> /dev/full", "2>&-"])
def test_shell_redirections_end_with_status_0(tmp_path, tail):
    line = (f"set -o pipefail; {sys.executable} '{HERE / 'maml_trpo.py'}' --out 'a b' "
            f"{' '.join(FAULT_RUN)} {tail}")
    out = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True,
                         text=True, timeout=120)
    assert out.returncode == 0 and "Traceback" not in out.stderr, out.stderr
    assert sorted(p.name for p in (tmp_path / "a b").iterdir()) == FILES_OF_A_TRAINING


@slow
def test_old_locale_no_display_and_names_with_spaces(tmp_path):
    """A whole run, figures included, where almost nothing can be encoded or shown."""
    out = subprocess.run(
        [sys.executable, str(HERE / "maml_trpo.py"), *FAULT_RUN, "--out", "Übung 1 θ"],
        cwd=tmp_path, capture_output=True, timeout=120, env=OLD_LOCALE)
    assert out.returncode == 0, out.stderr
    (folder,) = tmp_path.iterdir()
    assert os.fsencode(folder).endswith("Übung 1 θ".encode())
    assert sorted(p.name for p in folder.iterdir()) == FILES_OF_A_TRAINING


# Numbers that go wrong.


def toy_family(reward=lambda t, task: 0.1 * t, obs=lambda t: np.zeros(2, np.float32),
               done=lambda t: False, S=None, A=None, reset="new", results=5, raises=0,
               mode=AutoresetMode.NEXT_STEP):
    """A task family whose every part can be replaced by a wrong one."""
    class Toy(gym.Env):
        observation_space = S or gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)
        action_space = A or gym.spaces.Box(-1, 1, (3,), np.float32)

        def step(self, action):
            self.t += 1
            if self.t == raises:
                raise KeyError("a mistake of one's own")
            everything = obs(self.t), reward(self.t, self.task), done(self.t), False, {}
            return everything[:results]

    def new_reset(self, *, seed=None, options=None):
        self.t, self.task = 0, options["task"] if options else None
        return obs(0), {}

    def without_options(self, *, seed=None):
        return new_reset(self)

    def ignoring_the_task(self, *, seed=None, options=None):
        return new_reset(self)

    def old_reset(self, *, seed=None, options=None):
        return new_reset(self)[0]
    Toy.reset = {"new": new_reset, "without": without_options, "old": old_reset,
                 "ignoring": ignoring_the_task}[reset]
    return mt.TaskFamily("toy", lambda K: SyncVectorEnv([Toy] * K, autoreset_mode=mode),
                         lambda rng, M: rng.uniform(-1, 1, (M, 1)),
                         lambda n: np.zeros((n, 1)), 4)


def train_toy(family=None, **changes):
    return mt.train_maml(tiny_config(meta_batch_size=2, rollouts=2, horizon=4,
                                     hidden=(4,), cg_iterations=2, **changes), family)


@pytest.mark.parametrize("reward, error, words", [
    (math.nan, mt.BadInput, "reward at step 2"), (math.inf, mt.BadInput, "reward at step 2"),
    (1e300, mt.BadInput, "reward at step 2"), (3e38, mt.Diverged, "advantage")])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_bad_reward_is_named_with_iteration_task_and_step(reward, error, words):
    """From the second iteration on, where its task is the fourth that was drawn."""
    drawn = []
    family = toy_family(lambda t, task: reward if t > 2 and len(drawn) == 4
                        and task == drawn[3] else 0.1 * t)
    family = dataclasses.replace(family, sample_tasks=lambda rng, M: [
        drawn.append(rng.uniform(1, 2, 1)) or drawn[-1] for _ in range(M)])
    with pytest.raises(error, match=f"^iteration 2: .*{words}") as raised:
        train_toy(family)
    assert str(drawn[3]) in str(raised.value)


def test_bad_observation_is_the_environments_and_bad_action_the_policys():
    obs, act, rew = np.zeros((5, 3, 2)), np.zeros((5, 3, 4)), np.zeros((5, 3, 1))
    mt.check_rollout(7, obs, act, rew)
    for array, index, error, words in (
            (rew, (3, 2, 0), mt.BadInput, "reward at step 3"),
            (act, (3, 2, 1), mt.Diverged, "action at step 3"),
            (obs, (3, 2, 1), mt.BadInput, "observation at step 3"),
            (act, (1, 0, 0), mt.Diverged, "action at step 1")):    # what came first counts
        array[index] = math.nan
        with pytest.raises(error, match=f"task 7: the {words} is not finite"):
            mt.check_rollout(7, obs, act, rew)


@pytest.mark.parametrize("product, residual", [
    (lambda v: v * math.nan, 1.0), (lambda v: v * math.inf, math.nan),
    (lambda v: -v, 1.0), (lambda v: 0 * v, 1.0)])
def test_bad_products_skip_the_step_and_the_log_says_so(monkeypatch, product, residual):
    """pᵀHp NaN, infinite, negative or 0: θ is kept, trials and KL are 0."""
    monkeypatch.setattr(mt, "kl_hessian_product", lambda *args: product)
    theta, rows = train_toy(damping=0.0)
    start = mt.TrainState.initial(mt.make_policy(mt.TASKS["point2d"], tiny_config(
        hidden=(4,))), tiny_config())
    assert torch.equal(theta, start.theta)
    for row in rows:
        assert (row["line_search_steps"], row["kl"]) == (0, 0)
        assert row["surrogate_after"] == row["surrogate_before"]
        np.testing.assert_equal(row["cg_residual"], residual)
    assert "none" in mt.progress_line(rows[0], 2, 1.0)


def test_surrogate_that_no_step_improves_skips_the_step(monkeypatch):
    right = mt.meta_gradient
    monkeypatch.setattr(mt, "meta_gradient", lambda *args: -right(*args))        # uphill
    theta, rows = train_toy(max_kl=1e-6)
    assert [row["line_search_steps"] for row in rows] == [0, 0]
    assert all(row["kl"] == 0 for row in rows)


def test_gradient_that_is_not_finite_stops_and_leaves_the_last_checkpoint(
        tmp_path, monkeypatch, no_figures, capsys):
    right, calls = mt.meta_gradient, []

    def broken(*args):
        calls.append(1)
        return right(*args) * (math.nan if len(calls) == 3 else 1)
    monkeypatch.setattr(mt, "meta_gradient", broken)
    assert fault_run(tmp_path / "run", "--iterations", "3") == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "iteration 2: the meta-gradient is not finite" in error
    assert mt.load_checkpoint(tmp_path / "run" / "checkpoint.pt")[1].iteration == 1


@pytest.mark.parametrize("std", [1e-8, 1e8, 1e30])
def test_std_that_collapsed_or_exploded_stops_with_its_name(std):
    with pytest.raises(mt.Diverged, match="^iteration 1: .*std"):
        train_toy(init_std=std)
    mt.check_std(torch.tensor([2e-6, 1.0, 5e5]))


# Input of every kind. Hypothesis draws it, always the same.

quickly = functools.partial(hypothesis.settings, derandomize=True, deadline=None,
                            database=None, suppress_health_check=list(
                                hypothesis.HealthCheck))
MORE = 10 if os.environ.get("MAML_SLOW") == "1" else 1
WORDS = ["", " ", "-1", "0", "1", "2", "0.5", "1e-300", "1e30", "1e400", "nan", "inf",
         "-inf", "None", "true", "1,2", ",", "1,,2", "3,0", "a,b", "0x10", "1_0", "٣", "θ",
         "--", "-", "maml", "tanh", "ratio", "point2d", "cheetah", "gauss-newton",
         "1000000000", "99999999999999999999", "100000,100000", "a\\b", "'", "%s", "{}"]
LONG = {"iterations", "inner_steps", "cg_iterations", "backtrack_steps", "eval_steps"}


def files_of(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def run_badly(args: list, folder: Path, capsys) -> int:
    """The command's status: 0, or 2 or 1 with one line; what is in `folder` stays."""
    before = files_of(folder)
    capsys.readouterr()
    status = mt.main(args)
    error = capsys.readouterr().err
    assert status in (0, 2) or status == 1 and re.search("finite|std", error), error
    assert error.count("\n") == (status > 0) and "Traceback" not in error, error
    if (after := files_of(folder)) != before:
        assert "--resume" in args and status == 0 or before.items() <= after.items()
        shutil.rmtree(folder)                    # the next one finds what this one found
        for path, content in before.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    return status


@pytest.fixture
def classroom(tmp_path, monkeypatch, no_figures):
    """A folder `kept` that holds what a student may name by mistake, and is guarded."""
    monkeypatch.chdir(tmp_path)
    kept = tmp_path / "kept"
    assert fault_run(kept / "run") == 0
    (kept / "foreign.txt").write_bytes(b"\xff\xfenot a run")
    whole = (kept / "run" / "checkpoint.pt").read_bytes()
    (kept / "half.pt").write_bytes(whole[:len(whole) // 2])
    return kept


def test_any_command_line_works_or_is_refused_in_one_sentence(classroom, capsys):
    """500 command lines, 5,000 with MAML_SLOW=1: every flag, with words that fit and that
    do not; counted are those refused (status 2) and those that ran."""
    paths = ["", ".", "missing", "kept", "kept/run", "kept/a/b", "kept/foreign.txt",
             "kept/foreign.txt/x", "kept/half.pt", "kept/run/checkpoint.pt", "/proc/x",
             "x" * 300, "θ 1", "new.gif", "kept/run/config.json", "-", "nowhere/x.gif"]
    names = [f.name for f in dataclasses.fields(mt.Config)]
    draw, seen = hypothesis.strategies, []
    texts = draw.text(draw.characters(exclude_characters="\0\n\r", codec="utf-8"),
                      max_size=6)
    setting = draw.tuples(draw.sampled_from(names),
                          draw.sampled_from(WORDS) | texts).map(
        lambda pair: pair[:1] + (pair[1].replace("1000000000", "3")
                                 if pair[0] in LONG else pair[1],))
    path = draw.tuples(draw.sampled_from(["out", "init", "evaluate", "compare", "render"]),
                       draw.sampled_from(paths))
    loose = draw.sampled_from([("resume",), ("no-such",), ("",), ("resume", "x")])

    @quickly(max_examples=500 * MORE)
    @hypothesis.given(draw.lists(setting | path | loose, min_size=1, max_size=3))
    def check(flags):
        base = [] if any(flag[0] == "evaluate" for flag in flags) else FAULT_RUN
        words = [word for name, *value in flags
                 for word in ("--" + name.replace("_", "-"), *value)]
        if not any(flag[0] == "out" for flag in flags):
            words += ["--out", f"new/{len(seen)}"]
        seen.append(run_badly([*base, *words], classroom, capsys))
    check()
    print(f"{len(seen)} command lines: {seen.count(2)} refused, {seen.count(0)} ran")
    assert len(seen) >= 500 * MORE and seen.count(2) > 400 * MORE


def test_any_damaged_file_is_refused_in_one_sentence(classroom, capsys):
    """A byte changed, or the end cut off: never other numbers than those that were saved."""
    draw, seen = hypothesis.strategies, []
    whole = (classroom / "run" / "checkpoint.pt").read_bytes()
    expected = mt.load_checkpoint(classroom / "run" / "checkpoint.pt")

    @quickly(max_examples=150 * MORE)
    @hypothesis.given(draw.integers(0, len(whole) - 1), draw.integers(0, 255))
    def checkpoint(at, byte):
        path = Path("damaged.pt")
        path.write_bytes(whole[:at] + bytes([byte]) + whole[at + 1:] if byte else whole[:at])
        try:
            config, state = mt.load_checkpoint(path)
        except mt.BadInput as error:
            assert "\n" not in str(error)
            seen.append(error)
        else:
            assert config == expected[0] and torch.equal(state.theta, expected[1].theta)
            assert state.rows == expected[1].rows
    checkpoint()
    assert len(seen) > 60

    run = Path("other")
    run.mkdir()

    @quickly(max_examples=150 * MORE)
    @hypothesis.given(draw.sampled_from(["config.json", "evaluation.csv"]),
                      draw.integers(0, 700), draw.sampled_from([
                          b"", b"\0", b"\xff", b"[" * 9000, b"-9", b"nan", b"null", b'"',
                          b"99999999999", b"\n", b",", b"{}", b"true", b'{"hidden": 3}']))
    def text_files(name, at, piece):
        for path in (classroom / "run").glob("*.[cj]s*"):
            shutil.copy(path, run)
        text = (run / name).read_bytes()
        at %= len(text)
        (run / name).write_bytes(text[:at] + piece + text[at + 1:])
        try:
            method, table = mt.read_evaluation(run, "point2d")
            mt.comparison_table(expected[0], [(f"{method}, other", table)])
            mt.read_config(run / "config.json")
        except mt.BadInput as error:
            assert "\n" not in str(error)
            seen.append(error)
    text_files()
    assert len(seen) > 150
    (run / "config.json").write_text("[]")
    for args in ([*FAULT_RUN, "--out", "other", "--resume"], ["--evaluate", str(
            classroom / "run" / "checkpoint.pt"), "--compare", "other", "--out", "e"]):
        assert run_badly(args, classroom, capsys) == 2


@pytest.mark.filterwarnings("ignore")
def test_any_environment_trains_is_refused_or_raises_its_own_error():
    """What reset and step may return wrongly, spaces of all kinds, and combinations."""
    box, draw, seen = gym.spaces.Box, hypothesis.strategies, []
    small = np.zeros(2, np.float32)
    parts = dict(
        obs=[small, small.astype(int), [0.0, 1.0], np.zeros(3), np.zeros((1, 2)), 0.5,
             None, "x", small * math.nan, np.full(2, 1e300)],
        reward=[1, True, np.float32(2), np.ones(1), np.ones(2), None, "much", 1j,
                math.nan, -math.inf, 1e300, 2e38],
        done=[lambda t: False, lambda t: True, lambda t: t == 3, lambda t: t % 2,
              lambda t: None, lambda t: np.bool_(t > 4), lambda t: [False, True]],
        S=[box(-1, 1, (2,), np.float64), box(0, 9, (2,), np.uint8), box(0, 1, (2, 2)),
           box(0, 1, ()), box(0, 1, (0,)), gym.spaces.Discrete(2), gym.spaces.Dict()],
        A=[box(-np.inf, np.inf, (3,)), box(0, 5, (1,), np.int64), box(0, 1, (0,)),
           gym.spaces.Discrete(3), gym.spaces.MultiBinary(3), gym.spaces.Tuple([])],
        reset=["without", "old", "ignoring"], results=[4, 3], raises=[1, 2, 4],
        mode=[AutoresetMode.SAME_STEP, AutoresetMode.DISABLED])
    one = draw.sampled_from([(name, value) for name in parts for value in parts[name]])

    @quickly(max_examples=60 * MORE)
    @hypothesis.given(draw.lists(one, max_size=2, unique_by=lambda pair: pair[0]))
    def check(chosen):
        changes = dict(chosen)
        if "obs" in changes:
            changes["obs"] = lambda t, obs=changes["obs"]: obs
        if "reward" in changes:
            changes["reward"] = lambda t, task, reward=changes["reward"]: reward
        try:
            theta, _ = train_toy(toy_family(**changes), iterations=1)
            assert torch.isfinite(theta).all()
        except (mt.BadInput, mt.Diverged) as error:
            assert "\n" not in str(error) and len(str(error)) > 30
        except (KeyError, AssertionError) as error:
            assert "raises" in changes or changes.get("mode") == AutoresetMode.DISABLED
        seen.append(changes)
    check()
    assert len(seen) >= 60 * MORE


def test_environments_own_error_keeps_its_traceback():
    with pytest.raises(KeyError, match="one's own"):
        train_toy(toy_family(raises=4))
    with pytest.raises(mt.BadInput, match="expected 5, got 4") as raised:
        train_toy(toy_family(results=4))
    assert isinstance(raised.value.__cause__, ValueError)
    for wrong in (lambda K: gym.Env(), lambda K: mt.Point2D(3), lambda K: None):
        with pytest.raises(mt.BadInput, match="VectorEnv of 2 copies"):
            train_toy(dataclasses.replace(toy_family(), make_envs=wrong))


@pytest.mark.parametrize("flags", [
    ["--horizon", "1000000000"], ["--hidden", "100000,100000"], ["--rollouts", "1000000000"],
    ["--eval-episodes", "1000000000"], ["--meta-batch-size", "1000000000"]])
def test_sizes_beyond_any_memory_are_refused_by_name(tmp_path, capsys, flags):
    assert fault_run(tmp_path / "run", *flags) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and flags[0][2:].replace("-", "_") in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("error", [MemoryError("Unable to allocate 9 GiB"), RuntimeError(
    "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")])
def test_out_of_memory_is_one_sentence(tmp_path, monkeypatch, capsys, error):
    monkeypatch.setattr(mt, "train_maml", mock.Mock(side_effect=error))
    assert fault_run(tmp_path / "run") == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "out of memory" in error


# %% Long tests


@slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_main_job_reaches_its_returns(seed):
    """The defaults, at 0/1/2/3 steps on the paper's 40 goals."""
    config = mt.Config(task="point2d", seed=seed)
    theta, _ = mt.train_maml(config)
    returns = mt.evaluate(config, theta).mean(axis=0)
    assert (returns >= [-41.5, -12.5, -4.2, -3.8]).all(), returns


# %% Benchmark


def product_rate():
    """FLOP/s of one core in the policy's largest product."""
    a, b = torch.randn(2000, 100), torch.randn(100, 100)
    times = []
    for _ in range(50):
        watch = mt.Stopwatch()
        for _ in range(20):
            a @ b
        times.append(watch.lap() / 20)
    return 2 * 2000 * 100 * 100 / np.median(times)


def flops_of_cg():
    """What ten finite-difference products of point2d count."""
    from torch.utils.flop_counter import FlopCounterMode
    config = mt.Config(workers=1)
    policy, theta, data = sampled_problem(config, dtype=torch.float32)
    with FlopCounterMode(display=False) as flops:
        mt.gradient(lambda t: mt.surrogate_and_kl(policy, t, data[0], config.alpha)[1],
                    theta)
    return flops.get_total_flops() * len(data) * config.cg_iterations


def iteration_seconds(**settings):
    """In a process of its own: median seconds after the first iteration; peak memory."""
    import resource
    with mt.process_group():
        _, rows = mt.train_maml(mt.Config(**settings))
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    median = {k.removeprefix("seconds_"): np.median([row[k] for row in rows[1:]])
              for k in rows[0] if k.startswith("seconds")}
    return median | dict(gigabytes=kilobytes * (1e-9 if sys.platform == "darwin" else
                                                1024e-9))


def reduce_seconds(sizes):
    """In a process of its own: median seconds of an all_reduce of float64 numbers."""
    with mt.process_group():
        out = []
        for size in sizes:
            x, times, watch = torch.zeros(size).double(), [], mt.Stopwatch()
            for _ in range(500):
                torch.distributed.all_reduce(x)
                times.append(watch.lap())
            out.append(np.median(times[50:]))
    return out


WAYS = {"1 worker": (1, 1), "2 workers": (1, 2), "2 ranks": (2, 1)}


def print_iterations(title, ways=tuple(WAYS), **settings):
    """A meta-iteration by part, each way in fresh processes; → what each measured."""
    measured = {}
    for name in ways:
        ranks, workers = WAYS[name]
        here = in_ranks(ranks, "iteration_seconds", workers=workers, **settings)
        m = measured[name] = here[0]
        peak = " + ".join(f"{one['gigabytes']:.2f}" for one in here)
        print(f"  {title:18} {name:10} {m['total']:6.2f} s = " + " + ".join(
            f"{part} {m[part]:.2f} ({100 * m[part] / m['total']:.0f} %)" for part in
            ("sampling", "gradient", "cg", "line_search")) + f"; peak {peak} GB",
            flush=True)
    alone = measured["1 worker"]
    print("     from one to two: " + "; ".join(
        f"{name[2:]} {speed_up:.2f} x, by Amdahl {100 * max(0, 2 / speed_up - 1):.0f} % "
        "serial" for name in ways[1:]
        for speed_up in [alone["total"] / measured[name]["total"]])
        + ("" if mt.TASKS[settings["task"]].threads else "; of it sampling, one thread's, "
           f"{100 * alone['sampling'] / alone['total']:.0f} %"))
    return measured


def print_sampling(task, name, H, rounds=8, K=20):
    """Steps a second with the policy, against Gymnasium's env.step on one core.

    All steps that the K copies make count, also those after an episode's early end.
    """
    family = mt.TASKS[task]
    policy = mt.make_policy(family, mt.Config(task=task, rollouts=K))
    env = gym.make(name).unwrapped
    theta = policy.init(torch.Generator().manual_seed(0))
    actions = np.random.default_rng(0).uniform(-1, 1, (K * H // 2, *env.action_space.shape))

    def gymnasium():
        env.reset(seed=0)
        for action in actions:
            if env.step(action)[2]:
                env.reset()
        return len(actions)

    def ours(workers):
        data = mt.map_over_tasks(lambda m: mt.task_rollout(
            family.envs(K), policy, theta, [1.0], H, (m,)), range(workers), workers)
        inside.append(float(data[0].mask.mean()))
        return sum(K * float(d.mask.amax(0).sum()) for d in data)

    rates, inside = [], []
    with mt.one_thread_each():
        for _ in range(rounds + 1):                           # in turns; one to warm up
            watch, rates = mt.Stopwatch(), rates + [[]]
            for sample in (gymnasium, lambda: ours(1), lambda: ours(2)):
                rates[-1].append(sample() / watch.lap())
    rates = np.array(rates[1:])
    plain, one, two = np.median(rates, axis=0)
    ratio = np.median(rates / rates[:, :1], axis=0) / [1, 1, 2]
    print(f"  {name:15} env.step {plain:6,.0f}/s; sampling on 1 core {one:6,.0f}/s, "
          f"{ratio[1]:.2f} of it; on 2 {two:6,.0f}/s, {ratio[2]:.2f} of it a core; "
          f"{100 * np.mean(inside):.0f} % of the steps are inside episodes")


def benchmark(size=""):
    """Where the time goes, alone, on two threads, in two processes.

    `paper`: half-cheetah at the paper's size only (minutes).
    """
    print(f"{mt.available_cores()} cores. Seconds of a meta-iteration:")
    if size == "paper":
        print_iterations("cheetah-dir, paper", iterations=2, task="cheetah-dir")
        return
    measured = print_iterations("point2d", task="point2d", iterations=10)
    rate, flops = product_rate(), flops_of_cg()
    print(f"     a product (2000×100)·(100×100) in float32: {rate / 1e9:.0f} GFLOP/s a "
          "core; CG reaches " + ", ".join(
              f"{100 * flops / m['cg'] / rate / int(name[0]):.0f} % ({name})"
              for name, m in measured.items()))
    print_iterations("cheetah-dir", task="cheetah-dir", iterations=3, horizon=100,
                     meta_batch_size=20)
    for hvp in mt.HVPS[1:]:
        print_iterations(hvp, ("1 worker", "2 workers"), task="point2d", hvp=hvp,
                         iterations=2)
    print("Sampling, K 20, policy included:")
    print_sampling("cheetah-dir", "HalfCheetah-v5", H=200)
    print_sampling("ant-dir", "Ant-v5", H=100)
    P = {task: mt.make_policy(mt.TASKS[task], mt.Config(task=task)).num_params
         for task in ("point2d", "cheetah-dir", "ant-dir")}
    sizes = [3] + [p + 1 for p in P.values()]
    print("One all_reduce of float64 over 2 ranks, loopback: " + "; ".join(
        f"{where} {n:,} numbers, {8 * n:,} bytes, {1e3 * seconds:.2f} ms"
        for where, n, seconds in zip(["line search", *P], sizes,
                                     in_ranks(2, "reduce_seconds", sizes=sizes)[0])))


# %% The notes' figures and table about the Hessian


HESS_STEPS = tuple(float(f"{step:.3g}") for step in np.geomspace(1e-6, 1, 13))
HESS_CURVES = (("float32", False), ("float32", True), ("float64", False),
               ("float64", True))                              # dtype, symmetric?


def hess_trained(activation, iterations, tasks, seed=0):
    """config, policy, θ after `iterations` at M = 10, fresh data of `tasks` tasks."""
    config = mt.Config(activation=activation, iterations=iterations, meta_batch_size=10,
                       workers=1, seed=seed)
    theta, _ = mt.train_maml(config)
    family = mt.family_of(config)
    policy = mt.make_policy(family, config)
    goals = family.sample_tasks(mt.random_stream(seed, iterations), tasks)
    return config, policy, theta, [
        mt.sample_task_data(policy, theta, family, goal, config, (seed, iterations, m))
        for m, goal in enumerate(goals)]


def hess_difference(config, policy, theta, data):
    """(v, step, symmetric) ↦ the difference product of the mean KL over the tasks."""
    def kl_gradient(t):
        return mt.mean_over_tasks(lambda d: mt.gradient(lambda s: mt.surrogate_and_kl(
            policy, s, d, config.alpha)[1], t), data)
    return lambda v, step, symmetric: mt.hessian_vector_product(
        kl_gradient, theta, v, step, symmetric=symmetric)


def hess_exact(config, policy, theta, data):
    """v ↦ the Gauss–Newton product of the mean KL over the tasks."""
    return lambda v: mt.mean_over_tasks(lambda d: mt.gauss_newton_product(
        policy, theta, d, v, config.alpha), data)


def hess_fd_errors(activation, iterations, tasks=4):
    """Errors of the difference products along g, and the authors' moves in one CG.

    point2d at the default sizes, `tasks` tasks. Exact: Gauss–Newton in float64.
    """
    config, policy, theta, data = hess_trained(activation, iterations, tasks)
    in_64 = theta.double(), [hess_in_float64(policy, theta, d, config.alpha)
                             for d in data]
    v = mt.mean_over_tasks(
        lambda d: mt.meta_gradient(policy, in_64[0], d, config.alpha), in_64[1])
    exact = hess_exact(config, policy, *in_64)(v)
    errors = {}
    for dtype, symmetric in HESS_CURVES:
        problem = (theta, data) if dtype == "float32" else in_64
        product = hess_difference(config, policy, *problem)
        errors[dtype, symmetric] = [
            hess_gap(product(v.to(problem[0].dtype), step, symmetric).double(), exact)
            for step in HESS_STEPS]
    moves, hvp = [], hess_exact(config, policy, theta, data)

    def damped(p):
        moves.append(float(p.norm() / theta.norm()))
        return hvp(p) + config.damping * p

    mt.conjugate_gradient(damped, v.float(), config.cg_iterations, config.cg_tolerance)
    return errors, moves


def hess_in_float64(policy, theta, data, alpha):
    """One task's data and `old` policy again, in float64."""
    inner, (outer,) = ([mt.Trajectories(*(x.double() for x in vars(d).values()))
                        for d in group] for group in (data.inner, [data.outer]))
    phi = mt.adapt(policy, theta.double(), inner, alpha, False).detach()
    return mt.TaskData(inner, outer, policy.distribution(phi, outer.obs))


def figure_fd_error(path, iterations=12):
    """Error of the finite-difference product against its step, in four panels.

    The numbers go into a .csv beside the figure (of the authors' moves: their length).
    """
    with mt.one_thread_each():
        panels = {(activation, after): hess_fd_errors(activation, after)
                  for after in (0, iterations) for activation in ("relu", "tanh")}
    rows = []
    for panel, (errors, moves) in panels.items():
        rows += [(*panel, *curve, step, error) for curve, values in errors.items()
                 for step, error in zip(HESS_STEPS, values)]
        rows += [(*panel, "authors", True, move, "") for move in moves]
    mt.write_csv(Path(path).with_suffix(".csv"), (
        "activation", "iterations", "dtype", "symmetric", "step", "error"), rows)
    hess_draw_panels(path, panels)


HESS_REMARKS = {    # (activation, trained?): place on the axes and text
    ("relu", False): (0.05, 0.08, "each first sample lies\non every kink:\n"
                                  "error ∝ 1/step"),
    ("relu", True): (0.05, 0.08, "other samples' kinks are\ncrossed at any step:\n"
                                 "about 1 % stays"),
    ("tanh", False): (0.05, 0.78, "no kinks: error ∝ step or,\nsymmetric, ∝ step²,\n"
                                  "until rounding"),
    ("tanh", True): (0.05, 0.78, "as at initialisation")}


def hess_draw_panels(path, panels):
    """{(activation, iterations): (errors, moves)} → the figure."""
    figure, _ = mt.new_figure(1, 8.0, 6.6)
    figure.clear()
    axes = figure.subplots(2, 2, sharex=True, sharey=True)
    for ax, ((activation, after), (errors, moves)) in zip(axes.flat, panels.items()):
        ax.axvspan(min(moves), max(moves), color="#f2c94c", alpha=0.35, linewidth=0,
                   label="authors' moves, ‖v‖/‖θ‖ during one CG")
        ax.axvline(mt.Config().fd_step, color="black", linestyle=":", linewidth=1.5,
                   label=f"our step, {mt.Config().fd_step}")
        for (dtype, symmetric), values in errors.items():
            wide = dtype == "float32"                      # float64 is drawn on top
            ax.plot(HESS_STEPS, values, color="#f0a868" if wide else "#1f4f8f",
                    linewidth=4.5 if wide else 1.4, markersize=3.5,
                    linestyle="--" if symmetric else "-",
                    marker="" if wide else "s" if symmetric else "o",
                    label=f"{dtype}, {'symmetric' if symmetric else 'one-sided'}")
        x, y, remark = HESS_REMARKS[activation, after > 0]
        ax.text(x, y, remark, transform=ax.transAxes, fontsize=9, linespacing=1.4)
        ax.set(xscale="log", yscale="log", ylim=(1e-9, 1e3))
        ax.set_title(f"{dict(relu='ReLU', tanh='tanh')[activation]}, " + (
            f"after {after} meta-iterations" if after else "at initialisation"),
            fontsize=10)
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25)
    for ax in axes[1]:
        ax.set_xlabel("length of the move in θ, ‖εv‖")
    for ax in axes[:, 0]:
        ax.set_ylabel("relative error of H·v")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center",
                  ncols=3, frameon=False, fontsize=9)
    figure.savefig(path)


def figure_graph(path):
    """The computational graph of one meta-step, and where the pseudocode cuts it."""
    figure, (ax,) = mt.new_figure(1, 8.0, 6.3)
    ax.set(xlim=(0, 100), ylim=(-1, 81))
    ax.axis("off")
    old, y = r"$_\mathrm{old}$", 66
    for x, dy, width, text in (
            (5, 0, 9, "θ"), (26, 0, 16, "L(θ)\non D, with Â"),
            (48, 0, 12, "∇L(θ)"), (69, 0, 14, "θ′ =\nθ − α∇L(θ)"),
            (91, 9, 17, "surrogate\non D′ with Â′"),
            (91, -9, 17, f"k = KL(π{old} ‖ π$_{{θ′}}$)\non D′")):
        hess_box(ax, x, y + dy, text, width)
    for x, y_, width, text in (
            (26, 48, 16, "D, Â: numbers,\nsampled with θ"),
            (69, 44.5, 21, f"D′, Â′: numbers,\nsampled with θ′(θ{old})"),
            (91, 40, 17, f"π{old}: θ′(θ{old}),\ndetached")):
        hess_box(ax, x, y_, text, width, "#777777", "--")

    hess_arrow(ax, (9.5, y + 2.5), (62, y + 3), HESS_INK["first"], -0.3)
    for start, end in ((9.5, 18), (34, 42), (54, 62)):
        hess_arrow(ax, (start, y), (end, y), HESS_INK["second"])
    hess_arrow(ax, (76, y + 2), (82.5, y + 8), "black")
    hess_arrow(ax, (76, y - 2), (82.5, y - 7.5), "black")
    hess_arrow(ax, (69, y - 4.3), (48, y - 4.3), HESS_INK["third"], -0.3)
    for start, end, bend in (
            ((26, 52.3), (26, y - 4.3), 0), ((91, 44.3), (91, 52.7), 0),
            ((79.5, 46.5), (84, 52.7), 0), ((76, 48.8), (84, 70.7), 0.1)):
        hess_arrow(ax, start, end, "#777777", bend, "--", 1.2)

    for x, y_, ink, text in (
            (36, y + 13.3, "first", "θ → θ′ with derivative I"),
            (38, y + 2.4, "second", "∇"), (58, y - 3.4, "second", "−α"),
            (58.5, 55.0, "third", f"× ∂ⱼκ, which is 0 at θ{old}")):
        ax.text(x, y_, text, color=HESS_INK[ink], fontsize=9, ha="center", va="center")
    for x, y_, number in ((13.4, y, 1), (14.5, y + 6, 1), (57.2, y, 2),
                          (78.9, y + 4.9, 3)):
        hess_scissors(ax, x, y_, number)

    rows = (
        ("first", "first order", "J = I: all that --first-order keeps."),
        ("second", "second order", "J = I − α∇²L, if ∇L has a graph of its own "
         "(create_graph=True).\nThe gradients Jᵀ∇(surrogate) and ∇k = Jᵀ∇κ cross this "
         "path once."),
        ("third", "third order", "∇²k = Jᵀ(∇²κ)J + Σⱼ ∂ⱼκ·∇²θ′ⱼ, and ∇²θ′ⱼ = −α ∂ⱼ∇²L "
         f"crosses it twice.\nAt θ{old} each ∂ⱼκ is 0: the third derivative is there, "
         "times zero."))
    for (ink, head, text), y_ in zip(rows, (33.5, 29.5, 22.5)):
        ax.text(0, y_, head, color=HESS_INK[ink], fontsize=9, va="top", weight="bold")
        ax.text(16, y_, text, fontsize=9, va="top", linespacing=1.35)
    for number, y_, text in (
            (1, 11.8, "copy.deepcopy: the copy's parameters are new leaves that do not "
             "know θ."),
            (2, 7.0, "backward() and optim.step(): ∇L enters as numbers, in place, "
             "outside any graph."),
            (3, 2.2, "rewards are the environment's numbers; the graph that log π has "
             "ends at the copy.")):
        hess_scissors(ax, 18, y_, number)
        ax.text(21, y_, text, fontsize=9, va="center")
    ax.text(0, 7.0, "cut in the\npseudocode", color=HESS_INK["cut"], fontsize=9,
            va="center", weight="bold")
    figure.savefig(path)


HESS_INK = dict(first="#1f6fb4", second="#d95f02", third="#7b3fa0", cut="#c00000")


def hess_box(ax, x, y, text, width, color="black", style="-", height=8.6):
    from matplotlib.patches import FancyBboxPatch
    ax.add_patch(FancyBboxPatch(
        (x - width / 2, y - height / 2), width, height, edgecolor=color, linewidth=1.4,
        facecolor="white" if style == "-" else "#eeeeee", linestyle=style,
        boxstyle="round,pad=0,rounding_size=1.2"))
    ax.text(x, y, text, ha="center", va="center", fontsize=9, linespacing=1.3)


def hess_arrow(ax, start, end, color, bend=0.0, style="-", width=1.8):
    from matplotlib.patches import FancyArrowPatch
    ax.add_patch(FancyArrowPatch(
        start, end, arrowstyle="-|>", mutation_scale=13, color=color, linewidth=width,
        linestyle=style, connectionstyle=f"arc3,rad={bend}", shrinkA=0, shrinkB=0))


def hess_scissors(ax, x, y, number):
    ax.plot(x, y, marker="o", markersize=17, color="white", zorder=5,
            markeredgecolor=HESS_INK["cut"], markeredgewidth=1.4)
    ax.text(x, y - 0.1, f"✂{number}", color=HESS_INK["cut"], fontsize=9.5, ha="center",
            va="center", zorder=6)


def product_costs(*, repeats=25, warm_up=3):
    """Print what each product costs: one task, 2,000 samples, float32, one thread."""
    config = mt.Config(workers=1)
    family = mt.family_of(config)
    policy = mt.make_policy(family, config)
    theta = policy.init(torch.Generator().manual_seed(0))
    data = mt.sample_task_data(policy, theta, family, family.test_tasks(1)[0], config,
                               (0,))
    v = mt.meta_gradient(policy, theta, data, config.alpha)
    functions = hess_products(policy, theta, data, config.alpha, v)
    times = {name: [] for name in functions}
    with mt.one_thread_each():
        for _ in range(warm_up + repeats):            # in turns: they share the machine
            for name, function in functions.items():
                watch = mt.Stopwatch()
                function()
                times[name].append(watch.lap())
    plain = np.median(times["one plain gradient"][warm_up:])
    print("| one task, 2,000 samples, float32, one thread | ms | ratio to one gradient "
          "| 100×100 products a sample |\n|---|---|---|---|")
    for name, function in functions.items():
        with HessCountProducts(100) as counter:
            function()
        median = np.median(times[name][warm_up:])
        print(f"| {name} | {1e3 * median:.1f} | {median / plain:.1f} "
              f"| {counter.count} |")


def product_quality(*, activations=("relu", "tanh"), seeds=(0, 1), iterations=12, tasks=8):
    """Print what each product's errors do to ten iterations of CG, float32.

    Error: median and largest, along the ten directions that exact CG takes, all seeds.
    Progress: the predicted fall of the surrogate at a given KL, gᵀx/√(xᵀHx) with the
    true H, as a share of the exact product's. Length: the step's, over what δ allows.
    """
    print("| θ | product | move | error | progress | length |\n" + "|---" * 6 + "|")
    for activation in activations:
        for after in (0, iterations):
            found = {}
            for seed in seeds:
                quality = hess_quality(activation, after, tasks, seed)
                for name, numbers in quality.items():
                    found.setdefault(name, []).append(numbers)
            for (name, move), numbers in found.items():
                errors, progress, length = zip(*numbers)
                errors = np.concatenate(errors)
                print(f"| {activation}, {after} iterations | {name} | {move} "
                      f"| {np.median(errors):.2g}, {max(errors):.2g} | "
                      + " | ".join(", ".join(f"{x:.2f}" for x in column)
                                   for column in (progress, length)) + " |", flush=True)


def hess_quality(activation, iterations, tasks, seed):
    """(product, move) → (errors, progress, length) of `product_quality`."""
    with mt.one_thread_each():
        config, policy, theta, data = hess_trained(activation, iterations, tasks, seed)
        g = mt.mean_over_tasks(
            lambda d: mt.meta_gradient(policy, theta, d, config.alpha), data)
        exact = hess_exact(config, policy, theta, data)
        difference = hess_difference(config, policy, theta, data)
        seen = []                                    # exact CG's directions p, and Hp

        def solve(product, seen):
            def hvp(p):
                seen.append((p, product(p)))
                return seen[-1][1] + config.damping * p
            x, r = mt.conjugate_gradient(hvp, g, config.cg_iterations,
                                         config.cg_tolerance)
            true = float(x @ (exact(x) + config.damping * x))
            return float(g @ x) / true ** 0.5, (true / float(x @ (g - r))) ** 0.5

        best, _ = solve(exact, seen)
        out = {}
        for name, move, product in (
                *(("one-sided", s, lambda p, s=s: difference(p, s, False))
                  for s in (0.1, 0.01, 0.001)),
                ("symmetric", 0.01, lambda p: difference(p, 0.01, True)),
                ("symmetric, the authors'", "‖v‖/‖θ‖", lambda p: difference(
                    p, float(p.norm() / theta.norm()), True))):
            progress, length = solve(product, [])
            out[name, move] = ([hess_gap(product(p), Hp) for p, Hp in seen],
                               progress / best, length)
        return out


# %% Measured effects: what a choice does, by replacing one function


class SquaredPoint2D(mt.Point2D):
    """Point2D with the paper's reward, the squared distance."""

    def step(self, actions):
        obs, reward, *rest = super().step(actions)
        return obs, -reward ** 2, *rest


def authors_product(grad_fn, theta, v, step, grad_at_theta=None, symmetric=False):
    """Symmetric, with ε = 1/‖θ‖: a move of length ‖v‖/‖θ‖."""
    return HVP(grad_fn, theta, v, float(v.norm() / theta.norm()), symmetric=True)


def symmetric_product(grad_fn, theta, v, step, grad_at_theta=None, symmetric=False):
    return HVP(grad_fn, theta, v, step, symmetric=True)


def credit_without_baseline(data, gamma, lam):
    """What fitting after use means for a new task: its first baseline is 0."""
    data.adv = mt.standardise(mt.gae(data.rew, torch.zeros_like(data.rew), data.mask,
                                     gamma, lam), data.mask)
    return data


def credit_not_standardised(data, gamma, lam):
    """Advantages as they are; α is scaled down to what the first iterations stand."""
    returns = mt.discounted_returns(data.rew, gamma)
    values = mt.LinearBaseline().fit(data.obs, returns, data.mask).predict(data.obs)
    data.adv = mt.gae(data.rew, values, data.mask, gamma, lam)
    return data


HVP = mt.hessian_vector_product
EFFECTS = {     # name: (settings, {function of maml_trpo: its replacement})
    "the defaults": ({}, {}),
    "reward: squared distance (paper)": ({}, {"Point2D": SquaredPoint2D}),
    "α 0.1 (paper)": (dict(alpha=0.1, eval_alpha=0.1), {}),
    "α 0.5 (authors' run)": (dict(alpha=0.5, eval_alpha=0.5), {}),
    "symmetric differences": ({}, {"hessian_vector_product": symmetric_product}),
    "the authors' difference step": ({}, {"hessian_vector_product": authors_product}),
    "exact products (--hvp gauss-newton)": (dict(hvp="gauss-newton"), {}),
    "baseline 0 (fit after use)": ({}, {"assign_credit": credit_without_baseline}),
    "raw advantages, α 0.02": (dict(alpha=0.02, eval_alpha=0.02),
                               {"assign_credit": credit_not_standardised}),
    "first order": (dict(first_order=True), {}),
    "ratio inner loss (LVC)": (dict(inner_loss="ratio"), {}),
}


def effects(*names: str, iterations: int = 25, tasks: int = 10, seeds=(0, 1)) -> None:
    """Train briefly with one thing changed; print the returns on the paper's 40 goals."""
    print(f"{iterations} iterations of {tasks} tasks, seeds {seeds}; return by plain "
          f"distance after 0, 1, 2, 3 steps")
    for name, (settings, replaced) in EFFECTS.items():
        if names and name not in names:
            continue
        for seed in seeds:
            config = mt.Config(iterations=iterations, seed=seed, meta_batch_size=tasks,
                               **settings)
            family = mt.TASKS["point2d"]
            if "Point2D" in replaced:            # in training; evaluation stays as it is
                family = dataclasses.replace(family, make_envs=replaced["Point2D"],
                                             _cache=threading.local())
            with contextlib.ExitStack() as stack:
                for key, value in replaced.items():
                    stack.enter_context(mock.patch.object(mt, key, value))
                theta, rows = mt.train_maml(config, family)
                returns = mt.evaluate(config, theta).mean(0)
            skipped = sum(row["line_search_steps"] == 0 for row in rows)
            print(f"{name:38} seed {seed}: " + " ".join(f"{x:8.2f}" for x in returns)
                  + f"   {skipped} steps skipped", flush=True)


# %% This file as a command


def finetune(checkpoint: str, *alphas: str) -> None:
    """The search for a baseline's fine-tuning step: return on 20 tasks that are not the
    held-out ones, 20 episodes a step, for each first step α (the later ones are α/2)."""
    config, state = mt.load_checkpoint(Path(checkpoint))
    family = mt.family_of(config)
    tasks = family.sample_tasks(mt.random_stream(2025), 20)
    try:
        tried = [float(alpha) for alpha in alphas or
                 "0.002 0.005 0.01 0.02 0.05 0.1 0.2 0.5 1 2 5".split()]
    except ValueError:
        raise mt.BadInput(f"step sizes are numbers, not {' '.join(alphas)}") from None
    for alpha in tried:
        try:
            with mt.one_thread_each(), np.errstate(over="ignore"):
                returns = mt.adaptation_returns(
                    mt.make_policy(family, config), state.theta, family, tasks, 3, 20,
                    alpha, horizon=config.horizon, gamma=config.gamma, lam=config.lam,
                    seed=2025, workers=config.workers).mean(0)
        except mt.Diverged as error:
            returns = f"diverged ({error})"
        print(f"α {alpha:5g}: ", returns if isinstance(returns, str) else
              " ".join(f"{x:9.2f}" for x in returns), flush=True)


def figures() -> None:
    """Draw the notes' figures into figures/."""
    for name, draw in (("fd-error", figure_fd_error), ("graph", figure_graph)):
        path = HERE / "figures" / f"{name}.png"
        draw(path)
        print(path.relative_to(HERE))


COMMANDS = {"benchmark": benchmark, "figures": figures, "costs": product_costs,
            "quality": product_quality, "effects": effects, "mutants": mutants,
            "kills": kills, "finetune": finetune}
EXERCISE_COMMANDS = ("exercises", "make", "check", "bug")
USAGE = f"""usage: python {Path(__file__).name} COMMAND
  benchmark [paper]         where the time of a meta-iteration goes (3 minutes)
  costs                     seconds of each Hessian-vector product (seconds)
  quality                   what each product's errors do to a step (minutes)
  effects [NAME …]          one thing changed at a time, trained briefly (20 minutes)
  figures                   draw the notes' figures (a minute or two)
  finetune FILE [α …]       a baseline's step size: the search (minutes)
  kills [N]                 kill a run N times: does it end the same? (50: 3 minutes)
  mutants [NAME …]          which test catches which wrong change (15 minutes)
{EX_USAGE}"""


def main(argv) -> int:
    """These commands; a wrong call is answered in a sentence, status 2."""
    word, *rest = argv or ["nothing"]
    if word in EXERCISE_COMMANDS:
        return exercises_main(argv)
    try:
        inspect.signature(COMMANDS[word]).bind(*rest)
    except (KeyError, TypeError):
        print(USAGE, file=sys.stderr)
        return 2
    try:
        return COMMANDS[word](*rest) or 0
    except mt.BadInput as error:
        print(f"{word}: {error}", file=sys.stderr)
        return 2


@pytest.mark.parametrize("argv, words", [
    ([], "usage"), (["--help"], "usage"), (["finetune"], "usage"),
    (["figures", "more"], "usage"), (["kills", "x"], "'x' is not a whole number"),
    (["finetune", "README.md"], "README.md"), (["bug", "three", "b.py"], "cannot be")])
def test_wrong_command_is_answered_in_a_sentence(argv, words, monkeypatch, capsys):
    monkeypatch.chdir(HERE)
    assert main(argv) == 2
    assert words in capsys.readouterr().err


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
