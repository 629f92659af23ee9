"""Scoring of the built-in evaluators: hand-computed figures, published wording, broken data."""

from __future__ import annotations

from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from megatron_ross.evaluation.builtin import mmvp, pope
from tests.helpers.evaluation_data import MMVP_ROWS, picture, png, write_mmvp, write_pope


def test_mmvp_questions_and_published_wording(tmp_path: Path) -> None:
    questions = mmvp.read_mmvp(write_mmvp(tmp_path / "mmvp", MMVP_ROWS))
    assert [q.label for q in questions] == ["a", "b", "b", "a"]
    assert questions[2].prompt() == (
        "One or two, roughly? Options:\nA. One\nB. Two\n"
        "Answer with the option's letter from the given choices directly."
    )


def test_mmvp_as_parquet(tmp_path: Path) -> None:
    """The same questions, pictures in the file."""
    rows = [
        {"Index": str(i), "Question": "Q?", "Options": "(a) x (b) y", "Correct Answer": f"({a})"}
        | {"image": {"bytes": png(i), "path": None}}
        for i, a in ((2, "b"), (1, "a"))
    ]
    (tmp_path / "data").mkdir()
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "data" / "train-0.parquet")
    questions = mmvp.read_mmvp(tmp_path)
    assert [(q.index, q.label, q.options) for q in questions] == [(1, "a", ("x", "y")), (2, "b", ("x", "y"))]
    assert questions[1].image.tobytes() == picture(2).tobytes()


def test_mmvp_corrected_labels_mend_two_pairs(tmp_path: Path) -> None:
    rows = [f'{i},"Q?","(a) x (b) y",({"ba"[i % 2]})' for i in range(1, 301)]
    folder = write_mmvp(tmp_path / "mmvp", rows)
    published, corrected = mmvp.read_mmvp(folder), mmvp.read_mmvp(folder, corrected_labels=True)
    changed = [p.index for p, c in zip(published, corrected, strict=True) if p.label != c.label]
    assert changed == [99, 100, 279, 280]
    assert [corrected[i - 1].label for i in changed] == ["b", "a", "b", "a"]


@pytest.mark.parametrize(
    ("answer", "strict", "lenient"),
    [
        ("A", True, True),
        ("(a)", True, True),
        ("a.", True, True),
        ("Open", True, False),
        ("A. Open", False, True),
        ("The answer is A.", True, True),
        ("Answer: (A)", True, True),
        ("B", False, False),
        ("", False, False),
    ],
)
def test_mmvp_scoring_of_an_answer(answer: str, strict: bool, lenient: bool) -> None:
    question = mmvp.MmvpQuestion(1, "Are the wings open?", ("Open", "Closed"), "a", Path())
    assert mmvp.is_correct(answer, question) is strict
    if answer != "Open":  # has no letter, so the strict rule decides
        assert mmvp.is_correct(answer, question, lenient=True) is lenient


def test_mmvp_pairs_by_hand() -> None:
    assert mmvp.mmvp_scores([True, True, True, False, False, False]) == {
        "accuracy": pytest.approx(50.0),
        "pair_accuracy": pytest.approx(100 / 3),
    }


def test_yes_no_scores_by_hand() -> None:
    """True yes 2, false yes 1, false no 2, true no 3."""
    labels = [True, True, False, True, True, False, False, False]
    said = [True, True, True, False, False, False, False, False]
    scores = pope.yes_no_scores(said, labels)
    assert scores["accuracy"] == pytest.approx(62.5)
    assert scores["precision"] == pytest.approx(200 / 3)
    assert scores["recall"] == pytest.approx(50.0)
    assert scores["f1"] == pytest.approx(400 / 7)
    assert scores["yes_ratio"] == pytest.approx(37.5)
    assert pope.yes_no_scores([False], [False]) == {
        "accuracy": 100.0,
        "precision": 0.0,
        "recall": 0.0,
        "f1": 0.0,
        "yes_ratio": 0.0,
    }


@pytest.mark.parametrize(
    ("answer", "yes"),
    [
        ("Yes", True),
        ("No", False),
        ("no, there is none.", False),
        ("There is not a cat", False),
        ("A cat. No dog", True),
    ],
)
def test_reading_of_yes_and_no(answer: str, yes: bool) -> None:
    assert pope.says_yes(answer) is yes


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (MMVP_ROWS[:3], "3 questions are no pairs"),
        ([MMVP_ROWS[0], MMVP_ROWS[0]], "without a gap"),
        ([MMVP_ROWS[0], '2,"Q?","open or closed",(a)'], "row 3"),
        ([MMVP_ROWS[0], MMVP_ROWS[1].replace("(b)", "(c)")], "row 3"),
    ],
)
def test_broken_mmvp_is_named(rows: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        mmvp.read_mmvp(write_mmvp(tmp_path / "mmvp", rows))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"image": "a.jpg", "text": "Is it?", "label": "maybe"}', "line 1: the label"),
        ('{"image": "a.jpg", "label": "yes"}', "line 1: 'text', 'label' and 'image'"),
        ("[1]", "line 1"),
        ('{"image": "../a.jpg", "text": "Is it?", "label": "yes"}', "outside the image root"),
        ('{"image": "b.jpg", "text": "Is it?", "label": "yes"}', "b.jpg is missing"),
    ],
)
def test_broken_pope_is_named(line: str, message: str, tmp_path: Path) -> None:
    file, images = write_pope(tmp_path / "pope")
    file.write_text(line)
    with pytest.raises(ValueError, match=message):
        pope.read_yes_no(file, images)
