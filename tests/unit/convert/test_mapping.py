"""Mapping rows: where every row of the inputs ends up, and exact inverses."""

from __future__ import annotations

import pytest
import torch

from megatron_ross.convert.mapping import Direct, GroupedQkv, Part, Stacked, TensorMapping, with_prefix


def test_grouped_qkv_orders_rows_by_query_group() -> None:
    """4 heads of width 2 in 2 groups: group 0 holds queries 0 and 1, key 0, value 0; group 1 the others."""
    mapping = GroupedQkv("qkv", (Part("q", (8, 1)), Part("k", (4, 1)), Part("v", (4, 1))), num_groups=2)
    q = torch.tensor([0, 1, 10, 11, 20, 21, 30, 31]).view(8, 1)
    k = torch.tensor([100, 101, 110, 111]).view(4, 1)
    v = torch.tensor([200, 201, 210, 211]).view(4, 1)
    merged = mapping.merge([q, k, v])
    assert merged.flatten().tolist() == [0, 1, 10, 11, 100, 101, 200, 201, 20, 21, 30, 31, 110, 111, 210, 211]
    assert mapping.shape == tuple(merged.shape)


@pytest.mark.parametrize(
    "mapping",
    [
        Direct("a", (Part("a", (3, 5)),)),
        Stacked("b", (Part("gate", (4, 3)), Part("up", (4, 3)))),
        GroupedQkv("c", (Part("q", (12, 5)), Part("k", (4, 5)), Part("v", (4, 5))), num_groups=2),
        GroupedQkv("d", (Part("q", (12,)), Part("k", (12,)), Part("v", (12,))), num_groups=3),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_split_inverts_merge_bit_for_bit(mapping: TensorMapping, dtype: torch.dtype) -> None:
    tensors = [torch.randn(part.shape).to(dtype) for part in mapping.parts]
    merged = mapping.merge(tensors)
    assert tuple(merged.shape) == mapping.shape
    for original, restored in zip(tensors, mapping.split(merged), strict=True):
        assert torch.equal(original, restored)
        assert restored.is_contiguous()


def test_with_prefix_changes_hugging_face_names_only() -> None:
    row = Stacked("key", (Part("gate", (1, 1)), Part("up", (1, 1))))
    (renamed,) = with_prefix([row], "model.")
    assert renamed.key == "key"
    assert [part.name for part in renamed.parts] == ["model.gate", "model.up"]
    assert isinstance(renamed, Stacked)
