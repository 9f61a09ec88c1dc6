"""The exercises: maml_trpo.py with holes, and graders that say what was done instead.

    python classroom/exercises.py list                     the exercises
    python classroom/exercises.py make  all|ex5 FILE       write a file to fill in
    python classroom/exercises.py check all|ex5 FILE|DIR   grade a file, or a class
    python classroom/exercises.py bugs                     bugs to find, by symptom
    python classroom/exercises.py bug   N FILE             write a file with bug N
    python classroom/exercises.py key   N                  the answer: where bug N is

A grader calls the student's function on seeded random inputs and compares the result
with an oracle: loops, closed forms, torch.distributions, dense matrices, differences in
float64. It never takes the right answer from maml_trpo.py. Of a wrong answer it asks
which known mistake (mistakes.py) gives the same one, and then what was done to the
right answer. The text to read is exercises.md, and for teachers teaching.md.
"""
import argparse
import ast
import contextlib
import copy
import csv
import functools
import inspect
import json
import multiprocessing
import os
import re
import signal
import sys
import time
import traceback
from pathlib import Path
from types import ModuleType, SimpleNamespace

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Independent, Normal, kl_divergence

import maml_trpo as mt
import mistakes

SOURCE = Path(mt.__file__).read_text(encoding="utf-8")

# %% 1. What a grader can say

class Wrong(Exception):
    """What is wrong, in a sentence."""


def tensors_in(value, path: str):
    """Every tensor inside an argument: (where, tensor)."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from tensors_in(item, f"{path}[{i}]")
    elif isinstance(value, (mt.Trajectories, mt.TaskData)):
        for name, item in vars(value).items():
            yield from tensors_in(item, f"{path}.{name}")


AUTOGRAD = {         # a part of its words, and what they mean here
    "does not require grad": "There is no graph to differentiate. Either θ requires no "
    "gradient in this call (so it is when episodes are played and in the line search, "
    "and then create_graph must be False), or the code stands inside torch.no_grad(), "
    "or create_graph=True is missing",
    "a second time": "A graph is freed by its first backward pass. retain_graph=True "
    "keeps it: several products share one graph",
    "NoneType": "backward() fills the .grad of leaves only, and a tensor that was "
    "computed, as θ′ is after one step, is no leaf and has no .grad. Use "
    "torch.autograd.grad(loss, θ), which returns the gradient of any tensor"}


def describe(error: BaseException, file: str) -> str:
    """An exception in a sentence, with the last line of the file that it passed."""
    text, line = (str(error).strip().splitlines() or [""])[0][:200], ""
    for frame in traceback.extract_tb(error.__traceback__):
        if frame.filename == file:
            line = f" (line {frame.lineno}: {frame.line})"
    return f"raises {type(error).__name__}: {text}{line}"


def call(function, *args):
    """function(*args); whatever goes wrong in it becomes a Wrong."""
    name = getattr(function, "__name__", "it")
    code = getattr(function, "__code__", call.__code__)
    names = [*inspect.signature(function).parameters, *["argument"] * 9]
    before = [(where, x, x.detach().clone()) for argument, value in zip(names, args)
              for where, x in tensors_in(value, argument)]
    try:
        result = function(*args)
    except BaseException as error:
        if isinstance(error, NotImplementedError) and str(error).startswith("ex"):
            raise NotImplementedError(f"{name} is not written yet") from None
        hints = [hint for words, hint in AUTOGRAD.items() if words in str(error) and (
            words != "NoneType" or "backward" in code.co_names)]
        raise Wrong(". ".join([f"{name} {describe(error, code.co_filename)}", *hints])
                    ) from None
    for where, x, old in before:
        if not torch.equal(x, old):
            x.data.copy_(old)
            raise Wrong(f"{name} changes its argument {where} in place: the caller "
                        f"still needs the old one, so compute a new tensor")
    if result is None:
        raise Wrong(f"{name} returns None: is a `return` missing?")
    return result


def several(count: int, function, *args) -> tuple:
    """The results of a function that has more than one."""
    results = call(function, *args)
    if not isinstance(results, (tuple, list)) or len(results) != count:
        kind = type(results).__name__
        raise Wrong(f"{function.__name__} returns a {kind}, where {count} results are "
                    f"wanted, as in `return a, b`")
    return results


class Asked:
    """A function that the student's function calls; it keeps what it was asked."""

    def __init__(self, function):
        self.function, self.points, self.graph = function, [], True

    def __call__(self, x: Tensor):
        self.points.append(x.detach().clone())
        self.graph &= torch.is_grad_enabled()
        return self.function(x)

    def check(self, what: str, name: str, most: int) -> None:
        """Wrong if it was called too often, or where it cannot take a gradient."""
        if not self.graph:
            raise Wrong(f"{what}: the numbers are right, but {name} is called inside "
                        f"torch.no_grad(), and it takes a gradient itself")
        if len(self.points) > most:
            raise Wrong(f"{what}: the numbers are right, but it calls {name} "
                        f"{len(self.points)} times, where {most} will do")


def gradient_of(what: str, output, theta: Tensor) -> Tensor:
    """∂output/∂θ of something the student's function returned."""
    grad = torch.autograd.grad(output, theta, allow_unused=True, create_graph=True)[0] \
        if output.requires_grad else None
    if grad is None:
        raise Wrong(f"{what}: the value is right, but no gradient can reach θ: is "
                    f"there a detach, no_grad, item, numpy or copy on the way?")
    return grad


def close(a: Tensor | None, b: Tensor) -> bool:
    return a is not None and a.shape == b.shape and bool(
        (a - b).abs().max() <= 1e-6 * (1e-2 + b.abs().max()))


def check_kind(what: str, got, right: Tensor) -> None:
    """Wrong unless it is a tensor of finite numbers of the right dtype."""
    if not isinstance(got, Tensor):
        raise Wrong(f"{what} is a {type(got).__name__}, not a torch.Tensor")
    if got.dtype != right.dtype:
        raise Wrong(f"{what} has dtype {got.dtype}: {right.dtype} is right here")
    if not torch.isfinite(got).all():
        raise Wrong(f"{what} has NaN or infinity in it: {got.flatten()[:3].tolist()} …")


def likenesses(got: Tensor, right: Tensor):
    """(words, the right answer with that done to it), to compare `got` with."""
    yield "with the sign flipped", -right
    yield "twice", 2 * right
    yield "halved", right / 2
    if right.dim() == 2:
        yield "with its two axes exchanged", right.T
    if got.shape != right.shape:
        return
    for axis, size in enumerate(right.shape):
        yield f"in reverse order along axis {axis}", right.flip(axis)
        for shift, edge, way in ((1, 0, "late"), (-1, -1, "early")):
            shifted = right.roll(shift, axis)
            shifted.select(axis, edge).copy_(got.select(axis, edge))
            if size > 2:
                yield f"one place too {way} along axis {axis}", shifted
    if right.numel() > 2:
        factor = float((got * right).sum() / (right * right).sum())
        yield f"times {factor:.6g}", factor * right


def explain(what: str, got: Tensor, right: Tensor, others: list) -> None:
    """Raise Wrong with what can be said of an answer that no known mistake gives."""
    if got.shape == right.shape and not got.any():
        raise Wrong(f"{what} is 0 throughout")
    for words, like in likenesses(got, right):
        if close(got, like):
            raise Wrong(f"{what}: this equals the right answer {words}")
    for other, like in others:
        if close(got, like):
            raise Wrong(f"{what}: this equals the right answer to another question, "
                        f"{other}")
    if got.shape != right.shape:
        raise Wrong(f"{what} has shape {tuple(got.shape)}: {tuple(right.shape)} is "
                    f"right")
    wrong = (got - right).abs() > 1e-6 * (1e-2 + right.abs().max())
    at = np.unravel_index(int((got - right).abs().argmax()), tuple(got.shape))
    where = f", at index {[int(i) for i in at]}" if at else ""
    raise Wrong(f"{what} is wrong in {int(wrong.sum())} of {wrong.numel()} numbers: "
                f"{float(got[at]):.6g} where {float(right[at]):.6g} is right{where}")


def judge(check, functions: list[str], subject) -> None:
    """Run a grader: a generator of (what, what the function gave, what is right)."""
    for i, (what, got, right) in enumerate(check(subject)):
        right = right.detach()
        check_kind(what, got, right)
        if not close(got, right):
            for mistake in mistakes.MISTAKES:
                if mistake.function in functions:
                    at, wrong = first_wrong(mistake, check)
                    if at == i and close(wrong, got.detach()):
                        raise Wrong(f"{what}: this equals the right answer "
                                    f"{mistake.words}")
            reference = getattr(mt, functions[0].split(".")[0])
            explain(what, got.detach(), right,
                    [(what, right) for what, _, right in check(reference)])


@functools.cache
def first_wrong(mistake, check) -> tuple[int, Tensor | None]:
    """Which of the grader's quantities this mistake makes wrong first, and to what."""
    try:
        for i, (_, got, right) in enumerate(check(mistaken(mistake))):
            if not close(got, right):
                return i, got.detach()
    except Exception:                            # it fails in another way
        pass
    return -1, None


@functools.cache
def mistaken(mistake):
    """The reference's function, or class, with this mistake."""
    head, names = mistake.function.split(".")[0], dict(vars(mt))
    node = mistakes.parts(SOURCE)[head]
    first = min([node, *getattr(node, "decorator_list", [])], key=lambda x: x.lineno)
    text = "\n".join(SOURCE.splitlines()[first.lineno - 1:node.end_lineno]) + "\n"
    exec("from __future__ import annotations\n" + mistake.applied_to(text), names)
    return names[head]


# %% 2. Inputs and oracles

def normals(seed: int):
    """A function of sizes → that many normal numbers, float64."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


def jacobian(function, theta: Tensor, step: float = 1e-4) -> Tensor:
    """d function/dθ by central differences: (..., P)."""
    return torch.stack([
        (function(theta + e) - function(theta - e)).detach() / (2 * step)
        for e in step * torch.eye(len(theta)).double()], dim=-1)


@functools.cache
class Case:
    """A small tanh policy, θ_old, another θ, and a task's data with two inner steps."""

    def __init__(self, seed: int):
        self.shape = K, H, S, A = [(4, 5, 3, 2), (5, 7, 2, 3)][seed]
        self.alpha, randn = 0.3, normals(seed)
        self.policy = mt.GaussianPolicy(S, A, (4,), "tanh")
        self.theta_old = 0.5 * randn(self.policy.num_params)
        self.theta = self.theta_old + 0.2 * randn(len(self.theta_old))
        self.u = randn(len(self.theta))
        ends = torch.tensor([H, *range(2, K + 1)])           # all but the first: early
        self.keep = torch.arange(H) < ends[:, None]
        self.mask = self.keep.double()
        self.first, self.second, self.outer = (self.episodes(randn) for _ in range(3))
        self.inner = [self.first, self.second]
        old = self.policy.distribution(self.adapted(self.theta_old), self.outer.obs)
        self.data = mt.TaskData(self.inner, self.outer, old)

    def episodes(self, randn) -> mt.Trajectories:
        (K, H, S, A), mask = self.shape, self.mask[..., None]
        obs, act, rew, adv = (randn(K, H, n) * mask for n in (S, A, 1, 1))
        return mt.Trajectories(obs, act, rew[..., 0], self.mask, adv[..., 0])

    def pi(self, theta: Tensor, obs: Tensor) -> Independent:
        """π_θ as torch's own distribution."""
        ours = self.policy.distribution(theta, obs)
        return Independent(Normal(ours.mean, ours.log_std.exp()), 1)

    def loss(self, theta: Tensor, data, ratio_to: Tensor | None = None) -> Tensor:
        """The inner loss; with `ratio_to` = θ₀, π_θ/π_θ₀ in place of log π."""
        score = self.pi(theta, data.obs).log_prob(data.act)
        if ratio_to is not None:
            score = (score - self.pi(ratio_to, data.obs).log_prob(data.act)).exp()
        return -(score * data.adv)[self.keep].mean()

    def gradient(self, theta: Tensor, data, ratio_to: Tensor | None = None) -> Tensor:
        theta = theta.detach().clone().requires_grad_()
        return torch.autograd.grad(self.loss(theta, data, ratio_to), theta)[0]

    def adapted(self, theta: Tensor) -> Tensor:
        """θ′, without a graph."""
        for data in self.inner:
            theta = theta.detach() - self.alpha * self.gradient(theta, data)
        return theta

    def fisher(self, at: Tensor) -> Tensor:
        """F = GᵀWG, from the derivatives of the means and of σ, number by number."""
        def outputs(theta):                      # (steps, 2A)
            pi = self.pi(theta, self.outer.obs)
            return torch.cat([pi.mean, pi.stddev], -1)[self.keep]
        G, std = jacobian(outputs, at), outputs(at)[0, self.shape[-1]:]
        M = torch.cat([std**-2, 2 * std**-2])
        return torch.einsum("nap,a,naq->pq", G, M, G) / len(G)


@functools.cache
def dense(seed: int) -> SimpleNamespace:
    """What takes long: J, its like for the ratio loss, and the Fisher matrix at θ′."""
    c = Case(seed)
    between = c.theta_old - c.alpha * c.gradient(c.theta_old, c.first)

    def factor(theta: Tensor, data, ratio_to: Tensor | None = None) -> Tensor:
        hessian = jacobian(lambda t: c.gradient(t, data, ratio_to), theta)
        return torch.eye(len(theta)).double() - c.alpha * hessian          # I − α∇²L
    return SimpleNamespace(
        J=factor(between, c.second) @ factor(c.theta_old, c.first),
        J_ratio=factor(between, c.second, between)
        @ factor(c.theta_old, c.first, c.theta_old), F=c.fisher(c.adapted(c.theta_old)))


# %% 3. The graders, one for each function: (what, what it gave, what is right)

def check_returns(discounted_returns):
    for seed, gamma in enumerate((0.8, 0.6)):
        rew = Case(seed).outer.rew
        t = torch.arange(rew.shape[1]).double()
        ahead = t[None, :] - t[:, None]          # row t, column t′: t′ − t
        right = rew @ ((ahead >= 0) * gamma**ahead).T
        yield "discounted_returns", call(discounted_returns, rew, gamma), right


def check_gae(gae):
    for seed, gamma, lam in ((0, 0.9, 0.7), (1, 0.8, 0.6)):
        c = Case(seed)
        rew, mask, values = c.outer.rew, c.mask, normals(7)(*c.mask.shape)
        right = torch.zeros_like(rew)
        for k, n in enumerate(mask.sum(1).int().tolist()):
            v = [*values[k, :n].tolist(), 0.0]
            delta = [float(rew[k, t]) + gamma * v[t + 1] - v[t] for t in range(n)]
            for t in range(n):
                right[k, t] = sum((gamma * lam)**i * x for i, x in enumerate(delta[t:]))
        yield "gae", call(gae, rew, values, mask, gamma, lam), right


def check_log_prob(gaussian_class):
    for c in map(Case, range(2)):
        pi, act = c.policy.distribution(c.theta, c.outer.obs), c.outer.act
        mean, log_std = (x.clone().requires_grad_() for x in (pi.mean, pi.log_std))
        got = call(gaussian_class(mean, log_std).log_prob, act)
        log_prob = Normal(mean, log_std.exp()).log_prob(act).sum(-1)
        yield "log_prob", got, log_prob
        for x, name in ((mean, "μ"), (log_std, "log σ")):
            yield (f"log_prob: the value is right; its gradient by {name}",
                   gradient_of("log_prob", got.sum(), x),
                   torch.autograd.grad(log_prob.sum(), x, retain_graph=True)[0])


def check_kl(kl_old_new):
    for c in map(Case, range(2)):
        theta = c.theta.clone().requires_grad_()
        old, new = (c.policy.distribution(t, c.outer.obs) for t in (c.theta_old, theta))
        right = kl_divergence(*(Normal(p.mean, p.log_std.exp())
                                for p in (old, new))).sum(-1)
        got = call(kl_old_new, old, new)
        yield "kl_old_new", got, right
        yield ("kl_old_new: the value is right; its gradient by the new θ",
               gradient_of("kl_old_new", got.sum(), theta),
               torch.autograd.grad(right.sum(), theta)[0])


def check_inner_loss(inner_loss, estimator=""):
    for c in map(Case, range(2)):
        theta = c.theta.clone().requires_grad_()
        what = f"inner_loss{estimator and ' with the ratio'}"
        right = c.loss(theta, c.first, c.theta if estimator else None)
        got = call(inner_loss, c.policy, theta, c.first, *filter(None, [estimator]))
        yield what, got, right
        grad = gradient_of(what, got, theta)
        slope = torch.autograd.grad(right, theta, create_graph=True)[0]
        yield f"{what}: the value is right; its gradient by θ", grad, slope
        hvp = gradient_of(what, grad @ c.u, theta) if grad.requires_grad else 0 * c.u
        yield (f"{what}: value and gradient are right; its Hessian times v", hvp,
               torch.autograd.grad(slope @ c.u, theta)[0])


def check_adapt(adapt):
    for seed in range(2):
        c, d = Case(seed), dense(seed)
        right, one = c.adapted(c.theta_old), torch.eye(len(c.u)).double()
        for second, estimator, J in (
                (True, "log-prob", d.J), (True, "ratio", d.J_ratio),
                (False, "log-prob", one)):
            what = f"adapt (create_graph={second}, estimator={estimator!r})"
            theta = c.theta_old.clone().requires_grad_()
            got = call(adapt, c.policy, theta, c.inner, c.alpha, second, estimator)
            yield what, got, right
            yield (f"{what}: θ′ is right; its derivative Jᵀu",
                   gradient_of(what, got @ c.u, theta), c.u @ J)
        got = call(adapt, c.policy, c.theta_old, c.inner, c.alpha, False)
        yield "adapt (θ does not require grad)", got, right
        if got.requires_grad:
            raise Wrong("adapt (θ does not require grad): θ′ is right, but it still "
                        "has a graph; of a θ without one it must be plain numbers")


def check_surrogate(surrogate_and_kl):
    for seed in range(2):
        c, d = Case(seed), dense(seed)
        there = c.adapted(c.theta)               # `old` is not the policy of θ_old
        old = c.pi(there, c.outer.obs)
        data = mt.TaskData(c.inner, c.outer, c.policy.distribution(there, c.outer.obs))

        def values(phi):                         # surrogate and KL of the policy π_φ
            new = c.pi(phi, c.outer.obs)
            ratio = (new.log_prob(c.outer.act) - old.log_prob(c.outer.act)).exp()
            kl = kl_divergence(old.base_dist, new.base_dist).sum(-1)
            surrogate = -(ratio * c.outer.adv)[c.keep].mean()
            return torch.stack([surrogate, kl[c.keep].mean()])
        theta_prime, one = c.adapted(c.theta_old), torch.eye(len(c.u)).double()
        right, slope = values(theta_prime), jacobian(values, theta_prime)
        for first_order, estimator, J in (
                (False, "log-prob", d.J), (True, "log-prob", one),
                (False, "ratio", d.J_ratio), (False, "log-prob", None)):
            theta = c.theta_old.clone().requires_grad_(J is not None)
            got = several(2, surrogate_and_kl, c.policy, theta, data, c.alpha,
                          first_order, estimator)
            for i, name in enumerate(("surrogate", "KL")):
                what = (f"surrogate_and_kl (first_order={first_order}, "
                        f"estimator={estimator!r}): the {name}")
                yield what, got[i], right[i]
                if J is not None:
                    yield (f"{what} is right; its gradient by θ",
                           gradient_of(what, got[i], theta), slope[i] @ J)


def check_hvp(hessian_vector_product):
    what = "hessian_vector_product"
    for seed, P, step in ((0, 5, 0.02), (1, 8, 0.05)):
        randn, kept = normals(seed), []
        root, theta, v = randn(P, P), randn(P), 7 * randn(P)
        matrix, at, eps = root + root.T, theta.clone(), step / v.norm()

        def grad_k(t):                           # 0 at θ; its derivative there: matrix
            kept.append(torch.equal(theta, at))
            return matrix @ (t - at) + (t - at)**2 + (t - at)**3
        grad_fn = Asked(grad_k)
        got = call(hessian_vector_product, grad_fn, theta, v, step)
        if not all(kept):
            raise Wrong(f"{what} changes its argument theta in place, if only until it "
                        f"returns: compute a new tensor, grad_fn may look at θ, too")
        forward, backward = (grad_k(at + e * v) / e for e in (eps, -eps))
        yield what, got, backward if close(got, backward) else forward
        grad_fn.check(what, "grad_fn", 1)


def check_product(exact_product):
    name = exact_product.__name__
    for seed in range(2):
        c, d = Case(seed), dense(seed)
        product = call(exact_product, c.policy, c.theta_old, c.data, c.alpha)
        if not callable(product):
            raise Wrong(f"{name} returns a {type(product).__name__}, where a function "
                        f"v ↦ H·v is wanted")
        for n, v in enumerate((c.u, c.theta, c.u), 1):
            yield (f"{name}: its product number {n}", call(product, v),
                   d.J.T @ d.F @ d.J @ v)


def check_conjugate_gradient(conjugate_gradient):
    for seed, P in enumerate((5, 8)):
        randn = normals(seed)
        root, b = randn(P, P) / P**0.5, randn(P)
        H = root @ root.T + torch.eye(P).double()

        def krylov(n):                           # the best x within b, Hb, …, Hⁿ⁻¹b
            powers = [torch.linalg.matrix_power(H, i) @ b for i in range(n)]
            Q = torch.linalg.qr(torch.stack(powers, dim=1))[0]
            return Q @ torch.linalg.solve(Q.T @ H @ Q, Q.T @ b)
        for n in (1, 3, P):
            what = f"conjugate_gradient ({n} iteration{'s' * (n > 1)})"
            hvp = Asked(lambda p: H @ p)
            x, r = several(2, conjugate_gradient, hvp, b, n, 0.0)
            yield f"{what}: x", x, krylov(n)
            yield f"{what}: r", r, b - H @ krylov(n)
            hvp.check(what, "hvp", n)
        one, two, three = ((b - H @ krylov(n)).square().sum() for n in (1, 2, 3))
        stop = float((two * three)**0.5 / (one * two)**0.5)  # r·r passes it after two
        tiny = float((stop / (one * two)**0.5)**0.5)         # iterations, ‖r‖ after 3
        ones, bent = torch.ones(P).double(), torch.ones(P).double()
        ones[1], bent[1] = 1.2, -1.0                 # pᵀHp > 0 at first, then not
        for why, hvp, b_, tolerance, right in (
                ("r·r < tolerance", lambda p: H @ p, b * tiny, stop, krylov(2) * tiny),
                ("b = 0", lambda p: H @ p, 0 * b, 1e-10, 0 * b),
                ("pᵀHp not positive", lambda p: bent * p, ones, 0.0,
                 ones * (ones @ ones) / (ones @ (bent * ones))),
                ("H·p = NaN", lambda p: p * np.nan, b, 0.0, 0 * b)):
            x, _ = several(2, conjugate_gradient, hvp, b_, P, tolerance)
            yield f"conjugate_gradient, stopped by {why}: x", x, right


def check_scale(scale):
    for xHx, d in ((0.3, 0.01), (7.0, 0.05)):
        right = torch.tensor((2 * d / xHx)**0.5)
        yield "step_scale", torch.tensor(float(call(scale, xHx, d))), right


SEARCHES = (     # what is tested; surrogate (before: −1), KL (δ: 0.01) of trials 0 to 4
    ("the KL is too large at first", [-5, -4, -3, -2, 0], [.1, .0101, .009, .008, 0],
     2),
    ("the KL is δ itself", [-3, -2, -2, -2, -2], [.01, .009, .008, .007, .006], 0),
    ("the surrogate does not fall at first", [9, -1, -2, -3, -4], [.001] * 5, 2),
    ("the surrogate falls a little", [-1.00002, -2, -2, -2, -2], [.001] * 5, 0),
    ("only the last trial passes", [-5, -4, -3, -2, -2], [.1, .05, .04, .02, .005], 4),
    ("no trial has both", [-5, -4, -3, 2, 3], [.09, .08, .07, .001, .001], None),
    ("surrogate, then KL is NaN", [np.nan, -3, -2, -2, -2], [.001, np.nan, *[.001] * 3],
     2))


def check_line_search(search):
    randn, ratio, n, before, max_kl = normals(0), 0.6, 5, -1.0, 0.01
    theta, step = randn(7), randn(7)
    points = [theta + ratio**j * step for j in range(n)]
    for why, loss, kl, right in SEARCHES:
        what = f"backtrack_line_search, where {why}"
        evaluate = Asked(lambda t: next(((loss[j], kl[j]) for j in range(
            n) if torch.allclose(t, points[j])), (5.0, 1.0)))
        got = several(4, search, evaluate, theta, step, before, max_kl, ratio, n)
        tried = evaluate.points or [None]
        yield f"{what}: the first θ it tries", tried[0], points[0]
        yield f"{what}: θ", got[0], theta if right is None else points[right]
        good = (before, 0, 0) if right is None else (loss[right], kl[right], right + 1)
        yield (f"{what}: surrogate, KL, trials",
               *(torch.tensor([float(x) for x in row]) for row in (got[1:], good)))
        evaluate.check(what, "evaluate", n if right is None else right + 1)


def phi(obs: Tensor) -> Tensor:
    """The baseline's features, number by number: (K, H, 2S+4)."""
    rows = [[*x, *(a * a for a in x), t / 100, (t / 100)**2, (t / 100)**3, 1.0]
            for episode in obs.double().clip(-10, 10).tolist()
            for t, x in enumerate(episode)]
    return torch.tensor(rows).double().reshape(*obs.shape[:2], -1)


def check_baseline(baseline_class):
    for seed in range(2):
        data, baseline = copy.deepcopy(Case(seed).outer), baseline_class()
        data.obs[0, 0, 0], data.obs[0, 1, 1] = 25.0, -31.0   # beyond the clip
        keep, x = data.mask.bool(), phi(data.obs)
        y = (normals(7)(*data.rew.shape) + 3) * data.mask
        obs = data.obs.float()
        yield "features", call(baseline.features, obs), phi(obs)
        got = call(baseline.fit, data.obs, y, data.mask)
        if got is not baseline:
            raise Wrong("fit must return self: fit(…).predict(…) is how it is called")
        rows = torch.cat([x[keep], 1e-5**0.5 * torch.eye(x.shape[-1])])  # ridge as data
        weights = torch.linalg.lstsq(rows, torch.cat([y[keep], 0 * x[0, 0]])[:, None])
        yield "fit: the weights", baseline.weights, weights.solution[:, 0]
        baseline.weights = normals(7)(x.shape[-1])
        for obs in (data.obs, data.obs.float()):
            right = (phi(obs) * baseline.weights).sum(-1).to(obs.dtype)
            yield "predict", call(baseline.predict, obs), right


# %% 4. The list: the title, and the grader of each function (or of some of a class)

EXERCISES = {
    "ex1": ("returns and advantages", [
        (check_returns, ["discounted_returns"]), (check_gae, ["gae"])]),
    "ex2": ("log-probability and KL", [
        (check_log_prob, ["DiagonalGaussian.log_prob"]), (check_kl, ["kl_old_new"])]),
    "ex3": ("the inner step with its graph", [
        (check_inner_loss, ["inner_loss"]), (check_adapt, ["adapt"])]),
    "ex4": ("the surrogate, the KL, their gradients", [
        (check_surrogate, ["surrogate_and_kl"])]),
    "ex5": ("H·v by finite differences", [(check_hvp, ["hessian_vector_product"])]),
    "ex6": ("H·v exactly, in two ways", [
        (check_product, ["double_backprop_product"]),
        (check_product, ["gauss_newton_product"])]),
    "ex7": ("conjugate gradient", [(check_conjugate_gradient, ["conjugate_gradient"])]),
    "ex8": ("the step's scale and the line search", [
        (check_scale, ["step_scale"]), (check_line_search, ["backtrack_line_search"])]),
    "ex9": ("the linear baseline", [(check_baseline, [
        "LinearBaseline.features", "LinearBaseline.fit", "LinearBaseline.predict"])]),
    "ex10": ("the ratio inner loss (LVC)", [
        (functools.partial(check_inner_loss, estimator="ratio"), ["inner_loss"])]),
}
ALL = (*EXERCISES, "whole")


def functions_of(exercise: str) -> list[str]:
    return sum((functions for _, functions in EXERCISES[exercise][1]), [])


# %% 5. Grading a file in this process

def load(path) -> ModuleType:
    """The student's file as a module; Wrong if it cannot be imported."""
    module = ModuleType("student")
    sys.modules["student"] = module              # dataclasses look there
    try:
        exec(compile(Path(path).read_bytes(), str(path), "exec"), vars(module))
    except BaseException as error:
        raise Wrong(f"the file cannot be imported: it {describe(error, str(path))}"
                    ) from None
    return module


def grade_function(path, functions: list[str], check) -> tuple[str, str]:
    """A function, or the methods of a class; all that they call is the reference's."""
    name, head = functions[0].split(".")[-1], functions[0].split(".")[0]
    try:
        student = vars(load(path))
        if head not in student:
            raise Wrong(f"there is no {head} in the file")
        student |= {key: value for key, value in vars(mt).items() if key != head
                    and getattr(value, "__module__", "") == mt.__name__}
        judge(check, functions, student[head])
        return "pass", f"{name} is right"
    except NotImplementedError as error:
        return "not written", str(error)
    except Wrong as error:
        return "FAIL", str(error)
    except Exception as error:                   # the grader's own arithmetic
        return "FAIL", (f"{name} returns what cannot be used ({type(error).__name__}: "
                        f"{str(error)[:100]})")


def grade(path, exercise: str) -> tuple[str, str]:
    """("pass", "FAIL" or "not written", what there is to say), in this process."""
    verdicts = [whole(path)] if exercise == "whole" else [
        grade_function(path, functions, check)
        for check, functions in EXERCISES[exercise][1]]
    status = min(verdict for verdict, _ in verdicts)         # FAIL < not written < pass
    return status, "\n".join(text for _, text in sorted(verdicts) if status != "pass")


@functools.cache
def whole_numbers(m) -> list[Tensor]:
    """What module `m` computes in a short training and an evaluation."""
    config = m.Config(iterations=2, meta_batch_size=2, rollouts=6, horizon=9, alpha=0.5,
                      inner_steps=2, gamma=0.9, lam=0.8, hidden=(5,), init_std=0.4,
                      activation="tanh", alpha_follows_std=True, curvature_tasks=1,
                      cg_iterations=3, damping=0.1,       # or else rounding is seen
                      hvp="gauss-newton", inner_loss="ratio",
                      eval_tasks=2, eval_episodes=3)
    theta, rows = m.train_maml(config)
    log = [[x for name, x in row.items() if "seconds" not in name] for row in rows]
    return [theta, torch.from_numpy(m.evaluate(config, theta)), torch.tensor(log)]


def whole(path) -> tuple[str, str]:
    """Does the whole file train as the reference does? No exercise shows that."""
    try:
        got = whole_numbers(load(path))
    except NotImplementedError:
        return "not written", ""
    except BaseException as error:
        return "FAIL", str(error) if isinstance(error, Wrong) else (
            f"a short training {describe(error, str(path))}")
    same = all(a.shape == b.shape and torch.allclose(a, b, rtol=1e-3, atol=1e-5)
               for a, b in zip(got, whole_numbers(mt)))
    return ("pass", "") if same else (
        "FAIL", "a short training gives other numbers than with the reference")


# %% 6. Grading in other processes, with a time limit

SECONDS = 10.0                         # for an exercise; most take less than one
STATUSES = ("not written", "FAIL", "pass")


def answer_and_end(answer, seconds: float, function, *args) -> None:
    """What the other process does. What the file prints goes nowhere."""
    getattr(os, "setsid", int)()       # then it can be ended with all it has started
    getattr(signal, "alarm", int)(int(seconds) + 5)      # if nobody is left to end it
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)
    torch.set_num_threads(1)
    answer.send(function(*args))
    os._exit(0)                                  # whatever threads were left running


def apart(seconds: float, function, *args):
    """function(*args) from a process of its own, or Wrong, whatever happens there."""
    processes = multiprocessing.get_context("fork" if hasattr(os, "fork") else "spawn")
    answer, theirs = processes.Pipe(duplex=False)
    child = processes.Process(target=answer_and_end,
                              args=(theirs, seconds, function, *args))
    child.start()
    theirs.close()
    end = time.monotonic() + seconds
    while not answer.poll(0.1) and child.is_alive() and time.monotonic() < end:
        pass
    try:
        if answer.poll():
            return answer.recv()
        raise Wrong(f"took longer than {seconds:g} seconds" if child.is_alive() else
                    "ended the process that graded it")
    except EOFError:
        raise Wrong("ended the process that graded it") from None
    finally:
        with contextlib.suppress(AttributeError, OSError):
            os.killpg(child.pid, signal.SIGKILL)
        child.kill()
        child.join()


def grade_file(path, names, seconds=SECONDS) -> dict[str, tuple[str, str]]:
    """Exercise → (status, what there is to say), whatever the file does."""
    results = {}
    for name in names:
        try:
            results[name] = apart(seconds, grade, str(path), name)
        except Wrong as error:
            results[name] = "FAIL", f"{name} {error}"
    return results


def grade_student(student: str, files: list[Path], pattern: str, names) -> dict:
    """One student's row: of several files the best result of each exercise counts."""
    ours = [file.read_bytes().split() for file in [
        *HERE.parent.glob("*.py"), *HERE.parent.glob("*/*.py")]]
    best, notes = {}, []
    for file in files:
        if not file.match(pattern) or file.read_bytes().split() in ours:
            notes.append(f"ignored: {file.name}")
            continue
        try:
            results = apart(len(names) * (SECONDS + 1), grade_file, file, names)
        except Wrong as error:
            results = dict.fromkeys(names, ("FAIL", ""))
            notes.append(f"{file.name} {error}")
        for name, result in results.items():
            best[name] = max(best.get(name, result), result,
                             key=lambda result: STATUSES.index(result[0]))
    statuses = {name: best[name][0] if best else "" for name in names}
    messages = [f"{name}: {message}" for name, (status, message) in best.items()
                if status == "FAIL" and message]
    passed = [*statuses.values()].count("pass") if best else "nothing graded"
    return dict(student=student, passed=passed, **statuses,
                messages=" | ".join(messages + notes).replace("\n", "; "))


# %% 7. The command line

USAGE = __doc__.split("\n\n")[1]
MARK = "# One bug is hidden in this file, number "


def stub(names) -> str:
    """maml_trpo.py without the bodies of these exercises' functions."""
    lines, nodes = SOURCE.splitlines(keepends=True), mistakes.parts(SOURCE)
    wanted = {function for ex in names for function in functions_of(ex)}
    for function in sorted(wanted, key=lambda f: -nodes[f].lineno):     # the last first
        doc, first = nodes[function].body[:2]
        asked = [ex for ex in names if function in functions_of(ex)]
        lines[doc.end_lineno:nodes[function].end_lineno] = [
            f'{" " * first.col_offset}raise NotImplementedError('
            f'"{" and ".join(asked)}: write {function}")\n']
    return "".join(lines)


def write(path, text: str) -> None:
    try:
        with open(path, "x", encoding="utf-8") as f:
            f.write(text)
    except OSError as error:
        raise Wrong(f"{path}: {error.strerror}: choose another name") from None


def bug_file(number: int) -> str:
    """The program with a bug; no comment's place tells that code before it changed."""
    text = mistakes.BUGS[number - 1].applied_to(SOURCE)
    return re.sub(r"(?<=\S) {2,}# ", "  # ", text) + f"\n{MARK}{number}\n"


def list_bugs() -> None:
    """The numbers of the bugs under their symptoms, the easy ones first."""
    for symptom, bugs in mistakes.SYMPTOMS.items():
        print(f"{symptom}\n    " + ", ".join(
            f"{mistakes.BUGS.index(bug) + 1} {stars}" for stars, bug in bugs))


def check_file(path: Path, names) -> int:
    """Grade one file and print what there is to say: → exit status."""
    results = grade_file(path, names)
    passed = sum(status == "pass" for status, _ in results.values())
    if names == ALL and MARK in path.read_text(encoding="utf-8", errors="replace"):
        seen = any(status != "pass" for name, (status, _) in results.items()
                   if name != "whole")
        print("The bug is mended." if passed == len(names) else
              "The bug is not mended yet. " + (
                  "`check ex1`, `check ex2` and so on say more." if seen else
                  "No exercise is about it, only a training shows it."))
        results = {}
    for name, (status, message) in results.items():
        title, _ = EXERCISES.get(name, ("the whole at work", []))
        print(f"{name:6} {title:38} {status}")
        if status != "not written" or names != ALL or "\n" in message:
            print("".join(f"       {line}\n" for line in message.splitlines()), end="")
    print(f"{passed} of {len(names)} passed")
    return int(passed < len(names))


def harmless(cell):
    """A spreadsheet takes what begins with one of these for a formula."""
    return f"'{cell}" if str(cell)[:1] in tuple("=+-@\t\r") else cell


def check_folder(folder: Path, names, pattern: str, as_json: bool) -> int:
    """Grade a class, one row a student, a file or a subfolder: → exit status."""
    students: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*")):
        first, *more = path.relative_to(folder).parts
        if path.is_file() and not re.search(r"(^|[/\\])(\.|__)", str(path.relative_to(
                folder))):
            students.setdefault(first if more else path.stem, []).append(path)
    table = csv.DictWriter(sys.stdout, ["student", "passed", *names, "messages"])
    if not as_json:
        table.writeheader()
    rows = []
    for number, (student, files) in enumerate(students.items(), 1):
        print(f"{number} of {len(students)}: {student}", file=sys.stderr, flush=True)
        rows.append(grade_student(student, files, pattern, names))
        if not as_json:
            table.writerow({key: harmless(cell) for key, cell in rows[-1].items()})
            sys.stdout.flush()
    if as_json:
        print(json.dumps(rows, ensure_ascii=False, indent=1))
    if all(row["passed"] == "nothing graded" for row in rows):
        raise Wrong(f"nothing was graded in {folder}: no file of a student's own is "
                    f"named {pattern}")
    return int(any(row["passed"] != len(names) for row in rows))


def command(words: list[str], pattern: str, as_json: bool) -> int:
    """Do what the words say: → exit status."""
    names, numbers = ["all", *EXERCISES], map(str, range(1, len(mistakes.BUGS) + 1))
    match words:
        case ["list"]:
            for name, (title, _) in EXERCISES.items():
                print(f"{name:5} {title:38} {', '.join(functions_of(name))}")
        case ["bugs"]:
            list_bugs()
        case ["key", number] if number in numbers:
            print(f"{number}: {mistakes.BUGS[int(number) - 1].name}")
        case ["make", which, path] if which in names:
            write(path, stub(EXERCISES if which == "all" else [which]))
            print(f"Then: python classroom/exercises.py check {which} {path}")
        case ["bug", number, path] if number in numbers:
            write(path, bug_file(int(number)))
            print(f"Find the bug, mend it, then: python classroom/exercises.py check "
                  f"all {path}")
        case ["check", which, path] if which in names:
            chosen = ALL if which == "all" else (which,)
            if Path(path).is_dir():
                return check_folder(Path(path), chosen, pattern, as_json)
            if not Path(path).exists():
                raise Wrong(f"there is no file {path}")
            return check_file(Path(path), chosen)
        case _:
            raise Wrong(f"{' '.join(words)!r} cannot be understood; there are\n{USAGE}")
    return 0


def main(argv: list[str]) -> int:
    """→ 0 passed or done, 1 failed, 2 bad usage or nothing graded."""
    for stream in (sys.stdout, sys.stderr):      # a terminal that cannot show θ gets ?
        getattr(stream, "reconfigure", dict)(errors="replace")
    parser = argparse.ArgumentParser(
        prog="exercises.py", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*")
    parser.add_argument("--pattern", default="*.py", metavar="GLOB",
                        help="of a folder, grade the files with such names only")
    parser.add_argument("--json", action="store_true", help="of a folder, no CSV")
    options = parser.parse_args(argv)
    try:
        return command(options.words, options.pattern, options.json)
    except Wrong as error:
        print(f"exercises.py: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
