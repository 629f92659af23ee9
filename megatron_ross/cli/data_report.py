"""What `prepare-data` finds in a run's data: surveys source by source, the report, and the shards."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib
from jsonargparse import Namespace

from megatron_ross.checkpoint.manifest import ASSETS_NAME
from megatron_ross.cli.models import model_of
from megatron_ross.config.blend import data_sources
from megatron_ross.config.cli import ConfigError
from megatron_ross.config.model import RossModelConfig
from megatron_ross.config.schema import RunConfig
from megatron_ross.config.validate import check_anything_is_trained
from megatron_ross.data.dataset import ConcatDataset, RossDataset
from megatron_ross.data.rgb import CONVERSIONS, KINDS
from megatron_ross.data.shard_writer import write_shards
from megatron_ross.data.survey import (
    SKIPPED,
    Survey,
    findings_per_epoch,
    survey_dataset,
    text_histogram,
    training_plan,
)
from megatron_ross.training.data import (
    TrainingSet,
    build_dataset,
    build_order,
    build_valid_dataset,
    build_valid_order,
    source_names,
)
from megatron_ross.training.rehearsal import rehearse, rehearse_validation
from megatron_ross.training.schedule import num_iterations
from megatron_ross.training.start import start_of, with_image_conversion

EFFECTS = {
    **dict.fromkeys(SKIPPED, "skipped in training"),
    "mismatch": "masked in training",
    "lacks_images": "trained as text: they name no image",
    "images_cut": "images without room are dropped from reconstruction",
    "bad_image_cut": "broken, but behind the cut: never opened",
}


def effect_of(kind: str, conversion: str) -> str:
    """What a finding means for training; nothing if it means nothing. `conversion`: see `rgb.CONVERSIONS`."""
    if kind not in KINDS:
        return EFFECTS.get(kind, "")
    (way, how), (other, instead) = sorted(zip(CONVERSIONS, KINDS[kind], strict=True), key=lambda c: c[0] != conversion)
    return f"image_conversion {way}: {how}; {other}: {instead}"


@dataclass(frozen=True)
class Source:
    """One source of the data and what was found in it; `first` is its first sample's id in the whole set."""

    name: str
    dataset: RossDataset
    survey: Survey
    first: int


def open_data(options: Namespace, run: RunConfig) -> tuple[TrainingSet, RossDataset | None]:
    """The training set as training builds it, and the one that `valid_data_path` names. Raises ValueError."""
    run, model, assets = _model_and_assets(options, run)
    check_anything_is_trained(run, model)
    valid = build_valid_dataset(run, model.vision, assets) if run.observation.eval_interval is not None else None
    return build_dataset(run, model.vision, assets), valid


def _model_and_assets(options: Namespace, run: RunConfig) -> tuple[RunConfig, RossModelConfig, Path]:
    """The run with its `image_conversion`, the architecture, and the folder of the tokenizer."""
    if options.model and options.tokenizer:
        return with_image_conversion(run, None), model_of(run, options.model), Path(options.tokenizer)
    if not run.training.init_from and not run.training.load:
        raise ConfigError("init_from='': name a checkpoint to start from, or give both --model and --tokenizer")
    start = start_of(run)
    model = model_of(run, options.model) if options.model else start.manifest.model
    return with_image_conversion(run, start), model, Path(options.tokenizer or start.directory / ASSETS_NAME)


def survey_sources(options: Namespace, run: RunConfig, data: TrainingSet) -> list[Source]:
    """Check the sources one after the other; each has a progress file of its own."""
    parts = data.datasets if isinstance(data, ConcatDataset) else [data]
    names = source_names(run.data) or [run.data.data_path]
    sources: list[Source] = []
    for i, (name, dataset) in enumerate(zip(names, parts, strict=True)):
        survey = survey_source(options, run, name, dataset, f"progress_{i}.jsonl")
        first = sources[-1].first + len(sources[-1].dataset) if sources else 0
        sources.append(Source(name, dataset, survey, first))
    return sources


def survey_source(options: Namespace, run: RunConfig, name: str, dataset: RossDataset, file: str) -> Survey:
    """Check one source; `file` of the output folder keeps the progress."""
    print(f"source {name}: {len(dataset):,} samples", flush=True)
    return survey_dataset(
        dataset,
        decode=not options.skip_images,
        num_workers=run.data.num_workers,
        progress_file=options.out / file,
    )


def make_report(run: RunConfig, data: TrainingSet, sources: Sequence[Source]) -> tuple[Survey, dict[str, Any]]:
    """Everything found, of all sources together, and as JSON."""
    whole = Survey()
    for source in sources:
        whole.add(source.survey, source.first)
    plans = {}
    for packing in (False, True):
        setting = replace(run, data=replace(run.data, packing=packing))
        order = build_order(setting, data, whole.num_tokens)
        plans["packed" if packing else "padded"] = training_plan(whole, order, run.data.global_batch_size)
        if packing == run.data.packing:
            per_epoch, train_steps = findings_per_epoch(whole, order), num_iterations(run, order)
            stop = rehearse(run, whole, order, train_steps)
    report = {
        "packing": run.data.packing,
        "train_steps": train_steps,
        "stops": [stop] if stop else [],
        "epoch": plans,
        "per_epoch": per_epoch,
        "samples": whole.counts,
        "skipped": sorted(whole.skipped),
        "sources": {
            s.name: {"samples": len(s.dataset), "found": s.survey.counts, "examples": s.survey.examples}
            for s in sources
        },
    }
    return whole, report


def print_report(whole: Survey, report: dict[str, Any], sources: Sequence[Source]) -> None:
    print(text_histogram(whole.num_tokens, "tokens per sample"))
    print(text_histogram(whole.num_images, "images per sample"))
    plans = report["epoch"]
    print(f"{'one epoch':18}{'padded':>16}{'packed':>16}")
    for name in plans["packed"]:
        values = (plans[way].get(name, "-") for way in ("padded", "packed"))
        print(f"{name:18}" + "".join(f"{v:>16,.4g}" if isinstance(v, float) else f"{v:>16}" for v in values))
    print(f"the run: {report['train_steps']:,} steps, {'packed' if report['packing'] else 'padded'}")
    for source in sources:
        print(f"source {source.name}: {len(source.dataset):,} samples")
        for kind, count in source.survey.counts.items():
            effect = effect_of(kind, source.dataset.image_processor.conversion)
            print(f"  {kind}: {count:,} samples{f' ({effect})' if effect else ''}")
            for example in source.survey.examples[kind]:
                print(f"      {example}")
    for kind, count in report["per_epoch"].items():
        print(f"in one epoch, {kind}: {count:,} of {plans['packed']['samples']:,} samples")
    for stop in report["stops"]:
        print(stop)


def validation_stop(
    options: Namespace, run: RunConfig, data: TrainingSet, whole: Survey, valid: RossDataset | None
) -> str:
    """Why validation would end the run; empty if it would not, or if there is none. `whole` is the survey of `data`."""
    if run.observation.eval_interval is None:
        return ""
    survey = whole if valid is None else survey_source(options, run, "validation", valid, "progress_valid.jsonl")
    return rehearse_validation(run, survey, build_valid_order(run, data if valid is None else valid))


def draw(survey: Survey, path: Path) -> None:
    """Histograms of tokens and images per sample."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    axes[0].hist(survey.num_tokens, bins=60)
    axes[0].set(xlabel="tokens per sample", ylabel="samples")
    axes[1].hist(survey.num_images, bins=range(max(survey.num_images) + 2), align="left", rwidth=0.8)
    axes[1].set(xlabel="images per sample")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def shard_sources(run: RunConfig, sources: Sequence[Source], folder: Path, samples_per_shard: int) -> None:
    """Write every source's usable samples as tars, and print the settings that read them."""
    lines = []
    for source, setting in zip(sources, data_sources(run.data), strict=True):
        target = folder / source.name if len(sources) > 1 else folder
        count = write_shards(source.dataset, source.survey.skipped, target, samples_per_shard)
        path = target / (f"{{000000..{count - 1:06}}}.tar" if count > 1 else "000000.tar")
        share = f"weight: {setting.weight}" if setting.weight is not None else f"epochs: {setting.epochs}"
        lines.append(f"  - {{data_path: '{path}', {share}}}" if run.data.blend else f"data_path: '{path}'")
    print("\n".join(["settings that read the shards:", *(["blend:"] if run.data.blend else []), *lines]))


def prepare(options: Namespace, run: RunConfig) -> int:
    """Survey, report, and shards where they are asked for; 1 if training would stop. Raises ValueError."""
    data, valid = open_data(options, run)
    options.out.mkdir(parents=True, exist_ok=True)
    sources = survey_sources(options, run, data)
    whole, report = make_report(run, data, sources)
    report["stops"] += filter(None, [validation_stop(options, run, data, whole, valid)])
    print_report(whole, report, sources)
    (options.out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    draw(whole, options.out / "histograms.png")
    if options.write_shards is not None:
        shard_sources(run, sources, options.write_shards, options.samples_per_shard)
    return 1 if report["stops"] else 0
