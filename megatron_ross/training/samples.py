"""Pictures and answers while a run trains: held-out images painted from the model's outputs, questions answered.

The last data-parallel replica makes them, in the foreground. The other replicas begin the next step at once, but wait
at its first collective until this one has joined them: the run stands still for as long as answers and pictures take.
The replica's last tensor-parallel rank with the denoiser paints; the run's logging rank, which is of the same replica,
waits for the pictures and writes them:

    <save>/samples/iteration-0000100.png    a row per image: input, round trip through the VAE, reconstruction
    <save>/samples/iteration-0000100.json   question, expected answer, answer
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

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
from megatron_ross.data.tokenizer import TextTokenizer
from megatron_ross.models.latents import LatentEncoder
from megatron_ross.models.pictures import to_bytes
from megatron_ross.models.ross_stage import RossStage
from megatron_ross.parallel.groups import ParallelGroups
from megatron_ross.platform import current_device
from megatron_ross.training.data import TrainingSet
from megatron_ross.training.forward_only import forward_only
from megatron_ross.training.greedy import ForwardPasses, greedy_tokens

_CANDIDATES = 256
NUM_PANELS = 3


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
    """`panels` uint8 [n, 3, 3, S, S]: per image input, VAE round trip, reconstruction; RGB. None without denoiser."""

    answers: list[Answer]
    panels: Tensor | None
    seconds: float


class SampleMaker:
    """Chooses samples once, and runs them through the model when asked. Making it is a collective call.

    Args:
        dataset, ids: held-out samples; the first of them that have images are taken.
        encoder: loads the VAE where the model has none at hand (`latent_cache`).
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
        self._tokenizer, self._load_encoder = tokenizer, encoder
        self._encoder: LatentEncoder | None = None
        settings = run.observation
        num_pictures = settings.num_pictures if denoiser_pp_rank is not None else 0
        chosen = _choose(dataset, ids, max(num_pictures, settings.num_answers))
        self._questions = [question for question, _ in chosen]
        self._records = [record for _, record in chosen]
        self._num_answers = min(len(chosen), settings.num_answers)
        self._pictured = [i for i, question in enumerate(self._questions) if question.images][:num_pictures]
        self._painter = None if denoiser_pp_rank is None else dist.get_global_rank(groups.pp, denoiser_pp_rank)

    def run(self) -> Samples | None:
        """Answers and pictures, on the logging rank; None elsewhere, and where there is nothing to do. Collective."""
        begin = time.perf_counter()
        if not self._questions or not (self._num_answers or self._pictured):
            return None
        with forward_only(self._chunks):
            if self._groups.dp.rank() != self._groups.dp.size() - 1:
                return None
            settings, questions = self._run.observation, self._questions
            max_new_tokens = settings.answer_max_new_tokens if self._num_answers else 0
            passes = ForwardPasses(
                self._run, self._chunks, self._groups, questions, max_new_tokens, self._model.vision.image_size
            )
            tokens, conditions = greedy_tokens(passes, len(questions), max_new_tokens, self._stop_ids())
            panels = self._paint(conditions) if self._pictured else None
        if not self._groups.is_logging_rank:
            return None
        return Samples(self._answers(tokens), panels, time.perf_counter() - begin)

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

    def _paint(self, conditions: list[Tensor]) -> Tensor | None:
        """The panels on the logging rank, which gets them from the painting rank; None on all others."""
        painter, logger = self._painter, dist.get_world_size() - 1
        if self._groups.tp.rank() != self._groups.tp.size() - 1:
            return None
        if dist.get_rank() == painter:
            panels = self._panels(torch.stack([conditions[i] for i in self._pictured]))
            if painter != logger:
                dist.send(panels, logger)
            return panels
        if dist.get_rank() == logger:
            side = 16 * self._model.vision.grid_size
            panels = torch.empty(
                len(self._pictured), NUM_PANELS, 3, side, side, dtype=torch.uint8, device=current_device()
            )
            dist.recv(panels, painter)
            return panels
        return None

    def _panels(self, conditions: Tensor) -> Tensor:
        head = next(chunk.module for chunk in self._chunks if _has_denoiser(chunk.module)).reconstruction
        encoder = head.latent_encoder or self._own_encoder()
        images = [self._questions[i].images[0].load_pixels() for i in self._pictured]
        pixels = torch.stack(images).to(current_device())
        latents = head.sample_latents(conditions, self._run.observation.picture_steps, range(len(images)))
        columns = [encoder.vae_input(pixels), encoder.round_trip(pixels), encoder.decode_latents(latents)]
        return torch.stack([to_bytes(column) for column in columns], dim=1)

    def _own_encoder(self) -> LatentEncoder:
        if self._encoder is None:
            self._encoder = self._load_encoder().to(current_device())
        return self._encoder


def _has_denoiser(stage: RossStage) -> bool:
    return stage.spec.has("D")


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
