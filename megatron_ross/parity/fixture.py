"""Reads a directory of recorded reference cases (its metadata.json describes it) and turns cases into microbatches.

Nothing about a particular fixture is assumed: sizes, texts, seeds and denoiser widths come from its files.
"""

from __future__ import annotations

import functools
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_ross.config.model import IGNORE_LABEL, IMAGE_TOKEN_ID, RossModelConfig
from megatron_ross.data.batch import ImageSpan, NoiseDraws, RossMicrobatch, RossSample
from megatron_ross.data.collate import collate
from megatron_ross.parallel.groups import ParallelGroups

_LISTED = 5


class FixtureError(ValueError):
    """The fixture cannot be used; the message names the file and what is wrong with it."""


@dataclass(frozen=True)
class Case:
    """One recorded batch: tensors `in.*`, `draw.*` and `out.*`, and what is special about it."""

    letter: str
    tensors: dict[str, Tensor]
    reconstructs: bool
    max_length: int | None = None
    gradients: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # stage1 / stage2 -> HF name -> gradient


@dataclass(frozen=True)
class FixtureModel:
    """One model of a fixture."""

    name: str
    root: Path
    metadata: dict[str, Any]
    tolerances: dict[str, Any]
    files: dict[str, Any] = field(default_factory=dict)  # what every tensor file should hold, by relative path

    @property
    def goldens(self) -> Path:
        return self.root / "goldens" / self.name

    @property
    def checkpoint(self) -> Path:
        return self.root / self.metadata["composite"]

    def tensors(self, name: str) -> dict[str, Tensor]:
        """All tensors of one of this model's files; do not write to them."""
        return self.read(self.goldens / name)

    def read(self, path: Path) -> dict[str, Tensor]:
        """All tensors of a file of the fixture, which are what its metadata promises, and finite.

        Raises:
            FixtureError: they are not; the message names the file and the tensors.
        """
        tensors = read_tensors(path)
        entry = self.files.get(path.relative_to(self.root).as_posix(), {})
        check_tensors(path, tensors, entry.get("tensors"))
        return tensors

    def json(self, name: str) -> Any:
        return _read_json(self.goldens / name)

    def tolerance(self, name: str, default: float) -> float:
        """The looser of ours and the fixture's own."""
        return max(default, float(self.tolerances.get(name, 0.0)))

    def case_letters(self) -> list[str]:
        return sorted(self.metadata["losses"])

    def case(self, letter: str) -> Case:
        """A recorded case; those that share another's inputs or draws are completed from it."""
        found = sorted(self.goldens.glob(f"case_{letter}_*.safetensors"))
        recorded = [path for path in found if "_grads_" not in path.name]
        tensors = self.read(recorded[0]) if recorded else {}
        reference = self._donor(letter, tensors)
        merged = {k: v for k, v in reference.items() if not k.startswith("out.")} | tensors
        losses = self.metadata["losses"][letter]
        gradients = {
            stage: self.read(path)
            for stage in ("stage1", "stage2")
            for path in found
            if path.name == f"case_{letter}_grads_{stage}.safetensors"
        }
        return Case(letter, merged, "vm_loss" in losses, losses.get("tokenizer_model_max_length"), gradients)

    def _donor(self, letter: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Case `a` lends its inputs and draws; a text-only case lends draws of a batch of the same size (`b`)."""
        if "in.input_ids" not in tensors:
            return self._recorded("a")
        if "draw.t" not in tensors and "vm_loss" in self.metadata["losses"][letter]:
            return {k: v for k, v in self._recorded("b").items() if k.startswith("draw.")}
        return {}

    def _recorded(self, letter: str) -> dict[str, Tensor]:
        paths = [p for p in sorted(self.goldens.glob(f"case_{letter}_*.safetensors")) if "_grads_" not in p.name]
        if not paths:
            raise FixtureError(f"{self.goldens}: no file case_{letter}_*.safetensors")
        return self.read(paths[0])


def load_fixture(root: Path, only: str | None = None) -> list[FixtureModel]:
    """All models of a fixture.

    Raises:
        FixtureError: not a fixture, or it has no model of that name.
    """
    metadata = _read_json(root / "metadata.json")
    if not isinstance(metadata, dict) or "models" not in metadata:
        raise FixtureError(f"{root / 'metadata.json'}: no entry `models`; not a directory of recorded cases")
    names = list(metadata["models"]) if only is None else [only]
    if missing := set(names) - set(metadata["models"]):
        raise FixtureError(f"{root}: no model {missing.pop()!r}; it has {', '.join(metadata['models'])}")
    tolerances, files = metadata.get("tolerances", {}), metadata.get("files", {})
    models = [FixtureModel(n, root, metadata["models"][n], tolerances, files) for n in names]
    for model in models:
        _check_metadata(model)
    return models


def _check_metadata(model: FixtureModel) -> None:
    """What every check relies on is there, before any rank waits for another: entries, and the files of all cases."""
    where = f"{model.root / 'metadata.json'}: models.{model.name}"
    for name in ("composite", "vision_tower", "auto_encoder", "losses", "gradient_norms", "sampling"):
        if name not in model.metadata:
            raise FixtureError(f"{where} has no entry {name!r}")
    for letter, losses in model.metadata["losses"].items():
        for name in ("lm_loss", "loss"):
            if not isinstance(losses.get(name), int | float) or not math.isfinite(losses[name]):
                raise FixtureError(
                    f"{where}.losses.{letter}.{name} is {losses.get(name)!r}, it must be a finite number"
                )
        case = model.case(letter)
        needed = [f"in.{name}" for name in ("input_ids", "labels", "attention_mask")]
        needed += [f"draw.{name}" for name in ("t", "eps", "vae_noise")] if case.reconstructs else []
        if missing := [name for name in needed if name not in case.tensors]:
            raise FixtureError(f"{model.goldens}: case {letter} has no tensor {', '.join(missing)}")


def check_tensors(path: Path, tensors: dict[str, Tensor], declared: dict[str, Any] | None) -> None:
    """The tensors of a file are finite and, where `declared` (name -> {"shape": ...}), exactly those.

    Raises:
        FixtureError: names the file and the first offenders.
    """
    problems = [f"{name} holds NaN or Inf" for name, t in tensors.items() if not bool(torch.isfinite(t).all())]
    if declared is not None:
        problems += [f"{name} is missing" for name in declared if name not in tensors]
        problems += [f"{name} is not in metadata.json" for name in tensors if name not in declared]
        problems += [
            f"{name} is {list(tensors[name].shape)}, metadata.json says {entry['shape']}"
            for name, entry in declared.items()
            if name in tensors and list(tensors[name].shape) != entry["shape"]
        ]
    if problems:
        more = f" and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
        raise FixtureError(f"{path}: {'; '.join(problems[:_LISTED])}{more}")


@functools.lru_cache(maxsize=8)
def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file; callers must not change them."""
    try:
        return load_file(path)
    except Exception as error:  # missing, truncated, not safetensors: all the same to the user
        raise FixtureError(f"{path}: {error}") from error


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise FixtureError(f"{path}: {error}") from error


def case_samples(case: Case, model: RossModelConfig) -> list[RossSample]:
    """Recorded rows as samples with images expanded to spans; every row consumes at least one image, as recorded.

    Raises:
        FixtureError: the case was recorded with another vocabulary, image size or latent size than the model has.
    """
    _check_case(case, model)
    ids, labels, mask = (case.tensors[f"in.{name}"] for name in ("input_ids", "labels", "attention_mask"))
    size = model.vision.image_size
    images = case.tensors.get("in.images", torch.zeros(len(ids), 3, size, size))
    samples, next_image = [], 0
    for row in range(len(ids)):
        kept = mask[row] == 1
        sample, used = _expand(row, ids[row][kept], labels[row][kept], images[next_image:], model, case)
        samples.append(sample)
        next_image += max(1, used)
    return samples


def _check_case(case: Case, model: RossModelConfig) -> None:
    vocab_size, size, grid = model.language.vocab_size, model.vision.image_size, model.vision.grid_size
    for name in ("in.input_ids", "in.labels"):
        if (highest := int(case.tensors[name].max())) >= vocab_size:
            raise FixtureError(
                f"case {case.letter}: {name} holds id {highest}, but the checkpoint has a vocabulary of {vocab_size}"
            )
    expected = {"in.images": [3, size, size]}
    if case.reconstructs and model.vae is not None:
        channels = model.vae.latent_channels
        expected |= {"draw.eps": [4 * channels, grid, grid], "draw.vae_noise": [channels, 2 * grid, 2 * grid]}
    for name, shape in expected.items():
        if name in case.tensors and list(case.tensors[name].shape[1:]) != shape:
            found = list(case.tensors[name].shape)
            raise FixtureError(
                f"case {case.letter}: {name} is {found}, but the checkpoint needs [..., {str(shape)[1:]}"
            )


def _expand(
    row: int, ids: Tensor, labels: Tensor, images: Tensor, model: RossModelConfig, case: Case
) -> tuple[RossSample, int]:
    num_tokens = model.vision.num_image_tokens
    pieces: list[Tensor] = []
    targets: list[Tensor] = []
    spans: list[ImageSpan] = []
    length = 0
    for token, label in zip(ids.tolist(), labels.tolist(), strict=True):
        is_image = token == IMAGE_TOKEN_ID
        if is_image:
            index = len(spans)
            spans.append(ImageSpan(length, index, functools.partial(images.__getitem__, index), case.reconstructs))
        count = num_tokens if is_image else 1
        pieces.append(torch.full((count,), token))
        targets.append(torch.full((count,), IGNORE_LABEL if is_image else label))
        length += count
    stop = case.max_length
    return RossSample(row, torch.cat(pieces)[:stop], torch.cat(targets)[:stop], tuple(spans)), len(spans)


def microbatches(
    samples: list[RossSample],
    draws: NoiseDraws | None,
    model: RossModelConfig,
    groups: ParallelGroups,
    *,
    micro_batch_size: int,
    seq_multiple: int,
) -> list[RossMicrobatch]:
    """This data-parallel rank's microbatches; sample j goes where the loader would put it."""
    dp = groups.dp.size()
    if len(samples) % (micro_batch_size * dp):
        raise FixtureError(
            f"a recorded batch has {len(samples)} samples: micro_batch_size {micro_batch_size} x data-parallel size "
            f"{dp} must divide it"
        )
    longest = max(len(sample.input_ids) for sample in samples)
    seq_length = -(-longest // seq_multiple) * seq_multiple
    batches = []
    for start in range(groups.dp.rank() * micro_batch_size, len(samples), micro_batch_size * dp):
        rows = slice(start, start + micro_batch_size)
        batch = collate(
            [(0, sample) for sample in samples[rows]],
            seq_length,
            image_size=model.vision.image_size,
            tp_rank=groups.tp.rank(),
            tp_size=groups.tp.size(),
            reference_dummy_images=draws is not None,
        )
        if draws is not None:
            batch.draws = NoiseDraws(draws.t[:, rows], draws.eps[:, rows], draws.posterior[rows])
        batches.append(batch)
    return batches


def recorded_draws(t: Tensor, eps: Tensor, posterior: Tensor) -> NoiseDraws:
    """Draws as recorded, [4B, ...] with index r*B + b, in our shapes [K, n, ...]."""
    num_images = posterior.shape[0]
    return NoiseDraws(t.view(-1, num_images), eps.view(-1, num_images, *eps.shape[1:]), posterior)
