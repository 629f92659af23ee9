"""Settings of validation, pictures and answers: one line for every mistake."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_ross.config.cli import ConfigError
from megatron_ross.config.schema import RunConfig
from megatron_ross.config.validate import validate_run


@pytest.fixture(autouse=True)
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.json", "v.json"):
        (tmp_path / name).touch()


def check(**flat: Any) -> None:
    validate_run(RunConfig.from_flat({"data_path": "a.json", "init_from": "x", **flat}), world_size=1)


def test_held_out_samples_come_from_one_place() -> None:
    check(valid_split=0.1)
    check(valid_data_path="v.json", eval_interval=10, eval_iters=3)
    check(valid_split=0.1, sample_interval=5, save="run", picture_steps="10,10,1")
    check(wandb_project="ross", save="run")


@pytest.mark.parametrize(
    ("flat", "message"),
    [
        ({"eval_interval": 5}, r"eval_interval=5: needs held-out samples; .*valid_data_path.*valid_split"),
        ({"sample_interval": 5, "save": "run"}, r"sample_interval=5: needs held-out samples"),
        ({"valid_split": 0.1, "valid_data_path": "v.json"}, r"valid_split=0\.1: valid_data_path='v\.json' is set, too"),
        ({"valid_split": 1.0}, r"valid_split=1\.0: must be at most"),
        ({"valid_data_path": "missing.json"}, r"valid_data_path='missing\.json': no such file"),
        (
            {"valid_data_path": "v.json", "valid_image_folder": "nowhere"},
            r"valid_image_folder='nowhere': no such folder",
        ),
        ({"valid_image_folder": "."}, r"valid_image_folder='\.': needs valid_data_path"),
        ({"eval_iters": 2, "valid_split": 0.1}, r"eval_iters=2: needs eval_interval"),
        ({"eval_interval": 0, "valid_split": 0.1}, r"eval_interval=0: must be at least 1"),
        ({"sample_interval": 5, "valid_split": 0.1}, r"sample_interval=5: needs save"),
        (
            {"sample_interval": 5, "valid_split": 0.1, "save": "run", "picture_steps": "0"},
            r"picture_steps='0': .* positive step counts",
        ),
        (
            {"sample_interval": 5, "valid_split": 0.1, "save": "run", "tp_comm_overlap": True},
            r"sample_interval=5: tp_comm_overlap fixes",
        ),
        ({"log_source_losses": True}, r"log_source_losses=True: there is one source"),
        ({"wandb_project": "ross"}, r"wandb_project='ross': needs save"),
        ({"log_timestep_buckets": -1}, r"log_timestep_buckets=-1: must not be negative"),
    ],
)
def test_mistakes(flat: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        check(**flat)
    assert "\n" not in str(caught.value)
