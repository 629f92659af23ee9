"""Packs: full, complete, the same everywhere, and resumable; token lengths behind them."""

from __future__ import annotations

import io
import itertools
import json
import random
import tarfile

import numpy as np
import pytest
import torch

from megatron_ross.data import lengths as lengths_module
from megatron_ross.data.dataset import RossDataset
from megatron_ross.data.lengths import measure, modality_lengths, token_lengths
from megatron_ross.data.loader import RossLoader
from megatron_ross.data.order import BlendedOrder, SampleOrder, with_epoch
from megatron_ross.data.packing import PackedOrder, fullest_subset, plan_packs, utilisation
from megatron_ross.data.quarantine import BadSamplePolicy


def llava_lengths(n: int, image_tokens: int, text_only: float = 0.1, seed: int = 0) -> np.ndarray:
    """Log-normal text with mean 180 tokens, one image in most samples."""
    rng = np.random.default_rng(seed)
    text = rng.lognormal(np.log(180) - 0.32, 0.8, n).clip(10, 3000).astype(np.int64)
    return text + image_tokens * (rng.random(n) > text_only)


def _keys(n: int) -> np.ndarray:
    return with_epoch(np.arange(n), 0)


@pytest.mark.parametrize("image_tokens", [576, 729])
@pytest.mark.parametrize("text_only", [0.0, 0.1])
@pytest.mark.parametrize("capacity", [4096, 8192])
def test_packs_are_full_on_a_llava_like_mix(image_tokens, text_only, capacity):
    lengths = llava_lengths(20_000, image_tokens, text_only)
    plan = plan_packs(_keys(len(lengths)), lengths, capacity, 64)
    used = utilisation(plan, lengths, capacity)
    print(f"utilisation {used:.4f} at {image_tokens} image tokens, capacity {capacity}, {text_only:.0%} text only")
    assert used >= 0.97
    assert sorted(plan.keys[:, 1].tolist()) == list(range(len(lengths)))
    totals = np.add.reduceat(lengths[plan.keys[:, 1]], plan.bounds[:-1])
    assert totals.max() <= capacity


def test_fullest_subset_equals_brute_force():
    rng = random.Random(0)
    for _ in range(300):
        sizes = [rng.randint(1, 30) for _ in range(rng.randrange(9))]
        room = rng.randrange(60)
        chosen = fullest_subset(sizes, room)
        sums = [sum(c) for k in range(len(sizes) + 1) for c in itertools.combinations(sizes, k)]
        assert sum(sizes[i - 1] for i in chosen) == max(s for s in sums if s <= room)
        assert chosen == sorted(set(chosen))


def test_no_sample_waits_longer_than_the_buffer():
    """A sample is packed at the latest when it is the oldest, so pack i holds none that entered after i * lookahead."""
    lengths = llava_lengths(2000, 576)
    plan = plan_packs(_keys(2000), lengths, 4096, 16)
    opened = plan.keys[:, 1][plan.bounds[:-1]]
    assert (np.diff(opened) > 0).all(), "packs are opened in the order of the samples"
    for pack in range(len(plan)):
        assert plan.keys[:, 1][plan.bounds[pack] : plan.bounds[pack + 1]].max() < plan.bounds[pack] + 16


def test_impossible_lengths_are_refused():
    with pytest.raises(ValueError, match="both are seq_length"):
        plan_packs(_keys(2), np.array([5, 11]), 10, 4)
    with pytest.raises(ValueError, match="3 lengths for 2 samples"):
        PackedOrder(SampleOrder(2), [1, 2, 3], 10)


def test_order_of_packs():
    lengths = llava_lengths(500, 576)
    order = PackedOrder(SampleOrder(500, seed=4), lengths, 4096)
    per_epoch = [order.epoch_length(e) for e in range(3)]
    flat = order.sequences(0, sum(per_epoch))
    begin = 0
    for epoch, count in enumerate(per_epoch):
        keys = [key for pack in flat[begin : begin + count] for key in pack]
        assert {e for e, _ in keys} == {epoch}
        assert sorted(i for _, i in keys) == list(range(500))
        begin += count
    fresh = PackedOrder(SampleOrder(500, seed=4), lengths, 4096)
    start, stop = per_epoch[0] - 3, per_epoch[0] + per_epoch[1] + 5
    assert [tuple(k) for k in fresh.keys(start, stop).tolist()] == [key for pack in flat[start:stop] for key in pack]


def test_blends_can_be_packed():
    lengths = llava_lengths(300, 576)
    order = PackedOrder(BlendedOrder([100, 200], [2.0, 0.5], seed=1), lengths, 4096)
    keys = [key for pack in order.sequences(0, order.epoch_length(0)) for key in pack]
    assert sorted(i for _, i in keys if i < 100) == sorted([*range(100)] * 2)
    assert len([i for _, i in keys if i >= 100]) == 100
    assert len(set(keys)) == len(keys)


@pytest.fixture
def dataset(toy, qwen, processor, tmp_path):
    return RossDataset(toy / "data.json", toy / "images", qwen, "qwen_2", processor, 16, 512)


def _packed_loader(dataset, **changes):
    order = PackedOrder(SampleOrder(len(dataset), seed=1), measure(dataset, 1, False), 320)
    settings = {"global_batch_size": 4, "micro_batch_size": 2, "pack_length": 320}
    return RossLoader(dataset, order, **settings | changes)


def test_packed_loader_holds_the_samples_of_the_data_set(dataset):
    loader = _packed_loader(dataset)
    seen: list[int] = []
    while len(seen) < len(dataset):
        for batch in loader.next_step():
            assert batch.tokens.shape == (1, 640)
            assert int(batch.cu_seqlens[-1]) == 640
            starts = [int(s) for s in batch.cu_seqlens[:-1]]
            offset = iter(starts)
            for sample_id in batch.sample_ids:
                sample = dataset[sample_id]
                start = next(s for s in offset if int(batch.position_ids[0, s]) == 0 and _same(batch, s, sample))
                shifted = torch.cat([sample.labels[1:], torch.tensor([-100])])
                assert torch.equal(batch.labels[0, start : start + len(shifted)], shifted)
            seen += batch.sample_ids
    first_epoch = seen[: len(dataset)]
    assert sorted(first_epoch) == list(range(len(dataset)))
    loader.close()


def _same(batch, start, sample) -> bool:
    length = len(sample.input_ids)
    tokens = batch.tokens[0, start : start + length]
    return torch.equal(tokens, sample.input_ids.clamp_min(0))


def test_packed_resume_with_another_layout(dataset):
    straight = _packed_loader(dataset)
    expected = [[i for b in straight.next_step() for i in b.sample_ids] for _ in range(5)]
    first = _packed_loader(dataset)
    first.next_step()
    first.next_step()
    state = first.state_dict()
    assert state["consumed_samples"] == len(expected[0]) + len(expected[1])
    ranks = [_packed_loader(dataset, micro_batch_size=1, dp_size=2, dp_rank=r) for r in range(2)]
    for loader in ranks:
        loader.load_state_dict(state)
    for step in expected[2:]:
        parts = [loader.next_step() for loader in ranks]
        assert [i for pair in zip(*parts, strict=True) for b in pair for i in b.sample_ids] == step
    for loader in (straight, first, *ranks):
        loader.close()


def test_broken_sample_in_a_pack_spares_its_neighbours(toy, qwen, processor):
    good = RossDataset(toy / "data.json", toy / "images", qwen, "qwen_2", processor, 16, 512)
    whole, lengths = _packed_loader(good), measure(good, 1, False)
    reference = [b for _ in range(2) for b in whole.next_step()]
    (toy / "images/0.png").write_bytes(b"broken")
    policy = BadSamplePolicy(max_bad_share=1.0)
    broken = _packed_loader(good, bad_samples=policy)
    for a, b in zip(reference, [b for _ in range(2) for b in broken.next_step()], strict=True):
        assert torch.equal(a.tokens, b.tokens)
        bad = {i for i in b.sample_ids if "0.png" in good.record(i).images}
        bounds = dict(zip(b.sample_ids, _bounds(b, lengths), strict=True))
        for sample_id, (start, stop) in bounds.items():
            if sample_id in bad:
                assert (b.labels[0, start:stop] == -100).all()
            else:
                assert torch.equal(a.labels[0, start:stop], b.labels[0, start:stop])
        expected = [0.0 if i in bad else 1.0 for i in b.noise_keys[:, 1].tolist()]
        assert b.recon_weight.tolist() == expected
    assert broken.bad_sample_counts["bad"] > 0
    whole.close()
    broken.close()


def _bounds(batch, lengths) -> list[tuple[int, int]]:
    """Where the samples of a microbatch of two packs of 320 lie."""
    bounds, offset, pack_end = [], 0, 320
    for sample_id in batch.sample_ids:
        length = int(lengths[sample_id])
        if offset + length > pack_end or offset not in batch.cu_seqlens.tolist():
            offset, pack_end = 320, 640
        bounds.append((offset, offset + length))
        offset += length
    return bounds


def test_pack_length_and_order_come_together(dataset):
    with pytest.raises(ValueError, match="come together"):
        RossLoader(dataset, SampleOrder(len(dataset)), global_batch_size=1, micro_batch_size=1, pack_length=320)
    with pytest.raises(ValueError, match="differs from the order's capacity"):
        _packed_loader(dataset, pack_length=64)


def test_lengths_are_exact_cached_and_the_same_in_processes(toy, qwen, processor, tmp_path, monkeypatch):
    records = json.loads((toy / "data.json").read_text())
    records[3] = {"id": "broken"}
    (toy / "data.json").write_text(json.dumps(records))
    dataset = RossDataset(toy / "data.json", toy / "images", qwen, "qwen_2", processor, 16, 512)
    expected = [1 if i == 3 else len(dataset[i].input_ids) for i in range(23)]
    assert token_lengths(dataset, cache_folder=tmp_path / "cache").tolist() == expected
    monkeypatch.setattr(lengths_module, "_SPAWN_ABOVE", 0)
    monkeypatch.setattr(lengths_module, "_CHUNK", 5)
    assert measure(dataset, 2, False).tolist() == expected
    monkeypatch.setattr(lengths_module, "map_samples", lambda *_: pytest.fail("measured again"))
    assert token_lengths(dataset, cache_folder=tmp_path / "cache").tolist() == expected
    other = RossDataset(toy / "data.json", toy / "images", qwen, "qwen_2", processor, 25, 512)
    assert other.fingerprint != dataset.fingerprint


def test_modality_lengths_are_counted_once_for_any_template(toy, qwen, processor, tmp_path, monkeypatch):
    cache, settings = tmp_path / "cache", (qwen, "qwen_2", processor, 16, 512)
    dataset = RossDataset(toy / "data.json", toy / "images", *settings)
    first = modality_lengths(dataset, cache_folder=cache)
    assert first.tolist() == [dataset.modality_length(i) for i in range(23)]
    assert {n > 0 for n in first.tolist()} == {True, False}
    with monkeypatch.context() as patch:
        patch.setattr(RossDataset, "modality_length", lambda *_: pytest.fail("counted again"))
        assert modality_lengths(dataset, cache_folder=cache).tolist() == first.tolist()
        again = RossDataset(toy / "data.json", toy / "images", qwen, "plain", processor, 25, 128)
        assert isinstance(modality_lengths(again, cache_folder=cache), np.memmap)
    records = json.loads((toy / "data.json").read_text())
    (toy / "data.json").write_text(json.dumps([*records, records[0]]))
    changed = RossDataset(toy / "data.json", toy / "images", *settings)
    assert len(modality_lengths(changed, cache_folder=cache)) == 24


def test_modality_lengths_of_broken_shards(tmp_path, qwen, processor):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, data in (("0.json", b"{"), ("1.json", b"[]"), ("2.txt", b"a b c"), ("2.jpg", b"x")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    dataset = RossDataset(tmp_path / "a.tar", None, qwen, "qwen_2", processor, 16, 512, cache_folder=tmp_path)
    assert modality_lengths(dataset, cache_folder=tmp_path).tolist() == [-1, -1, 4]
