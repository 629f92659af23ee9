"""What a resumed run keeps of the log of the run before."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from megatron_ross.config.schema import RunConfig
from megatron_ross.data.run_files import RunFiles
from megatron_ross.training.metrics import METRICS_FILE, RunLog
from tests.helpers.full_disk import full_disk

LINES = [json.dumps({"iteration": iteration}) for iteration in (1, 2, 3)]


def _resume_at_2(folder: Path, text: str) -> list[str]:
    """The lines that are left of a log with this text."""
    path = folder / METRICS_FILE
    path.write_text(text)
    RunLog(RunConfig.from_flat({"save": str(folder), "tensorboard": False}), RunFiles(), 5, start_iteration=2)
    assert [file.name for file in folder.iterdir()] == [METRICS_FILE]
    return path.read_text().splitlines()


@pytest.mark.parametrize("torn", ["", "\n", '{"iteration": 4, "lm_lo', '{"itera\n', "\0" * 40, "7"])
def test_a_torn_last_line_is_left_out(torn: str, tmp_path: Path) -> None:
    """As after a kill, or a crash of the machine, in the middle of a write."""
    assert _resume_at_2(tmp_path, "\n".join([*LINES, torn])) == LINES[:2]


def test_a_torn_line_may_be_the_only_one(tmp_path: Path) -> None:
    assert _resume_at_2(tmp_path, '{"iter') == []


@pytest.mark.parametrize("broken", ['{"iteration": 4, "lm_lo', "7", "[]", "{}", ""])
def test_another_broken_line_is_named(broken: str, tmp_path: Path) -> None:
    """Somebody has edited the file: nothing is thrown away."""
    text = "\n".join([LINES[0], broken, *LINES[1:]]) + "\n"
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: .* is no line of a log; remove it"):
        _resume_at_2(tmp_path, text)
    assert (tmp_path / METRICS_FILE).read_text() == text


def test_tensorboard_on_a_full_disk_ends_no_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its thread dies, and every later call raises what it died of."""
    monkeypatch.setattr(threading, "excepthook", lambda arguments: None)
    run = RunConfig.from_flat({"save": str(tmp_path), "save_failure": "continue"})
    log = RunLog(run, RunFiles.of(run), 5, start_iteration=0)
    with full_disk(100):
        for step in range(50):
            log._to_tensorboard("add_scalar", "loss", 1.0, step)
        log.close(0)
    assert capsys.readouterr().err.count(f"warning: cannot write {tmp_path / 'tensorboard'} (File too large)") == 1
