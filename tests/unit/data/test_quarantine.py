"""Broken samples: skipped in place, agreed between ranks, written down, and limited."""

from __future__ import annotations

import json
import threading

import pytest
import torch

from megatron_ross.config.schema import RunConfig
from megatron_ross.data.dataset import RossDataset
from megatron_ross.data.errors import SampleError
from megatron_ross.data.loader import RossLoader
from megatron_ross.data.order import SampleOrder
from megatron_ross.data.quarantine import (
    BadSamplePolicy,
    Quarantine,
    TooManyBadSamplesError,
    samples_for_a_share,
)
from megatron_ross.training.data import bad_sample_limits

LENIENT = {"max_bad_share": 1.0, "max_mismatch_share": 1.0}


@pytest.fixture
def broken(toy):
    """The toy data set with a broken file, a missing file, a malformed record and a mismatch."""
    records = json.loads((toy / "data.json").read_text())
    (toy / "images/3.png").write_bytes((toy / "images/3.png").read_bytes()[:300])
    (toy / "images/4.png").unlink()
    records[5] = {"id": "five", "conversations": "nothing"}
    records[6] = {"id": "six", "conversations": [{"from": "human", "value": "Empty?"}, {"from": "gpt", "value": ""}]}
    (toy / "data.json").write_text(json.dumps(records))
    bad = {5} | {
        i
        for i, r in enumerate(records)
        if {"3.png", "4.png"} & set(r.get("image", []) if isinstance(r.get("image"), list) else [r.get("image")])
    }
    return toy, bad


def _loader(folder, qwen, processor, policy, **changes):
    dataset = RossDataset(folder / "data.json", folder / "images", qwen, "qwen_2", processor, 16, 512)
    settings = {"global_batch_size": 23, "micro_batch_size": 1, "bad_samples": policy}
    return RossLoader(dataset, SampleOrder(len(dataset), seed=1), **settings | changes)


def test_bad_samples_are_skipped_in_place_and_written_down(broken, qwen, processor, tmp_path):
    folder, bad = broken
    policy = BadSamplePolicy(quarantine_path=tmp_path / "quarantine.jsonl", **LENIENT)
    loader = _loader(folder, qwen, processor, policy)
    step = loader.next_step()
    assert sorted(i for batch in step for i in batch.sample_ids) == list(range(23))
    for batch in step:
        skipped = batch.sample_ids[0] in bad
        assert (batch.num_supervised_tokens == 0) == (skipped or batch.sample_ids[0] == 6)
        assert batch.num_supervised_tokens == int((batch.labels >= 0).sum())
        assert (batch.recon_weight == (0 if skipped else 1)).all()
    assert loader.bad_sample_counts == {"bad": len(bad), "mismatch": 1}
    lines = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert {line["sample_id"]: line["status"] for line in lines} == dict.fromkeys(bad, "bad") | {6: "mismatch"}
    assert all(line["reason"] and line["epoch"] == 0 for line in lines)
    loader.close()


class _World:
    """Runs one function per rank in threads; `agree` is a real maximum over all of them."""

    def __init__(self, size: int):
        self._barrier = threading.Barrier(size, timeout=60)
        self._flags: list[torch.Tensor] = []

    def agree(self, flags: torch.Tensor) -> torch.Tensor:
        self._flags.append(flags)
        self._barrier.wait()
        result = torch.stack(self._flags).amax(0)
        if self._barrier.wait() == 0:
            self._flags = []
        self._barrier.wait()
        return result


def test_ranks_agree_although_each_decodes_its_share_only(broken, qwen, processor):
    """2 data-parallel x 2 tensor-parallel ranks, plus 2 ranks that decode nothing (a middle pipeline stage)."""
    folder, _ = broken
    ranks = [(dp, tp, pixels) for dp in range(2) for tp, pixels in ((0, True), (1, True), (0, False))]
    world, results, errors = _World(len(ranks)), {}, []

    def run(dp, tp, pixels):
        try:
            policy = BadSamplePolicy(agree=world.agree, **LENIENT)
            loader = _loader(folder, qwen, processor, policy, global_batch_size=12, micro_batch_size=3, dp_rank=dp,
                             dp_size=2, tp_rank=tp, tp_size=2, want_pixels=pixels)  # fmt: skip
            results[dp, tp, pixels] = ([loader.next_step() for _ in range(4)], loader.state_dict())
            loader.close()
        except BaseException as error:
            errors.append(error)
            world._barrier.abort()

    threads = [threading.Thread(target=run, args=rank) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors
    states = [state for _, state in results.values()]
    assert all(state == states[0] for state in states)
    whole = _loader(folder, qwen, processor, BadSamplePolicy(**LENIENT), global_batch_size=12)
    for _ in range(4):
        whole.next_step()
    assert whole.state_dict() == states[0]
    whole.close()
    for dp in range(2):
        reference = results[dp, 0, True][0]
        for tp, pixels in ((1, True), (0, False)):
            for a, b in zip(reference, results[dp, tp, pixels][0], strict=True):
                for x, y in zip(a, b, strict=True):
                    assert torch.equal(x.labels, y.labels)
                    assert torch.equal(x.recon_weight, y.recon_weight)
                    assert x.num_supervised_tokens == y.num_supervised_tokens


def test_without_a_policy_the_first_broken_sample_stops(broken, qwen, processor):
    loader = _loader(broken[0], qwen, processor, None)
    with pytest.raises(SampleError):
        loader.next_step()
    loader.close()


@pytest.mark.parametrize(
    ("limits", "word", "setting"),
    [
        ({"max_bad_share": 0.05, "max_mismatch_share": 1.0}, "bad", "max_bad_sample_share=0.05"),
        ({"max_bad_share": 1.0, "max_mismatch_share": 0.01}, "mismatch", "max_mismatch_share=0.01"),
    ],
)
def test_run_stops_above_the_allowed_share_with_examples(broken, qwen, processor, limits, word, setting):
    loader = _loader(broken[0], qwen, processor, BadSamplePolicy(min_samples=1, template="qwen_2", **limits))
    with pytest.raises(
        TooManyBadSamplesError, match=rf"samples are {word}.*{setting}.*Examples: sample \d+: "
    ) as error:
        loader.next_step()
    assert setting.partition("=")[0] in RunConfig().to_flat()
    assert ("template qwen_2" in str(error.value)) or word == "bad"
    loader.close()


def test_counts_survive_a_resume(broken, qwen, processor):
    straight = _loader(broken[0], qwen, processor, BadSamplePolicy(**LENIENT), global_batch_size=8)
    for _ in range(4):
        straight.next_step()
    first = _loader(broken[0], qwen, processor, BadSamplePolicy(**LENIENT), global_batch_size=8)
    first.next_step()
    second = _loader(broken[0], qwen, processor, BadSamplePolicy(**LENIENT), global_batch_size=8)
    second.load_state_dict(first.state_dict())
    for _ in range(3):
        second.next_step()
    assert second.state_dict() == straight.state_dict()
    for loader in (straight, first, second):
        loader.close()


@pytest.mark.parametrize(
    ("num_samples", "allowed"), [(8, 0), (10, 0), (99, 0), (100, 1), (300, 3), (999, 9), (1000, 10), (10_000_000, 10)]
)
def test_a_share_is_one_of_the_whole_set_where_that_is_small(num_samples, allowed):
    """Allowed bad samples among the first ones consumed; the share is 1 %."""
    quarantine = Quarantine(BadSamplePolicy(min_samples=samples_for_a_share(num_samples)))
    consumed = min(num_samples, 4)
    quarantine.counts["bad"] = allowed
    quarantine.check(consumed)
    quarantine.counts["bad"] += 1
    with pytest.raises(TooManyBadSamplesError):
        quarantine.check(consumed)


def test_later_the_share_is_one_of_what_was_consumed():
    quarantine = Quarantine(BadSamplePolicy(min_samples=samples_for_a_share(10_000_000)))
    quarantine.counts["bad"] = 50_000
    quarantine.check(5_000_000)
    with pytest.raises(TooManyBadSamplesError, match="50000 of 4999999"):
        quarantine.check(4_999_999)


def test_an_exact_share_is_allowed():
    """0.29 * 100 is below 29 in floating point."""
    quarantine = Quarantine(BadSamplePolicy(max_bad_share=0.29, min_samples=samples_for_a_share(100)))
    quarantine.counts["bad"] = 29
    quarantine.check(100)


@pytest.mark.parametrize("num_samples", [8, 10])
def test_a_small_set_of_broken_samples_stops(toy, qwen, processor, num_samples):
    """As a run builds its limits."""
    (toy / "data.json").write_text(json.dumps([{"id": i, "conversations": "none"} for i in range(num_samples)]))
    dataset = RossDataset(toy / "data.json", toy / "images", qwen, "qwen_2", processor, 16, 512)
    order = SampleOrder(num_samples)
    loader = RossLoader(dataset, order, global_batch_size=2, micro_batch_size=1,
                        bad_samples=bad_sample_limits(RunConfig(), order))  # fmt: skip
    with pytest.raises(TooManyBadSamplesError, match=r"2 of 2 samples are bad.*max_bad_sample_share=0\.01"):
        loader.next_step()
    loader.close()
