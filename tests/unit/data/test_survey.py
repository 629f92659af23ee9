"""Surveys: they drop what training drops, resume, and write shards that hold the rest. The two data tools."""

from __future__ import annotations

import json
import shutil

import pytest

from megatron_ross.data import lengths as lengths_module
from megatron_ross.data.dataset import RossDataset
from megatron_ross.data.loader import RossLoader
from megatron_ross.data.order import BlendedOrder, SampleOrder
from megatron_ross.data.packing import PackedOrder
from megatron_ross.data.quarantine import BadSamplePolicy
from megatron_ross.data.survey import Checker, findings_per_epoch, survey_dataset, text_histogram, training_plan
from megatron_ross.parity.preprocessing import check_preprocessing


@pytest.fixture
def mixed(toy):
    """The toy data with one of every fault."""
    records = json.loads((toy / "data.json").read_text())
    human = {"from": "human", "value": "Well?"}
    records[0] = {"id": "r", "conversations": 3}
    records[1] = {"id": "c", "image": "1.png", "conversations": [human, {"from": "gpt", "value": "x"}]}
    records[3] = {"id": "e", "conversations": [human, {"from": "gpt", "value": " "}]}
    records[8] = {"id": "m", "conversations": [human, {"from": "gpt", "value": "USER: a ASSISTANT: b"}]}
    records[10]["image"] = "../data.json"
    (toy / "images/5.png").write_bytes((toy / "images/5.png").read_bytes()[:200])
    (toy / "data.json").write_text(json.dumps(records))
    return toy


@pytest.fixture
def dataset(mixed, qwen, processor):
    return RossDataset(mixed / "data.json", mixed / "images", qwen, "qwen_2", processor, 16, 512)


def _survey(dataset, path, **changes):
    settings = {"decode": True, "num_workers": 1, "progress_file": path / "progress.jsonl", "show_progress": False}
    return survey_dataset(dataset, **settings | changes)


def test_survey_drops_what_training_drops(dataset, tmp_path):
    survey = _survey(dataset, tmp_path)
    policy = BadSamplePolicy(max_bad_share=1, max_mismatch_share=1, quarantine_path=tmp_path / "q.jsonl")
    loader = RossLoader(dataset, SampleOrder(23), global_batch_size=23, micro_batch_size=1, bad_samples=policy)
    step = loader.next_step()
    lines = [json.loads(line) for line in (tmp_path / "q.jsonl").read_text().splitlines()]
    assert survey.skipped == {line["sample_id"] for line in lines if line["status"] == "bad"}
    assert {0, 1, 10, 5, 21} == survey.skipped
    assert loader.bad_sample_counts == {"bad": len(survey.skipped), "mismatch": survey.counts["mismatch"]}
    assert sum(survey.num_supervised) == sum(batch.num_supervised_tokens for batch in step)
    assert survey.counts["bad_record"] == survey.counts["bad_conversation"] == survey.counts["empty_answer"] == 1
    assert "outside the image root" in " ".join(survey.examples["bad_image"])
    loader.close()


def test_stopped_survey_goes_on(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(lengths_module, "_CHUNK", 3)
    whole = _survey(dataset, tmp_path, block=6)
    (tmp_path / "a").mkdir()
    lines = (tmp_path / "progress.jsonl").read_text().splitlines(keepends=True)
    assert len(lines) == 6, "what it knew, three blocks of at least 6, and the rest, empty here"
    (tmp_path / "a/progress.jsonl").write_text("".join(lines[:4]) + lines[4][:20])
    seen: list[int] = []
    original = Checker._check
    monkeypatch.setattr(Checker, "_check", lambda self, d, i, s: seen.append(i) or original(self, d, i, s))
    resumed = _survey(dataset, tmp_path / "a", block=6)
    assert seen == list(range(12, 23))
    assert resumed == whole
    assert _survey(dataset, tmp_path / "a", block=6) == whole
    assert len(seen) == 11
    with pytest.raises(ValueError, match="belongs to other data"):
        _survey(dataset, tmp_path / "a", decode=False)


def test_plan_counts(dataset, tmp_path):
    survey = _survey(dataset, tmp_path)
    padded = training_plan(survey, SampleOrder(23), 4)
    packed = training_plan(survey, PackedOrder(SampleOrder(23), survey.num_tokens, 512), 4)
    assert padded["samples"] == packed["samples"] == padded["sequences"] == 23
    assert padded["tokens"] == packed["tokens"] == sum(dataset_length(dataset, i) for i in range(23))
    assert padded["steps"] == 23 / 4
    assert packed["sequences"] == 4 * packed["steps"] >= packed["tokens"] / 512
    assert packed["pack_utilisation"] == pytest.approx(packed["tokens"] / (packed["sequences"] * 512))


def test_repeated_samples_count_as_often_as_they_come(dataset, tmp_path):
    survey = _survey(dataset, tmp_path)
    order = BlendedOrder([10, 13], [3.0, 0.0])
    lengths = [dataset_length(dataset, i) for i in range(10)]
    assert training_plan(survey, order, 4)["tokens"] == 3 * sum(lengths)
    assert findings_per_epoch(survey, order)["bad_record"] == 3
    assert findings_per_epoch(survey, SampleOrder(23))["bad_record"] == 1


def dataset_length(dataset, index):
    try:
        return len(dataset[index].input_ids)
    except ValueError:
        return 1


def test_a_broken_image_behind_the_cut_is_reported_but_not_dropped(mixed, qwen, processor, tmp_path):
    records = json.loads((mixed / "data.json").read_text())
    records[9]["image"] = ["1.png", "gone.png"]
    (mixed / "data.json").write_text(json.dumps(records))
    room = len(RossDataset(mixed / "data.json", mixed / "images", qwen, "qwen_2", processor, 16, 512)[9].input_ids)
    for max_length, kinds in ((512, {"bad_image"}), (60, {"bad_image_cut", "images_cut"})):
        assert room > 60
        dataset = RossDataset(mixed / "data.json", mixed / "images", qwen, "qwen_2", processor, 16, max_length)
        survey = _survey(dataset, tmp_path, progress_file=tmp_path / f"{max_length}.jsonl")
        assert {kind for kind, samples in survey.found.items() if 9 in samples} - {"nothing_supervised"} == kinds
        assert (9 in survey.skipped) == (max_length == 512)


def test_text_histogram_counts_everything():
    text = text_histogram([1, 1, 2, 40], "title")
    assert sum(int(line.split()[-1]) for line in text.splitlines()[1:]) == 4
    assert text_histogram([3, 3], "t").splitlines()[1].split() == ["3", "#" * 50, "2"]


def test_check_preprocessing_passes_on_the_golden_files(golden, capsys):
    assert check_preprocessing(golden) == 0
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 14
    assert all(row.startswith("equal") for row in rows)


def test_check_preprocessing_finds_a_changed_label(golden, tmp_path, capsys):
    for name in ("preprocess", "llm_qwen2", "llm_vicuna"):
        shutil.copytree(golden / name, tmp_path / name, ignore=shutil.ignore_patterns("*.safetensors.x"))
    shutil.copy(golden / "metadata.json", tmp_path)
    file = tmp_path / "preprocess/text_v1_vicuna.json"
    data = json.loads(file.read_text())
    data["results"][2]["labels"][-1] = -100
    file.write_text(json.dumps(data))
    assert check_preprocessing(tmp_path) == 1
    assert "DIFFERS  text_v1_vicuna.json" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"metadata\.json"):
        check_preprocessing(tmp_path / "preprocess")
