"""Which parts of the model each pipeline stage holds, written as one string.

Megatron's `pipeline_model_parallel_layout` letters, extended:

    V vision tower + projector    E token embedding + splice    t decoder layer
    N final norm                  D denoiser + VAE target       H LM head + cross entropy

Stages are separated by `|`; `t*8` repeats a letter, `(tt|)*3` repeats a group. Commas and blanks are cosmetic. With
PP ranks and VPP chunks per rank there are PP*VPP stages, stage i living on rank i % PP as chunk i // PP.
The planner and the model builder both read `StageLayout`, so an estimate cannot disagree with what is built.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

from megatron_ross.config.shown import shown

_ORDER = "VEtNDH"
_MAX_LETTERS = 8192
_TOO_LONG = f"stands for more than {_MAX_LETTERS} letters, and no model has so many layers; write fewer"


@dataclass(frozen=True)
class StageSpec:
    """Contents of one pipeline stage (one virtual chunk of one pipeline rank)."""

    index: int
    letters: str
    layer_offset: int

    @property
    def num_layers(self) -> int:
        return self.letters.count("t")

    def has(self, letter: str) -> bool:
        return letter in self.letters

    def __str__(self) -> str:
        return re.sub(r"t{2,}", lambda m: f"t*{len(m[0])}", self.letters)


@dataclass(frozen=True)
class StageLayout:
    """All stages in the order in which a microbatch visits them."""

    stages: tuple[StageSpec, ...]
    pipeline_model_parallel_size: int

    @property
    def virtual_pipeline_model_parallel_size(self) -> int | None:
        """Chunks per pipeline rank, None when there is only one (Megatron's convention)."""
        chunks = len(self.stages) // self.pipeline_model_parallel_size
        return chunks if chunks > 1 else None

    def chunks_of_rank(self, pp_rank: int) -> tuple[StageSpec, ...]:
        return self.stages[pp_rank :: self.pipeline_model_parallel_size]

    def stage_of(self, letter: str) -> StageSpec | None:
        """The (only) stage that holds `letter`, None when no stage does."""
        return next((s for s in self.stages if s.has(letter)), None)

    def pp_rank_of(self, letter: str) -> int | None:
        stage = self.stage_of(letter)
        return None if stage is None else stage.index % self.pipeline_model_parallel_size

    @cached_property
    def has_denoiser(self) -> bool:
        return self.stage_of("D") is not None

    def megatron_layout(self) -> list[list[str]]:
        """The same decoder placement in Megatron's own list form (embedding first, loss last, as it insists)."""
        rows = [["decoder"] * stage.num_layers for stage in self.stages]
        rows[0].insert(0, "embedding")
        rows[-1].append("loss")
        return rows

    def __str__(self) -> str:
        return "|".join(str(stage) for stage in self.stages)


def _expand(text: str) -> str:
    """The layout with every `*` carried out. Raises ValueError: longer than _MAX_LETTERS."""
    text = _bounded(re.sub(r"[\s,]", "", text))
    group = re.compile(r"\(([^()]*)\)\*(\d+)")
    while match := group.search(text):
        text = _bounded(text[: match.start()] + _repeated(match) + text[match.end() :])
    return _bounded(re.sub(r"([A-Za-z])\*(\d+)", _repeated, text))


def _repeated(match: re.Match[str]) -> str:
    piece, count = match.groups()
    if len(count) > len(str(_MAX_LETTERS)) or len(piece) * int(count) > _MAX_LETTERS:
        raise ValueError(_TOO_LONG)
    return piece * int(count)


def _bounded(text: str) -> str:
    if len(text) > _MAX_LETTERS:
        raise ValueError(_TOO_LONG)
    return text


def parse_layout(
    text: str,
    *,
    num_layers: int,
    pipeline_model_parallel_size: int,
    has_denoiser: bool,
) -> StageLayout:
    """Parse and check a layout string.

    Raises:
        ValueError: naming the layout, the rule it breaks and the fix.
    """

    def refuse(rule: str) -> ValueError:
        return ValueError(f"layout={shown(text, 300)}: {rule}")

    try:
        expanded = _expand(text)
    except ValueError as error:
        raise refuse(str(error)) from None
    if unknown := set(expanded) - set(_ORDER + "|"):
        raise refuse(f"unknown letter(s) {''.join(sorted(unknown)):.40}; use V E t N D H, `|`, `*` and parentheses")
    rows = expanded.split("|")
    pp = pipeline_model_parallel_size
    if len(rows) % pp:
        raise refuse(
            f"{len(rows)} stages are not a multiple of pipeline_model_parallel_size={pp}; "
            f"write {pp} stages (or a multiple, for interleaving), or set pipeline_model_parallel_size={len(rows)}"
        )
    _check_contents("".join(rows), num_layers, has_denoiser, refuse)
    stages, offset = [], 0
    for index, letters in enumerate(rows):
        if not letters:
            raise refuse(f"stage {index} is empty; give it at least one decoder layer")
        stages.append(StageSpec(index, letters, offset))
        offset += letters.count("t")
    return StageLayout(tuple(stages), pp)


def _check_contents(letters: str, num_layers: int, has_denoiser: bool, refuse) -> None:
    wanted = {"V": 1, "E": 1, "N": 1, "H": 1, "D": int(has_denoiser), "t": num_layers}
    for letter, count in wanted.items():
        if letters.count(letter) != count:
            hint = " (the checkpoint has no denoiser)" if letter == "D" and not has_denoiser else ""
            raise refuse(f"letter {letter} occurs {letters.count(letter)} times, the model needs {count}{hint}")
    heads = letters[letters.index("N") + 1 :]
    body = letters[: letters.index("N") + 1]
    if list(body) != sorted(body, key=_ORDER.index) or set(heads) - set("DH"):
        raise refuse("order must be V E t.. N, then D and H in either order")


@dataclass(frozen=True)
class LayoutCosts:
    """What each part costs, in units of one decoder layer. The planner computes them; zero balances layers alone."""

    vision: float = 0.0
    denoiser: float = 0.0
    head: float = 0.0


def auto_layout(
    *,
    num_layers: int,
    pipeline_model_parallel_size: int,
    virtual_pipeline_model_parallel_size: int | None = None,
    has_denoiser: bool,
    costs: LayoutCosts | None = None,
) -> str:
    """The layout whose most expensive stage is cheapest; among those, the most even one.

    Raises:
        ValueError: more stages than decoder layers.
    """
    virtual = virtual_pipeline_model_parallel_size or 1
    num_stages = pipeline_model_parallel_size * virtual
    if num_stages > num_layers:
        raise ValueError(
            f"layout='auto': {num_stages} stages (pipeline size {pipeline_model_parallel_size} x virtual size "
            f"{virtual}) for {num_layers} decoder layers; make the sizes smaller, or write the layout out"
        )
    costs = costs or LayoutCosts()
    letters = "VE" + "t" * num_layers + ("NDH" if has_denoiser else "NH")
    cost_of = {"V": costs.vision, "E": 0.0, "t": 1.0, "N": 0.0, "D": costs.denoiser, "H": costs.head}
    bounds = _even_cuts([cost_of[letter] for letter in letters], num_stages)
    return "|".join(str(StageSpec(0, letters[i:j], 0)) for i, j in pairwise(bounds))


def _even_cuts(costs: list[float], num_parts: int) -> list[int]:
    """Bounds [0, .., len] of contiguous non-empty parts: least maximum first, then least sum of squares."""
    prefix = [0.0, *accumulate(costs)]
    bottleneck = _best_cuts(prefix, num_parts, math.inf, max)
    limit = max(prefix[j] - prefix[i] for i, j in pairwise(bottleneck)) * (1 + 1e-9)
    return _best_cuts(prefix, num_parts, limit, lambda so_far, part: so_far + part**2)


def _best_cuts(prefix: list[float], num_parts: int, limit: float, join: Callable[[float, float], float]) -> list[int]:
    """Dynamic programme over (end, parts): `join` combines the value so far with a new part's cost, at most `limit`."""
    best: list[tuple[float, list[int]]] = [(0.0, [0])] + [(math.inf, [])] * (len(prefix) - 1)
    for _ in range(num_parts):
        following: list[tuple[float, list[int]]] = [(math.inf, [])] * len(prefix)
        for end in range(1, len(prefix)):
            for start in range(end):
                value, cuts = best[start]
                part = prefix[end] - prefix[start]
                if cuts and part <= limit and (joined := join(value, part)) < following[end][0]:
                    following[end] = (joined, [*cuts, end])
        best = following
    return best[-1][1]
