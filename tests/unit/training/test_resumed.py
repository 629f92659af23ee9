"""What a resumed run may change, what it keeps of its first start, and what it is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_ross.checkpoint.manifest import Manifest
from megatron_ross.config.cli import ConfigError
from megatron_ross.config.schema import RunConfig
from megatron_ross.data.order import SampleOrder
from megatron_ross.training.resumed import (
    PROGRESS_KEY,
    changed_settings,
    check_trained_parts,
    group_sizes,
    plan_start,
    record_of,
)
from megatron_ross.training.schedule import BatchSpan
from megatron_ross.training.start import Start
from tests.helpers.golden import model_config

ORDER = SampleOrder(30)


def config(**flat: Any) -> RunConfig:
    return RunConfig.from_flat({"global_batch_size": 4, "num_epochs": 2.0, **flat})


def saved(run: RunConfig, iteration: int = 5, **training: Any) -> Start:
    """A start that resumes what this run saved; without a record of its progress, as earlier versions."""
    data = {"consumed_sequences": iteration * run.data.global_batch_size}
    record = {"settings": run.to_flat(), "data": data, **training}
    return Start(Path("runs/x/iter_0000005"), Manifest(iteration, model_config("qwen2_siglip"), training=record), True)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"freeze_language_model": True}, r"freeze_language_model=True: the run to resume was trained with False"),
        ({"freeze_mm_mlp_adapter": True}, r"freeze_mm_mlp_adapter=True: .*with False"),
        ({"freeze_mm_inv_projector": True}, r"freeze_mm_inv_projector=True: .*with False"),
        ({"unfreeze_mm_vision_tower": True}, r"unfreeze_mm_vision_tower=True: .*with False"),
        ({"train_denoiser_position_table": True}, r"train_denoiser_position_table=True: .*with None"),
        ({"lm_loss_weight": 0.0}, r"lm_loss_weight=0.0: .*with 1.0"),
        ({"recon_loss_weight": 0.0}, r"recon_loss_weight=0.0: .*with 1.0"),
        ({"recon_objective": "regress"}, r"recon_objective='regress': .*with 'denoise'"),
    ],
)
def test_other_trained_parts_are_refused_by_name(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{says}.*init_from=runs/x/iter_0000005, without load") as error:
        check_trained_parts(config(**change), saved(config()))
    assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match=rf"^{next(iter(change))}="):
        check_trained_parts(config(), saved(config(**change)))
    check_trained_parts(config(**change), saved(config(**change)))
    check_trained_parts(config(**change), replace(saved(config()), resumes=False))


def test_a_change_that_decides_nothing_is_none() -> None:
    check_trained_parts(config(recon_loss_weight=0.5, num_noise_draws=2), saved(config()))
    check_trained_parts(config(train_denoiser_position_table=False), saved(config()))
    frozen = {"freeze_mm_inv_projector": True}
    check_trained_parts(config(train_denoiser_position_table=True, **frozen), saved(config(**frozen)))
    off = {"recon_loss_weight": 0.0}
    check_trained_parts(config(recon_objective="regress", **off), saved(config(**off)))
    start = saved(config())
    llava = replace(start.manifest, model=replace(start.manifest.model, denoiser=None, vae=None))
    check_trained_parts(config(recon_loss_weight=0.0), replace(start, manifest=llava))
    check_trained_parts(config(lm_loss_weight=0.25), saved(config()))
    head = {"lm_loss_weight": 0.0}
    check_trained_parts(config(freeze_language_model=True, **head), saved(config(freeze_language_model=True)))
    language = replace(start.manifest.model.language, share_embeddings_and_output_weights=True)
    tied = replace(start.manifest, model=replace(start.manifest.model, language=language))
    check_trained_parts(config(**head), replace(start, manifest=tied))


def test_what_differs_is_told_by_setting() -> None:
    before = config(lr=1e-3, load="runs/x")
    start = saved(before)
    del start.manifest.training["settings"]["lr_continue"]  # is newer than this checkpoint
    start.manifest.training["settings"]["of_another_version"] = 3
    assert changed_settings(before, start) == []
    now = config(lr=5e-4, num_epochs=3.0, load="runs/y", init_from="z", lr_continue="rewarm", global_batch_size=8)
    assert changed_settings(now, start) == [
        "lr 0.001 -> 0.0005",
        "lr_continue None -> 'rewarm'",
        "global_batch_size 4 -> 8",
        "num_epochs 2.0 -> 3.0",
    ]
    check_trained_parts(now, start)


def test_progress_goes_from_start_to_start() -> None:
    """Batch sizes of all starts, and where the run went on after its end."""
    first = plan_start(config(), replace(saved(config()), resumes=False), ORDER)
    record = record_of(first, None)
    assert record == {"batch_sizes": [[0, 0, 4]]}
    second_run = config(global_batch_size=8)
    second = plan_start(second_run, saved(config(), **{PROGRESS_KEY: record}), ORDER)
    assert second.progress.batches.spans == (BatchSpan(0, 0, 4), BatchSpan(5, 20, 8))
    assert second.train_iters == 10  # 60 samples: 5 x 4 and 5 x 8
    ended = saved(second_run, 10, **{PROGRESS_KEY: record_of(second, (2, 4))})
    ended.manifest.training["data"]["consumed_sequences"] = 60
    with pytest.raises(ConfigError, match="set lr_continue"):
        plan_start(config(num_epochs=3.0), ended, ORDER)
    third = plan_start(config(num_epochs=3.0, lr_continue="rewarm"), ended, ORDER)
    assert record_of(third, None) == {"batch_sizes": [[0, 0, 4], [5, 20, 8], [10, 60, 4]], "continued_at": 10}
    assert (third.schedule.start, third.schedule.length, third.train_iters) == (60, 32, 18)


def test_checkpoints_that_count_iterations_go_on_as_they_would_have() -> None:
    run = config(train_iters=20)
    plan = plan_start(run, saved(run), ORDER)
    assert plan.progress.batches.spans == (BatchSpan(0, 0, 4),)
    assert plan.schedule == plan_start(run, replace(saved(run), resumes=False), ORDER).schedule
    mixed = saved(run)  # its batches changed once, nobody knows where
    mixed.manifest.training["data"]["consumed_sequences"] = 24
    assert plan_start(run, mixed, ORDER).progress.batches.spans == (BatchSpan(0, 0, 4.8), BatchSpan(5, 24, 4))


def test_a_run_keeps_the_sizes_that_its_samples_were_grouped_by() -> None:
    first = config(group_by_modality_length=True, micro_batch_size=2, global_batch_size=8)
    now = config(group_by_modality_length=True, micro_batch_size=1, global_batch_size=16)
    assert group_sizes(config(), saved(config())) is None
    assert group_sizes(first, replace(saved(now), resumes=False)) == (2, 4)
    assert group_sizes(now, saved(first)) == (2, 4)  # of an earlier version
    kept = saved(now, **{PROGRESS_KEY: {"batch_sizes": [[0, 0, 16]], "group_sizes": [2, 4]}})
    assert group_sizes(now, kept) == (2, 4)


@pytest.mark.parametrize(
    ("training", "says"),
    [
        ({PROGRESS_KEY: {"batch_sizes": []}}, r"training.progress.batch_sizes is \[\]"),
        ({PROGRESS_KEY: {"batch_sizes": [[0, 0, 0]]}}, "training.progress.batch_sizes"),
        ({PROGRESS_KEY: {"batch_sizes": [[0, 0]]}}, "training.progress.batch_sizes"),
        ({PROGRESS_KEY: {"batch_sizes": [[0, 0, 4]], "continued_at": "x"}}, "training.progress.continued_at is 'x'"),
        ({PROGRESS_KEY: 3}, "training.progress is 3"),
        ({PROGRESS_KEY: {"group_sizes": [0, 4]}}, r"training.progress.group_sizes is \[0, 4\]"),
        ({"settings": {"num_epochs": "many"}}, "training.settings.num_epochs is 'many'"),
        ({"data": {"consumed_sequences": -1}}, "training.data.consumed_sequences is -1"),
    ],
)
def test_a_record_that_is_none_is_named(training: dict[str, Any], says: str) -> None:
    run = config(group_by_modality_length=True)
    start = saved(run, **training)
    with pytest.raises(ValueError, match=rf"^runs/x/iter_0000005/manifest.json: {says}"):
        (group_sizes(run, start), plan_start(run, start, ORDER))
