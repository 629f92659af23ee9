"""Where a run starts: afresh only if it was never saved."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from megatron_ross.checkpoint.manifest import Manifest, iteration_dir, write_latest
from megatron_ross.config.cli import ConfigError
from megatron_ross.config.schema import RunConfig
from megatron_ross.training.start import check_unchanged, refuse_to_mix, resumed_checkpoint, start_of
from tests.helpers.golden import model_config


def _run(folder: Path, init_from: str = "somewhere", save: str = "") -> RunConfig:
    return RunConfig.from_flat({"load": str(folder), "init_from": init_from, "save": save})


def _write(folder: Path, iteration: int) -> None:
    directory = iteration_dir(folder / "checkpoints", iteration)
    directory.mkdir(parents=True)
    Manifest(iteration, model_config("qwen2_siglip")).write(directory)
    write_latest(folder / "checkpoints", iteration)


def test_a_run_that_was_never_saved_starts_afresh(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    assert resumed_checkpoint(_run(tmp_path)) is None
    with pytest.raises(ConfigError, match="give init_from to start afresh"):
        resumed_checkpoint(_run(tmp_path, init_from=""))


def test_a_saved_run_is_resumed(tmp_path: Path) -> None:
    _write(tmp_path, 5)
    start = start_of(_run(tmp_path))
    assert (start.directory, start.resumes) == (iteration_dir(tmp_path / "checkpoints", 5), True)
    assert start.manifest.iteration == 5
    assert not start_of(RunConfig.from_flat({"init_from": str(tmp_path)})).resumes


def test_a_run_killed_before_its_first_latest_is_resumed(tmp_path: Path) -> None:
    """Twice in a row, even: the second time, two checkpoints are complete."""
    _write(tmp_path, 4)
    _write(tmp_path, 5)
    (tmp_path / "checkpoints" / "latest_checkpointed_iteration.txt").unlink()
    assert resumed_checkpoint(_run(tmp_path)) == iteration_dir(tmp_path / "checkpoints", 5)


def test_a_damaged_manifest_is_named_and_the_checkpoint_before_offered(tmp_path: Path) -> None:
    """Before anything slow starts; a run that only takes weights from there is offered nothing."""
    for iteration in (4, 5):
        _write(tmp_path, iteration)
    path = tmp_path / "checkpoints" / "iter_0000005" / "manifest.json"
    path.write_text(path.read_text().replace('"iteration": 5', '"iteration": 7'))
    advice = r"write 4 into .*/checkpoints/latest_checkpointed_iteration\.txt, and load=.*/checkpoints\)"
    with pytest.raises(ValueError, match=rf"iter_0000005/manifest\.json: is damaged.* {advice}"):
        start_of(_run(tmp_path))
    write_latest(tmp_path / "checkpoints", 4)  # as advised
    assert start_of(_run(tmp_path / "checkpoints")).manifest.iteration == 4
    write_latest(tmp_path / "checkpoints", 5)
    with pytest.raises(ValueError, match=r"its other fields$"):
        start_of(RunConfig.from_flat({"init_from": str(tmp_path)}))


@pytest.mark.parametrize("damage", ["garbage", "another iteration"])
def test_damage_is_not_taken_for_a_new_run(damage: str, tmp_path: Path) -> None:
    _write(tmp_path, 5)
    latest = tmp_path / "checkpoints" / "latest_checkpointed_iteration.txt"
    {
        "garbage": lambda: latest.write_text("\0\0"),
        "another iteration": lambda: latest.write_text("7\n"),
    }[damage]()
    with pytest.raises(ConfigError, match=r"load=.*: write 5 into .* to go on from the newest"):
        resumed_checkpoint(_run(tmp_path))


def test_one_checkpoint_of_another_run_can_be_named(tmp_path: Path) -> None:
    """Once it is gone, that is no new run."""
    _write(tmp_path, 4)
    named = iteration_dir(tmp_path / "checkpoints", 4)
    assert resumed_checkpoint(_run(named, save=str(tmp_path / "other"))) == named
    assert resumed_checkpoint(_run(named)) == named
    shutil.rmtree(named)
    with pytest.raises(ConfigError, match=r"load=.*iter_0000004"):
        resumed_checkpoint(_run(named))


def test_one_checkpoint_of_the_run_itself_cannot(tmp_path: Path) -> None:
    """A run that is started again would return to it."""
    for iteration in (4, 5):
        _write(tmp_path, iteration)
    named = iteration_dir(tmp_path / "checkpoints", 4)
    advice = rf"write 4 into .*latest_checkpointed_iteration\.txt, and give load={tmp_path}$"
    with pytest.raises(ConfigError, match=advice):
        resumed_checkpoint(_run(named, save=str(tmp_path)))


def test_the_checkpoints_of_another_run_are_not_saved_over(tmp_path: Path) -> None:
    """The same run is the one whose `load` and `save` are one folder, by whatever names."""
    own, other = tmp_path / "own", tmp_path / "other"
    _write(own, 2)
    _write(other, 4)
    (tmp_path / "link").symlink_to(own)
    for load in (own, own / "checkpoints", tmp_path / "link"):
        refuse_to_mix(_run(load, save=str(own)))
    refuse_to_mix(_run(other, save=str(tmp_path / "new")))
    refuse_to_mix(RunConfig.from_flat({"load": str(own)}))
    for load in ("", str(other), str(iteration_dir(other / "checkpoints", 4))):
        run = RunConfig.from_flat({"load": load, "init_from": "somewhere", "save": str(own)})
        with pytest.raises(ConfigError, match=rf"^save='{own}': .*iteration 2 is the last.*give load={own} to go on"):
            refuse_to_mix(run)
    shutil.rmtree(iteration_dir(own / "checkpoints", 2))  # damaged, and all the more another run's
    with pytest.raises(ConfigError, match=r"latest_checkpointed_iteration\.txt is there"):
        refuse_to_mix(RunConfig.from_flat({"init_from": "somewhere", "save": str(own)}))


def test_what_only_a_killed_first_save_left_is_no_other_run(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "iter_0000003.incomplete").mkdir(parents=True)
    (tmp_path / "metrics.jsonl").touch()
    refuse_to_mix(RunConfig.from_flat({"init_from": "somewhere", "save": str(tmp_path)}))


def test_a_run_that_saved_meanwhile_is_noticed(tmp_path: Path) -> None:
    _write(tmp_path, 4)
    run = _run(tmp_path, save=str(tmp_path))
    start = start_of(run)
    check_unchanged(run, start)
    _write(tmp_path, 5)
    with pytest.raises(ConfigError, match=r"another run has just saved .*iter_0000005; start again"):
        check_unchanged(run, start)
