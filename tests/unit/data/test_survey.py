"""Surveys: they drop what training drops, resume, and write shards that hold the rest. The two data tools."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from megatron_ross.data.dataset import RossDataset
from megatron_ross.data.loader import RossLoader
from megatron_ross.data.order import SampleOrder
from megatron_ross.data.quarantine import BadSamplePolicy
from megatron_ross.data.survey import Checker, survey_dataset, text_histogram, training_plan

ROOT = Path(__file__).parents[3]


def _tool(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
    assert survey.num_supervised == sum(batch.num_supervised_tokens for batch in step)
    assert survey.counts["bad_record"] == survey.counts["bad_conversation"] == survey.counts["empty_answer"] == 1
    assert "outside the image root" in " ".join(survey.examples["bad_image"])
    loader.close()


def test_stopped_survey_goes_on(dataset, tmp_path, monkeypatch):
    whole = _survey(dataset, tmp_path, block=6)
    (tmp_path / "a").mkdir()
    lines = (tmp_path / "progress.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "a/progress.jsonl").write_text("".join(lines[:3]) + lines[3][:20])
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
    plan = training_plan(survey, 4, 512)
    assert plan["samples"] == 23
    assert plan["tokens"] == sum(dataset_length(dataset, i) for i in range(23))
    assert plan["steps_unpacked"] == 23 / 4
    assert plan["packs"] >= plan["tokens"] / 512
    assert plan["pack_utilisation"] == pytest.approx(plan["tokens"] / (plan["packs"] * 512))


def dataset_length(dataset, index):
    try:
        return len(dataset[index].input_ids)
    except ValueError:
        return 1


def test_text_histogram_counts_everything():
    text = text_histogram([1, 1, 2, 40], "title")
    assert sum(int(line.split()[-1]) for line in text.splitlines()[1:]) == 4
    assert text_histogram([3, 3], "t").splitlines()[1].split() == ["3", "#" * 50, "2"]


def test_prepare_data_reports_and_writes_shards(mixed, golden, qwen, processor, tmp_path, capsys):
    main = _tool("prepare_data").main
    settings = {"image_root": str(mixed / "images"), "image_size": 56, "num_image_tokens": 16, "num_workers": 1}
    status = main([str(mixed / "data.json")], str(golden / "llm_qwen2"), tmp_path / "out", pack_length=8192,
                  write_shards=tmp_path / "shards", samples_per_shard=7, **settings)  # fmt: skip
    assert status == 1
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert Image.open(tmp_path / "out/histograms.png").size[0] > 500
    assert "bad_image" in capsys.readouterr().out
    local = RossDataset(mixed / "data.json", mixed / "images", qwen, "qwen_2", processor, 16, 512)
    kept = [i for i in range(23) if i not in report["skipped"]]
    shards = sorted(str(p) for p in (tmp_path / "shards").iterdir())
    assert len(shards) == -(-len(kept) // 7)
    packed = RossDataset(shards, None, qwen, "qwen_2", processor, 16, 512, cache_folder=tmp_path / "cache")
    assert len(packed) == len(kept)
    for number, index in enumerate(kept):
        assert torch.equal(packed[number].input_ids, local[index].input_ids)
        for a, b in zip(packed[number].images, local[index].images, strict=True):
            assert torch.equal(a.load_pixels(), b.load_pixels())


def test_check_preprocessing_passes_on_the_golden_files(golden, capsys):
    assert _tool("check_preprocessing").main(golden) == 0
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
    assert _tool("check_preprocessing").main(tmp_path) == 1
    assert "DIFFERS  text_v1_vicuna.json" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"metadata\.json"):
        _tool("check_preprocessing").main(tmp_path / "preprocess")
