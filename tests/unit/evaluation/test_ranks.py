"""A rank that fails in a benchmark leaves alone only if the others have left it, too."""

from __future__ import annotations

import time

import pytest

from megatron_ross.evaluation.errors import FrameworkError
from megatron_ross.evaluation.ranks import wait_for_other_ranks
from tests.helpers.distributed import run_ranks


def leave(rank: int, world_size: int, failing: list[int], stuck: list[int]) -> tuple[str, float]:
    """What the rank that failed is told, and after how many seconds it went on."""
    if rank in stuck:
        time.sleep(4)
        return "stuck", 0.0
    start = time.monotonic()
    try:
        wait_for_other_ranks("lmms-eval gqa 0", "no data" if rank in failing else "", patience_s=1.5)
    except FrameworkError as error:
        return str(error), time.monotonic() - start
    return "", time.monotonic() - start


@pytest.mark.distributed
@pytest.mark.parametrize("failing", [[], [0], [0, 1]])
def test_ranks_that_have_all_left_go_on(failing: list[int]) -> None:
    assert [told for told, _ in run_ranks(leave, 2, failing, [])] == ["", ""]


@pytest.mark.distributed
def test_a_rank_that_failed_alone_ends_so_that_the_others_do_not_wait() -> None:
    (told, seconds), _ = run_ranks(leave, 2, [0], [1])
    assert "rank 0 failed in lmms-eval gqa (no data) while other ranks wait for its answers" in told
    assert 1.0 < seconds < 4
