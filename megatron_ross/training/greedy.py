"""Greedy answers and image conditions from a model that lies over ranks as it trains.

Every token is a forward-only pass of whole sequences through Megatron's schedule: no cache, no other way through the
model than training's. One data-parallel replica does it, and all of its ranks learn every token, so they stop together.

Shape legend: n questions, s tokens, N tokens per image, h hidden size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from megatron_ross.config.features import sequence_multiple
from megatron_ross.config.model import IGNORE_LABEL
from megatron_ross.config.schema import RunConfig
from megatron_ross.data.batch import RossMicrobatch, RossSample
from megatron_ross.data.collate import collate
from megatron_ross.losses import LossScales
from megatron_ross.models.ross_stage import RossStage
from megatron_ross.parallel.groups import ParallelGroups
from megatron_ross.platform import current_device
from megatron_ross.training.step import run_schedule


class ForwardPasses:
    """Passes of the same questions, each longer by a token than before. All ranks of a replica call it alike.

    Args:
        questions: not empty; every rank has the pixels of their images.
        max_new_tokens: most tokens that will be appended.
    """

    def __init__(
        self,
        run: RunConfig,
        chunks: list[DistributedDataParallel],
        groups: ParallelGroups,
        questions: Sequence[RossSample],
        max_new_tokens: int,
        image_size: int,
    ) -> None:
        self._chunks, self._groups, self._image_size = chunks, groups, image_size
        self._questions = list(questions)
        multiple = sequence_multiple(run)
        self._length = -(-(max(len(q.input_ids) for q in questions) + max_new_tokens) // multiple) * multiple
        # As many microbatches as pipeline ranks, which the interleaved schedule needs; the last question fills up.
        self._num_rows = -(-len(self._questions) // groups.pp.size())
        self._conditions: list[Tensor] = []
        self._tokens: list[Tensor] = []

    def run(self, appended: Sequence[Sequence[int]]) -> tuple[list[int], list[Tensor]]:
        """One pass.

        Args:
            appended: tokens behind each question, n lists.

        Returns:
            The next token of each question, and on the ranks with the denoiser what it sees of each question's first
            image, [N, h] (of questions without image: nothing useful). Elsewhere the second list is empty.
        """
        self._conditions, self._tokens = [], []
        batches = self._batches(appended)
        try:
            for chunk in self._chunks:
                chunk.module.on_heads = self._read
            run_schedule(self._chunks, batches, [LossScales(0.0, 0.0)] * len(batches), forward_only=True)
        finally:
            for chunk in self._chunks:
                chunk.module.on_heads = None
        n = len(self._questions)
        tokens = torch.full((self._num_rows * len(batches),), -1, device=current_device())
        if self._tokens:
            tokens = torch.cat(self._tokens)
        dist.all_reduce(tokens, op=dist.ReduceOp.MAX, group=self._groups.model_parallel)
        return tokens[:n].tolist(), [row for rows in self._conditions for row in rows][:n]

    def _batches(self, appended: Sequence[Sequence[int]]) -> list[RossMicrobatch]:
        samples = [_longer(q, tokens) for q, tokens in zip(self._questions, appended, strict=True)]
        samples += [samples[-1]] * (self._num_rows * self._groups.pp.size() - len(samples))
        return [
            collate(
                [(0, sample) for sample in samples[start : start + self._num_rows]],
                self._length,
                image_size=self._image_size,
                tp_rank=self._groups.tp.rank(),
                tp_size=self._groups.tp.size(),
                want_pixels=any(chunk.module.spec.has("V") for chunk in self._chunks),
            ).to(current_device())
            for start in range(0, len(samples), self._num_rows)
        ]

    def _read(self, stage: RossStage, hidden: Tensor, batch: RossMicrobatch) -> None:
        if stage.spec.has("H"):
            last = torch.tensor(batch.lengths, device=hidden.device) - 1
            rows = hidden[last, torch.arange(len(batch.lengths), device=hidden.device)]
            self._tokens.append(_likeliest(stage.logits(rows), self._groups.tp))
        if stage.spec.has("D"):
            images = stage.reconstruction.image_conditions(hidden, batch)
            self._conditions.append(_first_of_each_row(images, batch))


def greedy_tokens(
    passes: ForwardPasses, num_questions: int, max_new_tokens: int, stop_ids: frozenset[int]
) -> tuple[list[list[int]], list[Tensor]]:
    """The likeliest tokens behind each question, up to a stop token (left out), and the conditions of the first pass.

    `max_new_tokens` 0 makes the one pass that the conditions need.
    """
    answers: list[list[int]] = [[] for _ in range(num_questions)]
    is_done = [max_new_tokens == 0] * num_questions
    conditions: list[Tensor] = []
    for number in range(max(1, max_new_tokens)):
        tokens, seen = passes.run(answers)
        conditions = conditions if number else seen
        for i, token in enumerate(tokens):
            is_done[i] = is_done[i] or token in stop_ids
            if not is_done[i]:
                answers[i].append(token)
        if all(is_done):
            break
    return answers, conditions


def _longer(question: RossSample, tokens: Sequence[int]) -> RossSample:
    ids = torch.cat([question.input_ids, torch.tensor(tokens, dtype=torch.int64)])
    return dataclasses.replace(question, input_ids=ids, labels=torch.full_like(ids, IGNORE_LABEL))


def _likeliest(logits: Tensor, tp: dist.ProcessGroup) -> Tensor:
    """int64 [n]: the vocabulary's largest of logits [n, v/tp], the first of equal ones; the same on all ranks."""
    value, column = logits.float().max(dim=-1)
    pairs = torch.stack([value.double(), (column + tp.rank() * logits.shape[1]).double()])
    gathered = [torch.empty_like(pairs) for _ in range(tp.size())]
    dist.all_gather(gathered, pairs, group=tp)
    values, ids = torch.stack(gathered, dim=1)
    return ids.gather(0, values.argmax(dim=0, keepdim=True)).squeeze(0).long()


def _first_of_each_row(images: Tensor, batch: RossMicrobatch) -> Tensor:
    """[n, N, h] of all images -> [rows, N, h]; zeros for rows without one."""
    row_length = batch.tokens.shape[1]
    rows = (batch.recon_start // row_length).tolist()
    first = images.new_zeros(batch.tokens.shape[0], *images.shape[1:])
    for i in reversed(range(len(rows))):
        first[rows[i]] = images[i]
    return first
