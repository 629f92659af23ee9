"""What a run takes over from the checkpoint that it resumes, what has changed since, and what must not change.

All of it is read from the manifest: before a process group, a data set or a weight is there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

from megatron_ross.checkpoint.manifest import MANIFEST_NAME
from megatron_ross.config.cli import ConfigError
from megatron_ross.config.schema import RunConfig, TrainingConfig
from megatron_ross.config.shown import shown
from megatron_ross.data.order import SampleOrder
from megatron_ross.training.schedule import BatchHistory, BatchSpan, Progress, RunPlan, has_ended, plan_training
from megatron_ross.training.start import Start

PROGRESS_KEY = "progress"
"""In the manifest's `training`; a checkpoint from before there was such a record is read by what else it says."""

_WHERE_IT_STARTS = ("load", "init_from", "save")


def plan_start(run: RunConfig, start: Start, order: SampleOrder) -> RunPlan:
    """Length and schedule of a run that starts there.

    Raises:
        ConfigError: it goes on after its end, and no setting says at which learning rate.
        ValueError: the checkpoint's record of its progress is none.
    """
    if not start.resumes:
        return plan_training(run, order, None)
    progress = _progress(start)
    trained = TrainingConfig(
        train_iters=_number(start, "settings", "train_iters", None),
        num_epochs=_number(start, "settings", "num_epochs", TrainingConfig.num_epochs),
    )
    return plan_training(run, order, progress, has_ended(trained, order, progress))


def record_of(plan: RunPlan, group_sizes: tuple[int, int] | None) -> dict[str, Any]:
    """What the next start needs to know: the entry PROGRESS_KEY of the manifest's `training`."""
    progress = plan.progress
    record: dict[str, Any] = {"batch_sizes": [list(span) for span in progress.batches.spans]}
    if progress.continued_at is not None:
        record["continued_at"] = progress.continued_at
    if group_sizes is not None:
        record["group_sizes"] = list(group_sizes)
    return record


def group_sizes(run: RunConfig, start: Start) -> tuple[int, int] | None:
    """(batch size, batches per step) that `group_by_modality_length` deals its samples to; None without it.

    A run that begins takes its own micro-batches. One that resumes keeps those that it began with: the order of its
    samples must not change with the micro-batch size, nor with the global batch size.
    """
    if not run.data.group_by_modality_length:
        return None
    sizes = (run.data.micro_batch_size, run.data.global_batch_size // run.data.micro_batch_size)
    if not start.resumes:
        return sizes
    if "group_sizes" in _record(start, PROGRESS_KEY):
        kept = _record(start, PROGRESS_KEY)["group_sizes"]
        if not _is_row(kept, 2) or not all(isinstance(size, int) and size > 0 for size in kept):
            raise _damaged(start, f"training.{PROGRESS_KEY}.group_sizes", kept)
        return kept[0], kept[1]
    micro = _number(start, "settings", "micro_batch_size", sizes[0])
    total = _number(start, "settings", "global_batch_size", sizes[0] * sizes[1])
    if micro < 1 or total < micro:
        raise _damaged(start, "training.settings.micro_batch_size", micro)
    return micro, total // micro


def changed_settings(run: RunConfig, start: Start) -> list[str]:
    """`name saved -> now` of every setting in which a run differs from the checkpoint that it resumes."""
    saved = _record(start, "settings")
    defaults = RunConfig().to_flat()  # a setting that is newer than the checkpoint had its default, then
    return [
        f"{name} {shown(saved.get(name, defaults[name]))} -> {shown(value)}"
        for name, value in run.to_flat().items()
        if name not in _WHERE_IT_STARTS and value != saved.get(name, defaults[name])
    ]


def check_trained_parts(run: RunConfig, start: Start) -> None:
    """Refuse to resume with other trained parts: the optimizer's state would be that of other parameters.

    Raises:
        ConfigError: names the setting, and how to start with these weights and a new optimizer.
    """
    saved = _record(start, "settings")
    if not start.resumes or not saved:
        return
    known = {field.name for field in _sections(run)}
    before = RunConfig.from_flat({name: value for name, value in saved.items() if name in known})
    model = start.manifest.model
    idle = () if model.denoiser is not None else _OF_THE_DENOISER
    if model.language.share_embeddings_and_output_weights:
        idle = (*idle, "lm_loss_weight")  # the LM head is the embedding, and trained as such
    for name, trained in _TRAINED.items():
        if name in idle:
            continue
        was, now = trained(before), trained(run)
        if was != now:
            raise ConfigError(
                f"{name}={shown(run.to_flat()[name])}: the run to resume was trained with "
                f"{shown(before.to_flat()[name])}, so other parts were trained and its optimizer state does not fit; "
                f"restore the setting, or start anew from its weights: init_from={start.directory}, without load, "
                "and another save"
            )


def _trains_the_table(run: RunConfig) -> bool:
    asked = run.trainability.train_denoiser_position_table
    return run.trainability.freeze_language_model if asked is None else asked


_TRAINED: dict[str, Callable[[RunConfig], Any]] = {
    "freeze_language_model": lambda run: run.trainability.freeze_language_model,
    "freeze_mm_mlp_adapter": lambda run: run.trainability.freeze_mm_mlp_adapter,
    "unfreeze_mm_vision_tower": lambda run: run.trainability.unfreeze_mm_vision_tower,
    "freeze_mm_inv_projector": lambda run: run.trainability.freeze_mm_inv_projector,
    "train_denoiser_position_table": lambda run: (
        not run.trainability.freeze_mm_inv_projector and _trains_the_table(run)
    ),
    "lm_loss_weight": lambda run: run.trainability.freeze_language_model or run.loss.supervises_text,
    "recon_loss_weight": lambda run: run.trainability.freeze_mm_inv_projector or run.loss.recon_loss_weight != 0,
    "recon_objective": lambda run: run.loss.recon_objective if run.loss.recon_loss_weight != 0 else None,
}
"""What each setting decides about trained parts; a change that decides nothing is none."""

_OF_THE_DENOISER = (
    "freeze_mm_inv_projector",
    "train_denoiser_position_table",
    "recon_loss_weight",
    "recon_objective",
)


def _sections(run: RunConfig) -> list[Any]:
    return [field for section in fields(run) for field in fields(getattr(run, section.name))]


def _progress(start: Start) -> Progress:
    iteration = start.manifest.iteration
    size = _number(start, "settings", "global_batch_size", 1)
    sequences = _number(start, "data", "consumed_sequences", iteration * size)
    record = _record(start, PROGRESS_KEY)
    if not record:
        mean = size if iteration * size == sequences or not iteration else sequences / iteration
        return Progress(iteration, sequences, BatchHistory.constant(mean))
    spans = record.get("batch_sizes")
    if not isinstance(spans, list) or not spans or not all(_is_row(span, 3) and span[2] > 0 for span in spans):
        raise _damaged(start, f"training.{PROGRESS_KEY}.batch_sizes", spans)
    continued_at = _number(start, PROGRESS_KEY, "continued_at", None)
    return Progress(iteration, sequences, BatchHistory(tuple(BatchSpan(*span) for span in spans)), continued_at)


def _record(start: Start, name: str) -> dict[str, Any]:
    record = start.manifest.training.get(name, {})
    if not isinstance(record, dict):
        raise _damaged(start, f"training.{name}", record)
    return record


def _number(start: Start, record: str, name: str, default: Any) -> Any:
    value = _record(start, record).get(name, default)
    if value is not default and not _is_number(value):
        raise _damaged(start, f"training.{record}.{name}", value)
    return value


def _is_row(value: Any, length: int) -> bool:
    return isinstance(value, Sequence) and len(value) == length and all(map(_is_number, value))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 2**62


def _damaged(start: Start, name: str, value: Any) -> ValueError:
    return ValueError(
        f"{start.directory / MANIFEST_NAME}: {name} is {shown(value)}, which no training has written; "
        "resume another checkpoint"
    )
