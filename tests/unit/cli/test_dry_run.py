"""`train --dry-run`: finds what would stop a run, in one process, and leaves nothing behind."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_ross.cli import dry_run
from megatron_ross.cli.train import main
from megatron_ross.planner.hardware import GPUS
from megatron_ross.training import main as training
from tests.helpers.toy_run import write_data
from tests.helpers.variants import make_variant


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("dry")
    return {
        **write_data(folder / "data", 30),
        "init_from": str(make_variant(folder / "model", "qwen2_siglip").path),
        "pipeline_model_parallel_size": 2,
        "layout": "VEt*2|t*2NDH",
        "seq_length": 256,
        "global_batch_size": 8,
        "num_epochs": 2,
        "num_workers": 1,
    }


@pytest.fixture
def check(settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Any:
    """`check(*flags, **changed settings)` -> exit status, what was printed, error lines. Training must not begin."""

    def begins(*args: object) -> None:
        raise AssertionError("a dry run made a process group")

    monkeypatch.setattr(training, "start_process_group", begins)
    monkeypatch.delenv("WORLD_SIZE", raising=False)

    def run(*flags: str, **changes: Any) -> tuple[int, str, list[str]]:
        config = tmp_path / "run.yaml"
        config.write_text(yaml.safe_dump({**settings, "save": str(tmp_path / "runs" / "new"), **changes}))
        code = main(["--dry-run", "--config", str(config), *flags])
        printed = capsys.readouterr()
        assert not (tmp_path / "runs").exists()
        return code, printed.out, [line for line in printed.err.splitlines() if line.startswith("error: ")]

    return run


def test_a_good_run(check: Any) -> None:
    code, out, errors = check("--world-size", "4", "--gpu", "h100")
    assert (code, errors) == (0, [])
    assert "4 ranks, layout VEt*2|t*2NDH" in out
    assert "30 of 30 samples looked at: no findings" in out
    assert "30 samples, 8 steps of 8" in out  # 60 samples in batches of 8
    assert "predicted for 4 x h100" in out
    assert out.splitlines()[-1] == "dry run: nothing would stop this run"


def test_the_tables_are_those_of_training(check: Any) -> None:
    """Stages as the layout has them, the whole model's parameters, and the features of this machine."""
    _, out, _ = check()
    assert "2 ranks, layout" in out  # one replica, where nobody says how many
    assert "    0        0      0  VEt*2" in out
    assert "decoder precision" in out
    assert "no GPU is here and --gpu names none, so it is not compared" in out
    tables = {size: check(tensor_model_parallel_size=size)[1] for size in (1, 2)}
    totals = {size: [row for row in text.splitlines() if row.startswith("  all")] for size, text in tables.items()}
    assert totals[1] == totals[2]


@pytest.mark.parametrize(
    ("flags", "changes", "message"),
    [
        (["--world-size", "3"], {}, "world size 3: must be a multiple of"),
        (["--world-size", "0"], {}, "world_size=0: must be at least 1"),
        (["--gpu", "h1000"], {}, "gpu='h1000': not in the planner's table"),
        (["--dry-run-samples", "-1"], {}, "dry_run_samples=-1"),
        ([], {"layout": "VEt*3|t*2NDH"}, "layout"),
        ([], {"init_from": "nowhere"}, "init_from='nowhere': no such folder"),
        ([], {"micro_batch_size": 5}, "global_batch_size=8"),
        ([], {"save": f"{__file__}/run"}, "cannot write there"),
        ([], {"fp8": "hybrid"}, "fp8='hybrid'"),
    ],
)
def test_settings_and_checkpoint_are_checked_first(check: Any, flags: list, changes: dict, message: str) -> None:
    code, out, errors = check(*flags, **changes)
    assert (code, len(errors)) == (1, 1)
    assert message in errors[0]
    assert "samples looked at" not in out


def test_features_of_another_machine_are_left_to_it(check: Any) -> None:
    code, out, _ = check("--gpu", "h100", fp8="hybrid", bf16=True)
    assert code == 0
    assert "features: not checked" in out


def test_bad_samples_are_found_before_they_stop_a_run(check: Any, settings: dict[str, Any], tmp_path: Path) -> None:
    records = json.loads(Path(settings["data_path"]).read_text())
    for record in [record for record in records if isinstance(record.get("image"), str)][:13]:
        record["image"] = "missing.png"
    (tmp_path / "data.json").write_text(json.dumps(records))
    code, out, errors = check(data_path=str(tmp_path / "data.json"))
    assert code == 1
    assert "13 of 30 samples are bad" in errors[0]
    assert "(max_bad_sample_share=0.01)" in errors[0]
    assert "bad_image 13" in out
    assert check(data_path=str(tmp_path / "data.json"), max_bad_sample_share=0.9)[0] == 0


def test_the_limits_are_those_of_training(check: Any, settings: dict[str, Any], tmp_path: Path) -> None:
    """Images that no record names count, and several limits may be passed."""
    records = json.loads(Path(settings["data_path"]).read_text())
    for record in records[:3]:
        record.pop("image", None)
        record["conversations"][0]["value"] = "<image>\nWhat is it?"
    records[4]["conversations"] = []
    (tmp_path / "data.json").write_text(json.dumps(records))
    code, _, errors = check(data_path=str(tmp_path / "data.json"))
    assert code == 1
    assert [error.partition(":")[2].split()[:5] for error in errors] == [
        ["1", "of", "30", "samples", "are"],
        ["3", "of", "30", "samples", "are"],
    ]
    assert "lacks_images" in errors[1]
    assert check(data_path=str(tmp_path / "data.json"), max_bad_sample_share=0.1)[0] == 0  # 3 of 30


def test_images_alone_are_enough_without_a_language_loss(check: Any, settings: dict[str, Any], tmp_path: Path) -> None:
    records = json.loads(Path(settings["data_path"]).read_text())
    (tmp_path / "images.json").write_text(json.dumps([{"image": r["image"]} for r in records if "image" in r]))
    (tmp_path / "text.json").write_text(json.dumps([r for r in records if "image" not in r]))
    images, text = ({"data_path": str(tmp_path / name)} for name in ("images.json", "text.json"))
    assert check(**images, lm_loss_weight=0)[::2] == (0, [])
    assert check(**images)[0] == 1
    code, _, errors = check(**text, lm_loss_weight=0)
    assert (code, len(errors)) == (1, 1)
    assert "lm_loss_weight=0, seq_length=256: none of 6 samples has an image" in errors[0]
    assert check(**text)[0] == 0


def test_a_sample_of_the_data_is_spread_over_it(check: Any, settings: dict[str, Any]) -> None:
    assert "10 of 30 samples looked at" in check("--dry-run-samples", "10")[1]
    assert "30 of 30 samples looked at" in check("--dry-run-samples", "0")[1]


def test_a_gpu_that_is_too_small_stops_a_run(check: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dry_run, "known_gpu", lambda name: replace(GPUS["h100"], name=name, memory_gib=1.0))
    code, out, errors = check("--gpu", "tiny")
    assert code == 1
    assert errors[0].startswith("error: gpu=tiny: has 1.0 GiB, and the fullest rank needs")
    assert "DOES NOT FIT" in out
    assert out.splitlines()[-1] == "dry run: 1 thing(s) would stop this run"


def test_a_file_cannot_ask_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """It would train where a dry run was meant."""
    monkeypatch.setattr(training, "_leave", lambda code, rank, message, **more: print(message) or code)
    (tmp_path / "run.yaml").write_text("dry_run: true\n")
    assert main(["--config", str(tmp_path / "run.yaml")]) == 1
    assert "give the flag --dry-run" in capsys.readouterr().out


@pytest.mark.parametrize("flag", ["--world-size=2", "--gpu=h100", "--dry-run-samples=3"])
def test_its_options_belong_to_it(flag: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(training, "_leave", lambda code, rank, message, **more: print(message) or code)
    assert main([flag]) == 1
    assert "belongs to --dry-run" in capsys.readouterr().out
