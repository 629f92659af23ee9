"""The chunked LM head against the whole one, and the memory that it takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from megatron_ross.models.lm_head import VocabularyShard, lm_head_loss_sum
from megatron_ross.platform import ensure_platform
from tests.helpers.distributed import run_ranks

NUM_ROWS, HIDDEN, VOCABULARY = 41, 16, 203
EVERYTHING = 10**9


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation inside gives out."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_flatten(result)[0]:
            if isinstance(value, Tensor):
                self.numel = max(self.numel, value.numel())
        return result


def inputs(num_rows: int = NUM_ROWS, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, the whole head and labels; the first and the last token of the vocabulary are among the labels."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(num_rows, HIDDEN, generator=generator).to(dtype)
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator).to(dtype)
    labels = torch.randint(0, VOCABULARY, (num_rows,), generator=generator)
    labels[:2] = torch.tensor([0, VOCABULARY - 1])[:num_rows]
    return rows, weight, labels


def tensor_parallel_shard() -> VocabularyShard:
    """All ranks share the vocabulary. Only the whole head asks Megatron for its group."""
    from megatron.core import parallel_state

    ensure_platform()
    parallel_state.initialize_model_parallel(torch.distributed.get_world_size(), create_gloo_process_groups=False)
    return VocabularyShard(parallel_state.get_tensor_model_parallel_group(), VOCABULARY)


def loss_and_gradients(
    rank: int, world_size: int, chunk_tokens: int, num_rows: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, gradient of the rows summed over ranks, and this rank's part of the head's gradient."""
    rows, weight, labels = inputs(num_rows, dtype)
    padded = F.pad(weight, (0, 0, 0, -VOCABULARY % world_size))
    mine = padded.chunk(world_size)[rank].clone().requires_grad_()
    rows.requires_grad_()
    shard = tensor_parallel_shard()
    loss = lm_head_loss_sum(rows, mine, labels, shard, chunk_tokens=chunk_tokens)
    (loss * 0.7).backward()
    assert rows.grad is not None
    assert mine.grad is not None
    torch.distributed.all_reduce(rows.grad)
    return loss.detach(), rows.grad, mine.grad


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize(
    ("num_rows", "chunk_tokens"),
    [(NUM_ROWS, 1), (NUM_ROWS, 8), (NUM_ROWS, NUM_ROWS - 1), (NUM_ROWS, NUM_ROWS), (NUM_ROWS, 1000), (2, 1), (0, 8)],
)
def test_chunks_equal_plain_cross_entropy(world_size: int, num_rows: int, chunk_tokens: int) -> None:
    """Also where 3 ranks pad the vocabulary: padded ids get neither probability nor gradient."""
    rows, weight, labels = inputs(num_rows)
    rows.requires_grad_()
    weight.requires_grad_()
    expected = F.cross_entropy(rows @ weight.t(), labels, reduction="sum")
    (expected * 0.7).backward()
    results = run_ranks(loss_and_gradients, world_size, chunk_tokens, num_rows, torch.float32)
    for loss, grad_rows, _ in results:
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-6, atol=0)
        torch.testing.assert_close(grad_rows, rows.grad, rtol=1e-5, atol=4e-6)  # a sum over up to 51 blocks
    grad_weight = torch.cat([part for _, _, part in results])
    torch.testing.assert_close(grad_weight[:VOCABULARY], weight.grad, rtol=1e-5, atol=1e-6)
    assert not grad_weight[VOCABULARY:].any()


@pytest.mark.distributed
def test_bf16_chunks_are_as_good_as_the_whole_head() -> None:
    """Both round logits to bf16; their gradients differ by the rounding of a few bf16 numbers."""
    ((whole, whole_rows, whole_weight),) = run_ranks(loss_and_gradients, 1, EVERYTHING, NUM_ROWS, torch.bfloat16)
    ((loss, rows, weight),) = run_ranks(loss_and_gradients, 1, 8, NUM_ROWS, torch.bfloat16)
    torch.testing.assert_close(loss, whole, rtol=1e-6, atol=0)
    torch.testing.assert_close(rows, whole_rows)
    error = (weight.float() - whole_weight.float()).norm() / whole_weight.float().norm()
    assert float(error) < 2**-7


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [1, 3])
def test_bf16_gradients_are_as_exact_in_64_chunks_as_in_one(world_size: int) -> None:
    """Against fp64. A sum over chunks that is kept in bf16 is off by four times as much."""
    exact = [t.double().requires_grad_() if t.is_floating_point() else t for t in inputs(512, torch.bfloat16)]
    rows, weight, labels = exact
    (F.cross_entropy(rows @ weight.t(), labels, reduction="sum") * 0.7).backward()
    errors = []
    for chunk_tokens in (EVERYTHING, 8):
        results = run_ranks(loss_and_gradients, world_size, chunk_tokens, 512, torch.bfloat16)
        grads = results[0][1], torch.cat([part for _, _, part in results])[:VOCABULARY]
        errors.append([float((g.double() - t.grad).norm() / t.grad.norm()) for g, t in zip(grads, exact, strict=False)])
    whole, chunked = errors
    for error, one_chunk in zip(chunked, whole, strict=True):
        assert error < 1.1 * one_chunk, (chunked, whole)


def memory(rank: int, world_size: int, chunk_tokens: int, train_head: bool) -> tuple[int, int]:
    """(largest tensor made, largest tensor kept for backward beside the head itself), in elements."""
    rows, weight, labels = inputs()
    rows.requires_grad_()
    weight.requires_grad_(train_head)
    shard = tensor_parallel_shard()
    kept = [0]

    def keep(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() != weight.data_ptr():
            kept.append(tensor.numel())
        return tensor

    with LargestTensor() as largest, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        lm_head_loss_sum(rows, weight, labels, shard, chunk_tokens=chunk_tokens).backward()
    return largest.numel, max(kept)


@pytest.mark.distributed
@pytest.mark.parametrize("train_head", [True, False])
def test_logits_of_one_chunk_are_the_most_that_exists(train_head: bool) -> None:
    chunk_tokens = 20
    ((largest, kept),) = run_ranks(memory, 1, chunk_tokens, train_head)
    assert largest == chunk_tokens * VOCABULARY  # the head's gradient is smaller: HIDDEN < chunk_tokens
    assert kept == NUM_ROWS * HIDDEN  # the rows
    ((largest, kept),) = run_ranks(memory, 1, EVERYTHING, train_head)
    assert largest >= NUM_ROWS * VOCABULARY
    assert kept == NUM_ROWS * VOCABULARY


@pytest.mark.distributed
def test_a_frozen_head_gets_no_gradient() -> None:
    run_ranks(frozen_head, 1)


def frozen_head(rank: int, world_size: int) -> None:
    rows, weight, labels = inputs()
    shard = tensor_parallel_shard()
    rows.requires_grad_()
    products: list[str] = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
            if "mm" in func.name():
                products.append(func.name())
            return func(*args, **(kwargs or {}))

    loss = lm_head_loss_sum(rows, weight, labels, shard, chunk_tokens=NUM_ROWS - 1)
    with Products():
        loss.backward()
    assert weight.grad is None
    assert len(products) == 2 * 2  # logits again and the rows' gradient, for two chunks
