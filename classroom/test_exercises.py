"""Tests of the graders, of the exercises' command line, and of the mutation run."""
import csv
import io
import json
import re
import textwrap
import warnings

import pytest

import exercises as ex
import mistakes

with warnings.catch_warnings():                  # there is no pytest.ini to name it in
    warnings.simplefilter("ignore", pytest.PytestUnknownMarkWarning)
    text = pytest.mark.text       # reads text, runs nothing: catches no mutation
pytestmark = pytest.mark.filterwarnings("ignore")
ex.torch.set_num_threads(1)
EVERY = list(dict.fromkeys(f for e in ex.EXERCISES for f in ex.functions_of(e)))
GRADED = [m for m in mistakes.MISTAKES if m.function in EVERY]


def filled_in(path, **bodies: str):
    """A student's file: these bodies, and stubs for all other functions."""
    stub = ex.stub(ex.EXERCISES)
    for name in EVERY:
        if body := bodies.get(name.split(".")[-1]):
            stub = re.sub(rf'( *)raise NotImplementedError\(".*write {name}"\)',
                          lambda hole: textwrap.indent(body, hole[1]), stub)
    path.write_text(stub, encoding="utf-8")
    return path


def said_of(function: str, subject) -> list[str]:
    """What the graders of this function say of `subject`."""
    said = []
    for _, graders in ex.EXERCISES.values():
        for check, functions in graders:
            try:
                if function in functions:
                    ex.judge(check, functions, subject)
            except ex.Wrong as error:
                said.append(str(error))
    return said


@pytest.mark.parametrize("name", ex.ALL)
def test_the_reference_passes_every_grader(name):
    assert ex.grade(ex.mt.__file__, name) == ("pass", "")


RIGHT = {     # the same functions written in other ways
    "discounted_returns": """R, out = torch.zeros(len(rew), dtype=rew.dtype), []
for r in rew.T.flip(0):
    R = r + gamma * R
    out.insert(0, R)
return torch.stack(out, 1)""",
    "gae": """out, last, after = torch.zeros_like(rew), 0, 0
for t in reversed(range(rew.shape[1])):
    delta = rew[:, t] + gamma * after - values[:, t]
    last = (delta + gamma * lam * last) * mask[:, t]
    after = values[:, t] * mask[:, t]
    out[:, t] = last
return out""",
    "log_prob": """from torch.distributions import Normal
return Normal(self.mean, self.log_std.exp()).log_prob(act).sum(-1)""",
    "kl_old_new": """from torch.distributions import Normal, kl_divergence
old, new = (Normal(p.mean, p.log_std.exp()) for p in (old, new))
return kl_divergence(old, new).sum(-1)""",
    "inner_loss": """log_prob = policy.distribution(theta, trajectories.obs).log_prob(
    trajectories.act)[trajectories.mask > 0]
if estimator == "ratio":
    log_prob = log_prob.exp() / log_prob.exp().detach()
return -(log_prob * trajectories.adv[trajectories.mask > 0]).mean()""",
    "adapt": """for data in inner_data:
    if not theta.requires_grad:
        create_graph = False
    at = theta if theta.requires_grad else theta.clone().requires_grad_()
    loss = inner_loss(policy, at, data, estimator)
    step = torch.autograd.grad(loss, at, create_graph=create_graph)[0]
    theta = theta - alpha * step
return theta""",
    "surrogate_and_kl": """graph = theta.requires_grad and not first_order
phi = adapt(policy, theta, task_data.inner, alpha, graph, estimator)
new, happened = policy.distribution(phi, task_data.outer.obs), task_data.outer.mask > 0
score = [p.log_prob(task_data.outer.act) for p in (new, task_data.old)]
gain = score[0].exp() / score[1].exp() * task_data.outer.adv
kl = kl_old_new(task_data.old, new)
return [-gain[happened].mean(), kl[happened].mean()]""",
    "hessian_vector_product": "e = -step / v.norm()\nreturn grad_fn(theta + e * v) / e",
    "double_backprop_product": """def k(t):
    return surrogate_and_kl(policy, t, task_data, alpha)[1]
return lambda v: torch.autograd.functional.hvp(k, theta, v)[1]""",
    "gauss_newton_product": """from functools import partial
return partial(lambda product, v: product(v), double_backprop_product(
    policy, theta, task_data, alpha))""",
    "conjugate_gradient": """x, r = 0 * b, b.clone()
p = r.clone()
for n in range(iterations):
    if r.dot(r) < tolerance:
        return x, r
    Hp = hvp(p)
    if torch.isnan(Hp).any() or p.dot(Hp) <= 0:
        return x, r
    old = r.dot(r)
    step = old / p.dot(Hp)
    x += step * p
    r -= step * Hp
    p = r + r.dot(r) / old * p
return x, r""",
    "step_scale": "return (0.5 * xHx / max_kl)**-0.5",
    "backtrack_line_search": """scale = 1.0
for j in range(1, trials + 1):
    loss, kl = evaluate(theta + scale * full_step)
    if not (math.isnan(loss) or math.isnan(kl)):
        if not (loss >= surrogate_before or kl > max_kl):
            return theta + scale * full_step, loss, kl, j
    scale *= ratio
return theta, surrogate_before, 0.0, 0""",
    "features": """x = torch.clip(obs.double(), -10, 10)
t = torch.ones(x.shape[:2]).double().cumsum(1)[:, :, None] - 1
parts = [x, x * x, *((t / 100)**n for n in (1, 2, 3)), t**0]
return torch.cat(parts, 2)""",
    "fit": """phi = self.features(obs) * mask[..., None]
phi, y = phi.flatten(0, 1), (returns * mask).double().flatten()
ridge = 1e-5 * torch.eye(phi.shape[1]).double()
self.weights = torch.linalg.inv(phi.T @ phi + ridge) @ (phi.T @ y)
return self""",
    "predict": "return (self.features(obs) * self.weights).sum(2).type(obs.dtype)"}


def test_right_answers_of_other_kinds_pass(tmp_path):
    assert {name.split(".")[-1] for name in EVERY} == set(RIGHT)
    path = filled_in(tmp_path / "student.py", **RIGHT)
    assert {name: ex.grade(path, name) for name in ex.ALL} == dict.fromkeys(
        ex.ALL, ("pass", ""))


@pytest.mark.parametrize("mistake", GRADED, ids=lambda m: m.name)
def test_grader_sees_each_mistake_and_says_its_words(mistake):
    said = said_of(mistake.function, ex.mistaken(mistake))
    assert any(mistake.words in message for message in said)


@pytest.mark.parametrize("words, change", {
    "with the sign flipped": lambda x: -x, "halved": lambda x: x / 2,
    "twice": lambda x: x + x, "times 3": lambda x: 3 * x,
    "is 0 throughout": lambda x: 0 * x,
    "one place too late along axis 1": lambda x: x.roll(1, 1),
    "one place too early along axis 1": lambda x: x.roll(-1, 1),
    "in reverse order along axis 0": lambda x: x.flip(0),
    "with its two axes exchanged": lambda x: x.T,
    "has shape (4, 4)": lambda x: x[:, :4], "has dtype": lambda x: x.float(),
    "has NaN": lambda x: x + ex.np.nan, "is a list": lambda x: x.tolist(),
    "returns None: is a `return` missing?": lambda x: None}.items())
def test_what_was_done_to_the_right_answer_is_named(words, change):
    def discounted_returns(rew, gamma):
        return change(ex.mt.discounted_returns(rew, gamma))
    assert words in said_of("discounted_returns", discounted_returns)[0]


def test_exchanged_missing_and_uncallable_results_are_named():
    def surrogate_and_kl(*args):
        return ex.mt.surrogate_and_kl(*args)[::-1]
    (said,) = said_of("surrogate_and_kl", surrogate_and_kl)
    assert "another question" in said and said.endswith("the KL")
    for kind, results in ("Tensor", ex.torch.ones(2)), ("tuple", (1, 2, 3)):
        def conjugate_gradient(*args):
            return results
        assert f"returns a {kind}, where 2 results are wanted" in said_of(
            "conjugate_gradient", conjugate_gradient)[0]

    def gauss_newton_product(*args):
        return args[1]
    assert "a function v ↦ H·v" in said_of("gauss_newton_product",
                                          gauss_newton_product)[0]


@pytest.mark.parametrize("body", [
    "pass", "return torch.ones(4, 5).double()", "return list(locals().values())[-1]",
    "import sys; sys.exit(0)"])
def test_constants_arguments_and_nothing_fail_every_function(body, tmp_path):
    bodies = {name.split(".")[-1]: body for name in EVERY}
    path = filled_in(tmp_path / "student.py", **bodies)
    for name, (_, graders) in ex.EXERCISES.items():
        status, message = ex.grade(path, name)
        right = {f"{f.split('.')[-1]} is right" for f in ex.functions_of(name)}
        assert status == "FAIL" and not right & {*message.splitlines()}
        assert len(message.splitlines()) == len(graders)
        if body == "pass":
            assert message.count("is a `return` missing?") == len(graders)


def test_exercises_do_not_depend_on_each_other(tmp_path):
    path = filled_in(tmp_path / "student.py", step_scale=RIGHT["step_scale"],
                     discounted_returns="print('hello')")
    assert "step_scale is right" in ex.grade(path, "ex8")[1]
    status, message = ex.grade(path, "ex1")
    assert status == "FAIL" and "discounted_returns returns None" in message
    assert "gae is not written yet" in message
    assert {ex.grade(path, name)[0] for name in ("ex2", "whole")} == {"not written"}


def test_stub_is_the_source_with_only_those_bodies_replaced():
    for names in ("ex9", "ex10"), tuple(ex.EXERCISES):
        stub, wanted = ex.stub(names), {f for e in names for f in ex.functions_of(e)}
        theirs, ours = mistakes.parts(stub), mistakes.parts(ex.SOURCE)
        assert {name for name in ours if not hasattr(ours[name], "bases")
                and ex.ast.dump(theirs[name]) != ex.ast.dump(ours[name])} == wanted
        assert all(ex.ast.get_docstring(theirs[f]) == ex.ast.get_docstring(ours[f])
                   for f in wanted)


def test_a_file_that_hangs_sleeps_or_exits_is_answered_exercise_by_exercise(tmp_path):
    path = filled_in(tmp_path / "student.py", gae="import time; time.sleep(60)",
                     adapt="while True: pass", log_prob="import os; os._exit(0)")
    said = ex.grade_file(path, ("ex1", "ex3"), 1) | ex.grade_file(path, ("ex2", "ex5"))
    assert said == {"ex1": ("FAIL", "ex1 took longer than 1 seconds"),    # no "loop"
                    "ex2": ("FAIL", "ex2 ended the process that graded it"),
                    "ex3": ("FAIL", "ex3 took longer than 1 seconds"),
                    "ex5": ("not written", "hessian_vector_product is not written yet")}


def test_make_never_overwrites_and_bad_usage_is_status_2(tmp_path, capsys):
    file = tmp_path / "student.py"
    assert ex.main(["make", "ex5", str(file)]) == 0
    assert "ex5: write hessian_vector_product" in file.read_text(encoding="utf-8")
    file.write_text("def f(:\n")
    capsys.readouterr()
    for argv in ("make ex5", "make all", "bug 3", "check ex99", "bug x", "bug 0", ""):
        assert ex.main([*argv.split(), str(file)]) == 2
        out = capsys.readouterr()
        assert out.err.startswith("exercises.py: ") and not out.out
    assert ex.main(["check", "ex1", str(tmp_path / "missing.py")]) == ex.main([]) == 2
    assert file.read_text() == "def f(:\n" and list(tmp_path.iterdir()) == [file]
    assert ex.main(["check", "ex1", str(file)]) == 1
    assert "cannot be imported: it raises SyntaxError" in capsys.readouterr().out
    assert ex.main(["list"]) == 0 and "ex10" in capsys.readouterr().out


def test_folder_is_graded_into_a_table_of_students(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ex, "ALL", ("ex5", "ex8"))
    for name in "anna", "carl":
        (tmp_path / name).mkdir()
        (tmp_path / name / "maml_trpo.py").write_text(ex.SOURCE, encoding="utf-8")
    good = ("step_scale", "backtrack_line_search")
    filled_in(tmp_path / "anna" / "good.py", **{name: RIGHT[name] for name in good})
    filled_in(tmp_path / "anna" / "more.py", hessian_vector_product="return v")
    filled_in(tmp_path / "=kills.py", hessian_vector_product=(
        "import os, signal; os.kill(os.getppid(), signal.SIGKILL)"))
    (tmp_path / "zoe.ipynb").write_text("{}")
    assert ex.main(["check", "all", str(tmp_path)]) == 1
    out, progress = capsys.readouterr()
    kills, anna, carl, zoe = csv.DictReader(io.StringIO(out))
    assert kills["student"] == "'=kills" and kills["ex8"] == "FAIL"
    assert "ended the process that graded it" in kills["messages"]
    assert [anna[key] for key in ("student", "passed", "ex5", "ex8")] == [
        "anna", "1", "FAIL", "pass"]
    assert anna["messages"].endswith(" | ignored: maml_trpo.py")
    assert carl["passed"] == zoe["passed"] == "nothing graded"
    assert zoe["messages"] == "ignored: zoe.ipynb"
    assert progress.startswith("1 of 4: =kills\n2 of 4: anna\n")
    assert ex.main(["check", "ex8", str(tmp_path), "--pattern", "good.py", "--json"]
                   ) == 1
    _, anna, *_ = json.loads(capsys.readouterr().out)
    assert anna == dict(student="anna", passed=1, ex8="pass", messages=(
        "ignored: maml_trpo.py | ignored: more.py"))
    for file in [*tmp_path.glob("*.py"), *tmp_path.glob("anna/*.py")]:
        file.unlink()
    assert ex.main(["check", "all", str(tmp_path)]) == 2
    assert "nothing was graded in" in capsys.readouterr().err


def test_bugs_are_distinct_look_natural_and_are_seen(tmp_path, capsys):
    assert ex.main(["bugs"]) == 0
    listed = [int(n) for n in re.findall(r"(\d+) ★", capsys.readouterr().out)]
    assert listed == [*range(1, 1 + len(set(mistakes.BUGS)))]
    lines = {re.sub(" +# ", "  # ", line) for line in ex.SOURCE.splitlines()}
    for number in listed:
        bug, file = ex.bug_file(number), tmp_path / "bug.py"
        new = [line for line in bug.splitlines() if line not in lines and line.strip()]
        assert not re.search(r"[\w)\]]  +[^#\s]|\( | \)| ,|.{89}", "\n".join(new))
        file.write_text(bug, encoding="utf-8")
        if mistakes.BUGS[number - 1] not in GRADED:
            assert ex.whole(file)[0] == "FAIL"


def test_a_bug_is_not_told_and_its_mending_is_seen(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ex, "ALL", ("ex8", "whole"))
    known, unknown = mistakes.read(
        "backtrack_line_search\n    and kl <= max_kl =>  :: nobody looks\n"
        "train_maml\n    manual_seed(config.seed) => manual_seed(7) :: another θ\n")
    monkeypatch.setattr(mistakes, "BUGS", [known, unknown])
    for number, says, mend in (
            (1, "`check ex1`", (":  # F", " and kl <= max_kl:  # F")),
            (2, "only a training", ("d(7)", "d(config.seed)"))):
        file = tmp_path / f"{number}.py"
        assert ex.main(["bug", str(number), str(file)]) == 0
        bug = file.read_text(encoding="utf-8")
        assert ex.main(["check", "all", str(file)]) == 1
        out = capsys.readouterr().out
        assert says in out and "not mended yet" in out and "δ" not in out
        file.write_text(bug.replace(*mend), "utf-8")
        assert ex.main(["check", "all", str(file)]) == 0
        assert "The bug is mended." in capsys.readouterr().out
    assert ex.main(["key", "1"]) == 0 and "nobody looks" in capsys.readouterr().out


@text
def test_each_mistake_fits_the_program_and_its_name_is_its_own():
    for mistake in mistakes.MISTAKES:
        assert mistake.applied_to(ex.SOURCE) != ex.SOURCE
        ex.mistaken(mistake)                     # it is Python
    assert len({m.name for m in mistakes.MISTAKES}) == len(mistakes.MISTAKES) > 200


def test_the_mutation_run_counts_only_tests_that_run_the_program(tmp_path, capsys):
    (tmp_path / "maml_trpo.py").write_text("def twice(x):\n    return x + x\n")
    (tmp_path / "test_it.py").write_text(
        "import maml_trpo, pytest\n\n@pytest.mark.text\ndef test_text():\n"
        "    assert 'x + x' in open('maml_trpo.py').read()\n\n"
        "def test_two():\n    assert maml_trpo.twice(2) == 4\n\n"
        "def test_three():\n    assert maml_trpo.twice(3) == 6\n")
    chosen = mistakes.read("twice\n    x + x => 2 * x :: the same program\n"
                           "    x + x => x * x :: squared\n    (x) => ( :: no Python\n")
    assert mistakes.run(chosen, tmp_path) == [chosen[0], chosen[2]]
    same, squared, broken, *_, total = capsys.readouterr().out.splitlines()
    assert same == "SURVIVED  twice: the same program  []" and "2 survived" in total
    assert squared == "caught  twice: squared  [test_three]"
    assert broken.startswith("NOT RUN  twice: no Python")
