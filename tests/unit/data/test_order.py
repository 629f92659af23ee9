"""One global order per (seed, epoch), and the published grouped sampler."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from megatron_ross.config.limits import LIMITS
from megatron_ross.data.order import BlendedOrder, GroupedOrder, SampleOrder, epochs_from_weights, grouped_indices


def test_every_epoch_is_a_different_permutation():
    order = SampleOrder(100, seed=3)
    epochs = [[order.sample_at(100 * e + i) for i in range(100)] for e in range(3)]
    for number, epoch in enumerate(epochs):
        assert {e for e, _ in epoch} == {number}
        assert sorted(i for _, i in epoch) == list(range(100))
    assert len({tuple(i for _, i in epoch) for epoch in epochs}) == 3


def test_order_depends_on_the_seed_and_on_nothing_else():
    ids = SampleOrder(50, seed=1).epoch_ids(0)
    assert np.array_equal(ids, SampleOrder(50, seed=1).epoch_ids(0))
    assert not np.array_equal(ids, SampleOrder(50, seed=2).epoch_ids(0))
    assert SampleOrder(50, shuffle=False).epoch_ids(4).tolist() == list(range(50))


def test_shuffle_is_uniform_enough():
    """Over many epochs every sample visits every place about equally often (chi-squared, 19*19 degrees of freedom)."""
    n, epochs = 20, 2000
    order = SampleOrder(n, seed=0)
    counts = np.zeros((n, n))
    for epoch in range(epochs):
        counts[np.arange(n), order.epoch_ids(epoch)] += 1
    chi_squared = ((counts - epochs / n) ** 2 / (epochs / n)).sum()
    assert 260 < chi_squared < 480  # mean 361, standard deviation 27


def test_keys_agree_with_sequences_across_epochs():
    order = SampleOrder(7, seed=0)
    flat = [key for sequence in order.sequences(3, 40) for key in sequence]
    assert [tuple(row) for row in order.keys(3, 40).tolist()] == flat
    assert order.keys(5, 5).shape == (0, 2)


def test_one_sample_epochs():
    assert SampleOrder(1).sequences(0, 3) == [((0, 0),), ((1, 0),), ((2, 0),)]
    with pytest.raises(ValueError, match="at least one sample"):
        SampleOrder(0)


def test_grouped_indices_equal_golden(golden):
    data = json.loads((golden / "preprocess/sampler.json").read_text())
    mixed = data["mixed_lengths"]
    kinds = {
        "mixed": mixed,
        "one_modality_positive": [abs(n) for n in mixed],
        "one_modality_negative": [-abs(n) for n in mixed],
    }
    for case in data["cases"]:
        generator = torch.Generator().manual_seed(case["seed"])
        indices = grouped_indices(kinds[case["lengths"]], case["batch_size"], case["world_size"], generator)
        assert indices == case["indices"]
        assert torch.rand(1, generator=generator).item() == pytest.approx(case["next_uniform_draw"], abs=1e-7)


def test_grouped_order_is_a_permutation_of_one_kind_per_batch():
    lengths = [(-1) ** i * (5 + i % 13) for i in range(96)]
    ids = GroupedOrder(lengths, seed=5, batch_size=2, world_size=4).epoch_ids(1)
    assert sorted(ids.tolist()) == list(range(96))
    kinds = [{lengths[i] > 0 for i in ids[b : b + 8]} for b in range(0, 80, 8)]
    assert all(len(kind) == 1 for kind in kinds)
    assert len(set(map(tuple, kinds))) == 2


def test_grouped_order_refuses_length_zero():
    with pytest.raises(ValueError, match="sample 1 has length 0"):
        grouped_indices([3, 0, -2], 1, 1, torch.Generator())


def test_blend_counts_every_source_by_its_epochs():
    order = BlendedOrder([10, 20], [2.0, 0.5], seed=3)
    assert order.num_samples == 30
    for pair in range(3):
        keys = np.concatenate([order.epoch_keys(2 * pair), order.epoch_keys(2 * pair + 1)])
        ids = keys[:, 1].tolist()
        assert sorted(ids) == sorted([*range(10)] * 4 + [*range(10, 30)])
        assert len({tuple(key) for key in keys.tolist()}) == len(keys), "a second pass has a key of its own"
    first = order.epoch_keys(0)[:, 1]
    assert (np.diff((first < 10).astype(int)) != 0).sum() > 5, "sources are mixed, not joined"


def test_blend_sequences_agree_with_keys():
    order = BlendedOrder([7, 5], [1.0, 0.4], seed=0)
    flat = [key for sequence in order.sequences(2, 40) for key in sequence]
    assert [tuple(row) for row in order.keys(2, 40).tolist()] == flat
    assert order.sample_at(11) == flat[9]


def test_weights_become_epochs():
    epochs = epochs_from_weights([100, 300], [1, 1])
    assert epochs == [2.0, 200 / 300]


@pytest.mark.parametrize(("sizes", "epochs"), [([3], [1.0, 2.0]), ([3, 4], [1.0, -1.0]), ([3], [0.2])])
def test_impossible_blends(sizes, epochs):
    with pytest.raises(ValueError, match="blend"):
        BlendedOrder(sizes, epochs)


@pytest.mark.parametrize("weights", [[1, 2], [3, 1], [0, 1], [0.7, 0.1]])
def test_weights_are_shares_of_an_epoch(weights):
    sizes = [100, 300]
    order = BlendedOrder(sizes, epochs_from_weights(sizes, weights), seed=1)
    for epoch in range(3):
        ids = order.epoch_ids(epoch)
        assert len(ids) == pytest.approx(sum(sizes), abs=1)
        assert (ids < 100).mean() == pytest.approx(weights[0] / sum(weights), abs=0.005)


def test_shares_that_do_not_divide_lose_no_sample():
    """A third of an epoch is not a binary number; after three of them every sample has come exactly once."""
    order = BlendedOrder([10, 30], [1 / 3, 1 / 3], seed=0)
    ids = np.concatenate([order.epoch_ids(e) for e in range(3)])
    assert sorted(ids.tolist()) == list(range(40))


def test_grouped_order_of_a_blend():
    """Grouping changes the order of a blend's samples, not which they are."""
    lengths = [(-1) ** i * (5 + i % 13) for i in range(96)]
    blend = BlendedOrder([32, 64], [2.0, 0.5], seed=5)
    order = GroupedOrder(lengths, seed=5, batch_size=2, world_size=4, base=blend)
    for epoch in range(2):
        keys, plain = order.epoch_keys(epoch), blend.epoch_keys(epoch)
        assert sorted(map(tuple, keys.tolist())) == sorted(map(tuple, plain.tolist()))
        kinds = [{lengths[i] > 0 for i in keys[b : b + 8, 1]} for b in range(0, 80, 8)]
        assert all(len(kind) == 1 for kind in kinds)


LARGEST_SEED = int(LIMITS["seed"].high)


@pytest.mark.parametrize("seed", [0, 2**31, 2**32 - 1, 2**32, LARGEST_SEED])
def test_every_seed_up_to_the_limit_orders(seed):
    lengths = [(-1) ** i * (i % 7 + 1) for i in range(40)]
    for order in (
        SampleOrder(40, seed),
        GroupedOrder(lengths, seed, batch_size=2, world_size=2),
        BlendedOrder([30, 10], [1, 2.5], seed),
    ):
        for epoch in (0, 1, 2**20):
            ids = order.epoch_ids(epoch)
            assert set(ids.tolist()) == set(range(40))


def test_all_bits_of_a_seed_matter_to_the_grouped_order():
    def ids(seed):
        return tuple(GroupedOrder([1] * 50, seed, batch_size=2, world_size=2).epoch_ids(0).tolist())

    seeds = [1, 1 + 2**31, 1 + 2**32, 1 + 2**33, 1 + 2**61, LARGEST_SEED]
    assert len({ids(seed) for seed in seeds}) == len(seeds)


def test_the_grouped_order_of_small_seeds_stays():
    """Runs that were begun before large seeds were possible must resume: the generator's seed, written out."""
    for seed, epoch in ((0, 0), (42, 0), (42, 3), (2**31 + 5, 1)):
        state = (seed * 2**32 + epoch + 0x9E3779B97F4A7C15) % 2**64
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            state = ((state ^ (state >> shift)) * factor) % 2**64
        generator = torch.Generator().manual_seed((state ^ (state >> 31)) >> 1)
        lengths = [i % 9 + 1 for i in range(30)]
        expected = grouped_indices(lengths, 2, 3, generator)
        assert GroupedOrder(lengths, seed, batch_size=2, world_size=3).epoch_ids(epoch).tolist() == expected
