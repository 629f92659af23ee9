"""Checks of a whole data set before anyone rents GPUs: what is broken, how long samples are, what training will drop.

The data set is walked in blocks; the findings of every finished block are appended to a progress file, so a survey
that was stopped goes on where it was. The same code runs as in training, so both drop the same samples.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ross.data.dataset import RossDataset
from megatron_ross.data.errors import ConversationError, ImageError, RecordError
from megatron_ross.data.images import decode_image
from megatron_ross.data.lengths import STUB_LENGTH, map_samples
from megatron_ross.data.order import SampleOrder
from megatron_ross.data.packing import PackedOrder, utilisation

SKIPPED = ("bad_record", "bad_conversation", "bad_image")
"""Kinds of findings for which training skips the sample; the others only reduce what is learnt from it."""

_MAX_EXAMPLES = 5


@dataclass
class Survey:
    """Sizes by sample, and findings: kind -> count and a few examples."""

    num_tokens: list[int] = field(default_factory=list)
    num_images: list[int] = field(default_factory=list)
    num_supervised: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    skipped: set[int] = field(default_factory=set)

    def find(self, kind: str, index: int, message: str) -> None:
        """Note a finding."""
        self.counts[kind] += 1
        shown = self.examples.setdefault(kind, [])
        if len(shown) < _MAX_EXAMPLES:
            shown.append(message)
        if kind in SKIPPED:
            self.skipped.add(index)

    def add(self, other: Survey) -> None:
        """Append the survey of the following samples."""
        self.num_tokens += other.num_tokens
        self.num_images += other.num_images
        self.num_supervised += other.num_supervised
        self.counts += other.counts
        self.skipped |= other.skipped
        for kind, messages in other.examples.items():
            self.examples[kind] = (self.examples.get(kind, []) + messages)[:_MAX_EXAMPLES]

    def to_json(self) -> dict[str, Any]:
        return vars(self) | {"counts": dict(self.counts), "skipped": sorted(self.skipped)}

    @classmethod
    def from_json(cls, d: dict[str, Any]) -> Survey:
        return cls(**d | {"counts": Counter(d["counts"]), "skipped": set(d["skipped"])})


@dataclass(frozen=True)
class Checker:
    """Checks pieces of a data set; picklable, for worker processes. `decode`: read and decode every image."""

    decode: bool

    def __call__(self, dataset: RossDataset, indices: range) -> Survey:
        survey = Survey()
        for index in indices:
            tokens, images = self._check(dataset, index, survey)
            survey.num_tokens.append(tokens)
            survey.num_images.append(images)
        return survey

    def _check(self, dataset: RossDataset, index: int, survey: Survey) -> tuple[int, int]:
        """Tokens and images of one sample as training will see it."""
        try:
            record = dataset.record(index)
            sizes = dataset.measure(index)
        except RecordError as error:
            survey.find("bad_record", index, str(error))
            return STUB_LENGTH, 0
        except ConversationError as error:
            survey.find("bad_conversation", index, str(error))
            return STUB_LENGTH, 0
        if any(turn.role == "gpt" and not turn.text.strip() for turn in record.turns):
            survey.find("empty_answer", index, record.where)
        if sizes.mismatch:
            survey.find("mismatch", index, record.where)
        elif not sizes.num_supervised:
            survey.find("nothing_supervised", index, record.where)
        if sizes.num_images_cut:
            survey.find("images_cut", index, f"{record.where}: {sizes.num_images_cut} images do not fit max_length")
        try:
            for number, name in enumerate(record.images):
                if self.decode:
                    dataset.image_processor.to_uint8(decode_image(dataset.read_image(index, number, name), name))
        except ImageError as error:
            survey.find("bad_image", index, f"{record.where}: {error}")
        else:
            survey.num_supervised += sizes.num_supervised
        return sizes.num_tokens, sizes.num_images


def survey_dataset(
    dataset: RossDataset,
    *,
    decode: bool,
    num_workers: int,
    progress_file: Path,
    show_progress: bool = True,
    block: int = 100_000,
) -> Survey:
    """Check every sample; goes on after the last finished block that `progress_file` holds for the same data.

    Raises:
        ValueError: the progress file belongs to other data or settings.
    """
    head = {"fingerprint": dataset.fingerprint, "decode": decode, "block": block}
    done = list(_read_progress(progress_file, head))
    survey = Survey()
    for part in done:
        survey.add(part)
    lines = [json.dumps(head), *(json.dumps(part.to_json()) for part in done)]
    temporary = progress_file.with_suffix(".tmp")
    temporary.write_text("".join(line + "\n" for line in lines))
    os.replace(temporary, progress_file)  # drops the line that was being written when the survey was stopped
    with progress_file.open("a") as file:
        for start in range(len(done) * block, len(dataset), block):
            indices = range(start, min(start + block, len(dataset)))
            title = f"checking samples from {start} of {len(dataset)}"
            part = Survey()
            for piece in map_samples(dataset, Checker(decode), indices, num_workers, show_progress, title):
                part.add(piece)
            survey.add(part)
            file.write(json.dumps(part.to_json()) + "\n")
            file.flush()
    return survey


def _read_progress(path: Path, head: dict[str, Any]) -> Iterator[Survey]:
    if not path.exists():
        return
    lines = path.read_text().splitlines()
    if lines and json.loads(lines[0]) != head:
        raise ValueError(f"{path} belongs to other data or settings; delete it to survey anew")
    for line in lines[1:]:
        try:
            yield Survey.from_json(json.loads(line))
        except json.JSONDecodeError:  # half a line
            return


def training_plan(survey: Survey, global_batch_size: int, pack_length: int | None) -> dict[str, float]:
    """What one epoch will be: sequences and steps, padded and packed, and how full packs are."""
    lengths = np.array(survey.num_tokens)
    plan: dict[str, float] = {
        "samples": len(lengths),
        "tokens": int(lengths.sum()),
        "supervised_tokens": survey.num_supervised,
        "images": int(sum(survey.num_images)),
        "steps_unpacked": len(lengths) / global_batch_size,
    }
    if pack_length is not None and lengths.max() <= pack_length:
        order = PackedOrder(SampleOrder(len(lengths)), lengths, pack_length)
        plan["packs"] = order.epoch_length(0)
        plan["steps_packed"] = order.epoch_length(0) / global_batch_size
        plan["pack_utilisation"] = utilisation(order.plan(0), lengths, pack_length)
    return plan


def text_histogram(values: list[int], title: str, width: int = 50, num_bins: int = 12) -> str:
    """A bar per range of values, for the terminal."""
    low, high = min(values), max(values)
    step = -(-(high - low + 1) // num_bins)
    counts, edges = np.histogram(values, bins=np.arange(low, high + step + 1, step))
    rows = [title]
    for count, edge in zip(counts.tolist(), edges.tolist(), strict=False):
        label = f"{edge}" if step == 1 else f"{edge} - {edge + step - 1}"
        rows.append(f"  {label:>17} {'#' * round(width * count / counts.max())} {count}")
    return "\n".join(rows)
