"""Every placement of V, E, N, D and H over the chunks of pipeline ranks, and two steps in each of them.

One set of ranks walks through many layouts. They keep their process groups: gloo's threads, some 75 per layout, would
otherwise stay and poll until the ranks end.
"""

from __future__ import annotations

import hashlib
import itertools
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ross.checkpoint.loading import load_checkpoint
from megatron_ross.checkpoint.manifest import ASSETS_NAME, Manifest, iteration_dir
from megatron_ross.checkpoint.optimizer_state import parameter_slices
from megatron_ross.checkpoint.saver import CheckpointSaver, SavePolicy
from megatron_ross.checkpoint.state import training_state
from megatron_ross.data.batch import RossMicrobatch
from megatron_ross.parallel.param_gather import gather_now
from megatron_ross.parity.gather import Piece, own_gradients, pieces_of
from tests.helpers.batches import make_batch
from tests.helpers.runs import Session, open_session

NUM_LAYERS = 8
"""Enough for eight stages whose middle six hold nothing but a layer, and so few that a stage has two at most."""
MAX_CHUNKS = 4
_FRONTS = (("VE",), ("V", "E"))
_BACKS = (("NDH",), ("ND", "H"), ("NH", "D"), ("N", "DH"), ("N", "D", "H"), ("N", "H", "D"))
_BACKS_OF_LLAVA = (("NH",), ("N", "H"))
_LOSS, _GRADIENT, _UPDATE = 1e-5, 1e-4, 1e-3
_SECOND_GRADIENT = 1e-3
"""The first update enlarges what rounding does to small gradients: with two tensor-parallel ranks, to 2e-4 here."""


def placements(num_stages: int, *, has_denoiser: bool = True) -> list[str]:
    """Layouts that differ in the stages of V, E, N, D or H, or in whether E and N have decoder layers with them."""
    found = []
    backs = _BACKS if has_denoiser else _BACKS_OF_LLAVA
    for front, back, with_e, with_n in itertools.product(_FRONTS, backs, (True, False), (True, False)):
        num_middle = num_stages - len(front) - len(back)
        if num_middle == -1 and with_e and with_n:  # E and N share a stage, with all layers
            joined = f"{front[-1]}{'t' * NUM_LAYERS}{back[0]}"
            found.append("|".join([*front[:-1], joined, *back[1:]]))
        elif num_middle >= 0 and (num_homes := with_e + num_middle + with_n):
            homes = ["t" * (NUM_LAYERS // num_homes + (i < NUM_LAYERS % num_homes)) for i in range(num_homes)]
            of_e, of_n = homes.pop(0) if with_e else "", homes.pop() if with_n else ""
            found.append("|".join([*front[:-1], front[-1] + of_e, *homes, of_n + back[0], *back[1:]]))
    return found


def placement_of(layout: str) -> tuple[int | None, ...]:
    """Number of stages, and the stages of V, E, N, D, H and of the first and last decoder layer; None for no D."""
    stages = layout.split("|")
    where = {letter: [i for i, stage in enumerate(stages) if letter in stage] for letter in "VENDHt"}
    return (len(stages), *(where[letter][0] if where[letter] else None for letter in "VENDHt"), where["t"][-1])


def share_a_rank(layout: str, pipeline_model_parallel_size: int) -> bool:
    """E and H are on one pipeline rank, in one chunk or in two."""
    e, h = ([letter in stage for stage in layout.split("|")].index(True) for letter in "EH")
    return (h - e) % pipeline_model_parallel_size == 0


def deeper(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    """NUM_LAYERS decoder layers, those beyond the stored ones like them, but not equal."""
    stored = config["num_hidden_layers"]
    for name in [name for name in tensors if name.startswith("model.layers.")]:
        _, _, number, rest = name.split(".", 3)
        for layer in range(int(number) + stored, NUM_LAYERS, stored):
            tensors[f"model.layers.{layer}.{rest}"] = tensors[name] * (1 + 0.1 * layer)
    config["num_hidden_layers"] = NUM_LAYERS


@dataclass(frozen=True)
class Step:
    """One step of one process; by checkpoint key, gradients and weights after the update."""

    lm_loss: float
    recon_loss: float
    grad_norm: float
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]


@dataclass(frozen=True)
class Walk:
    """What ranks need to walk through layouts.

    Attributes:
        path: the checkpoint to start from.
        settings: flat run settings that all layouts share.
        saved: a training checkpoint after one step, which the first layout resumes.
        steps: two steps of one process.
    """

    path: Path
    settings: dict[str, Any]
    saved: Path
    steps: tuple[Step, Step]


def alone(rank: int, world_size: int, path: Path, settings: dict[str, Any], root: Path) -> tuple[Step, Step]:
    """For `run_ranks`: two steps of one process, saved in between."""
    session = open_session(path, settings)
    batches = session.microbatches(make_batch("mixed", session.model))
    first = _one_step(session, batches)
    _save(session, root, path, trainable_only=False)
    second = _one_step(session, batches)
    session.close()
    return first, second


def _one_step(session: Session, batches: list[RossMicrobatch]) -> Step:
    lm_loss, recon_loss, grad_norm, found = _step(session, batches)
    gradients, weights = (_whole(pieces) for pieces in found)
    return Step(lm_loss, recon_loss, grad_norm, gradients, weights)


def _whole(pieces: list[Piece]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for piece in pieces:
        tensors.setdefault(piece.key, torch.zeros(piece.shape))[piece.place] = piece.data
    return tensors


def _step(session: Session, batches: list[RossMicrobatch]) -> tuple[float, float, float, tuple[list[Piece], ...]]:
    """Losses, gradient norm, and this rank's pieces of all gradients and updated weights, tied copies included."""
    lm_loss, recon_loss = session.losses_and_gradients(batches)
    gradients = own_gradients(session.stages, session.optimizer, session.groups)
    found = [
        [piece for stage in session.stages for piece in pieces_of(stage, lambda p: gradients.get(id(p)), replicas=True)]
    ]
    session.optimizer.prepare_grads()
    grad_norm = float(session.optimizer.get_grad_norm())
    session.optimizer.step_with_ready_grads()
    gather_now(session.chunks)
    found.append(
        [
            p
            for stage in session.stages
            for p in pieces_of(stage, lambda p: p.detach() if p.requires_grad else None, replicas=True)
        ]
    )
    return lm_loss, recon_loss, grad_norm, tuple(found)


def walk(rank: int, world_size: int, layouts: list[str], plan: Walk, folder: Path) -> list[str]:
    """For `run_ranks`: what this rank finds wrong in which layout.

    In each: a step, a save (every other one of trained tensors only), then the checkpoint of the layout before is
    resumed, into weights and moments that are NaN, and a second step follows.
    """
    wrong = []
    saved = plan.saved
    with mock.patch.object(dist, "new_group", _KeptGroups()) as groups:
        for index, layout in enumerate(layouts):
            groups.begin()
            session = open_session(plan.path, plan.settings | {"layout": layout})
            batches = session.microbatches(make_batch("mixed", session.model))
            found = [f"step 0: {text}" for text in _differences(_step(session, batches), plan.steps[0], None)]
            resumed, saved = saved, _save(session, folder / str(index), plan.path, trainable_only=index % 2 == 1)
            _forget(session)
            _load(session, resumed)
            after = plan.steps[0].weights
            found += [f"step 1: {text}" for text in _differences(_step(session, batches), plan.steps[1], after)]
            found += ["copies of tied embeddings differ"] if _copies_differ(session) else []
            session.close()
            if rank == 0 and index:
                shutil.rmtree(resumed.parent)
            wrong += [f"{layout}: {text}" for text in found]
    return wrong


class _KeptGroups:
    """Stands for `new_group`: every layout gets the groups of the first that asked for the same ranks as often."""

    def __init__(self) -> None:
        self._make: Callable[..., Any] = dist.new_group
        self._kept: dict[tuple[tuple[int, ...], int], Any] = {}
        self._asked: Counter[tuple[int, ...]] = Counter()

    def begin(self) -> None:
        """The next layout."""
        self._asked.clear()

    def __call__(self, ranks: list[int] | None = None, **kwargs: Any) -> Any:
        wanted = tuple(range(dist.get_world_size()) if ranks is None else ranks)
        key = wanted, self._asked[wanted]
        self._asked[wanted] += 1
        if key not in self._kept:
            self._kept[key] = self._make(ranks=ranks, **kwargs)
        return self._kept[key]


def _save(session: Session, root: Path, base: Path, *, trainable_only: bool) -> Path:
    progress = {"num_updates": 1}
    state = training_state(session.stages, session.optimizer, progress, session.groups, trainable_only=trainable_only)
    saver = CheckpointSaver(root, base / ASSETS_NAME, SavePolicy())
    saver.save(Manifest(iteration=1, model=session.model, base=str(base) if trainable_only else None), state)
    saver.finish()
    return iteration_dir(root, 1)


def _load(session: Session, path: Path) -> None:
    load_checkpoint(path, session.stages, session.optimizer, session.groups)


def _forget(session: Session) -> None:
    """Make every weight and moment NaN: what is not loaded then shows."""
    for stage in session.stages:
        for parameter in stage.parameters():
            parameter.data.fill_(torch.nan)
    for piece in parameter_slices(session.optimizer):
        for tensor in (piece.main, piece.state["exp_avg"], piece.state["exp_avg_sq"]):
            tensor.data.fill_(torch.nan)


def _copies_differ(session: Session) -> bool:
    """Any two copies of one shard of the tied embeddings, anywhere. A collective call."""
    digests = {
        hashlib.sha256(parameter.detach().numpy().tobytes()).hexdigest()
        for stage in session.stages
        for parameter in stage.parameters()
        if getattr(parameter, "shared_embedding", False)
    }
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, (session.groups.tp.rank(), digests))
    by_shard: dict[int, set[str]] = {}
    for shard, found in everywhere:
        by_shard.setdefault(shard, set()).update(found)
    return any(len(found) > 1 for found in by_shard.values())


def _differences(
    got: tuple[float, float, float, tuple[list[Piece], ...]], wanted: Step, before: dict[str, Tensor] | None
) -> Iterator[str]:
    """What is not as in one process. `before`: its weights before the step, to measure errors by the update."""
    *numbers, (gradients, weights) = got
    limit_of_gradients = _GRADIENT if before is None else _SECOND_GRADIENT
    for name, number, limit in zip(
        ("lm_loss", "recon_loss", "grad_norm"), numbers, (_LOSS, _LOSS, _GRADIENT), strict=True
    ):
        expected = getattr(wanted, name)
        if not abs(number - expected) <= limit * abs(expected):
            yield f"{name} is {number}, one process has {expected}"
    floor = 1e-4 * max(float(gradient.norm()) for gradient in wanted.gradients.values())
    for piece in gradients:
        ours, theirs = _common_rows(piece, wanted.gradients[piece.key])
        error = float((ours - theirs).norm()) / max(float(theirs.norm()), floor)
        if not error < limit_of_gradients:
            yield f"gradient of {piece.key} is off by {error:.2g}"
    for piece in weights if before is not None else []:
        ours, theirs = _common_rows(piece, wanted.weights[piece.key])
        update = float((theirs - _common_rows(piece, before[piece.key])[1]).norm())
        error = float((ours - theirs).norm())
        if not error <= _UPDATE * update + 1e-6 * float(theirs.norm()):
            yield f"{piece.key} is off by {error / max(update, 1e-30):.2g} of its update"


def _common_rows(piece: Piece, whole: Tensor) -> tuple[Tensor, Tensor]:
    """A piece and its place in the whole tensor, both without the padding of the vocabulary."""
    theirs = whole[piece.place]
    return piece.data[: len(theirs)], theirs
