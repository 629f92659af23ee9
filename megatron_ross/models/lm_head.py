"""Letter H: cross entropy of the LM head at supervised positions, with a bound on the memory that logits take.

Up to `chunk_tokens` positions, logits are kept for the backward pass. Beyond, they are made chunk by chunk, reduced to
one log-sum-exp and one target logit per position, and made again in the backward pass: no more than one chunk of
logits ever exists. The backward pass takes all positions and as many rows of the vocabulary as make no more logits: the
weight's gradient is then summed in fp32 within one product per block, and rounded to bf16 once, not once per chunk.

Shape legend: n supervised positions, c positions of a chunk, h hidden size, v this rank's rows of the vocabulary, b of
them in a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron_ross.losses import Observe, lm_loss_sum


@dataclass(frozen=True)
class VocabularyShard:
    """The part of the vocabulary that this tensor-parallel rank holds.

    Args:
        group: the tensor-parallel ranks.
        vocab_size: real tokens; what the padded vocabulary has beyond them never gets probability.
    """

    group: dist.ProcessGroup
    vocab_size: int

    def logits(self, rows: Tensor, weight: Tensor, block: slice = slice(0, None)) -> Tensor:
        """Vocabulary-parallel logits [n, v] of hidden states [n, h], or [n, b] of a block; padded ids are -inf."""
        logits = F.linear(rows, weight[block])
        real = self.vocab_size - self.first_id(weight) - block.start
        if real < logits.shape[1]:
            is_padding = torch.arange(logits.shape[1], device=logits.device) >= real
            logits = logits.masked_fill(is_padding, float("-inf"))
        return logits

    def first_id(self, weight: Tensor) -> int:
        """Token id of the first row of this rank's `weight` [v, h]."""
        return self.group.rank() * weight.shape[0]

    def locate(self, labels: Tensor, weight: Tensor, block: slice = slice(0, None)) -> tuple[Tensor, Tensor]:
        """Column of every label int64 [n] among these logits, 0 for those that are not, and which are, bool [n]."""
        columns = labels - self.first_id(weight) - block.start
        is_mine = (columns >= 0) & (columns < weight[block].shape[0])
        return columns * is_mine, is_mine


def lm_head_loss_sum(
    rows: Tensor,
    weight: Tensor,
    labels: Tensor,
    shard: VocabularyShard,
    *,
    chunk_tokens: int,
    observe: Observe | None = None,
) -> Tensor:
    """Summed cross entropy; fp32 scalar, the same on every tensor-parallel rank.

    Args:
        rows: hidden states at supervised positions [n, h], n may be 0. Their gradient is this rank's part; `to_heads`
            sums the parts.
        weight: this rank's rows of the LM head [v, h].
        labels: int64 [n].
        chunk_tokens: most positions whose logits exist at the same time.
        observe: gets the losses of the tokens, fp32 [n], if there are any.
    """
    if rows.shape[0] <= chunk_tokens:
        return lm_loss_sum(shard.logits(rows, weight), labels, observe)
    return _ChunkedCrossEntropy.apply(rows, weight, labels, shard, chunk_tokens, observe)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Keeps rows, weight, labels and one fp32 number per position; ranks meet twice however many chunks there are."""

    @staticmethod
    def forward(
        ctx,
        rows: Tensor,
        weight: Tensor,
        labels: Tensor,
        shard: VocabularyShard,
        chunk_tokens: int,
        observe: Observe | None,
    ) -> Tensor:
        parts = [
            _reduce_chunk(rows[chunk], weight, labels[chunk], shard) for chunk in _chunks(rows.shape[0], chunk_tokens)
        ]
        log_normaliser, target = (torch.cat(values) for values in zip(*parts, strict=True))
        log_normaliser, target = _join_shards(log_normaliser, target, shard.group)
        ctx.save_for_backward(rows, weight, labels, log_normaliser)
        ctx.shard, ctx.chunk_tokens = shard, chunk_tokens
        losses = log_normaliser - target
        if observe is not None:
            observe(losses)
        return losses.sum()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        rows, weight, labels, log_normaliser = ctx.saved_tensors
        wants_rows, wants_weight = ctx.needs_input_grad[:2]
        grad_rows = torch.zeros_like(rows, dtype=torch.float32) if wants_rows else None
        grad_weight = torch.empty_like(weight) if wants_weight else None
        block_size = max(1, weight.shape[0] * ctx.chunk_tokens // rows.shape[0])
        for block in _chunks(weight.shape[0], block_size):
            grad_logits = _logits_gradient(rows, weight, block, labels, log_normaliser, ctx.shard, grad)
            if grad_rows is not None:
                grad_rows += _fp32_product(grad_logits, weight[block])
            if grad_weight is not None:
                torch.mm(grad_logits.t(), rows, out=grad_weight[block])
        return None if grad_rows is None else grad_rows.to(rows.dtype), grad_weight, None, None, None, None


def _fp32_product(a: Tensor, b: Tensor) -> Tensor:
    """a b in float32, whatever the dtype of the two: parts of a sum must not be rounded to bf16 one by one."""
    if a.dtype != torch.float32 and a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)  # type: ignore[call-overload]
    return torch.mm(a.float(), b.float())


def _chunks(n: int, size: int) -> Iterator[slice]:
    for start in range(0, n, size):
        yield slice(start, min(n, start + size))


def _reduce_chunk(rows: Tensor, weight: Tensor, labels: Tensor, shard: VocabularyShard) -> tuple[Tensor, Tensor]:
    """Of this rank's logits: log of the sum of exponentials, and the label's logit (0 if another rank has it)."""
    logits = shard.logits(rows, weight).float()
    columns, is_mine = shard.locate(labels, weight)
    target = logits.gather(1, columns[:, None]).squeeze(1)
    return logits.logsumexp(1), torch.where(is_mine, target, 0.0)


def _join_shards(log_normaliser: Tensor, target: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """The same two numbers over the whole vocabulary, float32 [n] each."""
    if group.size() == 1:
        return log_normaliser, target
    largest = log_normaliser.clone()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    sums = torch.stack([(log_normaliser - largest).exp(), target])
    dist.all_reduce(sums, group=group)
    return sums[0].log() + largest, sums[1]


def _logits_gradient(
    rows: Tensor,
    weight: Tensor,
    block: slice,
    labels: Tensor,
    log_normaliser: Tensor,
    shard: VocabularyShard,
    grad: Tensor,
) -> Tensor:
    """(softmax - one-hot) x grad for a block of this rank's vocabulary, [n, b] in the dtype of `rows`."""
    probabilities = (shard.logits(rows, weight, block).float() - log_normaliser[:, None]).exp_()
    columns, is_mine = shard.locate(labels, weight, block)
    probabilities.scatter_add_(1, columns[:, None], -is_mine.to(probabilities.dtype)[:, None])
    return probabilities.mul_(grad).to(rows.dtype)
