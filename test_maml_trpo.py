"""The tests of maml_trpo.py: the algorithm, the proofs of notes.md, then the rest.

    python -m pytest                        the fast suite
    MAML_SLOW=1 python -m pytest            the long tests too

The first part follows sections 0 to 8 and proves what notes.md says about them. After
the line "You can stop reading here" come the tests of Part II.

Oracles are independent of the functions they test: plain loops, closed forms,
torch.distributions, dense solves, central finite differences in float64, a raw
Gymnasium environment. Sizes are pairwise different, so that a wrong axis cannot hide;
inputs are random and seeded; nothing depends on the clock.
"""
import contextlib
import copy
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
import subprocess
import sys
import textwrap
import time
import warnings
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import gymnasium as gym
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

torch.set_num_threads(1)
ALPHA = 0.1
POINT2D = mt.TASKS["point2d"]
HVPS = ("finite-difference", "double-backprop", "gauss-newton")


# %% Helpers: small random problems, float64, pairwise different sizes

def random_trajectories(rng, K=3, H=5, S=4, A=2):
    """Trajectories of random numbers; two end early and are padded with zeros."""
    mask = torch.ones(K, H, dtype=torch.float64)
    mask[0, -2:] = 0
    mask[1, -1:] = 0

    def numbers(*shape):
        return torch.tensor(rng.standard_normal(shape))
    obs, act = (numbers(K, H, n) * mask[..., None] for n in (S, A))
    rew, adv = numbers(2, K, H) * mask
    return mt.Trajectories(obs, act, rew, mask, adv)


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


def small_problem(seed=0, inner_steps=1, activation="tanh", K=3, alpha=ALPHA):
    """policy, θ_old (float64), TaskData whose `old` is the adapted policy at θ_old."""
    rng = np.random.default_rng(seed)
    policy = mt.GaussianPolicy(4, 2, hidden=(7, 6), activation=activation, init_std=0.7)
    theta = policy.init(torch.Generator().manual_seed(seed), torch.float64)
    theta = theta + 0.1 * torch.tensor(rng.standard_normal(theta.shape))
    inner = [random_trajectories(rng, K) for _ in range(inner_steps)]
    outer = random_trajectories(rng, K + 1)
    old = policy.distribution(plain_adapt(policy, theta, inner, alpha), outer.obs)
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
    return mt.Config(**dict(
        iterations=2, meta_batch_size=3, rollouts=4, horizon=7, hidden=(8, 6),
        alpha=0.2, lam=1.0, max_kl=0.02, cg_iterations=3, hvp="finite-difference",
        curvature_tasks=9, eval_tasks=5, eval_episodes=3) | changes)


def first_theta(config, dtype=torch.float32):
    policy = mt.make_policy(mt.family_of(config), config)
    return policy.init(torch.Generator().manual_seed(config.seed), dtype)


def sampled_problem(config, dtype=torch.float64):
    """policy, θ and the data of config.meta_batch_size tasks of point2d."""
    policy, theta = mt.make_policy(POINT2D, config), first_theta(config, dtype)
    theta += 0.1 * torch.randn(theta.shape, generator=torch.Generator().manual_seed(9),
                               dtype=dtype)
    tasks = POINT2D.sample_tasks(np.random.default_rng(0), config.meta_batch_size)
    return policy, theta, [
        mt.sample_task_data(policy, theta, POINT2D, task, config, (0, m))
        for m, task in enumerate(tasks)]


def without_seconds(rows):
    return [row | dict(seconds=0) for row in rows]


# %% Section 0: configuration

# Every setting once more, by hand: what `--task NAME` alone does.
DEFAULTS = dict(
    method="maml", seed=0, inner_steps=1, first_order=False,
    inner_loss="log-prob", hidden=(100, 100), activation="relu", damping=1e-5,
    cg_tolerance=1e-10, fd_step=0.01, backtrack_ratio=0.8, backtrack_steps=15,
    eval_tasks=40, eval_steps=3, workers=0)
COLUMNS = ("iterations", "meta_batch_size", "rollouts", "horizon", "alpha",
           "eval_alpha", "eval_episodes", "gamma", "lam", "init_std", "max_kl",
           "cg_iterations", "curvature_tasks", "alpha_follows_std", "hvp")
ALL_TASKS = {
    "point2d": (60, 20, 20, 100, 0.1, 0.1, 40, 0.99, 0.9, 1.0, 0.05,
                5, 5, False, HVPS[0]),
    "cheetah-vel": (100, 20, 20, 200, 0.1, 0.1, 20, 0.95, 1.0, 0.5, 0.05,
                    10, 20, False, HVPS[0]),
    "cheetah-dir": (200, 20, 20, 200, 0.1, 0.1, 20, 0.95, 1.0, 0.5, 0.05,
                    10, 20, False, HVPS[0]),
    "ant-vel": (140, 5, 40, 200, 0.2, 0.2, 40, 0.97, 0.95, 0.5, 0.05,
                10, 20, True, HVPS[2]),
    "ant-dir": (600, 2, 40, 200, 0.2, 0.2, 40, 0.97, 0.95, 0.5, 0.05,
                10, 20, True, HVPS[2]),
}


@pytest.mark.parametrize("task", ALL_TASKS)
def test_presets_and_defaults_are_these(task):
    expected = DEFAULTS | dict(zip(COLUMNS, ALL_TASKS[task])) | dict(task=task)
    assert dataclasses.asdict(mt.Config(task=task)) == expected
    assert mt.TASKS[task].horizon == expected["horizon"]
    assert set(mt.TASKS) == set(mt.PRESETS) == set(ALL_TASKS)


def test_config_is_its_tasks_preset_but_for_what_is_given():
    """And two settings that follow others, as long as they are not given themselves."""
    usual, ant = vars(mt.Config()), dict(zip(COLUMNS, ALL_TASKS["ant-dir"]))
    for given, more in (
            ({}, {}), (dict(task="point2d", first_order=True), {}),
            (dict(alpha=0.5), dict(eval_alpha=0.5)),
            (dict(alpha=0.5, eval_alpha=0.4), {}),
            (dict(task="ant-dir", alpha=0.3), ant | dict(eval_alpha=0.3)),
            (dict(method="random"), dict(iterations=0))):
        config = mt.Config(**given)
        assert vars(config) == usual | more | given
        assert dataclasses.replace(config, seed=3) == mt.Config(**given, seed=3)


def test_config_brings_numpys_numbers_and_json_lists_to_plain_ones():
    plain = mt.Config("ant-dir", alpha=0.5, rollouts=3, hidden=(8, 6), first_order=True)
    from_numpy = mt.Config(np.str_("ant-dir"), alpha=np.float32(0.5), hidden=np.array(
        [8, 6]), rollouts=np.int64(3), first_order=np.True_, lam=plain.lam)
    from_json = mt.Config(**json.loads(json.dumps(vars(from_numpy))))
    assert repr(from_numpy) == repr(from_json) == repr(plain)         # types as well
    assert type(mt.Config(alpha=1).alpha) is float


@pytest.mark.parametrize("name, value", [
    ("alpha", -0.1), ("alpha", math.nan), ("alpha", math.inf), ("alpha", "0.1"),
    ("alpha", None), ("alpha", True), ("gamma", 1.5), ("meta_batch_size", 0),
    ("rollouts", 1.5), ("rollouts", 3.0), ("rollouts", True), ("rollouts", "3"),
    ("backtrack_ratio", 1.5), ("backtrack_ratio", 0), ("inner_steps", 0),
    ("curvature_tasks", 0), ("workers", -1), ("horizon", 10**9), ("hidden", ()),
    ("hidden", 3), ("hidden", (3, 0)), ("hidden", [3.5]), ("hidden", "3"),
    ("hvp", "magic"), ("hvp", 1), ("max_kl", 0), ("init_std", 0), ("task", "walker"),
    ("first_order", 1), ("first_order", "yes"), ("no_such", 1)])
def test_config_refuses_an_impossible_value_by_name(name, value):
    with pytest.raises(mt.BadInput, match=rf"\b{name}\b"):
        mt.Config(**{name: value})


def test_config_refuses_settings_that_contradict_each_other():
    with pytest.raises(mt.BadInput, match="these are the settings of point2d"):
        dataclasses.replace(mt.Config(), task="ant-dir")
    with pytest.raises(mt.BadInput, match="random.*iterations 3"):
        mt.Config(method="random", iterations=3)


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


def test_family_of_makes_an_environment_once_for_each_number_of_copies():
    """Its own ones in every call: two runs never step the same environment."""
    made = []
    family = dataclasses.replace(
        POINT2D, make_envs=lambda K: made.append(K) or mt.Point2D(K))
    one, two = (mt.family_of(tiny_config(rollouts=4), family) for _ in range(2))
    assert one.make_envs(4) is one.make_envs(4) is not two.make_envs(4)
    assert one.make_envs(3) is one.make_envs(3) and made == [4, 4, 3]
    assert dataclasses.replace(one, make_envs=family.make_envs) == family


# %% Section 2: the policy

def test_policy_kl_equals_torch_distributions_and_monte_carlo():
    """The reversed arguments give another number. log π by torch.distributions, too."""
    policy, theta, data = small_problem()
    obs, thetas = data.outer.obs[0, :3], (theta, theta + 0.3)
    old, new = (policy.distribution(t, obs) for t in thetas)
    plain_old, plain_new = (plain_policy(policy, t, obs) for t in thetas)
    kl = mt.kl_old_new(old, new)
    torch.testing.assert_close(kl, kl_divergence(plain_old, plain_new))
    assert kl.shape == (3,) and (kl - mt.kl_old_new(new, old)).abs().min() > 1e-3
    torch.manual_seed(1)
    act = plain_old.sample((200_000,))
    torch.testing.assert_close(new.log_prob(act), plain_new.log_prob(act))
    estimate = old.log_prob(act) - new.log_prob(act)
    error = estimate.std(0) / math.sqrt(len(act))
    assert ((estimate.mean(0) - kl).abs() < 5 * error).all()


@pytest.mark.parametrize("activation, log_std, expected", [
    ("relu", -0.4, math.exp(-0.4)), ("tanh", 3.0, math.exp(3.0)), ("relu", -99, 1e-6)])
def test_policy_sampler_draws_from_distribution(activation, log_std, expected):
    """The same mean and the same σ, with the same least σ, in numpy arrays."""
    policy, theta, _ = small_problem(activation=activation)
    theta[-1] = log_std
    obs = np.random.default_rng(0).standard_normal((9, 4))
    act_on = policy.sampler(theta, np.random.default_rng(1))
    draws = np.stack([act_on(obs) for _ in range(5_000)])
    pi = policy.distribution(theta, torch.tensor(obs))
    std = pi.log_std.exp().numpy()
    assert (abs(draws.mean(0) - pi.mean.numpy()) < 5 * std / 70).all()
    np.testing.assert_allclose(draws.std(0), np.tile(std, (9, 1)), rtol=0.06)
    np.testing.assert_allclose([std[1], policy.std(theta)[1]], expected, rtol=1e-6)


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
    config = tiny_config(activation=activation, init_std=0.3)
    policy, theta = mt.make_policy(POINT2D, config), first_theta(config)
    torch.testing.assert_close(theta[-2:].exp(), torch.full((2,), 0.3))
    theta[:-2] += 0.1
    unit = {"relu": torch.nn.ReLU, "tanh": torch.nn.Tanh}[activation]
    layers = torch.nn.Sequential(torch.nn.Linear(2, 8), unit(), torch.nn.Linear(8, 6),
                                 unit(), torch.nn.Linear(6, 2))
    torch.nn.utils.vector_to_parameters(theta[:-2], layers.parameters())
    obs = torch.tensor([[0.4, -0.7], [0.1, 3.0]])
    mean = policy.distribution(theta, obs).mean
    torch.testing.assert_close(mean, layers(obs).detach())
    numbers = sum(weights.numel() for weights in layers.parameters())
    assert numbers + 2 == len(theta) == policy.num_params


# %% Section 3: rollouts

class OnePoint(gym.Env):
    """point2d alone: `reset` needs the task, and `step` an episode that is going on."""
    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space = gym.spaces.Box(-1, 1, (2,), np.float32)

    def reset(self, *, seed=None, options=None):
        self.point, self.ended = mt.Point2D(1), False
        return self.point.reset(options={"task": options["task"]})[0][0], {}

    def step(self, action):
        assert not self.ended
        obs, reward, ended, _, _ = self.point.step(action[None])
        self.ended = ended[0]
        return obs[0], reward[0], self.ended, False, {}


class OtherForms(mt.Point2D):
    """point2d that uses one array for all observations, overwrites its actions, and
    answers in other types. Half of the ends are `terminated`, half `truncated`."""

    def __init__(self, form, flag, K):
        super().__init__(K)
        self.form, self.flag, self.array = form, flag, np.zeros((K, 2))

    def reset(self, *, seed=None, options=None):
        self.array[:], _ = super().reset(seed=seed, options=options)
        return self.form(self.array), {}

    def step(self, actions):
        self.array[:], reward, ended, _, _ = super().step(actions)
        actions[:] = 99
        even = np.arange(self.num_envs) % 2 == 0
        return (self.form(self.array), self.form(reward), self.flag(ended & even),
                self.flag(ended & ~even), {})


def same(x):
    return x


FORMS = [(same, same), (np.ndarray.tolist, np.ndarray.tolist),
         (torch.tensor, torch.tensor), (same, lambda ended: 1.0 * ended),
         (same, lambda ended: 2 * ended)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("make_envs", [
    mt.Point2D, *(functools.partial(OtherForms, *forms) for forms in FORMS),
    *(lambda K, mode=mode: SyncVectorEnv([OnePoint] * K, autoreset_mode=mode)
      for mode in AutoresetMode)])
def test_rollout_records_what_the_environment_saw(make_envs, dtype):
    """point2d, replayed from the recorded actions: positions, rewards, ends. So do its
    forms above, and copies of a Gymnasium environment, which must not begin anew."""
    policy = mt.GaussianPolicy(2, 2, hidden=(8, 6))
    theta = policy.init(torch.Generator().manual_seed(0), dtype)
    goal = torch.tensor([0.1, -0.1])       # two clipped actions away: some end at once
    family = dataclasses.replace(POINT2D, make_envs=make_envs)
    envs = mt.family_of(tiny_config(horizon=100), family).make_envs(60)
    step, given = envs.step, []
    envs.step = lambda actions: given.append(actions.copy()) or step(actions)
    for seed in (1, 2):
        given.clear()
        data = mt.task_rollout(envs, policy, theta, goal.numpy(), 20, (seed,))
        assert data.obs.shape == (60, 20, 2) and data.obs.dtype == dtype
        act, given_act = data.act.double(), torch.tensor(np.stack(given, axis=1))
        after = torch.cumsum(0.1 * act.clamp(-1, 1), dim=1)       # stays after its end
        running = ((after - goal).abs() >= 0.01).any(-1)
        assert 0 < running[:, -1].sum() < 60, "no early end: choose another goal"
        mask = torch.cat([torch.ones(60, 1), running[:, :-1]], dim=1).double()
        assert torch.equal(data.mask, mask.to(dtype))
        assert torch.equal(act, given_act * mask[..., None])       # as drawn, unclipped
        at = torch.cat([torch.zeros(60, 1, 2), after[:, :-1]], dim=1)
        rew = -(after - goal).pow(2).sum(-1).sqrt() * mask
        for ours, expected in ((data.obs, at * mask[..., None]), (data.rew, rew)):
            torch.testing.assert_close(ours.double(), expected, rtol=0, atol=1e-6)
        assert data.mean_return() == pytest.approx(rew.sum(1).mean().item())


def test_rollout_depends_on_its_seed_and_on_nothing_before():
    """First states and actions of every copy: all different for all different keys."""
    envs = SyncVectorEnv([lambda: gym.make("Pendulum-v1")] * 3)
    policy = mt.GaussianPolicy(3, 1, hidden=(8, 6))
    theta = policy.init(torch.Generator().manual_seed(0))

    def first(key):
        data = mt.task_rollout(envs, policy, theta, None, 9, key)
        noise = data.act - policy.distribution(theta, data.obs).mean
        return torch.cat([data.obs[:, 0], noise[:, 0]], dim=1)                 # (3, 4)
    keys = [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1),
            (0, 0), (0,)]
    every = torch.cat([first(key) for key in keys])                           # (21, 4)
    assert torch.equal(every[:3], first(keys[0]))
    for column in every.T:
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
    ahead = np.hstack([values[:, 1:], np.zeros((K, 1))])         # V is 0 after the end
    raw = discounted((rew + gamma * ahead - values) * happened, gamma * lam)
    expected = (raw - raw[happened].mean()) / raw[happened].std() * happened
    ours = mt.assign_credit(data, gamma, lam).adv
    assert ours.dtype == dtype
    tolerance = 2e-6 if dtype == torch.float32 else 1e-7
    np.testing.assert_allclose(ours, expected, rtol=0, atol=tolerance)


# %% Section 5: the inner update

def test_inner_loss_equals_plain_loop():
    """−(1/N) Σ log π·Â over the N steps that happened, not episodes."""
    policy, theta, data = small_problem()
    d, terms = data.inner[0], []
    for k, t in itertools.product(range(3), range(5)):
        if d.mask[k, t]:
            pi = plain_policy(policy, theta, d.obs[k, t])
            terms.append(float(pi.log_prob(d.act[k, t]) * d.adv[k, t]))
    assert abs(float(mt.inner_loss(policy, theta, d)) + np.mean(terms)) < 1e-12
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
    for create_graph in (False, True):
        t = theta.clone().requires_grad_()
        theta_prime = mt.adapt(policy, t, data.inner, ALPHA, create_graph)
        (grad,) = torch.autograd.grad(theta_prime @ weights, t)
        assert torch.equal(grad, weights) != create_graph


# %% Section 6: meta-objective and KL

def test_mean_over_tasks_adds_in_float64_and_is_like_what_it_shall_be_like():
    """In float32 the middle one of these three numbers would be lost."""
    like = torch.zeros(2, dtype=torch.float32)
    mean = mt.mean_over_tasks(lambda x: torch.tensor([x, 6.0]), [1e9, 3.0, -1e9], like)
    assert mean.tolist() == [1.0, 6.0] and mean.dtype == torch.float32


def meta_objective(policy, data, alpha=ALPHA, config=None):
    """The surrogate as a plain function of θ, written out once more."""
    def function(theta):
        phi, outer = plain_adapt(policy, theta, data.inner, alpha, config), data.outer
        log_new = plain_policy(policy, phi, outer.obs).log_prob(outer.act)
        ratio = torch.exp(log_new - data.old.log_prob(outer.act))
        return -plain_mean(ratio * outer.adv, outer.mask)
    return function


def plain_kl(policy, data, alpha=ALPHA, config=None):
    """KL(old adapted ‖ new adapted) as a function of θ, by torch.distributions."""
    old = Independent(Normal(data.old.mean, data.old.log_std.exp()), 1)

    def function(theta):
        phi = plain_adapt(policy, theta, data.inner, alpha, config)
        new = plain_policy(policy, phi, data.outer.obs)
        return plain_mean(kl_divergence(old, new), data.outer.mask)
    return function


@pytest.mark.parametrize("inner_steps", [1, 2])
@pytest.mark.parametrize("away", [0.0, 0.05])
def test_meta_gradient_equals_central_differences(inner_steps, away):
    """Second order, through one and two inner steps, at θ_old and away from it."""
    policy, theta, data = small_problem(seed=1, inner_steps=inner_steps)
    theta = theta + away
    expected = central_difference(meta_objective(policy, data), theta)
    exact = mt.meta_gradient(policy, theta, [data], tiny_config(alpha=ALPHA))
    assert gap(exact, expected) < 1e-7
    for changes in (dict(first_order=True), dict(inner_loss="ratio")):
        config = tiny_config(alpha=ALPHA, **changes)
        assert gap(mt.meta_gradient(policy, theta, [data], config), exact) > 0.01


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
    policy, theta, (data,) = sampled_problem(config, dtype)

    def kl(t):
        return mt.surrogate_and_kl(policy, t, data, config.alpha)[1]
    assert kl(theta).item() == 0.0 and not mt.gradient(kl, theta).any()


# %% Section 7: the TRPO step

def one_j_problem(**changes):
    """Three tasks of point2d; tanh, float64, an α so large that J is far from I."""
    config = tiny_config(activation="tanh", alpha=1.0, eval_alpha=0.3, hidden=(4,),
                         **changes)
    return config, *sampled_problem(config)


def mean_of(objective, policy, data, *more):
    """The mean over tasks of `meta_objective` or `plain_kl`, as a function of θ."""
    each = [objective(policy, d, 1.0, *more) for d in data]
    return lambda theta: sum(function(theta) for function in each) / len(each)


def dense_hessian(policy, data, theta, config):
    """∇²k with the J of the log π loss, or of first order: J = I, so this is F."""
    own = [config] * config.first_order
    return hessian(mean_of(plain_kl, policy, data, *own), theta)


ESTIMATORS = dict(inner_steps=2), dict(first_order=True), dict(inner_loss="ratio")


@pytest.mark.parametrize("hvp", HVPS)
@pytest.mark.parametrize("changes", ESTIMATORS, ids=str)
def test_three_products_equal_the_dense_hessian(hvp, changes):
    """Of the KL's values, or for first order F. The J of first order or of the ratio
    would give another one. Two inner steps: J ≠ Jᵀ."""
    config, policy, theta, data = one_j_problem(hvp=hvp, fd_step=1e-6, **changes)
    for d in data:
        d.outer.mask[0, -2:] = 0                                       # an early end
    H = dense_hessian(policy, data, theta, config)
    product = mt.kl_hessian_product(policy, theta, data, config)
    tolerance = 1e-3 if hvp == "finite-difference" else 1e-8
    for v in torch.randn(3, len(theta), generator=torch.Generator().manual_seed(0),
                         dtype=torch.float64):
        assert gap(product(v), H @ v) < tolerance
    if "inner_steps" not in changes:
        more = [] if config.first_order else [config]
        assert gap(hessian(mean_of(plain_kl, policy, data, *more), theta), H) > 0.05


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
    """After n steps: argmin of ½xᵀHx − bᵀx over span(b, Hb, …), at last H⁻¹b; and r.
    It ends earlier as soon as r·r is below the tolerance."""
    a, b = torch.tensor(np.random.default_rng(2).standard_normal((2, 8, 8)))
    H, b, asked = a @ a.T + 0.1 * torch.eye(8), b[0], []

    def hvp(v):
        asked.append(v)
        return H @ v
    for n in (1, 2, 4, 8):
        basis = torch.linalg.qr(torch.stack(
            [torch.linalg.matrix_power(H, i) @ b for i in range(n)], dim=1))[0]
        best = basis @ torch.linalg.solve(basis.T @ H @ basis, basis.T @ b)
        x, r = mt.conjugate_gradient(hvp, b, n, 1e-10)
        torch.testing.assert_close(x, best, rtol=1e-7, atol=1e-8)
        torch.testing.assert_close(r, b - H @ x)
        assert len(asked) == n
        asked.clear()
    _, r = mt.conjugate_gradient(hvp, b, 7, 0.0)
    for share, products in ((1.01, 7), (0.99, 8)):
        asked.clear()
        mt.conjugate_gradient(hvp, b, 8, share * float(r @ r))
        assert len(asked) == products


def test_conjugate_gradient_stops_at_curvature_that_is_not_positive():
    """−1 in the first direction, NaN, and b = 0, where there is no direction; NaN in
    the second direction leaves the x so far."""
    H = torch.diag(torch.tensor([1.0, -1.0, 1.0], dtype=torch.float64))
    b = torch.tensor([0.1, 5.0, 0.1], dtype=torch.float64)
    for hvp, right in ((H.matmul, b), (lambda v: v * math.nan, b), (same, 0 * b)):
        x, r = mt.conjugate_gradient(hvp, right, 9, 1e-10)
        assert not x.any() and torch.equal(r, right)
    products = iter([2 * b, math.nan * b])
    x, _ = mt.conjugate_gradient(lambda v: next(products), b, 9, 1e-10)
    assert torch.equal(x, b / 2)


def search_along_a_line(surrogate, kl, full_step, ratio=0.8, trials=15):
    """δ = 0.01, from 0: → (where it ends, surrogate, KL, trials), and what was tried.
    """
    tried = []

    def evaluate(theta):
        tried.append(theta.item())
        return surrogate(theta.item()), kl(theta.item())
    theta, *numbers = mt.backtrack_line_search(
        evaluate, torch.zeros(1), torch.tensor([full_step]), 0.0, 0.01, ratio,
        trials)
    return [theta.item(), *numbers], tried


def test_line_search_backtracks_until_both_conditions_hold():
    """None is needed; KL alone refuses two trials, the surrogate alone three."""
    for surrogate, kl, tried in (
            (lambda x: -x, lambda x: 0.01, [1.5]),
            (lambda x: -1e-6 * x, lambda x: 0.01, [1.5]),           # any fall will do
            (lambda x: -x, lambda x: 0.01 * x, [1.5, 1.2, 0.96]),
            (lambda x: x * (x - 0.9), lambda x: 0.0, [1.5, 1.2, 0.96, 0.768])):
        numbers, ours = search_along_a_line(surrogate, kl, 1.5)
        np.testing.assert_allclose(ours, tried, rtol=1e-6)
        last = ours[-1]
        assert numbers == [last, surrogate(last), kl(last), len(tried)]


def test_line_search_restores_theta_when_nothing_is_accepted():
    """After fifteen trials of four fifths, or the trials that were asked for."""
    for surrogate, kl in (
            (lambda x: x, lambda x: 0.0), (lambda x: -x, lambda x: 1.0),
            (lambda x: math.nan, lambda x: 0.0), (lambda x: 0.0, lambda x: 0.0),
            (lambda x: -x, lambda x: math.nan)):
        numbers, tried = search_along_a_line(surrogate, kl, 1.0)
        assert numbers == [0.0, 0.0, 0.0, 0]
        np.testing.assert_allclose(tried, 0.8 ** np.arange(15), rtol=1e-6)
    _, tried = search_along_a_line(surrogate, kl, 1.0, ratio=0.5, trials=3)
    assert tried == [1.0, 0.5, 0.25]


def dense_meta_step(policy, theta, data, config):
    """−√(2δ/xᵀHx)·x. H is of the first tasks only, and no estimator's business. For
    first order F x = g, and the length is H's."""
    g = jacobian(mean_of(meta_objective, policy, data, config), theta)
    few, damping = data[:config.curvature_tasks], config.damping * torch.eye(len(theta))
    H = hessian(mean_of(plain_kl, policy, few), theta) + damping
    x = torch.linalg.solve(dense_hessian(policy, few, theta, config) + damping, g)
    return -math.sqrt(2 * config.max_kl / float(x @ H @ x)) * x


@pytest.mark.parametrize("hvp", HVPS)
@pytest.mark.parametrize("changes", [*ESTIMATORS, dict(curvature_tasks=2)], ids=str)
def test_trpo_step_equals_dense_solve_and_scale(hvp, changes):
    """x from the dense damped Hessian, scaled to ½sᵀHs = δ; the first 0.9ʲ to pass.
    With 2 of the 3 tasks for H, g and the line search still have all."""
    config, policy, theta, data = one_j_problem(
        hvp=hvp, damping=0.2, cg_iterations=60, cg_tolerance=1e-22, fd_step=1e-6,
        backtrack_ratio=0.9, **changes)
    full = dense_meta_step(policy, theta, data, config)
    if "inner_steps" not in changes:
        other = dense_meta_step(policy, theta, data, dataclasses.replace(
            config, first_order=False, inner_loss="log-prob", curvature_tasks=3))
        assert gap(other, full) > 0.02, "the test shows too little"
    new, stats = mt.trpo_meta_step(policy, theta, data, config)
    j = stats["line_search_steps"] - 1
    tolerance = 1e-3 if hvp == "finite-difference" else 1e-6
    assert gap(new - theta, 0.9**j * full) < tolerance
    surrogate, kl = (mean_of(f, policy, data) for f in (meta_objective, plain_kl))
    before = surrogate(theta)
    assert stats["surrogate_before"] == pytest.approx(float(before), abs=1e-9)
    trials = [theta + 0.9**trial * full for trial in range(j + 1)]
    passed = [bool(surrogate(t) < before and kl(t) <= config.max_kl) for t in trials]
    assert passed == [False] * j + [True]
    assert (stats["surrogate_after"], stats["kl"]) == pytest.approx(
        (float(surrogate(new)), float(kl(new))), rel=1e-6)
    g = jacobian(mean_of(meta_objective, policy, data, config), theta)
    assert stats["surrogate_predicted"] - stats["surrogate_before"] == pytest.approx(
        float(g @ (new - theta)), rel=1e-6)


def test_meta_gradient_divides_each_tasks_gradient_by_its_own_sigma():
    """g = (1/M) Σ (1/σ_i)∇U_i, with U_i of the raw advantages less their mean."""
    config, policy, theta, tasks = one_j_problem()
    slopes, sigmas = [], []
    for task in tasks:
        data, happened = task.outer, task.outer.mask.bool()
        returns = mt.discounted_returns(data.rew, config.gamma)
        values = mt.LinearBaseline().fit(data.obs, returns, data.mask).predict(data.obs)
        raw = mt.gae(data.rew, values, data.mask, config.gamma, config.lam)
        sigmas.append(raw[happened].std(correction=0))
        outer = dataclasses.replace(data, adv=raw - raw[happened].mean())
        slopes.append(central_difference(meta_objective(
            policy, mt.TaskData(task.inner, outer, task.old), 1.0), theta))
    g = mt.meta_gradient(policy, theta, tasks, config)
    assert gap(g, sum(U / sigma for U, sigma in zip(slopes, sigmas)) / 3) < 1e-5
    assert torch.cosine_similarity(g, sum(slopes), dim=0) < 0.999


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
        assert row["surrogate_predicted"] == row["surrogate_before"]
        assert not row["cg_residual"] < 1
    assert "none" in mt.progress_line(rows[0], 2, 1.0)


def test_step_is_skipped_for_negative_curvature_of_x_and_for_no_gradient(monkeypatch):
    """xᵀHx = xᵀ(g − r) = −g·g; or advantages of 0. ‖r‖ is logged as a share of ‖g‖."""
    config = tiny_config()
    policy, theta, tasks = sampled_problem(config)
    with monkeypatch.context() as patch:
        patch.setattr(mt, "conjugate_gradient", lambda hvp, g, *_: (g, 2 * g))
        negative = mt.trpo_meta_step(policy, theta, tasks, config)
    for task in tasks:
        task.outer.adv *= 0
    flat = mt.trpo_meta_step(policy, theta, tasks, config)
    for (new, stats), residual in ((negative, 2), (flat, 0)):
        assert torch.equal(new, theta)
        assert stats["cg_residual"] == pytest.approx(residual)


# %% Section 8: meta-training

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
    assert len(data.inner) == 3
    for phase, episodes in enumerate([*data.inner, data.outer]):
        again = mt.task_rollout(mt.Point2D(4), policy, phi, goal, 7, (5, 6, phase))
        torch.testing.assert_close(episodes.act, again.act, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(
            episodes.adv, mt.assign_credit(again, 0.7, 0.6).adv, rtol=1e-6, atol=1e-6)
        if phase < 3:
            phi = plain_adapt(policy, phi, [episodes], 0.8)
    torch.testing.assert_close(data.old.mean,
                               policy.distribution(phi, data.outer.obs).mean)


def test_best_theta_is_the_one_that_was_sampled_when_the_return_after_was_highest():
    """A training of five iterations, from what it reports; its rows by a plain mean.
    It goes on from a state in the middle as if it had never stopped."""
    config, states = tiny_config(iterations=5, inner_steps=2, seed=13), []
    theta, rows = mt.train_maml(config, report=states.append)
    policy = mt.make_policy(POINT2D, config)
    assert [state.iteration for state in states] == [0, 1, 2, 3, 4, 5]
    assert torch.equal(states[0].theta, first_theta(config))
    assert rows == states[-1].rows and torch.equal(theta, states[-1].theta)
    for i, (row, state, later) in enumerate(zip(rows, states, states[1:])):
        goals = POINT2D.sample_tasks(mt.random_stream(13, i), 3)
        data = [mt.sample_task_data(policy, state.theta, POINT2D, goal, config,
                                    (13, i, m)) for m, goal in enumerate(goals)]
        assert set(row) == {*mt.PROGRESS_COLUMNS, "surrogate_predicted"}
        assert row["iteration"] == i
        assert (row["return_pre"], row["return_post"]) == pytest.approx((
            np.mean([d.inner[0].rew.sum(1).mean() for d in data]),
            np.mean([d.outer.rew.sum(1).mean() for d in data])), rel=1e-6)
        std = later.theta[-2:].exp().mean().item()                     # of the new θ
        assert row["std_mean"] == pytest.approx(std, rel=1e-6)
        post = [row["return_post"] for row in rows[:i + 1]]
        assert later.best_return == max(post)
        assert torch.equal(later.best_theta, states[np.argmax(post)].theta)
    pre = [row["return_pre"] for row in rows]
    assert 0 < np.argmax(post) < 4 and np.argmax(pre) != np.argmax(post), "other seed"
    again, same_rows = mt.train_maml(config, start=states[3])
    assert torch.equal(again, theta)
    assert without_seconds(same_rows) == without_seconds(rows)


def test_std_that_leaves_its_bounds_stops_in_that_iteration(monkeypatch):
    """One σ is enough; that of the new θ counts. Iterations are counted from 0."""
    def train(*log_stds):
        moves = iter(log_stds)

        def step(policy, theta, *_):
            theta = theta.clone()
            theta[-1] = next(moves)
            return theta, {}
        monkeypatch.setattr(mt, "trpo_meta_step", step)
        mt.train_maml(tiny_config())
    train(-13.0, 13.0)
    for wrong in (-14.0, 14.0):
        with pytest.raises(mt.Diverged, match="^iteration 1: std"):
            train(0.0, wrong)


def test_alpha_that_follows_the_std_is_used_for_the_whole_iteration():
    """As if α·(σ/σ₀)² had been given: to inner steps, g, H·v and the line search."""
    config = tiny_config(alpha_follows_std=True, init_std=0.5, alpha=0.1, inner_steps=2,
                         seed=1)
    theta = first_theta(config, torch.float64)
    theta[-2:] = torch.tensor([-0.1, -0.5])
    states = []
    mt.train_maml(config, start=mt.TrainState(0, theta, [], theta, -math.inf),
                  report=states.append)
    for before, after in zip(states, states[1:]):
        sigma = math.exp(before.theta[-2:].mean())            # their geometric mean
        plain = dataclasses.replace(config, alpha_follows_std=False,
                                    alpha=0.1 * (sigma / 0.5)**2)
        theta, rows = mt.train_maml(dataclasses.replace(
            plain, iterations=after.iteration), start=before)
        torch.testing.assert_close(theta, after.theta, rtol=1e-6, atol=1e-8)
        assert rows[-1]["line_search_steps"] > 0                      # θ has moved


@contextlib.contextmanager
def float64_by_default():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("hvp", HVPS)
def test_training_is_the_same_in_every_mode_that_the_caller_may_have_set(hvp):
    class Underflows(mt.Point2D):
        def step(self, actions):
            assert not np.exp([-1e4]).any()
            return super().step(actions)

    config = tiny_config(hvp=hvp)
    family = dataclasses.replace(POINT2D, make_envs=Underflows)
    theta, rows = mt.train_maml(config, family)
    for mode in (torch.no_grad(), torch.inference_mode(), torch.autocast("cpu"),
                 float64_by_default(), np.errstate(all="raise")):
        with mode:
            again, same_rows = mt.train_maml(config, family)
        assert torch.equal(again, theta)
        assert without_seconds(same_rows) == without_seconds(rows)


def test_theta_does_not_depend_on_the_number_of_blas_threads():
    """With sizes for which the libraries of numpy and torch use all that they have."""
    code = ("import maml_trpo as mt; print(mt.train_maml(mt.Config(iterations=1, "
            "meta_batch_size=1, rollouts=64, horizon=9, hidden=(128, 128)))[0].numpy()"
            ".tobytes().hex())")
    one, two = (subprocess.run(
        [sys.executable, "-c", code], cwd=HERE, capture_output=True, check=True,
        env=os.environ | dict(OMP_NUM_THREADS=n, OPENBLAS_NUM_THREADS=n)).stdout
        for n in "12")
    assert one == two and len(one) > 8 * 128**2


def test_short_training_improves_the_return_after_adaptation():
    """Eight meta-iterations on the real task, by more than any noise."""
    config = tiny_config(iterations=8, rollouts=10, meta_batch_size=6, horizon=40,
                         hidden=(30, 20), cg_iterations=5, seed=1)
    started = time.perf_counter()
    _, rows = mt.train_maml(config)
    seconds = [row["seconds"] for row in rows]
    assert min(seconds) > 0 and sum(seconds) <= time.perf_counter() - started
    assert rows[-1]["return_post"] > rows[0]["return_post"] + 5
    assert sum(row["line_search_steps"] == 0 for row in rows) <= 1


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


def test_meta_gradient_expectation_equals_the_sampled_objective_with_sampling_frozen(
        monkeypatch):
    """E[mt.meta_gradient] over D, D′ lacks exactly the E-MAML term of −∇ of (II).

    First order, it is −E[∇V(θ′)].
    """
    monkeypatch.setattr(mt, "kl_old_new", kl_divergence)              # of Categoricals
    mdp = MdpTiny(2, S=3, A=2, H=3, starts=3)
    case, theta = MdpSampled(mdp), mdp.theta
    second, first, slope = torch.zeros(3, mdp.P, dtype=torch.float64)
    second_order = tiny_config(alpha=MDP_ALPHA)
    first_order = tiny_config(alpha=MDP_ALPHA, first_order=True)
    for p, theta_prime, inner in case.outcomes(theta):               # D: one path (K 1)
        outer = mdp.weighted(theta_prime)                            # all D′, by p_θ′
        task = mt.TaskData(inner, outer, mdp.distribution(theta_prime, outer.obs))
        second -= p * mt.meta_gradient(mdp, theta, [task], second_order)
        first -= p * mt.meta_gradient(mdp, theta, [task], first_order)
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
        assert gap(case.mean("log-prob") + term, case.true) < 1e-8
        assert gap(case.true, expected) > 0.1
        for mean in (case.mean("ratio"), case.mean("DiCE")):
            assert gap(mean, case.true) > 0.01 and gap(mean, expected) > 0.1
            assert gap(mean + term, case.true) > 0.2         # one effect, counted twice
    for shift, first_is_nearer in ((0.0, True), (2.0, False)):     # a constant decides
        case = MdpSampled(mdp, credit=lambda data: data.adv + shift)
        first, second = (gap(case.mean(name), case.true)
                         for name in ("first order", "log-prob"))
        assert (first < second) == first_is_nearer


def test_surrogate_is_the_value_itself_at_horizon_1_and_log_prob_only_its_slope(
        monkeypatch):
    """Away from θ_old, E[ratio·r] is V(θ) for H = 1; E[log π·r] is another function."""
    monkeypatch.setattr(mt, "kl_old_new", kl_divergence)              # of Categoricals
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


@pytest.mark.parametrize("H, seed, trials", [(7, 5, [7, 2]), (60, 3, [1, 1])])
def test_mended_pseudocode_of_the_notes_finds_the_theta_of_train_maml(
        H, seed, trials, capsys):
    """Two meta-iterations in float64, with the block's settings changed to small ones.

    The sizes are pairwise different. Beside each other stand the moves of θ, not θ: an
    error of a share of the step cannot hide behind the size of θ. With 7 steps the line
    search has to shrink; with 60 the first trial passes, and episodes end early.
    """
    notes = (HERE / "notes.md").read_text(encoding="utf-8")
    block = notes.split("<!-- pseudocode begins -->")[1].split(
        "<!-- pseudocode ends -->")[0].split("```python\n")[1].split("```")[0]
    for theirs, small in (
            ("H, ITERATIONS = 20, 20, 100, 60 ", f"H, ITERATIONS = 3, 4, {H}, 2 "),
            ("HIDDEN, SEED = (100, 100), 0\n", f"HIDDEN, SEED = (8, 6), {seed}\n")):
        assert block.count(theirs) == 1, theirs
        block = block.replace(theirs, small)
    assert max(map(len, block.splitlines())) <= 88
    scope = {}
    exec(block, scope)
    assert capsys.readouterr().out.count("iteration ") == 2

    config = mt.Config(meta_batch_size=3, curvature_tasks=3, rollouts=4, horizon=H,
                       hidden=(8, 6), seed=seed, iterations=2)
    first = scope["policy"].init(torch.Generator().manual_seed(seed)).double()
    theta, rows = mt.train_maml(
        config, start=mt.TrainState(0, first, [], first, -math.inf))
    assert [row["line_search_steps"] for row in rows] == trials       # θ has moved
    moved, wanted = scope["theta"] - first, theta - first
    assert scope["theta"].dtype == theta.dtype == torch.float64
    assert (moved - wanted).norm() < 1e-9 * wanted.norm()


# %% Proofs: the KL's Hessian, where the third derivative is, what a product leaves out
#
# k(θ) = κ(θ′(θ)), κ(φ) = KL(π_old ‖ π_φ) averaged over D′. P = 99, so that every P × P
# derivative can be had in full; products are taken with a random vector, v.

HESS_ALPHA = 0.5


def hess_problem(inner_steps=2, activation="tanh", K=3):
    """A small problem with its J far from I, and θ′, κ, k written out once more."""
    policy, theta, data = small_problem(7, inner_steps, activation, K, HESS_ALPHA)
    still = mt.TaskData([], data.outer, data.old)                   # nothing is adapted
    v, away = torch.tensor(np.random.default_rng(0).standard_normal((2, len(theta))))
    return SimpleNamespace(
        policy=policy, theta=theta, data=data,
        adapted=plain_adapt(policy, theta, data.inner, HESS_ALPHA),
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
    for exact in (mt.double_backprop_product, mt.gauss_newton_product):
        ours = exact(p.policy, p.theta, p.data, HESS_ALPHA)
        assert gap(ours(p.v), whole @ p.v) < 1e-12

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
    assert not data.inner[0].obs[:, 0].any()
    if not moved:
        theta = first_theta(config, torch.float64)
    phi = plain_adapt(policy, theta, data.inner, 0.1)
    data.old = policy.distribution(phi, data.outer.obs)
    v = mt.meta_gradient(policy, theta, [data], config)
    exact = mt.gauss_newton_product(policy, theta, data, 0.1)(v)
    steps, errors = np.geomspace(1e-6, 1e-4, 5), []
    for step in steps:
        product = mt.kl_hessian_product(
            policy, theta, [data], dataclasses.replace(config, fd_step=step))
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
    for exact, H in ((mt.double_backprop_product, whole),
                     (mt.gauss_newton_product, flat)):
        ours = exact(p.policy, p.away, p.data, HESS_ALPHA)
        assert gap(ours(p.v), H @ p.v) < 1e-12


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
        act = plain_policy(p.policy, p.adapted, p.data.outer.obs).sample((n,))

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


# %% You can stop reading here: what follows tests Part II

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
            self.t, self.task = 0, options["task"]
            return (obs(0), {}) if reset == "new" else obs(0)

    return dataclasses.replace(mt.TaskFamily(
        "toy", lambda K: SyncVectorEnv([Toy] * K, autoreset_mode=mode),
        lambda rng, M: rng.uniform(-1, 1, (M, 1)), lambda n: np.zeros((n, 1)), 4),
        **changes)


def train_toy(family, **changes):
    small = dict(meta_batch_size=2, rollouts=2, horizon=4, hidden=(4,), cg_iterations=2)
    return mt.train_maml(tiny_config(**small | changes), family)


# %% The paper's locomotion tasks, against Gymnasium's own environments

@pytest.mark.parametrize("name", [task for task in ALL_TASKS if task != "point2d"])
def test_walkers_match_gymnasium_step_by_step_over_whole_episodes(name):
    """Same first states from the same seeds, then the same observations, but for the
    velocities, and ends; the authors' rewards; no more steps after an early end."""
    pytest.importorskip("mujoco")
    K, seeds, task, cheetah = 3, [11, 5, 2024], -1.0, name.startswith("cheetah")
    envs, rng = mt.TASKS[name].make_envs(K), np.random.default_rng(0)
    body, angles, speeds = (("HalfCheetah-v5", 8, 9) if cheetah else
                            ("Ant-v5", 13, 14))
    twins, ended = [gym.make(body).unwrapped for _ in range(K)], np.zeros(K, bool)
    obs, _ = envs.reset(seed=seeds, options={"task": np.array([task])})
    expected = np.array([twin.reset(seed=s)[0] for twin, s in zip(twins, seeds)])
    units = np.ones(expected.shape[1])
    units[angles:angles + speeds] = 10
    for _ in range(200):
        np.testing.assert_allclose(obs, expected / units, rtol=1e-15)
        actions = 0.8 * rng.standard_normal((K, *twins[0].action_space.shape))
        obs, rewards, terminated, truncated, _ = envs.step(actions)
        for k in range(K):
            paid = 0.0
            if not ended[k]:
                action = np.clip(actions[k], -1, 1)
                expected[k], _, ended[k], _, info = twins[k].step(action)
                speed = info["x_velocity"]
                paid = task * speed if name.endswith("dir") else -abs(speed - task)
                paid -= (0.05 if cheetah else 0.005) * np.square(action).sum()
                if not cheetah:
                    forces = np.square(twins[k].data.cfrc_ext.clip(-1, 1)).sum()
                    paid += 0.05 - 0.0005 * forces + (name == "ant-vel")
            assert rewards[k] == pytest.approx(paid, rel=1e-12, abs=1e-12)
        assert (terminated == ended).all() and not truncated.any()
    assert ended.any() != cheetah                              # both ways were seen
    envs.reset(seed=seeds)
    assert not envs.step(actions)[2].any()                     # all walk again


@pytest.mark.parametrize("name, high", [("cheetah-vel", 2), ("ant-vel", 3)])
def test_speeds_are_uniform_and_the_held_out_ones_fixed(name, high):
    speeds = mt.TASKS[name].sample_tasks(np.random.default_rng(0), 4000)
    quarters = np.quantile(speeds, [0, 0.25, 0.5, 0.75, 1])
    np.testing.assert_allclose(quarters / high, [0, 0.25, 0.5, 0.75, 1], atol=0.05)
    first = [[0.417022], [0.720324], [0.000114]]               # numpy's old seed 1
    np.testing.assert_allclose(mt.TASKS[name].test_tasks(3) / high, first, atol=1e-6)


@pytest.mark.parametrize("name", ["cheetah-dir", "ant-dir"])
def test_directions_are_taken_in_turn_and_of_an_odd_number_the_first_is_drawn(name):
    family, rng = mt.TASKS[name], np.random.default_rng(0)
    for tasks in (family.sample_tasks(rng, 4), family.test_tasks(4)):
        assert tasks.tolist() == [[1], [-1], [1], [-1]]
    odd = {tuple(family.sample_tasks(rng, 3)[:, 0]) for _ in range(20)}
    assert odd == {(1, -1, 1), (-1, 1, -1)}


@pytest.mark.parametrize("method, plays, columns", [
    ("maml", 2, 4), ("pretrained", 1, 4), ("random", 0, 4), ("oracle", 1, 1)])
def test_only_the_oracle_of_ones_own_family_sees_its_task_and_only_maml_adapts(
        monkeypatch, method, plays, columns):
    """Who sees what, and how many times each task is played, at evaluation too.
    Observations are whole numbers, as some environments have them."""
    right, played = mt.task_rollout, []

    def spy(envs, policy, theta, task, *rest):
        data = right(envs, policy, theta, task, *rest)
        played.append((data.obs, task))
        return data
    monkeypatch.setattr(mt, "task_rollout", spy)
    family = toy_family(S=gym.spaces.Box(0, 9, (2,), np.uint8),
                        obs=lambda t: np.full(2, 5, np.uint8))
    config = tiny_config(method=method, horizon=4, iterations=2 * (plays > 0))
    theta, _ = mt.train_maml(config, family)
    assert len(played) == 2 * 3 * plays
    assert mt.evaluate(config, theta, family).shape == (5, columns)
    for obs, task in played:
        seen = np.array([5, 5, *task] if method == "oracle" else [5, 5])
        np.testing.assert_allclose(obs, np.broadcast_to(seen, obs.shape), rtol=1e-6)


# %% Runs of a moment, from the command line: what the tests below share

# With several processes some have no task for the products. Later flags win.
TINY = ("--iterations 2 --meta-batch-size 5 --curvature-tasks 1 --rollouts 3 --horizon "
        "4 --hidden 5,4 --cg-iterations 2 --eval-tasks 4 --eval-episodes 2 "
        "--workers 1").split()


def tiny_run(folder, *more) -> int:
    return mt.main([*TINY, "--out", folder, *more])


def without_figures(patch):
    """Drawing and waiting for the disk take most of a run's time."""
    for name in ("draw_learning_curve", "draw_adaptation", "draw_trajectories",
                 "check_figures"):
        patch.setattr(mt, name, lambda *args: None)
    patch.setattr(os, "fsync", lambda file: None)


@pytest.fixture
def no_figures(monkeypatch):
    without_figures(monkeypatch)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A finished run that nobody disturbed, and nobody may change."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    with pytest.MonkeyPatch.context() as patch:
        without_figures(patch)
        assert tiny_run(folder) == 0
    return folder


def refused(capsys, *args) -> str:
    """The one line that is said when these arguments are refused."""
    capsys.readouterr()
    assert mt.main(args) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    return error


def all_in(folder: Path) -> list:
    return sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*"))


def outcome(folder: Path) -> list:
    """All that a run computed, but for the seconds."""
    config, state = mt.load_checkpoint(folder / "checkpoint.pt")
    progress = (folder / "progress.csv").read_text().split()
    return [config, state.theta.tolist(), state.best_theta.tolist(),
            without_seconds(state.rows), [row.rsplit(",", 1)[0] for row in progress],
            (folder / "evaluation.csv").read_text()]


# %% Several processes, joined by gloo on the loopback address

@pytest.fixture
def others(monkeypatch):
    """The processes that were started, in a list. In the end all have ended."""
    started, start = [], mt.start_process

    def start_and_note(*args):
        started.append(start(*args))
        return started[-1]
    monkeypatch.setattr(mt, "start_process", start_and_note)
    yield started
    assert all(process.poll() is not None for process in started)


@pytest.mark.parametrize("N", [2, 3])
def test_run_is_the_same_to_the_bit_with_any_number_of_processes(
        tmp_path, no_figures, trained, capfd, others, N):
    """Nothing but the usual is said, by anybody. A fork afterwards can train."""
    assert tiny_run(tmp_path / "run", "--workers", N) == 0
    said = capfd.readouterr()
    assert outcome(tmp_path / "run") == outcome(trained) and len(others) == N - 1
    assert f" {N} processes;" in said.out and said.out.count("\n") == 12
    assert said.err == ""
    if hasattr(os, "fork"):
        child = torch.multiprocessing.get_context("fork").Process(
            target=mt.train_maml, args=(tiny_config(),))
        child.start()
        child.join(60)
        assert child.exitcode == 0


def test_torchrun_computes_the_same_run(tmp_path, trained):
    """From another folder, into one with a space."""
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone",
         "--nproc-per-node=2", HERE / "maml_trpo.py", *TINY, "--out", "by torchrun"],
        cwd=tmp_path, check=True, timeout=300)
    assert outcome(tmp_path / "by torchrun") == outcome(trained)


def test_process_group_of_somebody_elses_stays_his(trained):
    config, state = mt.load_checkpoint(trained / "checkpoint.pt")
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    with mock.patch("torch.distributed.all_reduce", side_effect=AssertionError):
        assert torch.equal(mt.train_maml(config)[0], state.theta)
    torch.distributed.destroy_process_group()


def test_meta_step_sums_twice_and_once_for_each_product_and_each_trial(monkeypatch):
    """What travels: P + 1 numbers a gradient or product, 3 a trial, all of float64."""
    config = tiny_config(cg_iterations=4)
    policy, theta, data = sampled_problem(config, dtype=torch.float32)
    monkeypatch.setattr(mt, "PROCESSES", mt.Processes(number=0, N=2))
    sent = []
    monkeypatch.setattr(torch.distributed, "all_reduce", sent.append)
    _, stats = mt.trpo_meta_step(policy, theta, data, config)
    trials = stats["line_search_steps"]
    assert trials > 0 and [len(x) for x in sent] == [
        2, *[policy.num_params + 1] * (1 + 4), *[3] * trials]
    assert all(x.dtype == torch.float64 for x in sent)


def test_no_process_is_left_when_the_first_one_is_killed(tmp_path):
    """SIGKILL: after five seconds nobody holds the standard error, and none wrote."""
    first = subprocess.Popen(
        [sys.executable, HERE / "maml_trpo.py", *TINY, "--workers", "2",
         "--iterations", "99999"], cwd=tmp_path, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while not re.match(" +3 ", first.stdout.readline()):
        assert first.poll() is None
    first.kill()
    assert first.communicate(timeout=5)[1] == ""


@pytest.mark.parametrize("wrong, words", [
    ("mt.sample_task_data = fail", "iteration 0: of process 1"),
    ("mt.help_first_process = lambda **how: None", "could not start")])
def test_error_of_another_process_is_said_once_by_the_first(
        tmp_path, no_figures, monkeypatch, capfd, others, wrong, words):
    """The other one is the same program, but for what it does wrong."""
    script = tmp_path / "wrong.py"
    script.write_text(f"""import sys; sys.path.insert(0, {str(HERE)!r})
import maml_trpo as mt
def fail(*args):
    raise mt.Diverged(f"of process {{mt.PROCESSES.number}}")
{wrong}
sys.exit(mt.main())""")
    monkeypatch.setattr(mt, "__file__", str(script))
    assert tiny_run(tmp_path / "run", "--workers", 2) == 1
    error = capfd.readouterr().err
    assert error.count("\n") == 1 and words in error


def test_world_size_without_torchrun_is_one_sentence(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "torchrun" in refused(capsys, *TINY)


# %% Evaluation

def plain_evaluation(config, theta, m, task, alpha=0.2):
    """(φ, episodes) after 0, 1, … steps on held-out task m, written out once more."""
    family = mt.family_of(config)
    policy = mt.make_policy(family, config)
    for step in range(config.eval_steps + 1):
        data = mt.task_rollout(
            family.make_envs(config.eval_episodes), policy, theta, task, config.horizon,
            (config.seed, mt.EVALUATION, m, step))
        yield theta, data
        mt.assign_credit(data, config.gamma, config.lam)
        theta = plain_adapt(policy, theta, [data], alpha * (1 if step == 0 else 0.5))


@pytest.mark.parametrize("follows, alpha", [(False, 0.3), (True, 4 * 0.3)])
def test_evaluation_equals_a_plain_loop_with_every_setting_of_the_run(follows, alpha):
    """Fresh episodes after each step; α/2 from the second step on and no less later;
    an α that follows σ, whose geometric mean has doubled, is four times as large."""
    config = tiny_config(seed=5, alpha=0.1, eval_alpha=0.3, gamma=0.7, lam=0.6,
                         eval_steps=4, eval_tasks=3, eval_episodes=5, init_std=0.7,
                         alpha_follows_std=follows)
    theta = first_theta(config)
    theta[-2:] = torch.log(0.7 * torch.tensor([1.0, 4.0]))
    table = mt.evaluate(config, theta)
    assert table.shape == (3, 5)
    for m, goal in enumerate(POINT2D.test_tasks(3)):
        expected = [data.rew.sum(1).mean() for _, data in plain_evaluation(
            config, theta, m, goal, alpha)]
        np.testing.assert_allclose(table[m], expected, atol=1e-5)


@pytest.mark.parametrize("run", ["point2d-seed0", "point2d-oracle-seed0"])
def test_kept_checkpoint_of_an_earlier_version_gives_its_evaluation(run):
    """The first two tasks; after one step other processors may differ by more."""
    kept = HERE / "figures" / run
    config, state = mt.load_checkpoint(kept / "checkpoint.pt")
    again = mt.evaluate(dataclasses.replace(config, eval_tasks=2), state.theta)
    expected = mt.read_evaluation(kept, "point2d")[1][:2]
    np.testing.assert_allclose(again[:, :2], expected[:, :2], rtol=1e-3)


# %% The files of a run

def test_a_runs_files_hold_its_numbers_and_its_settings_but_not_its_workers(trained):
    config, state = mt.load_checkpoint(trained / "checkpoint.pt")
    header, *rows = (trained / "progress.csv").read_text().split()
    assert header == ("iteration,return_pre,return_post,surrogate_before,"
                      "surrogate_after,kl,line_search_steps,cg_residual,std_mean,"
                      "seconds")
    assert rows == [",".join(str(row[name]) for name in header.split(","))
                    for row in state.rows]
    assert len(rows) == state.iteration == 2
    table = mt.evaluate(config, state.theta)
    assert (trained / "evaluation.csv").read_text().split() == [
        "method,task,step,return", *(f"maml,{m},{step},{table[m, step]}"
                                     for m in range(4) for step in range(4))]
    settings = json.loads((trained / "config.json").read_text())
    assert mt.Config(**settings) == config and "workers" not in settings
    assert (config.rollouts, config.hidden, config.workers) == (3, (5, 4), 0)


# %% The printed table, and figures, read back from their axes

# The sums of the paper's thirteen numbers: none was mistyped.
@pytest.mark.parametrize("task, total", [
    ("point2d", -382.94), ("cheetah-dir", 1387.86), ("cheetah-vel", -1932.22),
    ("ant-vel", 233.34), ("ant-dir", 2104.63)])
def test_papers_numbers_stand_below_ours(task, total):
    rows = mt.comparison_rows(mt.Config(task), [
        (method, "last θ", np.zeros((40, 4)))
        for method in ("maml", "pretrained", "random", "oracle")])
    assert rows[-4].label == "maml, paper" and rows[-1].label == "oracle, paper"
    assert sum(row.mean.sum() for row in rows) == pytest.approx(total)


def test_standard_error_leaves_out_what_lies_between_the_two_directions():
    """By its definition; it stays unknown with one task of a kind."""
    table = np.random.default_rng(0).normal(0, 50, (40, 3))
    table += 900.0 * np.resize([1, -1], (40, 1))

    def error(rows):
        return rows.std(axis=0, ddof=1) / math.sqrt(len(rows))
    forward, backward = table[::2], table[1::2]
    both = np.hypot(error(forward), error(backward)) / 2
    for task, expected in (
            ("point2d", [(table, error(table))]),
            ("cheetah-dir", [(table, both), (forward, error(forward)),
                             (backward, error(backward))])):
        rows = mt.comparison_rows(mt.Config(task), [("maml", "last θ", table)])
        assert rows[len(expected)].label == "maml, paper"
        for row, (part, its_error) in zip(rows, expected):
            np.testing.assert_allclose([row.mean, row.error], [part.mean(0), its_error])
        few = mt.comparison_rows(mt.Config(task), [("maml", "last θ", table[:1])])
        assert np.isnan(few[0].error).all()


@pytest.fixture
def drawn(monkeypatch):
    """{"learning.png": figure}: figures are kept in place of being written."""
    from matplotlib.figure import Figure
    kept = {}
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **how: kept.update(
        {Path(path).name: figure}))
    return kept


def test_table_and_figure_show_each_row_with_its_error_and_the_papers(drawn):
    rows = mt.comparison_rows(mt.Config(), [
        ("maml", "last θ", np.array([[1.0, 2.0, 4.0], [2.0, 4.0, 8.0]])),
        ("oracle", "other", np.array([[7.0], [9.0]]))])
    steps, ours, *_ = mt.comparison_table(mt.Config(), rows).splitlines()
    assert steps.split() == "gradient steps 0 1 2".split()
    assert ours.split() == "maml, last θ 1.50 ± 0.50 3.00 ± 1.00 6.00 ± 2.00".split()
    mt.draw_adaptation(Path("adaptation.png"), mt.Config(), rows, 6)
    (ax,) = drawn["adaptation.png"].axes
    ours, paper = (container.lines for container in ax.containers)
    assert ours[0].get_xydata().tolist() == [[0, 1.5], [1, 3], [2, 6]]
    ends = np.array(ours[2][0].get_segments())[..., 1]         # of the errors' bars
    np.testing.assert_allclose(ends, [[1, 2], [2, 4], [4, 8]])
    assert paper[0].get_ydata().tolist() == [-40.41, -11.68, -3.33, -3.23]
    flat = [line.get_ydata()[0] for line in ax.lines if "oracle" in line.get_label()]
    assert flat == [8, -2.29] and "over 6" in ax.get_title()


def test_trajectories_show_each_goals_own_walks(drawn, monkeypatch):
    """The first episode of each step to its end, as the evaluation played it."""
    monkeypatch.setattr(mt.Point2D, "GOAL_BOX", 0.3)          # so that some end early
    config = tiny_config(horizon=9)
    theta = first_theta(config)
    mt.draw_trajectories(Path("trajectories.png"), config, theta)
    axes, goals = drawn["trajectories.png"].axes, POINT2D.test_tasks(4)
    for m, (ax, goal) in enumerate(zip(axes, goals, strict=True)):
        *walks, star, _ = [line.get_xydata() for line in ax.lines]
        played = [data for _, data in plain_evaluation(config, theta, m, goal)]
        for walk, data in zip(walks, played, strict=True):
            happened = data.mask[0].bool()
            np.testing.assert_allclose(walk, data.obs[0, happened], atol=1e-5)
        np.testing.assert_allclose(star, [goal])


# %% The command line, end to end

def test_command_line_trains_evaluates_draws_and_says_where(
        tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert mt.main(["--task", "point2d", *TINY]) == 0
    out, folder = capsys.readouterr().out, Path("runs/point2d-maml-seed0")
    assert sorted(os.listdir(folder)) == sorted(mt.RUN_FILES)
    assert str(folder) in out.splitlines()[-1]
    assert re.findall(r"^ +(\d+) .*→", out, re.MULTILINE) == ["0", "1"]
    for name in ("learning.png", "adaptation.png", "trajectories.png"):
        assert (folder / name).read_bytes()[:4] == b"\x89PNG"
    assert mt.new_folder(None, folder.name).name == "point2d-maml-seed0-2"
    assert mt.new_folder(None, folder.name).name == "point2d-maml-seed0-3"


def test_what_is_missing_or_broken_here_is_said_before_a_run_or_does_not_matter(
        tmp_path):
    """Importing does nothing; point2d needs no MuJoCo; a MuJoCo that is absent or
    broken is refused with the reason. A library for drawing that MUJOCO_GL names, a
    notebook's backend, a style with LaTeX, an umlaut in the folder and an output that
    cannot show θ change nothing. Nothing else is said, and no other file is made."""
    (cwd := tmp_path / "Übung 1").mkdir()
    (broken := tmp_path / "broken" / "mujoco").mkdir(parents=True)
    (broken / "__init__.py").write_text('raise ImportError("GLIBCXX_9 not found")')
    (style := tmp_path / "matplotlibrc").write_text("text.usetex: True\n")
    code = f"""
import sys, torch
threads = torch.get_num_threads()
import maml_trpo as mt
assert torch.get_num_threads() == threads and "matplotlib" not in sys.modules
sys.modules["mujoco"] = None
walker = {TINY} + ["--task", "cheetah-dir", "--out", "walker"]
status = [mt.main({TINY} + ["--out", "point"]), mt.main(walker)]
del sys.modules["mujoco"]
sys.path.insert(0, {str(broken.parent)!r})
status.append(mt.main(walker))
sys.path.pop(0)
sys.path_importer_cache.clear()
print(status + [mt.main(walker)])"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, capture_output=True, encoding="latin-1",
        env=os.environ | dict(
            PYTHONPATH=str(HERE), MUJOCO_GL="angle", MPLBACKEND="module://nowhere",
            MATPLOTLIBRC=str(style), LC_ALL="C", PYTHONIOENCODING="latin-1"))
    (tmp_path / "broken" / "gymnasium.py").write_text("import no_such_package")
    bare = subprocess.run([sys.executable, HERE / "maml_trpo.py"], capture_output=True,
                          text=True, env=os.environ | dict(
                              PYTHONPATH=str(tmp_path / "broken"), PYTHONUTF8="1"))
    assert bare.returncode == 2 and bare.stderr.count("\n") == 1
    assert "no_such_package" in bare.stderr and "requirements.txt" in bare.stderr
    absent, broken, *more = done.stderr.splitlines()
    assert "pip install" in absent and "GLIBCXX_9" in broken
    assert "before ? after" in done.stdout                              # → in latin-1
    pytest.importorskip("mujoco")
    assert more == [] and done.stdout.endswith("[0, 2, 2, 0]\n")
    assert sorted(os.listdir(cwd)) == ["point", "walker"]


def test_a_walkers_checkpoint_without_mujoco_is_refused_for_that(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "mujoco", None)
    mt.load_mujoco.cache_clear()
    kept = HERE / "figures" / "cheetah-dir-seed0" / "checkpoint.pt"
    error = refused(capsys, "--evaluate", kept)
    assert "pip install" in error and "checkpoint" not in error


def test_rank_of_a_group_of_somebody_elses_works_alone(monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "2")
    assert mt.under_torchrun()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    assert not mt.under_torchrun()


def test_help_says_every_setting_and_its_default(capsys):
    assert mt.main(["--help"]) == 0
    said = "".join(capsys.readouterr().out.split())
    for f in dataclasses.fields(mt.Config):
        assert "".join(f.metadata["help"].split()) in said
        assert f"default{f.default}".replace(" ", "") in said


def test_progress_line_shows_each_number_in_its_column():
    """5 iterations of 54.5 s are left: 272.5 s."""
    row = dict(zip(mt.PROGRESS_COLUMNS, (
        6, -31.25, -12.75, 0.01625, -0.21375, 0.0175, 3, 0.625, 0.875, 13.25)))
    line = mt.progress_line(row, 12, 54.5)
    assert line.split()[:-1] == ("6 -31.25 → -12.75 -0.21375 nan 0.0175 3 0.625 0.875 "
                                 "13.25").split()
    assert line.endswith("  4m32s")
    line = mt.progress_line(row | dict(surrogate_predicted=-0.5), 12, 54.5)
    assert line.split()[4:6] == ["-0.21375", "-0.50000"]


def test_command_line_resumes_extends_and_compares(
        tmp_path, no_figures, trained, monkeypatch):
    a, b, e = (tmp_path / name for name in "abe")
    assert tiny_run(a, "--iterations", "3") == 0
    assert tiny_run(b) == 0 and tiny_run(b, "--iterations", "3", "--resume") == 0
    assert outcome(a) == outcome(b)
    monkeypatch.setattr(mt, "draw_adaptation", drawn := mock.Mock())
    assert mt.main(["--workers", "1", "--evaluate", a / "checkpoint.pt", "--eval-tasks",
                    "2", "--compare", trained, a, "--out", e]) == 0
    _, run, *others = drawn.call_args.args[2]
    assert [row.label for row in others] == ["maml, a, 4 tasks", "maml, paper"]
    np.testing.assert_array_equal(
        run.mean, mt.read_evaluation(trained, "point2d")[1].mean(0))


@pytest.mark.parametrize("which, given", [("best", {}), ("last", dict(
    eval_tasks=3, eval_steps=1, eval_episodes=4, seed=6, eval_alpha=0.7))])
def test_evaluate_is_of_the_last_theta_and_with_best_of_the_best(
        trained, tmp_path, no_figures, capsys, which, given):
    """With every setting of an evaluation, which are written down with it."""
    config, state = mt.load_checkpoint(trained / "checkpoint.pt")
    assert not torch.equal(state.theta, state.best_theta)
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
    assert mt.main(["--evaluate", trained / "checkpoint.pt", "--out", tmp_path,
                    "--workers", "1", *(flags or ["--best"])]) == 0
    assert f"maml, {which} θ" in capsys.readouterr().out
    expected = mt.evaluate(dataclasses.replace(config, **given),
                           state.theta if which == "last" else state.best_theta)
    np.testing.assert_array_equal(mt.read_evaluation(tmp_path, "point2d")[1], expected)
    assert given.items() <= json.loads((tmp_path / "config.json").read_text()).items()


def test_init_starts_from_the_last_theta_of_the_other_run(
        trained, tmp_path, no_figures):
    """Flags may be shortened."""
    assert tiny_run(tmp_path, "--init", trained / "checkpoint.pt", "--iter", "0",
                    "--inner-l", "ratio") == 0
    last = mt.load_checkpoint(trained / "checkpoint.pt")[1].theta
    config, state = mt.load_checkpoint(tmp_path / "checkpoint.pt")
    assert state.iteration == 0 and config.inner_loss == "ratio"
    assert torch.equal(state.theta, last) and torch.equal(state.best_theta, last)


@pytest.mark.parametrize("args, words", [
    ("--alpha nan", r"\balpha"), ("--no-such-flag", "no-such-flag"),
    ("--iterations many", "iterations"), ("--hidden 64,x", "--hidden"),
    ("--method random --iterations 3", "random.*iterations"),
    ("--eval 2", "ambiguous.*eval-tasks"), ("--best", "--evaluate"),
    ("--evaluate missing.pt", "missing.pt"), ("--evaluate foreign.pt", "foreign.pt"),
    ("--evaluate run/checkpoint.pt --resume", "--resume"),
    ("--evaluate run/checkpoint.pt --alpha 0.3", "alpha"),
    ("--evaluate run/checkpoint.pt --task ant-vel", "point2d.*ant-vel"),
    ("--init run/checkpoint.pt --hidden 5", "hidden"),
    ("--init run/checkpoint.pt --method oracle", "oracle"),
    ("--init run/checkpoint.pt --method random --iterations 0", "--init"),
    ("--compare nowhere", "nowhere"), ("--compare ant", "ant"),
    ("--compare gaps", "gaps"), ("--out run", "run already"),
    ("--out gaps", "already"),
    ("--out foreign.pt", "foreign.pt"), ("--out /proc/maml", "/proc/maml"),
    ("--resume", "--out"), ("--resume --out .", "config.json"),
    ("--resume --out gaps", "gaps"),
    ("--resume --out run --alpha 0.3", "run has alpha 0.1, not 0.3"),
    ("--resume --out run --iterations 1", "iterations 2 are done"),
    ("--resume --out run --init run/checkpoint.pt", "--init")])
def test_bad_input_is_one_sentence_and_status_2_and_changes_nothing(
        tmp_path, trained, monkeypatch, capsys, args, words):
    monkeypatch.chdir(tmp_path)
    Path("foreign.pt").write_bytes(b"not a checkpoint")
    for folder, file, old, new in (
            ("run", "config.json", "", ""),
            ("ant", "config.json", "point2d", "ant-vel"),
            ("gaps", "evaluation.csv", ",1,2,", ",1,1,")):
        changed = Path(shutil.copytree(trained, folder), file)
        changed.write_text(changed.read_text().replace(old, new))
    Path("gaps", "checkpoint.pt").unlink()                       # as after --evaluate
    before = all_in(tmp_path)
    saved = {"--evaluate", "--resume"} & set(args.split())
    error = refused(capsys, *["--workers", "1"] if saved else TINY, *args.split())
    assert re.search(words, error)
    assert all_in(tmp_path) == before


def test_what_cannot_be_drawn_is_refused_before_the_training(
        tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(mt, "new_figure", mock.Mock(side_effect=RuntimeError("LaTeX")))
    assert "LaTeX" in refused(capsys, *TINY, "--out", tmp_path / "run")
    assert os.listdir(tmp_path) == []


# %% Faults: kills, full disks, bad input

@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_killed_runs_end_bit_identical_when_resumed(tmp_path, no_figures, trained):
    """A child is killed at each write, rename and meta-step, a file being half written.
    What it leaves, resumed, ends as the undisturbed run; but for the settings, which
    are the first file, nothing has to be there."""
    def start(folder, dies) -> int:
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
        os._exit(tiny_run(folder))

    for n in itertools.count():
        folder = tmp_path / f"killed {n}"
        if start(folder, n) != -signal.SIGKILL:
            break                                           # it ended before that
        if n >= 2:
            assert tiny_run(folder, "--resume") == 0
            assert outcome(folder) == outcome(trained), n
    assert n == 2 * (1 + 3 * 2 + 1) + 2                  # files twice, and two steps


@pytest.mark.parametrize("what, workers, status", [
    ("Ctrl-C", 2, 130), ("other killed", 3, 1), ("disk full", 1, 1),
    ("output closed", 1, 1), ("another --resume", 1, 0)])
def test_disturbed_run_ends_in_one_sentence_and_goes_on_to_the_same_end(
        tmp_path, no_figures, monkeypatch, capfd, trained, others, what, workers,
        status):
    """In the second iteration. Its θ can be evaluated, and it goes on with another
    number of processes, and, as under pythonw, without any output."""
    run = tmp_path / "run"

    def disturb():
        if what == "Ctrl-C":                # which a process in the background ignores
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.kill(os.getpid(), signal.SIGINT)
        elif what == "other killed":
            others[-1].kill()
        elif what == "disk full":
            patch.setattr(os, "fsync", mock.Mock(side_effect=OSError(28, "No space")))
        elif what == "output closed":
            patch.setattr(sys, "stdout", stream := io.StringIO())
            stream.close()
        else:
            assert tiny_run(run, "--resume") == 0

    step, calls = mt.trpo_meta_step, itertools.count(1)

    def disturbed_step(*args):
        if next(calls) == 2:
            disturb()
        return step(*args)

    with monkeypatch.context() as patch:
        patch.setattr(mt, "trpo_meta_step", disturbed_step)
        assert tiny_run(run, "--workers", workers) == status
    error = capfd.readouterr().err
    assert error.count("\n") == (status > 0) and not any(run.glob("*.tmp"))
    if what == "Ctrl-C":
        assert f"--resume --out {run}" in error
        config, state = mt.load_checkpoint(run / "checkpoint.pt")
        assert mt.main(["--evaluate", run / "checkpoint.pt", "--out", tmp_path / "e",
                        "--workers", 2]) == 0
        expected = mt.evaluate(config, state.theta)
        assert state.iteration == 1 and np.array_equal(
            mt.read_evaluation(tmp_path / "e", "point2d")[1], expected)
    elif status:
        assert "--resume" in error
        monkeypatch.setattr(sys, "stdout", None)
        assert tiny_run(run, "--resume") == 0
        assert outcome(run) == outcome(trained)
    else:
        assert outcome(run)[1] == outcome(trained)[1]
        assert sorted(os.listdir(run)) == sorted(os.listdir(trained))


def test_checkpoint_of_another_kind_is_refused_and_left(trained, tmp_path, capsys):
    """Content that only a foreign or newer program would write, change by change."""
    path = shutil.copytree(trained, tmp_path / "copied") / "checkpoint.pt"
    good = torch.load(path, weights_only=True)
    whole, theta = path.read_bytes(), good["theta"]
    flipped = bytearray(whole)
    flipped[flipped.index(theta.numpy().tobytes()) + 9] ^= 1         # one bit of θ
    contents = [bytes(flipped), whole[:-99]]
    for changes in (dict(version=99), dict(format="other"),
                    dict(theta=theta[:-1]), dict(theta=theta * math.nan),
                    dict(rows=[]), dict(config={"no_such": 1}),
                    dict(format=SimpleNamespace())):    # a pickle may run anything
        torch.save(good | changes, buffer := io.BytesIO())
        contents.append(buffer.getvalue())
    for content in contents:
        path.write_bytes(content)
        assert "copied" in refused(capsys, "--evaluate", path)
        assert "copied" in refused(capsys, "--resume", "--out", path.parent)
        assert path.read_bytes() == content


@pytest.mark.parametrize("reward, error, words", [
    (math.nan, mt.BadInput, "reward at step 2"),
    (1e300, mt.BadInput, "reward at step 2"), (3e38, mt.Diverged, "advantage")])
def test_bad_reward_is_named_with_iteration_task_and_step(reward, error, words):
    """Of the second task in the second iteration."""
    tasks, done = np.array([[0.25], [-0.75]]), []
    family = toy_family(lambda t, task: reward if len(done) > 1 and t > 2
                        and task == -0.75 else 0.1 * t,
                        sample_tasks=lambda rng, M: tasks)
    config = tiny_config(meta_batch_size=2, horizon=4)
    with pytest.raises(error, match=rf"^iteration 1: .*-0\.75.*{words}"):
        mt.train_maml(config, family, report=done.append)


def test_gradient_or_action_that_is_not_finite_stops_in_its_iteration(monkeypatch):
    with pytest.raises(mt.Diverged, match="action at step 0"):      # θ's fault
        mt.evaluate(tiny_config(), math.nan * first_theta(tiny_config()))
    right, factors = mt.meta_gradient, iter([1, math.nan])
    monkeypatch.setattr(mt, "meta_gradient", lambda *args: right(*args) * next(factors))
    with pytest.raises(mt.Diverged, match="^iteration 1: the meta-gradient"):
        train_toy(toy_family())


def test_environments_own_error_keeps_its_traceback():
    with pytest.raises(KeyError, match="one's own"):
        train_toy(toy_family(raises=4))
    with pytest.raises(mt.BadInput, match="expected 5, got 4") as raised:
        train_toy(toy_family(results=4))
    assert isinstance(raised.value.__cause__, ValueError)


@pytest.mark.parametrize("method", ["maml", "oracle"])
@pytest.mark.parametrize("words, changes", [
    ("VectorEnv of 2", dict(make_envs=lambda K: mt.Point2D(3))),
    ("one environment twice",
     dict(make_envs=lambda K: SyncVectorEnv([functools.cache(OnePoint)] * K))),
    ("rows of numbers", dict(sample_tasks=lambda rng, M: rng.uniform(size=M))),
    ("rows of numbers", dict(test_tasks=lambda n: np.zeros(n))),
    ("horizon is 9, the settings' 4", dict(horizon=9)),
    ("what Gymnasium says", dict(reset="old")),
    ("what Gymnasium says", dict(reward=lambda t, task: "much")),
    ("one row of numbers", dict(S=gym.spaces.Box(0, 1, (2, 2)))),
    ("one row of numbers", dict(A=gym.spaces.Box(0, 1, (0,)))),
    ("one row of numbers", dict(A=gym.spaces.Discrete(3)))])
def test_family_that_breaks_its_promises_is_refused_in_one_sentence(
        words, changes, method):
    with pytest.raises(mt.BadInput, match=f"^toy: .*{words}") as raised:
        train_toy(toy_family(**changes), method=method)
    assert "\n" not in str(raised.value)


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


def python_example(file, heading):
    """The first Python block after a heading, without the indent of a list."""
    section = (HERE / file).read_text(encoding="utf-8").split(f"{heading}\n")[1]
    return textwrap.dedent(section.split("```python\n")[1].split("```")[0])


def test_own_environment_of_the_notes_runs(tmp_path, monkeypatch):
    """The example as it stands, with two iterations in place of twenty."""
    monkeypatch.chdir(tmp_path)
    example = python_example("notes.md", "Your own environment")
    assert "iterations=20" in example
    scope: dict = {}
    few = "iterations=2, eval_tasks=5, eval_episodes=4"
    exec(example.replace("iterations=20", few), scope)
    theta = scope["theta"]
    returns = mt.evaluate(scope["config"], theta, scope["family"])
    assert returns.shape == (5, 4) and -20 < returns.mean() < 0
    with pytest.raises(mt.BadInput, match="another task"):
        mt.evaluate(mt.Config(), theta)                       # θ is not point2d's


def test_python_example_of_the_readme_runs(capsys):
    """As it stands, with less training and fewer tasks."""
    example = python_example("README.md", "## More")
    assert "iterations=5" in example and "eval_tasks=10" in example
    few = "iterations=1, rollouts=2, meta_batch_size=2, curvature_tasks=1"
    exec(example.replace("iterations=5", few).replace("tasks=10", "tasks=2"), {})
    assert len(capsys.readouterr().out.split()) >= 4              # after 0 to 3 steps


@text
def test_every_relative_link_leads_to_a_file():
    for file in (*HERE.glob("*.md"), *HERE.glob("*/*.md")):
        written = file.read_text(encoding="utf-8")
        for link in re.findall(r"\]\(([^)#\s]+)|src=\"([^\"]+)\"", written):
            target = "".join(link)
            assert "://" in target or (file.parent / target).exists(), (file, target)


# %% Long tests

@slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_main_job_reaches_its_returns(seed):
    """The defaults, at 0/1/2/3 steps on the paper's 40 goals."""
    config = mt.Config(task="point2d", seed=seed)
    theta, _ = mt.train_maml(config)
    returns = mt.evaluate(config, theta).mean(axis=0)
    assert (returns >= [-41.5, -12.5, -5.0, -5.0]).all(), returns
