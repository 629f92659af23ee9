"""Where a run starts: afresh only if it was never saved."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_ross.checkpoint.manifest import Manifest, iteration_dir, write_latest
from megatron_ross.config.cli import ConfigError
from megatron_ross.config.schema import RunConfig
from megatron_ross.training.start import is_resume, start_manifest, start_path
from tests.helpers.golden import model_config


def _run(folder: Path, init_from: str = "somewhere") -> RunConfig:
    return RunConfig.from_flat({"load": str(folder), "init_from": init_from})


def _write(folder: Path, iteration: int) -> None:
    directory = iteration_dir(folder / "checkpoints", iteration)
    directory.mkdir(parents=True)
    Manifest(iteration, model_config("qwen2_siglip")).write(directory)
    write_latest(folder / "checkpoints", iteration)


def test_a_run_that_was_never_saved_starts_afresh(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    assert not is_resume(_run(tmp_path))
    with pytest.raises(ConfigError, match="give init_from to start afresh"):
        is_resume(_run(tmp_path, init_from=""))


def test_a_saved_run_is_resumed(tmp_path: Path) -> None:
    _write(tmp_path, 5)
    assert is_resume(_run(tmp_path))


def test_a_run_killed_before_its_first_latest_is_resumed(tmp_path: Path) -> None:
    """Twice in a row, even: the second time, two checkpoints are complete."""
    _write(tmp_path, 4)
    _write(tmp_path, 5)
    (tmp_path / "checkpoints" / "latest_checkpointed_iteration.txt").unlink()
    assert is_resume(_run(tmp_path))
    assert start_path(_run(tmp_path)) == iteration_dir(tmp_path / "checkpoints", 5)


def test_a_damaged_manifest_is_named_and_the_checkpoint_before_offered(tmp_path: Path) -> None:
    """Before anything slow starts; a run that only takes weights from there is offered nothing."""
    for iteration in (4, 5):
        _write(tmp_path, iteration)
    path = tmp_path / "checkpoints" / "iter_0000005" / "manifest.json"
    path.write_text(path.read_text().replace('"iteration": 5', '"iteration": 7'))
    with pytest.raises(ValueError, match=r"iter_0000005/manifest\.json: is damaged.* load=.*iter_0000004\)"):
        start_manifest(_run(tmp_path))
    with pytest.raises(ValueError, match=r"its other fields$"):
        start_manifest(RunConfig.from_flat({"init_from": str(tmp_path)}))


@pytest.mark.parametrize("damage", ["garbage", "another iteration"])
def test_damage_is_not_taken_for_a_new_run(damage: str, tmp_path: Path) -> None:
    _write(tmp_path, 5)
    latest = tmp_path / "checkpoints" / "latest_checkpointed_iteration.txt"
    {
        "garbage": lambda: latest.write_text("\0\0"),
        "another iteration": lambda: latest.write_text("7\n"),
    }[damage]()
    with pytest.raises(ConfigError, match=r"load=.*iter_0000005 to go on from the newest"):
        is_resume(_run(tmp_path))
