"""Pictures and answers while a run trains: held-out images painted from the model's outputs, questions answered.

The last data-parallel replica makes them. Its forward passes, one per token of an answer, are in the foreground: the
other replicas begin the next step at once, but wait at its first collective until this one has joined them. Painting
is not: the replica's last tensor-parallel rank with the denoiser paints in a thread (`painter`) while all go on.

    <save>/samples/iteration-0000100.png    a row per image: input, round trip through the VAE, reconstruction
    <save>/samples/iteration-0000100.json   question, expected answer, answer
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from megatron_ross.config.model import RossModelConfig
from megatron_ross.config.schema import RunConfig
from megatron_ross.data.batch import RossSample
from megatron_ross.data.conversation import END_TOKENS, first_question
from megatron_ross.data.errors import SampleError
from megatron_ross.data.records import Record
from megatron_ross.data.run_files import RunFiles
from megatron_ross.data.tokenizer import TextTokenizer
from megatron_ross.models.latents import LatentEncoder
from megatron_ross.parallel.groups import ParallelGroups
from megatron_ross.platform import current_device
from megatron_ross.training.data import TrainingSet
from megatron_ross.training.forward_only import forward_only
from megatron_ross.training.greedy import ForwardPasses, greedy_tokens
from megatron_ross.training.painter import Painter

_CANDIDATES = 256
_FOLDER = "samples"


@dataclass(frozen=True)
class Answer:
    """Of one held-out sample; `expected` is the record's."""

    sample_id: int
    images: list[str]
    question: str
    expected: str
    answer: str


@dataclass(frozen=True)
class Samples:
    """`picture` is the file with the pictures, which comes later; None where none are painted."""

    answers: list[Answer]
    picture: Path | None
    seconds: float


def sample_path(save: str | Path, iteration: int, suffix: str) -> Path:
    """File with the pictures (`.png`) or answers (`.json`) of an iteration."""
    return Path(save) / _FOLDER / f"iteration-{iteration:07d}{suffix}"


def drop_samples_after(save: Path, iteration: int) -> None:
    """Remove files of later iterations, so that a picture that is there has been painted by this run."""
    for path in (save / _FOLDER).glob("iteration-*"):
        found = re.match(r"iteration-(\d+)\.", path.name)
        if found is not None and int(found[1]) > iteration:
            path.unlink()


class SampleMaker:
    """Chooses samples once, and runs them through the model when asked. Making it is a collective call.

    Args:
        dataset, ids: held-out samples; the first of them that have images are taken.
        encoder: loads the VAE for the painting rank where its model has none (`latent_cache`).
        denoiser_pp_rank: pipeline rank with the denoiser; None: plain LLaVA.
    """

    def __init__(
        self,
        run: RunConfig,
        model: RossModelConfig,
        chunks: list[DistributedDataParallel],
        groups: ParallelGroups,
        dataset: TrainingSet,
        ids: Sequence[int],
        tokenizer: TextTokenizer,
        encoder: Callable[[], LatentEncoder],
        denoiser_pp_rank: int | None,
    ) -> None:
        self._run, self._model, self._chunks, self._groups = run, model, chunks, groups
        self._tokenizer = tokenizer
        settings = run.observation
        num_pictures = settings.num_pictures if denoiser_pp_rank is not None else 0
        chosen = _choose(dataset, ids, max(num_pictures, settings.num_answers))
        self._questions = [question for question, _ in chosen]
        self._records = [record for _, record in chosen]
        self._num_answers = min(len(chosen), settings.num_answers)
        self._pictured = [i for i, question in enumerate(self._questions) if question.images][:num_pictures]
        self._painter: Painter | None = None
        heads = [chunk.module.reconstruction for chunk in chunks if chunk.module.spec.has("D")]
        if heads and self._pictured and self._is_last_replica and groups.tp.rank() == groups.tp.size() - 1:
            self._painter = Painter(heads[0], encoder, settings.picture_steps, RunFiles.of(run))

    @property
    def _is_last_replica(self) -> bool:
        return self._groups.dp.rank() == self._groups.dp.size() - 1

    def run(self, iteration: int) -> Samples | None:
        """Make answers and begin to paint; on the logging rank what was made, elsewhere None. A collective call."""
        begin = time.perf_counter()
        if not self._questions or not (self._num_answers or self._pictured):
            return None
        with forward_only(self._chunks):
            if not self._is_last_replica:
                return None
            settings, questions = self._run.observation, self._questions
            max_new_tokens = settings.answer_max_new_tokens if self._num_answers else 0
            passes = ForwardPasses(
                self._run, self._chunks, self._groups, questions, max_new_tokens, self._model.vision.image_size
            )
            tokens, conditions = greedy_tokens(passes, len(questions), max_new_tokens, self._stop_ids())
            picture = sample_path(self._run.training.save, iteration, ".png") if self._pictured else None
            if self._painter is not None and picture is not None:
                pixels = torch.stack([self._questions[i].images[0].load_pixels() for i in self._pictured])
                wanted = torch.stack([conditions[i] for i in self._pictured])
                self._painter.start(wanted, pixels.to(current_device()), picture)
        if not self._groups.is_logging_rank:
            return None
        return Samples(self._answers(tokens), picture, time.perf_counter() - begin)

    def finish(self) -> None:
        """Wait for the pictures in work: after it, they are in the run folder. A collective call."""
        if self._painter is not None:
            self._painter.finish()
        dist.barrier()

    def _stop_ids(self) -> frozenset[int]:
        """What ends an answer; a caption of the `plain` template ends with its line instead."""
        token = END_TOKENS.get(self._run.data.template)
        stop_id = None if token is None else self._tokenizer.token_id(token)
        return frozenset() if stop_id is None else frozenset([stop_id])

    def _answers(self, tokens: Sequence[Sequence[int]]) -> list[Answer]:
        answers = []
        for question, record, ids in list(zip(self._questions, self._records, tokens, strict=True))[
            : self._num_answers
        ]:
            expected = next((turn.text for turn in record.turns if turn.role == "gpt"), "")
            text = self._tokenizer.decode(ids).strip()
            if self._run.data.template == "plain":
                text = text.partition("\n")[0]
            answers.append(
                Answer(question.sample_id, list(record.images), first_question(record.turns), expected, text)
            )
        return answers


def _choose(dataset: TrainingSet, ids: Sequence[int], count: int) -> list[tuple[RossSample, Record]]:
    """Up to `count` of the samples, those with images first, all images decoded. The same on all ranks: a sample that
    is broken for one of them is broken for all."""
    found: dict[int, tuple[RossSample, Record]] = {}
    candidates = sorted(ids[:_CANDIDATES], key=lambda i: not _has_image(dataset, i))
    chosen: list[tuple[RossSample, Record]] = []
    for start in range(0, len(candidates), max(1, count)):
        part = candidates[start : start + count]
        is_broken = torch.zeros(len(part), dtype=torch.int32)
        for place, sample_id in enumerate(part):
            try:
                found[sample_id] = _decoded(dataset.question(sample_id)), dataset.record(sample_id)
            except SampleError:
                is_broken[place] = 1
        is_broken = is_broken.to(current_device())
        dist.all_reduce(is_broken, op=dist.ReduceOp.MAX)
        chosen += [found[i] for i, broken in zip(part, is_broken.tolist(), strict=True) if not broken]
        if len(chosen) >= count:
            break
    return chosen[:count]


def _has_image(dataset: TrainingSet, sample_id: int) -> bool:
    try:
        return bool(dataset.record(sample_id).images)
    except SampleError:
        return False


def _decoded(question: RossSample) -> RossSample:
    """With pixels in memory: they are asked for in every pass. Raises ImageError."""
    images = tuple(replace(span, load_pixels=_kept(span.load_pixels())) for span in question.images)
    return replace(question, images=images)


def _kept(pixels: Tensor) -> Callable[[], Tensor]:
    return lambda: pixels
