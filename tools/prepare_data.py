"""Validate a data set before training, and pack it into WebDataset shards.

    python tools/prepare_data.py --data llava.json --image_root images --tokenizer Qwen/Qwen2-7B-Instruct \
        --template qwen_2 --out report --pack_length 8192 --write_shards shards

Prints exact counts of what training will drop and why, histograms, and the steps of one epoch; writes `report.json` and
`histograms.png` into `--out`. Run it again to go on where it was stopped. Exits 1 if samples have to be skipped.
"""

from __future__ import annotations

import json
import os
import sys
import tarfile
from pathlib import Path

import jsonargparse
import matplotlib
from tqdm import tqdm
from transformers import AutoTokenizer

from megatron_ross.data.dataset import RossDataset
from megatron_ross.data.images import ImageProcessor
from megatron_ross.data.shards import write_sample
from megatron_ross.data.survey import SKIPPED, Survey, survey_dataset, text_histogram, training_plan

HALF = (0.5, 0.5, 0.5)


def main(
    data: list[str],
    tokenizer: str,
    out: Path,
    image_root: str | None = None,
    template: str = "qwen_2",
    image_size: int = 384,
    num_image_tokens: int = 729,
    max_length: int = 8192,
    pack_length: int | None = None,
    global_batch_size: int = 128,
    decode_images: bool = True,
    num_workers: int = 2,
    write_shards: Path | None = None,
    samples_per_shard: int = 2000,
) -> int:
    """Check, report, and perhaps write shards.

    Args:
        data: LLaVA JSON, JSONL or tar files.
        tokenizer: folder or name of a Hugging Face tokenizer.
        out: folder for the report.
        decode_images: read and decode every image; False checks texts only.
        write_shards: folder for WebDataset tars of all samples that can be used.

    Returns:
        Exit status: 1 if any sample has to be skipped.
    """
    dataset = RossDataset(
        data,
        image_root,
        AutoTokenizer.from_pretrained(tokenizer),
        template,
        ImageProcessor(HALF, HALF, image_size),
        num_image_tokens,
        max_length,
    )
    out.mkdir(parents=True, exist_ok=True)
    survey = survey_dataset(
        dataset, decode=decode_images, num_workers=num_workers, progress_file=out / "progress.jsonl"
    )
    report(survey, out, global_batch_size, pack_length)
    if write_shards is not None:
        shard_dataset(dataset, survey.skipped, write_shards, samples_per_shard)
    return 1 if survey.skipped else 0


def report(survey: Survey, out: Path, global_batch_size: int, pack_length: int | None) -> None:
    """Print and write everything found."""
    plan = training_plan(survey, global_batch_size, pack_length)
    print(text_histogram(survey.num_tokens, "tokens per sample"))
    print(text_histogram(survey.num_images, "images per sample"))
    for name, value in plan.items():
        print(f"{name:20} {value:,.4g}" if isinstance(value, float) else f"{name:20} {value:,}")
    for kind, count in sorted(survey.counts.items()):
        print(f"{kind}: {count} samples{' (skipped in training)' if kind in SKIPPED else ''}")
        for example in survey.examples[kind]:
            print(f"    {example}")
    findings = {"counts": dict(survey.counts), "examples": survey.examples, "skipped": sorted(survey.skipped)}
    (out / "report.json").write_text(json.dumps({"plan": plan} | findings, indent=1) + "\n")
    draw(survey, out / "histograms.png")


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


def shard_dataset(dataset: RossDataset, skipped: set[int], folder: Path, samples_per_shard: int) -> None:
    """Write the usable samples as tars. Finished shards are kept, so that it can be run again."""
    folder.mkdir(parents=True, exist_ok=True)
    usable = [i for i in range(len(dataset)) if i not in skipped]
    starts = range(0, len(usable), samples_per_shard)
    for number, start in enumerate(tqdm(starts, desc="writing shards", unit="shard")):
        target = folder / f"{number:06}.tar"
        if target.exists():
            continue
        temporary = target.with_suffix(".tmp")
        with tarfile.open(temporary, "w") as tar:
            for index in usable[start : start + samples_per_shard]:
                record = dataset.record(index)
                images = [
                    (Path(name).suffix[1:].lower() or "jpg", dataset.read_image(index, i, name))
                    for i, name in enumerate(record.images)
                ]
                turns = [{"from": turn.role, "value": turn.text} for turn in record.turns]
                write_sample(tar, f"{index:09}", {"id": record.id, "conversations": turns}, images)
        os.replace(temporary, target)


if __name__ == "__main__":
    try:
        sys.exit(jsonargparse.auto_cli(main, as_positional=False))
    except ValueError as error:
        sys.exit(f"prepare_data: {error}")
