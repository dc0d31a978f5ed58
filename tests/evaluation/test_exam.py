"""C-Eval: prompts to the letter, choices and accuracy against transformers, examples left out where they do not fit."""

# ruff: noqa: RUF001 (Chinese punctuation is meant)
import csv
import io
import json
import math
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest

from gemma_deploy.calibration.sources import ceval as archive
from gemma_deploy.errors import UsageError
from gemma_deploy.evaluation import ceval, models
from gemma_deploy.evaluation.prompts import SUBJECTS, choice_tokens, prompt
from gemma_deploy.testing import write_tiny_checkpoint
from tests.calibration.make import HEADER, table, write_ceval
from tests.evaluation.conftest import BOS, logits_of, rounded, run, stock_model, tokens_of
from tests.evaluation.make import questions, write_exam, write_tokenizer

ZERO_SHOT = """以下是中国关于逻辑学考试的单项选择题，请选出其中的正确答案。

0+0
A. 0
B. 1
C. 2
D. 3
答案："""
ONE_SHOT = """以下是中国关于逻辑学考试的单项选择题，请选出其中的正确答案。

1+3+1
A. 4
B. 5
C. 6
D. 7
答案：A

0+0
A. 0
B. 1
C. 2
D. 3
答案："""


def rows(made):
    return [dict(zip(HEADER, row, strict=True)) for row in made]


def test_the_prompt_to_the_letter():
    question, example = rows(questions(1))[0], rows(questions(2, "CABD", first=3))[1]
    assert prompt("logic", [], question) == ZERO_SHOT
    assert prompt("logic", [example], question) == ONE_SHOT
    assert prompt("tea_making", [], question).startswith("以下是中国关于tea making考试的单项选择题，")
    assert len(SUBJECTS) == 52


@pytest.mark.skipif("CEVAL_ZIP" not in os.environ, reason="needs CEVAL_ZIP: the real ceval-exam.zip")
def test_the_names_are_those_of_the_real_archive():
    found = {split: archive.questions(Path(os.environ["CEVAL_ZIP"]), split) for split in ("dev", "val", "test")}
    assert {split: set(subjects) for split, subjects in found.items()} == {split: set(SUBJECTS) for split in found}
    counts = {split: sum(map(len, subjects.values())) for split, subjects in found.items()}
    assert counts == {"dev": 260, "val": 1346, "test": 12342}  # table 1 of arXiv:2305.08322


def built_apart(zip_file, split, shots, subject, number):
    """A prompt made from the CSV by other code."""
    with zipfile.ZipFile(zip_file) as opened:
        dev, asked = (
            list(csv.reader(io.StringIO(opened.read(f"ceval-exam/{one}/{subject}_{one}.csv").decode())))[1:]
            for one in ("dev", split)
        )
    name = {"logic": "逻辑学", "law": "法学"}[subject]
    text = f"以下是中国关于{name}考试的单项选择题，请选出其中的正确答案。\n\n"
    for _, question, a, b, c, d, answer, _ in dev[:shots]:
        text += f"{question}\nA. {a}\nB. {b}\nC. {c}\nD. {d}\n答案：{answer}\n\n"
    _, question, a, b, c, d, *_ = asked[number]
    return text + f"{question}\nA. {a}\nB. {b}\nC. {c}\nD. {d}\n答案："


def choices_of(model, checkpoint, zip_file, shots, subject, count):
    """What transformers chooses, and the four logits; the tokens of A to D are looked up by their text."""
    letters = [tokens_of(checkpoint, letter) for letter in "ABCD"]
    assert all(len(ids) == 1 for ids in letters)
    found = []
    for number in range(count):
        ids = (BOS, *tokens_of(checkpoint, built_apart(zip_file, "val", shots, subject, number)))
        found.append(logits_of(model, ids)[-1][[ids[0] for ids in letters]])
    return ["ABCD"[int(np.argmax(four))] for four in found], np.array(found)


COUNT = 7


@pytest.mark.parametrize(
    ("form", "shots", "change"), [("int8", 0, rounded), ("dynamic", 5, None), ("divided", 0, None), ("itself", 5, None)]
)
def test_choices_and_accuracy_are_transformers(checkpoint, compiled, tmp_path, capfd, form, shots, change):
    model = stock_model(checkpoint, change) if change else stock_model(checkpoint)
    exam = write_exam(tmp_path / "exam.zip", questions(COUNT))
    chosen = {name: choices_of(model, checkpoint, exam, shots, name, COUNT) for name in ("law", "logic")}
    # Right answers that the model finds in 5 of 7 questions of one subject, and 2 of the other.
    solved = {"law": 5, "logic": 2}
    rename = dict(zip("ABCD", "BCDA", strict=True))
    members = {}
    with zipfile.ZipFile(exam) as opened:
        members = {name.removeprefix("ceval-exam/"): opened.read(name) for name in opened.namelist()}
    for name, right in solved.items():
        answers = [letter if n < right else rename[letter] for n, letter in enumerate(chosen[name][0])]
        members[f"val/{name}_val.csv"] = table(
            [[*row[:-1], a] for row, a in zip(questions(COUNT), answers, strict=True)]
        )
    exam = write_ceval(tmp_path / "answered.zip", members)
    file = tmp_path / "result.json"
    target = checkpoint if form == "itself" else compiled(form)
    arguments = ["--task", "ceval", "--path", exam, "--shots", shots, "--json", file, "--no-record"]
    code, out, err = run(capfd, "eval", target, *arguments)
    assert code == 0, out + err
    found = json.loads(file.read_text())
    assert (found["questions"], found["right"], found["accuracy"]) == (14, 7, 0.5)
    assert found["accuracy_error"] == pytest.approx(math.sqrt(0.25 / 13))
    assert found["subjects"]["law"]["accuracy"] == 5 / 7
    assert found["subjects"]["logic"]["accuracy"] == 2 / 7
    assert found["average_over_subjects"] == pytest.approx(0.5)
    each = math.sqrt(5 / 7 * 2 / 7 / 6)
    assert found["subjects"]["law"]["accuracy_error"] == pytest.approx(each)
    assert found["average_over_subjects_error"] == pytest.approx(math.sqrt(2) * each / 2)
    for name in solved:
        answered = [one for one in found["answers"] if one["subject"] == name]
        assert [one["choice"] for one in answered] == chosen[name][0]
        assert {one["shots"] for one in answered} == {shots}
        # float32 in another order of sums: 2e-6 measured, of logits up to 6
        np.testing.assert_allclose([one["logits"] for one in answered], chosen[name][1], atol=4e-5)
    assert "50.0% ± 13.9%" in out
    assert len({letter for letters, _ in chosen.values() for letter in letters}) > 1, "says nothing about the order"


def test_side_by_side(checkpoint, compiled, tmp_path, capfd):
    other = write_tiny_checkpoint(tmp_path / "other", "gemma3_text", seed=1)
    write_tokenizer(other)
    exam, file = write_exam(tmp_path / "exam.zip", questions(COUNT)), tmp_path / "result.json"
    arguments = ["--task", "ceval", "--path", exam, "--json", file, "--no-record", "--shots", 0]
    code, out, err = run(capfd, "eval", compiled("int8"), "--against", other, *arguments)
    assert code == 0, out + err
    found = json.loads(file.read_text())

    def of(model):
        return [
            choice for name in ("law", "logic") for choice in choices_of(model, checkpoint, exam, 0, name, COUNT)[0]
        ]

    exact, near = of(stock_model(other)), of(stock_model(checkpoint, rounded))
    assert exact != near, "nothing would show that the two were exchanged"
    assert [one["choice_of_reference"] for one in found["answers"]] == exact
    assert [one["choice"] for one in found["answers"]] == near
    keys = ["ABCD"[n % 4] for n in range(COUNT)] * 2
    gains = [(a == k) - (b == k) for a, b, k in zip(near, exact, keys, strict=True)]
    assert found["accuracy_change"] == pytest.approx(np.mean(gains))
    assert found["accuracy_change_error"] == pytest.approx(np.std(gains, ddof=1) / math.sqrt(14))
    assert found["reference"]["right"] == sum(a == k for a, k in zip(exact, keys, strict=True))
    assert found["same_choice"] == np.mean([a == b for a, b in zip(near, exact, strict=True)])
    assert "the same choice in" in out


def test_examples_that_do_not_fit_are_left_out_from_the_front_and_said(checkpoint, compiled, tmp_path, capfd):
    exam, file = write_exam(tmp_path / "exam.zip", questions(2)), tmp_path / "result.json"
    arguments = ["--task", "ceval", "--path", exam, "--json", file, "--no-record"]
    code, out, err = run(capfd, "eval", compiled("int8"), *arguments, "--subjects", "logic")
    assert code == 0, out + err
    found = json.loads(file.read_text())
    assert [one["shots"] for one in found["answers"]] == [0, 0]
    assert "note: 2 of 2 prompts were longer than 32 tokens: 10 examples were left out, from the front" in out
    assert found["longest_prompt_tokens"] <= 32
    chosen = ceval.read(exam, "val", 5, subjects=["logic"], limit=None)
    encode = lambda text: tokens_of(checkpoint, text)  # noqa: E731
    examples, asked = chosen["logic"]
    wanted = [BOS, *encode(prompt("logic", examples[2:], asked[0]))]
    (one, *_) = ceval.ask(chosen, encode, BOS, longest=len(wanted), where="here")
    assert (list(one.ids), one.shots) == (wanted, 3)


def test_a_question_too_long_even_alone_is_refused_before_anything_runs(compiled, tmp_path, capfd, monkeypatch):
    long = questions(3)
    long[1][1] = "the layer " * 20
    exam = write_exam(tmp_path / "exam.zip", long)
    monkeypatch.setattr(models.Evaluated, "features", None)
    code, out, err = run(capfd, "eval", compiled("int8"), "--task", "ceval", "--path", exam, "--no-record")
    assert (code, out) == (2, "")
    assert "2 of 6 questions are too long even without an example" in err
    assert "  - law, id 1: " in err
    assert "at most 32 tokens" in err


def test_limit_subjects_and_the_bundled_sample(checkpoint, tmp_path, capfd):
    exam, file = write_exam(tmp_path / "exam.zip", questions(5)), tmp_path / "result.json"
    arguments = ["eval", checkpoint, "--task", "ceval", "--path", exam, "--limit", 2, "--shots", 1, "--json", file]
    assert run(capfd, *arguments, "--subjects", "logic")[0] == 0
    assert [(one["subject"], one["id"]) for one in json.loads(file.read_text())["answers"]] == [
        ("logic", "0"),
        ("logic", "1"),
    ]
    assert run(capfd, *arguments)[0] == 0
    assert json.loads(file.read_text())["questions"] == 4
    code, out, _ = run(capfd, "eval", "demo", "--task", "ceval", "--shots", 0, "--limit", 1)
    assert code == 0
    assert "val of bundled sample, 0-shot" in out


@pytest.mark.parametrize(
    ("change", "arguments", "code", "message"),
    [
        (None, ["--path", "{tmp}/no.zip"], 1, "No such file or directory"),
        (None, ["--subjects", "logics"], 2, "logics, did you mean logic?"),
        (None, ["--split", "test"], 1, "law_test: 2 answers that are not A, B, C or D, the first of id 0"),
        ({"dev/logic_dev.csv": table([], [*HEADER, "explanation"])}, [], 1, "logic_dev: 0 examples, 5 wanted"),
        ({"val/logic_val.csv": table([])}, ["--shots", "0"], 1, "logic_val: no question in it"),
        ({"val/logic_val.csv": b"id,question\n0,x\n"}, ["--shots", "0"], 1, "the CSV header is wrong"),
        ({"val/logic_val.csv": None, "val/law_val.csv": None}, ["--shots", "0"], 1, "has no val questions"),
    ],
)
def test_archives_and_requests_that_cannot_be_used(checkpoint, tmp_path, capfd, change, arguments, code, message):
    exam = write_exam(tmp_path / "exam.zip", questions(2))
    if change:
        with zipfile.ZipFile(exam) as opened:
            members = {name.removeprefix("ceval-exam/"): opened.read(name) for name in opened.namelist()} | change
        exam = write_ceval(tmp_path / "changed.zip", {name: data for name, data in members.items() if data is not None})
    arguments = [argument.format(tmp=tmp_path) for argument in arguments]
    path = [] if "--path" in arguments else ["--path", exam]
    found, out, err = run(capfd, "eval", checkpoint, "--task", "ceval", *path, *arguments)
    assert (found, out) == (code, "")
    assert message in err


def test_a_tokenizer_that_joins_colon_and_letter_is_refused():
    def joined(text):
        return [hash(text[:-2]), hash(text[-2:])]

    with pytest.raises(UsageError, match="does not make one token of each of A, B, C and D"):
        choice_tokens("x 答案：", joined, "here")
    assert choice_tokens("x：", lambda text: list(map(ord, text)), "here") == [65, 66, 67, 68]


def test_logits_that_are_not_finite_are_no_choice(tmp_path, capfd):
    broken = write_tiny_checkpoint(tmp_path / "broken", "gemma3_text")
    write_tokenizer(broken)
    raw = bytearray((broken / "model.safetensors").read_bytes())
    raw[-2:] = b"\xc0\x7f"  # NaN in the last norm
    (broken / "model.safetensors").write_bytes(raw)
    exam = write_exam(tmp_path / "exam.zip", questions(2))
    code, out, err = run(capfd, "eval", broken, "--task", "ceval", "--path", exam, "--shots", 0)
    assert (code, out) == (1, "")
    assert "4 questions have logits that are inf or NaN" in err


def test_errors_of_one_question_have_no_error():
    assert ceval.Accuracy.of([True]).error is None
    assert ceval.Accuracy.of([True, False]).error == 0.5
