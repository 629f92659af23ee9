"""The microbatch contract: positions, shifted labels, shares of images, packs."""

from __future__ import annotations

import pytest
import torch

from megatron_ross.config.model import IMAGE_TOKEN_ID
from megatron_ross.data.batch import ImageSpan, RossSample
from megatron_ross.data.collate import collate, collate_packed, image_share

P, N = 4, 3  # image side, tokens per image


def _sample(sample_id: int, layout: str, **span) -> RossSample:
    """`layout`: one letter per part, i = image (N tokens), q = ignored token, a = supervised token."""
    ids: list[int] = []
    labels: list[int] = []
    images: list[ImageSpan] = []
    for letter in layout:
        if letter == "i":
            value = float(sample_id * 10 + len(images))
            load = lambda value=value: torch.full((3, P, P), value)  # noqa: E731
            images.append(ImageSpan(len(ids), len(images), load, **span))
            ids += [IMAGE_TOKEN_ID] * N
            labels += [-100] * N
        else:
            ids.append(100 + len(ids))
            labels.append(ids[-1] if letter == "a" else -100)
    return RossSample(sample_id, torch.tensor(ids), torch.tensor(labels), tuple(images))


SAMPLES = [(0, _sample(5, "qiqa")), (0, _sample(6, "qqaa")), (1, _sample(7, "iiaqa"))]


def test_padded_microbatch():
    batch = collate(SAMPLES, 12, image_size=P)
    assert batch.tokens.shape == (3, 12)
    assert batch.tokens[0].tolist() == [100, 0, 0, 0, 104, 105, 0, 0, 0, 0, 0, 0]
    assert batch.labels[0].tolist() == [-100] * 4 + [105] + [-100] * 7
    assert batch.labels[1].tolist() == [-100, 102, 103] + [-100] * 9
    assert batch.position_ids.tolist() == [list(range(12))] * 3
    assert batch.image_mask.sum(1).tolist() == [N, 0, 2 * N]
    assert batch.num_images == 3
    assert batch.recon_start.tolist() == [1, 24, 27]
    assert batch.recon_weight.tolist() == [1, 1, 1]
    assert batch.noise_keys.tolist() == [[0, 5, 0], [1, 7, 0], [1, 7, 1]]
    assert batch.sample_ids == [5, 6, 7]
    assert batch.num_supervised_tokens == 5
    assert batch.pixels[:, 0, 0, 0].tolist() == [50, 70, 71]
    assert batch.cu_seqlens is None


def test_first_token_is_never_a_target():
    batch = collate([(0, _sample(1, "aa"))], 2, image_size=P)
    assert batch.labels.tolist() == [[101, -100]]


def test_too_long_sample_is_refused():
    with pytest.raises(ValueError, match="sample 7 has 9 tokens"):
        collate(SAMPLES, 8, image_size=P)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("n", [0, 1, 3, 8])
def test_shares_are_contiguous_and_complete(n, size):
    shares = [image_share(n, rank, size) for rank in range(size)]
    assert [i for share in shares for i in share] == list(range(n))
    assert max(len(share) for share in shares) == -(-n // size)


def test_each_rank_decodes_its_share_only():
    asked: list[int] = []

    def load(spans):
        asked.append(len(spans))
        return [span.load_pixels() for span in spans]

    parts = [collate(SAMPLES, 12, image_size=P, tp_rank=r, tp_size=4, load=load).pixels for r in range(4)]
    assert asked == [1, 1, 1, 0]
    assert torch.equal(torch.cat(parts), collate(SAMPLES, 12, image_size=P).pixels)
    assert parts[3].shape == (0, 3, P, P)
    assert collate(SAMPLES, 12, image_size=P, want_pixels=False).pixels is None


def test_dummy_images_of_reference_mode():
    batch = collate(SAMPLES, 12, image_size=P, reference_dummy_images=True)
    assert batch.num_images == 4
    assert batch.recon_start.tolist() == [1, -1, 24, 27]
    assert batch.noise_keys[1].tolist() == [0, 6, 0]
    assert batch.recon_weight.tolist() == [1, 1, 1, 0]  # of two images, the published code knew the first only
    assert batch.pixels[:, 0, 0, 0].tolist() == [50, 0, 70, 71]
    assert torch.equal(batch.image_mask, collate(SAMPLES, 12, image_size=P).image_mask)


def test_weight_zero_without_reconstruction():
    batch = collate([(0, _sample(1, "ia", reconstruct=False))], 4, image_size=P)
    assert batch.recon_weight.tolist() == [0]
    assert batch.image_mask.sum() == N


def test_text_only_microbatch_has_empty_tensors():
    batch = collate([(0, _sample(1, "qa"))], 4, image_size=P)
    assert batch.num_images == 0
    assert batch.noise_keys.shape == (0, 3)
    assert batch.pixels.shape == (0, 3, P, P)


def test_packs_restart_positions_and_never_join_samples():
    batch = collate_packed([SAMPLES[:2], SAMPLES[2:]], 12, image_size=P)
    assert batch.tokens.shape == batch.labels.shape == batch.position_ids.shape == (1, 24)
    assert batch.cu_seqlens.tolist() == [0, 6, 10, 12, 21, 24]
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.max_seqlen == 9
    assert batch.position_ids[0].tolist() == [*range(6), *range(4), *range(2), *range(9), *range(3)]
    assert batch.recon_start.tolist() == [1, 12, 15]
    for start, stop in zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:], strict=True):
        assert batch.labels[0, stop - 1] == -100, "a target must not come from the next sample"
        assert batch.position_ids[0, start] == 0


def test_packed_and_padded_hold_the_same():
    packed = collate_packed([SAMPLES], 30, image_size=P)
    padded = collate(SAMPLES, 12, image_size=P)
    assert packed.num_supervised_tokens == padded.num_supervised_tokens
    assert torch.equal(packed.noise_keys, padded.noise_keys)
    assert torch.equal(packed.pixels, padded.pixels)
    assert torch.equal(packed.tokens[packed.labels >= 0], padded.tokens[padded.labels >= 0])


def test_full_pack_has_no_padding_segment_and_overfull_is_refused():
    assert collate_packed([SAMPLES[:2]], 10, image_size=P).cu_seqlens.tolist() == [0, 6, 10]
    with pytest.raises(ValueError, match="pack of 10 tokens"):
        collate_packed([SAMPLES[:2]], 9, image_size=P)
