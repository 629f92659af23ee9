"""tools/evaluate.py and its scoring: hand-computed figures, published wording, broken data."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

from megatron_ross.evaluation import mmvp, pope
from tests.helpers import golden

ROOT = Path(__file__).resolve().parents[3]
HEADER = "lndex,Question,Options,Correct Answer"
ROWS = [
    '1,"Are the wings open?","(a) Open (b) Closed",(a)',
    '2,"Are the wings open?","(a) Open (b) Closed",(b)',
    '3,"One or two, roughly?","(a) One (b) Two",(b)',
    '4,"One or two, roughly?","(a) One (b) Two",(a)',
]


def write_mmvp(folder: Path, rows: list[str]) -> Path:
    (folder / "MMVP Images").mkdir(parents=True)
    for i, _ in enumerate(rows, 1):
        Image.new("RGB", (40, 30), (60 * i % 256, 10, 10)).save(folder / "MMVP Images" / f"{i}.jpg")
    (folder / "Questions.csv").write_text("\n".join([HEADER, *rows]) + "\n")
    return folder


def write_pope(folder: Path) -> tuple[Path, Path]:
    folder.mkdir()
    Image.new("RGB", (40, 30), (200, 10, 10)).save(folder / "a.jpg")
    lines = [{"image": "a.jpg", "text": f"Is there a {x}?", "label": y} for x, y in (("cat", "yes"), ("dog", "no"))]
    (folder / "pope.json").write_text("\n".join(map(json.dumps, lines)))
    return folder / "pope.json", folder


def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("evaluate_tool", ROOT / "tools" / "evaluate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_mmvp_questions_and_published_wording(tmp_path: Path) -> None:
    questions = mmvp.read_mmvp(write_mmvp(tmp_path / "mmvp", ROWS))
    assert [q.label for q in questions] == ["a", "b", "b", "a"]
    assert questions[2].prompt() == (
        "One or two, roughly? Options:\nA. One\nB. Two\n"
        "Answer with the option's letter from the given choices directly."
    )


def test_mmvp_corrected_labels_swap_two_pairs(tmp_path: Path) -> None:
    rows = [f'{i},"Q?","(a) x (b) y",({"ab"[i % 2]})' for i in range(1, 301)]
    folder = write_mmvp(tmp_path / "mmvp", rows)
    published, corrected = mmvp.read_mmvp(folder), mmvp.read_mmvp(folder, corrected_labels=True)
    changed = [p.index for p, c in zip(published, corrected, strict=True) if p.label != c.label]
    assert changed == [99, 100, 279, 280]


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


@pytest.mark.parametrize("task", ["mmvp", "pope"])
def test_the_tool_writes_answers_and_scores(task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if task == "mmvp":
        data = ["--data", str(write_mmvp(tmp_path / "mmvp", ROWS))]
    else:
        file, images = write_pope(tmp_path / "pope")
        data = ["--data", str(file), "--images", str(images)]
    checkpoint = str(golden.checkpoint_dir("qwen2_siglip"))
    output = tmp_path / "results"
    command = ["--checkpoint", checkpoint, "--task", task, *data, "--output", str(output), "--device", "cpu"]
    assert tool().main(command) == 0
    rows = [json.loads(line) for line in (output / f"{task}.jsonl").read_text().splitlines()]
    summary = json.loads((output / f"{task}.json").read_text())
    assert summary["questions"] == len(rows) == (4 if task == "mmvp" else 2)
    if task == "mmvp":
        assert summary["scores"] == mmvp.mmvp_scores([row["correct"] for row in rows])
    else:
        assert summary["scores"] == pope.yes_no_scores([r["said_yes"] for r in rows], [r["label"] for r in rows])
    assert "| metric | percent |" in (output / f"{task}.md").read_text()
    assert "accuracy" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (ROWS[:3], "3 questions are no pairs"),
        ([ROWS[0], ROWS[0]], "without a gap"),
        ([ROWS[0], '2,"Q?","open or closed",(a)'], "row 3"),
        ([ROWS[0], ROWS[1].replace("(b)", "(c)")], "row 3"),
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


def test_missing_data_ends_with_status_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--checkpoint", "nowhere", "--data", str(tmp_path / "no"), "--output", str(tmp_path / "results")]
    assert tool().main([*command, "--task", "mmvp"]) == 1
    assert "Questions.csv is missing" in capsys.readouterr().err
    assert tool().main([*command, "--task", "pope"]) == 1
    assert "--images" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()
