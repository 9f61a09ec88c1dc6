"""The proofs of maml_trpo.py: every claim of its docstrings that a computer can check.

    python -m pytest                        the fast suite (under 2 minutes on two cores)
    MAML_SLOW=1 python -m pytest            the long tests too
    python test_maml_trpo.py benchmark      where the time of a meta-iteration goes

Oracles are independent of the functions they test: plain loops, closed forms,
torch.distributions, dense solves, central finite differences in float64. Sizes are
pairwise different, so that a wrong axis cannot hide; inputs are random and seeded.
"""
import ast
import csv
import dataclasses
import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv

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
    """--first-order: J = I in every product."""
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
    for bad in (-1.0, math.nan):
        monkeypatch.setattr(mt, "kl_hessian_product",
                            lambda *_: lambda v, bad=bad: bad * v)
        new, stats = mt.trpo_meta_step(policy, theta, data, config)
        assert torch.equal(new, theta)
        assert stats["line_search_steps"] == 0 and stats["kl"] == 0


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


def command(*args, cwd, **kw):
    return subprocess.run([sys.executable, str(HERE / "maml_trpo.py"), *map(str, args)],
                          cwd=cwd, capture_output=True, text=True, timeout=120, **kw)


def test_command_line_trains_evaluates_draws_and_says_where(tmp_path):
    out = command("--task", "point2d", "--iterations", 2, *TINY, cwd=tmp_path)
    assert out.returncode == 0, out.stderr
    folder = tmp_path / "runs" / "point2d-maml-seed0"
    assert sorted(p.name for p in folder.iterdir()) == sorted(mt.RUN_FILES)
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


def test_command_line_resumes_extends_compares_and_evaluates(tmp_path, capsys):
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
    assert "maml, b" in capsys.readouterr().out
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


def benchmark():
    """Seconds of a meta-iteration by part, at the sizes of the paper's 2D task."""
    from torch.utils.flop_counter import FlopCounterMode
    torch.set_num_threads(1)
    a, b = torch.randn(2000, 100), torch.randn(100, 100)
    times = []
    for _ in range(50):
        started = time.perf_counter()
        for _ in range(20):
            a @ b
        times.append((time.perf_counter() - started) / 20)
    rate = 2 * 2000 * 100 * 100 / np.median(times)
    print(f"{mt.available_cores()} cores; one product (2000×100)·(100×100), float32: "
          f"{rate / 1e9:.0f} GFLOP/s a core")
    config = mt.Config(workers=1)
    policy, theta, data = sampled_problem(config, dtype=torch.float32)
    with FlopCounterMode(display=False) as flops:
        mt.gradient(lambda t: mt.surrogate_and_kl(policy, t, data[0], config.alpha)[1],
                    theta)
    per_product = flops.get_total_flops() * len(data)
    for hvp in mt.HVPS:
        for workers in (1, 2):
            config = mt.Config(workers=workers, iterations=4 if hvp == mt.HVPS[0] else 2,
                               hvp=hvp)
            _, rows = mt.train_maml(config)
            median = {k: np.median([row[k] for row in rows[1:]]) for k in rows[0]
                      if k.startswith("seconds")}
            total = median["seconds_total"]
            print(f"{hvp}, {workers} worker{'s' if workers > 1 else ''}: {total:.2f} s a "
                  f"meta-iteration = " + " + ".join(
                      f"{k.removeprefix('seconds_')} {v:.2f} ({100 * v / total:.0f} %)"
                      for k, v in median.items() if k != "seconds_total"))
            if hvp == mt.HVPS[0]:
                share = per_product * config.cg_iterations / median["seconds_cg"]
                print(f"    CG runs at {100 * share / (rate * workers):.0f} % of the "
                      f"product rate of {workers} core(s)")


if __name__ == "__main__":
    commands = {"benchmark": benchmark}
    if len(sys.argv) < 2 or sys.argv[1] not in commands:
        sys.exit(f"usage: python {Path(__file__).name} {{{','.join(commands)}}}")
    commands[sys.argv[1]](*sys.argv[2:])
