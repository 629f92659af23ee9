"""The space of layouts that tests walk through, and a small set of rows that covers every feasible pair of choices."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

from tests.helpers.batches import KINDS

MAX_RANKS = 4
NUM_LAYERS = 4
MODELS = ("qwen2_siglip", "llama_clip", "tied_odd_vocabulary")

Pair = tuple[str, Any, str, Any]


@dataclass(frozen=True)
class Row:
    """One choice of everything. `tower`: V shares the first stage or has its own. `heads`: what ends the pipeline."""

    tp: int
    pp: int
    vpp: int
    sp: bool
    dp: int
    tower: str
    heads: str
    micro_batch_size: int
    stage: int
    kind: str
    model: str

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.dp

    @property
    def layout(self) -> str | None:
        """The layout string, None when the placement does not fit the number of stages."""
        return layout_string(self.pp * self.vpp, self.tower, self.heads)

    @property
    def is_feasible(self) -> bool:
        parallel = (
            self.world_size <= MAX_RANKS and not (self.sp and self.tp == 1) and not (self.vpp > 1 and self.pp == 1)
        )
        return parallel and self.layout is not None

    def settings(self) -> dict[str, Any]:
        """Flat run settings."""
        return {
            "tensor_model_parallel_size": self.tp,
            "pipeline_model_parallel_size": self.pp,
            "sequence_parallel": self.sp,
            "layout": self.layout,
            "micro_batch_size": self.micro_batch_size,
            "freeze_language_model": self.stage == 1,
        }

    def __str__(self) -> str:
        sp = "sp" if self.sp else ""
        return (
            f"tp{self.tp}{sp}-pp{self.pp}x{self.vpp}-dp{self.dp}-{self.layout}-mbs{self.micro_batch_size}-"
            f"stage{self.stage}-{self.kind}-{self.model}"
        )


FACTORS: dict[str, tuple[Any, ...]] = {
    "tp": (1, 2),
    "pp": (1, 2, 4),
    "vpp": (1, 2),
    "sp": (False, True),
    "dp": (1, 2),
    "tower": ("shared", "own"),
    "heads": ("shared", "NDH", "ND|H", "NH|D"),
    "micro_batch_size": (1, 2),
    "stage": (1, 2),
    "kind": tuple(KINDS),
    "model": MODELS,
}
assert [f.name for f in fields(Row)] == list(FACTORS)


def layout_string(num_stages: int, tower: str, heads: str) -> str | None:
    """V E t.. N D H cut into `num_stages`, with tower and heads placed as asked; None if that is impossible."""
    front = ["V"] if tower == "own" else []
    back = {"shared": [], "NDH": ["NDH"], "ND|H": ["D", "H"], "NH|D": ["H", "D"]}[heads]
    body = ["E" if tower == "own" else "VE", *["t"] * NUM_LAYERS]
    tail = "" if heads == "NDH" else "NDH" if heads == "shared" else "N" + heads[1]
    if heads in ("ND|H", "NH|D"):
        back = [heads[-1]]
    num_body = num_stages - len(front) - len(back)
    if not 1 <= num_body <= len(body) + (heads != "shared" and bool(tail)):
        return None
    if num_body > len(body):  # the norm and its head get a stage of their own
        return "|".join([*front, *body, tail, *back])
    cuts = [round(i * len(body) / num_body) for i in range(num_body + 1)]
    stages = ["".join(body[a:b]) for a, b in itertools.pairwise(cuts)]
    stages[-1] += tail
    return "|".join([*front, *stages, *back])


def all_rows(**fixed: Any) -> Iterator[Row]:
    """Every feasible row, with some factors fixed."""
    choices = {name: (fixed[name],) if name in fixed else values for name, values in FACTORS.items()}
    for values in itertools.product(*choices.values()):
        row = Row(*values)
        if row.is_feasible:
            yield row


def pairs(row: Row) -> set[Pair]:
    """All pairs of choices that a row says something about.

    In stage 1, a batch without images has no gradient at all: such a row proves that nothing hangs, and no more.
    """
    names = ("stage", "kind") if row.stage == 1 and row.kind == "no_image" else FACTORS
    choices = [(name, getattr(row, name)) for name in names]
    return {(*a, *b) for a, b in itertools.combinations(choices, 2)}


def pairwise_rows() -> list[Row]:
    """Few rows with all pairs that any feasible row has: greedily the row that adds most, most ranks first."""
    candidates = [(row, pairs(row)) for row in all_rows()]
    random.Random(0).shuffle(candidates)  # equally good rows differ in more than the last factors
    missing = set().union(*(found for _, found in candidates))
    chosen: list[Row] = []
    while missing:
        gains = ((len(found & missing), row.world_size, -i) for i, (row, found) in enumerate(candidates))
        gain, _, index = max(gains)
        row, found = candidates[-index]
        assert gain > 0
        chosen.append(row)
        missing -= found
        candidates = [(r, f) for r, f in candidates if f & missing]
    return sorted(chosen, key=lambda row: row.world_size)
