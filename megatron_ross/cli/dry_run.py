"""`train --dry-run`: what would stop a run, found in one process on any machine, before anyone rents GPUs.

The checks are those that training itself makes when it starts (`training.main.checked_start`), a survey of samples that
are spread over the data, and the planner's prediction of memory against that of a GPU. Nothing is written but the
indexes of the data, which training uses, too.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import Namespace

from megatron_ross.cli.command import EXIT_ERROR, run_command
from megatron_ross.cli.train import DRY_RUN_SAMPLES, parse
from megatron_ross.config.cli import ConfigError
from megatron_ross.config.layout import StageLayout
from megatron_ross.config.model import RossModelConfig
from megatron_ross.config.schema import RunConfig
from megatron_ross.planner.hardware import GPUS, Gpu, known_gpu
from megatron_ross.training.start import Start

if TYPE_CHECKING:
    from megatron_ross.compat import Available
    from megatron_ross.data.survey import Survey
    from megatron_ross.training.data import TrainingSet

_GIB = 2**30


def check(argv: Sequence[str]) -> int:
    """0, or 1 if something would stop the training; each finding is a line on stderr.

    Under torchrun the first rank does it.
    """
    if int(os.environ.get("RANK", 0)):
        return 0
    return run_command(lambda: _check(*parse(argv)))


def _check(options: Namespace, run: RunConfig) -> int:
    limit = DRY_RUN_SAMPLES if options.dry_run_samples is None else options.dry_run_samples
    if limit < 0:
        raise ConfigError(f"dry_run_samples={limit}: must be 0, for all, or more")
    world_size = _world_size(options, run)
    named = known_gpu(options.gpu) if options.gpu else None
    from megatron_ross.compat import probe
    from megatron_ross.training.main import checked_start
    from megatron_ross.training.start import with_image_conversion

    def available() -> Available | None:
        return None if named and probe().gpu is None else probe()

    start, layout, warnings = checked_start(run, world_size, available)
    run = with_image_conversion(run, start)
    _check_save(run)
    _print_tables(run, start.manifest.model, layout, world_size, is_checked=available() is not None)
    for warning in warnings:
        print(f"warning: {warning}")
    problems: list[str] = []
    try:
        found = _look_at_data(run, start, limit)
        problems += found.problems
    except (ValueError, OSError) as error:
        found = None
        problems.append(str(error))
    try:
        problems += _check_memory(run, start.manifest.model, world_size, named or _gpu_here(), found)
    except ValueError as error:
        problems.append(str(error))
    for problem in problems:
        print(f"error: {' '.join(problem.split())}", file=sys.stderr)
    print(
        "dry run: " + (f"{len(problems)} thing(s) would stop this run" if problems else "nothing would stop this run")
    )
    return EXIT_ERROR if problems else 0


def _world_size(options: Namespace, run: RunConfig) -> int:
    """`--world-size`, what torchrun says, or as many ranks as one replica has."""
    replica = run.parallel.tensor_model_parallel_size * run.parallel.pipeline_model_parallel_size
    size = options.world_size if options.world_size is not None else int(os.environ.get("WORLD_SIZE", replica))
    if size < 1:
        raise ConfigError(f"world_size={size}: must be at least 1")
    return int(size)


def _check_save(run: RunConfig) -> None:
    """The run folder, or the folder that it will be made in, can be written to. Makes nothing."""
    if not run.training.save:
        return
    folder = Path(run.training.save).absolute()
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise OSError(f"save={run.training.save!r}: cannot write there ({folder}); choose another")


def _print_tables(
    run: RunConfig, model: RossModelConfig, layout: StageLayout, world_size: int, *, is_checked: bool
) -> None:
    """Stages with their parameters, and features, as training prints them."""
    from megatron_ross.compat import probe
    from megatron_ross.config.features import resolve_features
    from megatron_ross.planner.parameters import stage_parameters
    from megatron_ross.training.feature_table import feature_rows, feature_table
    from megatron_ross.training.report import stage_table

    whole = replace(run, parallel=replace(run.parallel, tensor_model_parallel_size=1))
    counts = []
    for spec in layout.stages:
        parameters = stage_parameters(model, whole, layout, spec)
        counts.append((sum(p.numel for p in parameters if p.trainable), sum(p.numel for p in parameters)))
    ranks = run.parallel.tensor_model_parallel_size * run.parallel.pipeline_model_parallel_size
    print(f"configuration and checkpoint are as training needs them; {world_size} ranks, layout {layout}")
    print(stage_table(layout, counts))
    if is_checked:
        features = resolve_features(run, probe())
        print(feature_table(feature_rows(run, features, probe(), layout, world_size // ranks)))
    else:
        print("features: not checked, this machine has no GPU; training checks them where it starts")


@dataclass(frozen=True)
class DataFindings:
    """Means over the samples that were looked at, and what would stop a run."""

    text_tokens: float
    supervised_tokens: float
    images: float
    longest: int
    problems: list[str]


def _look_at_data(run: RunConfig, start: Start, limit: int) -> DataFindings:
    """Survey samples of every source as `prepare-data` does. Raises ValueError, OSError: the data cannot be opened."""
    from megatron_ross.checkpoint.manifest import ASSETS_NAME
    from megatron_ross.data.dataset import ConcatDataset
    from megatron_ross.data.lengths import map_samples
    from megatron_ross.data.survey import Checker, Survey
    from megatron_ross.training.data import build_dataset, build_valid_dataset, source_names

    assets, model = start.directory / ASSETS_NAME, start.manifest.model
    data = build_dataset(run, model.vision, assets)
    build_valid_dataset(run, model.vision, assets)
    parts = data.datasets if isinstance(data, ConcatDataset) else [data]
    whole = Survey()
    for name, part in zip(source_names(run.data) or [run.data.data_path], parts, strict=True):
        indices = range(0, len(part), max(1, -(-len(part) // limit)) if limit else 1)
        found = Survey()
        for piece in map_samples(part, Checker(decode=True), indices, run.data.num_workers, True, f"checking {name}"):
            found.add(piece)
        kinds = ", ".join(f"{kind} {count:,}" for kind, count in found.counts.items()) or "no findings"
        print(f"data {name}: {len(indices):,} of {len(part):,} samples looked at: {kinds}")
        for examples in found.examples.values():
            print(f"    {examples[0]}")
        whole.add(found)
    problems = _what_stops(run, whole)
    print(_length_of_run(run, data, whole))
    count, images = len(whole.num_tokens), sum(whole.num_images)
    text = sum(whole.num_tokens) - images * model.vision.num_image_tokens
    means = (max(0, text) / count, sum(whole.num_supervised) / count, images / count)
    return DataFindings(*means, max(whole.num_tokens), problems)


def _what_stops(run: RunConfig, survey: Survey) -> list[str]:
    """Shares of broken and masked samples above what the run allows, and data that nothing is learned from."""
    from megatron_ross.data.quarantine import MAX_EXAMPLES, BadSamplePolicy, Quarantine
    from megatron_ross.data.survey import COUNTED

    checked, data = len(survey.num_tokens), run.data
    shares = BadSamplePolicy(
        max_bad_share=data.max_bad_sample_share,
        max_mismatch_share=data.max_mismatch_share,
        min_samples=checked,
        template=data.template,
    )
    quarantine = Quarantine(shares)
    quarantine.counts.update({name: len(samples) for name, samples in survey.counted.items()})
    quarantine.examples = [example for kind in COUNTED for example in survey.examples.get(kind, [])][:MAX_EXAMPLES]
    problems = quarantine.excesses(checked)
    supervises = run.loss.supervises_text
    if not problems and not any(survey.num_supervised if supervises else survey.num_images):
        setting = f"template={data.template}" if supervises else f"lm_loss_weight={run.loss.lm_loss_weight:g}"
        what = "a token that is trained on" if supervises else "an image, and nothing else would be trained on"
        problems.append(
            f"{setting}, seq_length={data.seq_length}: none of {checked:,} samples has {what}; "
            "megatron-ross prepare-data says why"
        )
    return problems


def _length_of_run(run: RunConfig, data: TrainingSet, survey: Survey) -> str:
    """The steps of the run; packing needs the length of every sample, so they are estimated there."""
    from megatron_ross.training.data import build_order
    from megatron_ross.training.schedule import num_iterations

    plain = replace(run, data=replace(run.data, packing=False, group_by_modality_length=False))
    steps = num_iterations(plain, build_order(plain, data))
    if run.data.packing and run.training.train_iters is None:
        steps = max(1, round(steps * sum(survey.num_tokens) / len(survey.num_tokens) / run.data.seq_length))
        return f"{len(data):,} samples, about {steps:,} steps (packed; the order of training counts exactly)"
    return f"{len(data):,} samples, {steps:,} steps of {run.data.global_batch_size}"


def _gpu_here() -> Gpu | None:
    """The GPU of this process; rates are those of a known one, only its memory is compared."""
    import torch

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(int(os.environ.get("LOCAL_RANK", 0)))
    return replace(GPUS["h100"], name=properties.name, memory_gib=properties.total_memory / _GIB)


def _check_memory(
    run: RunConfig, model: RossModelConfig, world_size: int, gpu: Gpu | None, found: DataFindings | None
) -> list[str]:
    """Print the planner's prediction; what does not fit into the GPU."""
    from megatron_ross.planner.auto import TYPICAL_GPU
    from megatron_ross.planner.report import table
    from megatron_ross.planner.search import longest_sample, plan_run
    from megatron_ross.planner.workload import default_workload

    workload = default_workload(run)
    if found is not None:
        means = {name: getattr(found, name) for name in ("text_tokens", "supervised_tokens", "images")}
        workload = replace(workload, **means)
    plan = plan_run(run, model, world_size, gpu or TYPICAL_GPU, workload)
    print(f"predicted for {world_size} x {gpu.name if gpu else 'a GPU like ' + TYPICAL_GPU.name}, {workload}:")
    print(table([plan]))
    need = plan.peak_memory.total / _GIB
    if gpu is None:
        print(f"memory: {need:.1f} GiB on the fullest rank; no GPU is here and --gpu names none, so it is not compared")
        return []
    if not plan.fits:
        return [
            f"gpu={gpu.name}: has {gpu.memory_gib:.1f} GiB, and the fullest rank needs {need:.1f} GiB; megatron-ross "
            "plan ranks the layouts that fit"
        ]
    longest = longest_sample(plan, model)
    if found is not None and found.longest > longest:
        return [
            f"gpu={gpu.name}: microbatches of samples as long as the longest that was seen ({found.longest:,} tokens) "
            f"do not fit {gpu.memory_gib:.1f} GiB, up to {longest:,} tokens do; lower micro_batch_size or seq_length, "
            "or set recompute_granularity"
        ]
    print(f"memory: {need:.1f} of {gpu.memory_gib:.1f} GiB on the fullest rank; samples up to {longest:,} tokens fit")
    return []
