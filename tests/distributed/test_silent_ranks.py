"""A rank that stands still, seen by the one that waits for it: which limit ends the run, when, and with what words."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_ross.training import watchdog
from megatron_ross.training.signals import StopSignal
from megatron_ross.training.watchdog import Watchdog
from tests.helpers.distributed import RankError, run_ranks
from tests.helpers.started_ranks import started_ranks
from tests.helpers.toy_run import two_stage_settings

pytestmark = pytest.mark.distributed

MARGIN_S = 10.0
"""For a machine that has a lot else to do."""


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return two_stage_settings(tmp_path_factory.mktemp("run")) | {"train_iters": 100_000, "log_interval": 1}


def test_a_collective_that_times_out_ends_in_one_line(toy: dict[str, Any], tmp_path: Path) -> None:
    limit_s = 24.0
    limits = {"hang_timeout_minutes": 0, "distributed_timeout_minutes": limit_s / 60}
    with started_ranks(2, toy | limits | {"save": str(tmp_path)}) as ranks:
        ranks.wait_for_iteration(2)
        ranks.send(1, signal.SIGSTOP)
        code, seconds = ranks.wait(0, limit_s + MARGIN_S)
        *_, last = ranks.said(0).splitlines()
        assert code == 1, ranks.said(0)
        assert last.startswith("stopped: another rank has not answered for distributed_timeout_minutes; look at"), last
        assert "Traceback" not in ranks.said(0)
        assert seconds > limit_s - 5  # exactly that long, not rounded to minutes


def test_a_rank_that_waits_for_a_silent_one_can_be_asked_to_stop(toy: dict[str, Any], tmp_path: Path) -> None:
    """Its main thread is in a collective, where Python runs no signal handler."""
    grace_s = 4.0
    with started_ranks(2, toy | {"preemption_grace_seconds": grace_s, "save": str(tmp_path)}) as ranks:
        ranks.wait_for_iteration(2)
        ranks.send(1, signal.SIGSTOP)
        time.sleep(2.0)  # the other is in the collective by then
        ranks.send(0, signal.SIGTERM)
        code, seconds = ranks.wait(0, grace_s + MARGIN_S)
        assert code == 128 + signal.SIGTERM, ranks.said(0)
        assert seconds > grace_s - 0.5
        assert "rank 0: stopped 4 s after SIGTERM without a checkpoint" in ranks.said(0)


def _outlive_the_grace(rank: int, world_size: int) -> int:
    stop = StopSignal(0.5)
    os.kill(os.getpid(), signal.SIGTERM)
    stop.cancel()
    time.sleep(1.5)
    return stop.number


def test_a_rank_that_has_saved_may_take_its_time() -> None:
    """For its last pictures, or an upload."""
    assert run_ranks(_outlive_the_grace, 1) == [signal.SIGTERM]


def _stand_still(rank: int, world_size: int, folder: Path, limit_s: float, store_answers: bool) -> None:
    with (folder / "stderr").open("wb") as out:
        os.dup2(out.fileno(), 2)
    if not store_answers:
        watchdog._ask_the_others = lambda *_: time.sleep(1000.0)
    Watchdog(limit_s, folder).beat("a step")
    time.sleep(1000.0)


@pytest.mark.parametrize(
    ("store_answers", "says"),
    [
        pytest.param(True, "all ranks answer", id="run folder"),
        pytest.param(False, "cannot ask the other ranks", id="run folder and store"),
    ],
)
def test_the_watchdog_needs_nothing_that_may_hang_itself(store_answers: bool, says: str, tmp_path: Path) -> None:
    """The report's file is a pipe without a reader: opening it blocks, as on a file system that does not answer."""
    (tmp_path / "hang").mkdir()
    os.mkfifo(tmp_path / "hang" / "rank-0.txt")
    limit_s = 2.0
    begin = time.monotonic()
    with pytest.raises(RankError, match="exit code 1"):
        run_ranks(_stand_still, 1, tmp_path, limit_s, store_answers)
    assert time.monotonic() - begin < limit_s + limit_s / 2 + 5 + MARGIN_S
    text = (tmp_path / "stderr").read_text()
    assert text.startswith("rank 0: no progress for 2 s in a step; it stands at\n")
    assert "in _stand_still" in text
    assert says in text
