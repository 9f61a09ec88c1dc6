"""Tests of the graders, of the exercises' command line, and of the mutation run."""
import csv
import io
import re
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
            stub = re.sub(rf'raise NotImplementedError\(".*write {name}"\)', body, stub)
    path.write_text(stub, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ex.ALL)
def test_the_reference_passes_every_grader(name):
    assert ex.grade(ex.mt.__file__, name) == ("pass", "")


@pytest.mark.parametrize("mistake", GRADED, ids=lambda m: m.name)
def test_grader_sees_each_mistake_and_says_its_words(mistake):
    said = []
    for _, checks in ex.EXERCISES.values():
        for check, functions in checks.items():
            try:
                if mistake.function in functions:
                    ex.judge(check, functions, ex.mistaken(mistake))
            except ex.Wrong as error:
                said.append(str(error))
    assert any(mistake.words in message for message in said)


@pytest.mark.parametrize("body", [
    "pass", "return torch.ones(4, 5).double()", "return list(locals().values())[-1]",
    "import sys; sys.exit(0)"])
def test_constants_arguments_and_nothing_fail_every_function(body, tmp_path):
    bodies = {name.split(".")[-1]: body for name in EVERY}
    path = filled_in(tmp_path / "student.py", **bodies)
    for name, (_, checks) in ex.EXERCISES.items():
        status, message = ex.grade(path, name)
        right = {f"{f.split('.')[-1]} is right" for f in ex.functions_of(name)}
        assert status == "FAIL" and not right & {*message.splitlines()}
        assert len(message.splitlines()) == len(checks)


def test_exercises_do_not_depend_on_each_other(tmp_path):
    path = filled_in(tmp_path / "student.py", step_scale="return (2*max_kl/xHx)**0.5",
                     discounted_returns="print('hello'); return None")
    assert "step_scale is right" in ex.grade(path, "ex8")[1]
    status, message = ex.grade(path, "ex1")
    assert status == "FAIL" and "discounted_returns is None" in message
    assert "gae is not written yet" in message and "it prints 'hello" in message
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
                    "ex2": ("FAIL", "ex2 ended the whole process"),
                    "ex3": ("FAIL", "ex3 took longer than 1 seconds"),
                    "ex5": ("not written", "hessian_vector_product is not written yet")}


def test_make_never_overwrites_and_bad_usage_is_status_2(tmp_path, capsys):
    file = tmp_path / "student.py"
    assert ex.main(["make", "ex5", str(file)]) == 0
    assert "ex5: write hessian_vector_product" in file.read_text(encoding="utf-8")
    file.write_text("def f(:\n")
    capsys.readouterr()
    for argv in ("make ex5", "make all", "bug 3", "check ex99", "bug x", "make"):
        assert ex.main([*argv.split(), str(file)]) == 2
        out = capsys.readouterr()
        assert out.err.startswith("exercises.py: ") and not out.out
    assert ex.main(["check", "ex1", str(tmp_path / "missing.py")]) == ex.main([]) == 2
    assert file.read_text() == "def f(:\n" and list(tmp_path.iterdir()) == [file]
    assert ex.main(["check", "ex1", str(file)]) == 1
    assert "cannot be imported: it raises SyntaxError" in capsys.readouterr().out
    assert ex.main(["list"]) == 0 and "ex10" in capsys.readouterr().out


def test_folder_is_graded_into_a_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ex, "ALL", ("ex5", "ex8"))
    (tmp_path / "anna").mkdir()
    (tmp_path / "anna" / "good.py").write_text(ex.SOURCE, encoding="utf-8")
    filled_in(tmp_path / "dies.py", step_scale="import os; os._exit(0)")
    assert ex.main(["check", "all", str(tmp_path)]) == 1
    good, dies = csv.DictReader(io.StringIO(capsys.readouterr().out))
    assert list(good.values()) == ["anna/good.py", "2", "pass", "pass", ""]
    assert list(dies.values())[1:] == ["0", "not written", "FAIL",
                                       "ex8: ex8 ended the whole process"]


def test_planted_bug_is_not_told_and_its_mending_is_seen(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ex, "ALL", ("ex8",))
    monkeypatch.setattr(mistakes, "MISTAKES", mistakes.read(
        "backtrack_line_search\n    and kl <= max_kl =>  :: nobody looks\n"
        "    ratio**trial => ratio ** trial :: nothing, so it is passed over\n"))
    for file in tmp_path / "0.py", tmp_path / "1.py":
        assert ex.main(["bug", file.stem, str(file)]) == 0
        bug = file.read_text(encoding="utf-8")
        assert "surrogate_before :" in bug and "nobody looks" not in bug
        assert ex.main(["check", "all", str(file)]) == 1
        assert "δ" not in (out := capsys.readouterr().out) and "not mended yet" in out
        file.write_text(bug.replace("surrogate_before :",
                                    "surrogate_before and kl <= max_kl:"), "utf-8")
        assert ex.main(["check", "all", str(file)]) == 0
        assert "The bug is mended." in capsys.readouterr().out


@text
def test_each_mistake_fits_the_program_and_its_name_is_its_own():
    for mistake in mistakes.MISTAKES:
        assert mistake.applied_to(ex.SOURCE) != ex.SOURCE
        ex.mistaken(mistake)                     # it is Python
    assert len({m.name for m in mistakes.MISTAKES}) == len(mistakes.MISTAKES) > 100


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
