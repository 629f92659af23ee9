"""Tables of scores beside the published ones: what is marked, what is refused, what is kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_ross.evaluation.benchmarks import benchmarks, job
from megatron_ross.evaluation.errors import FrameworkError
from megatron_ross.evaluation.main import parse
from megatron_ross.evaluation.presets import PRESETS
from megatron_ross.evaluation.results import (
    AS_PUBLISHED,
    Result,
    check_headlines,
    earlier_results,
    is_finished,
    markdown,
    result,
    write_results,
)


def settings(preset: str = "published", **given: Any) -> dict[str, Any]:
    return {"checkpoint": "run", "export": "/run-ross", "fingerprint": "1", "preset": preset, "limit": None, **given}


def row(table: str, label: str) -> dict[str, str]:
    """A line of the table by the heads of its columns."""
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("|")]
    (found,) = (line for line in lines if line[0] == label)
    return dict(zip(lines[0], found, strict=True))


def test_the_table_stands_beside_the_published_figures() -> None:
    entries = [
        result(job("gqa"), {"exact_match": 0.655, "other": 1.0}, settings()),
        result(job("pope", "lmms-eval"), {"pope_f1_score": 0.5, "pope_accuracy": 0.25}, settings()),
        result(job("mme", "lmms-eval"), {"mme_score": 1500.0}, settings()),
    ]
    table = markdown(entries)
    gqa, pope, mme = (row(table, label) for label in ("GQA", "POPE", "mme"))
    assert (gqa["framework"], gqa["this checkpoint"], gqa["Ross-7B"]) == ("lmms-eval", "65.5", "65.5")
    assert gqa["LLaVA-v1.5-13B"] == "63.3"
    assert (pope["framework"], pope["this checkpoint"], pope["Ross-13B"]) == ("lmms-eval *", "50.0", "88.7")
    assert set(mme.values()) == {"mme", "lmms-eval", "mme_score", "1500.0", ""}
    assert "* not the framework of the published figures" in table
    assert "†" not in table
    assert [entry.as_published for entry in entries] == [True, False, True]


def test_another_preset_than_the_published_one_is_marked() -> None:
    entry = result(job("gqa"), {"exact_match": 0.655}, settings("default"))
    table = markdown([entry])
    assert not entry.as_published
    assert row(table, "GQA")["this checkpoint †"] == "65.5"
    assert "† not asked as for the published figures: `--preset published` does that" in table
    assert "* not" not in table


@pytest.mark.parametrize(
    ("name", "given", "note"),
    [
        ("mmvp", {"corrected_labels": True}, "MMVP `--corrected-labels true`"),
        ("mmvp", {"lenient": True, "seed": 1}, "MMVP `--lenient true --seed 1`"),
        ("mmvp", {"decoding": "greedy"}, "MMVP `--decoding greedy`"),
        ("gqa", {"dtype": "fp32", "template": "plain"}, "GQA `--template plain --dtype fp32`"),
        ("gqa", {"lmms_interface": "chat"}, "GQA `--lmms-interface chat`"),
        ("gqa", {"include_path": "tasks"}, "GQA `--include-path tasks`"),
        ("gqa", {"limit": 8}, None),
        ("reconstruction", {"reconstruction_steps": "10"}, "Reconstruction PSNR (dB) `--reconstruction-steps 10`"),
    ],
)
def test_options_that_depart_from_the_published_evaluation_are_named(
    name: str, given: dict[str, Any], note: str | None
) -> None:
    task = job(name)
    departing = result(task, {str(task.task.metric): 0.5}, settings(**given))
    table = markdown([departing, result(job("pope"), {"Overall.Overall": 75.0}, settings())])
    assert not departing.as_published
    assert (f"Options that depart from the published evaluation: {note}." in table) == (note is not None)
    assert ("Options that depart" in table) == (note is not None)
    assert ("Only the first questions were asked: GQA 8." in table) == ("limit" in given)


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("mmvp", {"decoding": "published", "dtype": "fp16", "lmms_interface": "chat"}),
        ("gqa", {"lenient": True, "pope_prompt": "plain", "seed": 1}),
    ],
)
def test_options_that_say_the_same_or_are_of_other_tasks_are_no_departure(name: str, given: dict[str, Any]) -> None:
    task = job(name)
    entry = result(task, {str(task.task.metric): 0.5}, settings(**given))
    assert entry.as_published
    assert "Options that depart" not in markdown([entry])


def test_the_builtin_pope_has_its_wording_named() -> None:
    entry = result(job("pope", "builtin"), {"f1": 50.0}, settings(pope_prompt="plain"))
    assert "Options that depart from the published evaluation: POPE `--pope-prompt plain`." in markdown([entry])


def test_every_option_is_known_to_change_the_questions_or_not_to() -> None:
    """A new option must be put into `AS_PUBLISHED` or in here."""
    others = {"checkpoint", "tasks", "framework", "preset", "output", "export_format", "batch_size", "device", "reuse"}
    others |= {"mmvp_data", "pope_data", "pope_images", "reconstruction_images", "vlmevalkit"}
    defaults = vars(parse(["--checkpoint", "x", "--tasks", "gqa"]))
    published = [option for group in AS_PUBLISHED.values() for option in group.items()]
    assert {name for name, _ in published} == defaults.keys() - others
    assert all(defaults[name] == values[0] for name, values in published)
    assert {preset.dtype for preset in PRESETS["published"].values()} < set(AS_PUBLISHED["all"]["dtype"])


@pytest.mark.parametrize(
    ("framework", "scores"),
    [
        ("builtin", {"f1": 62.5, "accuracy": 1.0}),
        ("lmms-eval", {"pope_f1_score": 0.625, "pope_accuracy": 0.01}),
        ("vlmevalkit", {"Overall.Overall": 62.5, "Overall.acc": 1.0}),
    ],
)
def test_pope_is_compared_by_f1_in_percent(framework: Any, scores: dict[str, float]) -> None:
    """VLMEvalKit's Overall of POPE, which was published, is F1."""
    assert result(job("pope", framework), scores, settings()).percent == pytest.approx(62.5)


def test_a_known_benchmark_without_its_headline_is_refused() -> None:
    lacking = result(job("gqa"), {"em": 0.5, "f1": 0.25}, settings())
    with pytest.raises(FrameworkError, match="lmms-eval gave no exact_match of gqa, only em, f1: "):
        check_headlines([lacking])
    check_headlines([result(job("mme", "lmms-eval"), {"mme_score": 1.0}, settings())])


def write(folder: Path, *entries: Result) -> None:
    """As one call of the tool does."""
    write_results(folder, [*earlier_results(folder, entries[0].settings), *entries])


def test_calls_add_to_a_folder(tmp_path: Path) -> None:
    """Another framework's scores of a benchmark stay, those of the same are replaced."""
    write(tmp_path, result(job("gqa"), {"exact_match": 0.25}, settings(limit=8)))
    write(tmp_path, result(job("pope", "builtin"), {"f1": 50.0}, settings()))
    write(tmp_path, result(job("pope"), {"Overall.Overall": 75.0}, settings()))
    write(tmp_path, result(job("gqa"), {"exact_match": 0.5}, settings()))
    stored = json.loads((tmp_path / "results.json").read_text())
    assert {(e["settings"]["export"], e["settings"]["preset"]) for e in stored["results"]} == {
        ("/run-ross", "published")
    }
    found = [(e["benchmark"], e["framework"], e["percent"]) for e in stored["results"]]
    assert found == [("gqa", "lmms-eval", 50.0), ("pope", "builtin", 50.0), ("pope", "vlmevalkit", 75.0)]
    table = (tmp_path / "results.md").read_text()
    assert [line.split(" | ")[0] for line in table.splitlines()[2:5]] == ["| GQA", "| POPE", "| POPE"]
    assert "Only the first" not in table
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "results.md"}


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (settings(fingerprint="2"), "not of /run-ross as it is now with preset published: name another"),
        (settings("default"), "of /run-ross with preset published, not of /run-ross with preset default: name another"),
        (settings(export="/b"), "not of /b with preset published: name another folder with --output"),
    ],
)
def test_a_folder_of_something_else_is_refused(other: dict[str, Any], message: str, tmp_path: Path) -> None:
    write(tmp_path, result(job("gqa"), {"exact_match": 0.25}, settings()))
    with pytest.raises(ValueError, match=message):
        earlier_results(tmp_path, other)


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"results": []}', '{"results": [{"task": "gqa"}]}', '{"results": 1}']
)
def test_a_damaged_file_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(ValueError, match=r"holds no results that can be added to .*: remove it, or name"):
        earlier_results(tmp_path, settings())


@pytest.mark.parametrize(
    ("name", "framework", "benchmark", "chosen"),
    [
        ("docvqa_val", None, "docvqa", "lmms-eval"),
        ("DocVQA_VAL", None, "docvqa", "vlmevalkit"),
        ("MMVP", "vlmevalkit", "mmvp", "vlmevalkit"),
        ("pope", "lmms-eval", "pope", "lmms-eval"),
        ("mme", "lmms-eval", "mme", "lmms-eval"),
    ],
)
def test_a_frameworks_own_name_is_the_benchmark_of_the_table(
    name: str, framework: Any, benchmark: str, chosen: str
) -> None:
    found = job(name, framework)
    assert (found.benchmark.name, found.framework) == (benchmark, chosen)


@pytest.mark.parametrize(
    ("scores", "metric"),
    [
        ({"perception": 1200.0, "cognition": 300.0}, "perception"),
        ({"dev.art": 0.1, "dev.Overall": 0.25}, "dev.Overall"),
        ({}, None),
    ],
)
def test_the_table_shows_one_metric_of_a_task_that_it_does_not_know(
    scores: dict[str, float], metric: str | None
) -> None:
    entry = result(job("mme", "lmms-eval"), scores, settings())
    assert (entry.metric, entry.percent) == (metric, scores.get(metric or ""))


@pytest.mark.parametrize(
    ("name", "changed", "finished"),
    [
        ("gqa", {}, True),
        ("gqa", {"limit": 8}, False),
        ("gqa", {"fingerprint": "2"}, False),
        ("gqa", {"versions": {"transformers": "6"}}, False),
        ("gqa", {"include_path": "other"}, False),
        ("gqa", {"mmvp_data": "other", "seed": 1, "batch_size": 1, "output": "elsewhere", "device": "cuda"}, True),
        ("mmvp", {"mmvp_data": "other"}, False),
        ("mmvp", {"pope_prompt": "plain", "include_path": "other"}, True),
    ],
)
def test_a_score_is_taken_up_only_where_asking_again_would_give_it(
    name: str, changed: dict[str, Any], finished: bool
) -> None:
    task = job(name)
    entry = result(task, {str(task.task.metric): 0.5}, settings(versions={"transformers": "5"}))
    assert is_finished(entry, task, settings(**{"versions": {"transformers": "5"}, **changed})) is finished
    assert not is_finished(entry, job("pope"), settings())
    assert not is_finished(result(task, {"another": 0.5}, settings()), task, settings())


def test_every_headline_can_be_shown_in_percent() -> None:
    assert {task.scale for b in benchmarks().values() for task in b.frameworks.values()} == {1, 100}
