"""Validation and losses taken apart: the same numbers in every layout, and a run that does not notice.

Held-out samples, their order and their noise are fixed, so one process is the oracle for all layouts; a run without any
of it is the oracle for what training must still do, bit by bit.
"""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_ross.checkpoint.manifest import write_latest
from megatron_ross.models.latents import LatentEncoder
from megatron_ross.models.loss_breakdown import MeanLosses
from megatron_ross.parallel.param_gather import gather_now
from megatron_ross.parity.gather import gather_parameters
from megatron_ross.training.trainer import Trainer
from tests.helpers.distributed import run_ranks
from tests.helpers.tensorboard import tensorboard_events
from tests.helpers.toy_run import with_trainer, write_data
from tests.helpers.variants import Stored, make_variant, without_denoiser

STEPS = 4
ONE = {"layout": "VEt*4NDH"}
TP2PP2 = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "layout": "V|Et*4NDH"}
SP = {"tensor_model_parallel_size": 2, "sequence_parallel": True, "layout": "VEt*4NDH"}
PP4 = {"pipeline_model_parallel_size": 4, "layout": "VE|t*2|t*2ND|H"}
VPP2 = {"pipeline_model_parallel_size": 2, "layout": "VEt|t|t|tNDH"}
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True, "ddp_bucket_size": 1}
RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
BUCKETS = [(0, 142), (143, 285), (286, 428), (429, 571), (572, 714), (715, 857), (858, 999)]
COUNTS = ("num_samples", "num_tokens", "num_images")
WATCH = {"eval_interval": 2, "log_timestep_buckets": 7, "log_source_losses": True}


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Stored:
    return make_variant(tmp_path_factory.mktemp("model"), "qwen2_siglip")


@pytest.fixture(scope="module")
def settings(stored: Stored, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A blend of two sources, a fifth of each held out."""
    sources = [write_data(tmp_path_factory.mktemp(name), n) for name, n in (("first", 23), ("second", 29))]
    return {
        "blend": [source | {"epochs": 1} for source in sources],
        "valid_split": 0.2,
        "init_from": str(stored.path),
        "seq_length": 256,
        "micro_batch_size": 1,
        "global_batch_size": 8,
        "lr": 1e-3,
        "lr_warmup_fraction": 0.0,
        "train_iters": STEPS,
        "log_interval": 2,
        "seed": 5,
        "tensorboard": False,
    }


def trained(rank: int, world_size: int, flat: dict[str, Any]) -> dict[str, Any]:
    """A whole run: what training did, and which samples it saw."""

    def act(trainer: Trainer) -> dict[str, Any]:
        take, seen, losses = trainer.loader.next_step, set(), []
        step = trainer._step

        def spied() -> Any:
            batches = take()
            seen.update(i for batch in batches for i in batch.sample_ids)
            return batches

        def recorded() -> Any:
            result, work = step()
            losses.append((result.lm_loss, result.recon_loss, result.grad_norm))
            return result, work

        trainer.loader.next_step, trainer._step = spied, recorded  # type: ignore[method-assign]
        trainer.train()
        gather_now(trainer.chunks)
        return {
            "losses": losses,
            "seen": seen,
            "digest": trainer.loader.state_dict()["digest"],
            "parameters": gather_parameters(trainer.stages, trainer.manifest.model, trainable_only=True),
        }

    return with_trainer(flat, act)


def lines(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


Watched = tuple[dict[str, Any], list[dict[str, Any]], list[dict[str, Any]]]


def watched(ranks: int, flat: dict[str, Any], folder: Path) -> Watched:
    """A run with a folder: what training did, its validations, its log."""
    folder.mkdir(exist_ok=True)
    result = run_ranks(trained, ranks, flat | {"save": str(folder)}, timeout_s=240)[0]
    return result, lines(folder, "validation.jsonl"), lines(folder, "metrics.jsonl")


@pytest.fixture(scope="module")
def alone_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("alone")


@pytest.fixture(scope="module")
def alone(settings: dict[str, Any], alone_folder: Path) -> Watched:
    return watched(1, settings | ONE | WATCH | {"tensorboard": True}, alone_folder)


@pytest.mark.distributed
def test_held_out_samples_are_never_trained_on(alone: Watched, settings: dict[str, Any]) -> None:
    """23 + 29 samples, of which 5 + 6 are held out; four batches of eight are most of an epoch."""
    result, validations, _ = alone
    (longer,) = run_ranks(trained, 1, settings | ONE | {"train_iters": 6})
    assert len(result["seen"]) == 8 * STEPS
    assert len(longer["seen"]) == 23 + 29 - 5 - 6  # more than an epoch
    assert [v["num_samples"] for v in validations] == [11, 11]


@pytest.mark.distributed
def test_parts_lie_around_the_whole(alone: Watched) -> None:
    """That sums of parts are the whole is tested on the sums; the log has means."""
    _, validations, log = alone
    assert [v["iteration"] for v in validations] == [2, 4]
    assert validations[1]["lm_loss"] < validations[0]["lm_loss"]
    for record in [*validations, *log]:
        assert set(record["recon_loss_by_timestep"]) <= {f"{first:03d}-{last:03d}" for first, last in BUCKETS}
        assert set(record["lm_loss_by_source"]) == {"0_data", "1_data"}
    for record in validations:
        buckets = record["recon_loss_by_timestep"].values()
        assert min(buckets) < record["recon_loss"] < max(buckets)
        for name in ("lm", "recon"):
            low, high = sorted(record[f"{name}_loss_by_source"].values())
            assert low < record[f"{name}_loss"] < high


@pytest.mark.distributed
def test_tensorboard_has_every_part(alone: Watched, alone_folder: Path) -> None:
    """Each number of both logs is a curve, e.g. `valid/lm_loss` or `train/recon_loss_by_timestep/000-142`."""
    _, validations, log = alone
    events = tensorboard_events(alone_folder)
    for prefix, records in (("train", log), ("valid", validations)):
        for name in ("lm_loss", "recon_loss"):
            assert curve_of(events, f"{prefix}/{name}") == {r["iteration"]: pytest.approx(r[name]) for r in records}
        for name in ("recon_loss_by_timestep", "lm_loss_by_source", "recon_loss_by_source"):
            parts = {key for record in records for key in record[name]}
            assert parts
            for part in parts:
                expected = {r["iteration"]: pytest.approx(r[name][part]) for r in records if part in r[name]}
                assert curve_of(events, f"{prefix}/{name}/{part}") == expected


def curve_of(events: EventAccumulator, tag: str) -> dict[int, float]:
    return {event.step: event.value for event in events.Scalars(tag)}


def assert_same_losses(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    for name in ("lm_loss", "recon_loss", "recon_loss_by_timestep", "lm_loss_by_source", "recon_loss_by_source"):
        assert ours[name] == pytest.approx(theirs[name], rel=2e-5), name
    assert [ours.get(name) for name in COUNTS] == [theirs.get(name) for name in COUNTS]


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("ranks", "flat"),
    [
        pytest.param(2, ONE | OVERLAP, id="dp2, overlapped"),
        pytest.param(2, SP, id="sequence parallel", marks=pytest.mark.slow),
        pytest.param(4, TP2PP2, id="tp2 pp2"),
        pytest.param(4, PP4, id="pp4, heads on two ranks", marks=pytest.mark.slow),
        pytest.param(2, VPP2 | OVERLAP, id="pp2 vpp2"),
        pytest.param(1, ONE | RECOMPUTE | {"lm_head_chunk_tokens": 3, "micro_batch_size": 4}, id="chunked, recomputed"),
    ],
)
def test_losses_are_the_same_in_every_layout(
    ranks: int, flat: dict[str, Any], alone: Watched, settings: dict[str, Any], tmp_path: Path
) -> None:
    _, expected, expected_log = alone
    _, got, log = watched(ranks, settings | WATCH | flat, tmp_path)
    for ours, theirs in zip([*got, *log], [*expected, *expected_log], strict=True):
        assert_same_losses(ours, theirs)


@pytest.mark.distributed
def test_packs_and_batch_sizes_change_nothing(settings: dict[str, Any], tmp_path: Path) -> None:
    """Packed training takes samples in another order, so the weights stay as they are here."""
    flat = settings | ONE | WATCH | {"lr": 0.0, "train_iters": 1}
    _, (padded,), _ = watched(1, flat, tmp_path / "padded")
    _, (packed,), _ = watched(1, flat | {"packing": True, "global_batch_size": 4}, tmp_path / "packed")
    assert_same_losses(packed, padded)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("ranks", "flat"),
    [
        pytest.param(4, TP2PP2, id="tp2 pp2", marks=pytest.mark.slow),
        pytest.param(2, ONE | OVERLAP | RECOMPUTE, id="dp2, overlapped and recomputed"),
        pytest.param(
            4,
            TP2PP2 | {"freeze_language_model": True, "packing": True, "rerun_mode": "validate_results"},
            id="tp2 pp2, stage 1, packed",
        ),
    ],
)
def test_training_does_not_notice(ranks: int, flat: dict[str, Any], settings: dict[str, Any], tmp_path: Path) -> None:
    """Losses, gradient norms, weights and the order of samples are those of a run without validation, bit by bit."""
    expected = run_ranks(trained, ranks, settings | flat, timeout_s=240)[0]
    got, validations, _ = watched(ranks, settings | flat | WATCH | {"eval_interval": 1}, tmp_path)
    assert len(validations) == STEPS
    for name in ("losses", "seen", "digest"):
        assert got[name] == expected[name], name
    assert all(torch.equal(got["parameters"][name], t) for name, t in expected["parameters"].items())


@pytest.mark.distributed
def test_a_resumed_run_repeats_nothing_and_omits_nothing(
    alone: Watched, settings: dict[str, Any], tmp_path: Path
) -> None:
    flat = settings | ONE | WATCH | {"save": str(tmp_path), "save_interval": 2}
    run_ranks(trained, 1, flat)
    _, expected, _ = alone
    assert [v["recon_loss"] for v in lines(tmp_path, "validation.jsonl")] == [v["recon_loss"] for v in expected]
    write_latest(tmp_path / "checkpoints", 2)
    run_ranks(trained, 1, flat | {"load": str(tmp_path), "init_from": ""})
    got = lines(tmp_path, "validation.jsonl")
    assert [(v["iteration"], v["lm_loss"], v["recon_loss"]) for v in got] == [
        (v["iteration"], v["lm_loss"], v["recon_loss"]) for v in expected
    ]


def signalled(rank: int, world_size: int, flat: dict[str, Any]) -> dict[str, Any]:
    """A run that rank 1 is asked to stop in the middle of its first validation."""

    def act(trainer: Trainer) -> dict[str, Any]:
        take = trainer.observations._validation._loader.next_step  # type: ignore[union-attr]

        def stopping() -> Any:
            if rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return take()

        trainer.observations._validation._loader.next_step = stopping  # type: ignore[union-attr]
        trainer.train()
        return {"iteration": trainer.iteration}

    return with_trainer(flat, act)


@pytest.mark.distributed
def test_a_stop_waits_for_no_validation_pictures_or_step(settings: dict[str, Any], tmp_path: Path) -> None:
    flat = settings | ONE | WATCH | {"save": str(tmp_path), "eval_interval": 1, "sample_interval": 1, "train_iters": 40}
    results = run_ranks(signalled, 2, flat)
    assert [r["iteration"] for r in results] == [1, 1]
    assert not (tmp_path / "validation.jsonl").exists()
    assert not (tmp_path / "samples").exists()
    assert (tmp_path / "checkpoints" / "iter_0000001").is_dir()


@pytest.mark.distributed
def test_other_data_with_a_broken_image_and_a_model_without_denoiser(settings: dict[str, Any], tmp_path: Path) -> None:
    """`valid_data_path`; its broken image is skipped every time and written down nowhere."""
    stored = make_variant(tmp_path / "llava", "qwen2_siglip", without_denoiser)
    valid = write_data(tmp_path / "valid", 9)
    (tmp_path / "valid" / "images" / "3_0.png").write_bytes(b"no image")
    flat = settings | {
        "init_from": str(stored.path),
        "pipeline_model_parallel_size": 2,
        "layout": "VEt*2|t*2NH",
        "valid_split": 0.0,
        "valid_data_path": valid["data_path"],
        "valid_image_folder": valid["image_folder"],
        "eval_iters": 1,
        "max_bad_sample_share": 1.0,
    }
    _, validations, _ = watched(2, flat | WATCH, tmp_path / "run")
    assert [(v["num_samples"], v["bad_samples"]) for v in validations] == [(8, {"bad": 1})] * 2
    assert all(v["num_images"] == 0 and v["recon_loss"] == 0 and not v["recon_loss_by_timestep"] for v in validations)
    assert validations[0]["lm_loss_by_source"] == {}  # other data has no sources
    assert not list((tmp_path / "run").glob("quarantine*"))


@pytest.mark.distributed
def test_nothing_is_written_unless_asked_for(settings: dict[str, Any], tmp_path: Path) -> None:
    run_ranks(trained, 1, settings | ONE | {"save": str(tmp_path), "tensorboard": True, "train_iters": 1})
    assert not (tmp_path / "validation.jsonl").exists()
    (line,) = lines(tmp_path, "metrics.jsonl")
    assert not any(line[name] for name in ("recon_loss_by_timestep", "lm_loss_by_source", "recon_loss_by_source"))


def validated_without_vae(rank: int, world_size: int, flat: dict[str, Any]) -> MeanLosses:
    """A validation in which encoding an image is an error."""

    def refuse(*_: Any) -> None:
        raise AssertionError("the VAE ran")

    def act(trainer: Trainer) -> MeanLosses:
        validation = trainer.observations._validation
        assert validation is not None
        result = validation.run(lambda: False)
        assert result is not None
        return result.losses

    with mock.patch.object(LatentEncoder, "posterior", refuse):
        return with_trainer(flat, act)


@pytest.mark.distributed
def test_without_weight_validation_encodes_nothing(settings: dict[str, Any]) -> None:
    losses = run_ranks(validated_without_vae, 2, settings | VPP2 | WATCH | {"recon_loss_weight": 0})[1]
    assert losses.lm.count > 0
    assert losses.recon.count == 0
