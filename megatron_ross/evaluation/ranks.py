"""Several ranks after a benchmark: a failure that not all of them share leaves the others waiting for answers."""

from __future__ import annotations

from datetime import timedelta

import torch.distributed as dist

from megatron_ross.evaluation.errors import FrameworkError


class RanksApart(FrameworkError):
    """This rank failed in a benchmark in which others still are: the process must end to free them."""


PATIENCE_S = 30.0
"""How long a rank that failed waits for the others to leave the same benchmark."""


def wait_for_other_ranks(benchmark: str, failure: str, patience_s: float = PATIENCE_S) -> None:
    """Tell the other ranks that this one has left a benchmark; one that failed waits until all have.

    Ranks exchange answers at the end of a benchmark. Where all ranks fail (no data), or only the first one while it
    scores, all leave within moments. Otherwise the others wait for this rank's answers, and only its exit frees them.

    Args:
        benchmark: the same text on every rank, another one for each benchmark.
        failure: why this rank has no answers; empty if it has.

    Raises:
        RanksApart: this rank failed and others are still in the benchmark.
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return
    store = dist.PrefixStore("left", dist.distributed_c10d._get_default_store())
    store.set(f"{benchmark} {dist.get_rank()}", "1")
    if not failure:
        return
    try:  # a store says with a RuntimeError that it has waited long enough
        store.wait([f"{benchmark} {rank}" for rank in range(dist.get_world_size())], timedelta(seconds=patience_s))
    except RuntimeError as error:
        raise RanksApart(
            f"rank {dist.get_rank()} failed in {benchmark.rpartition(' ')[0]} ({failure}) while other ranks wait for "
            "its answers; the same command asks for what is left, this benchmark last"
        ) from error
