"""Checks of a whole data set before anyone rents GPUs: what is broken, how long samples are, what training will drop.

The data set is walked in blocks; the findings of every finished block are appended to a progress file, so a survey
that was stopped goes on where it was. The same code runs as in training, so both drop the same samples.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ross.data.dataset import Measurement, RossDataset
from megatron_ross.data.errors import ConversationError, ImageError, RecordError
from megatron_ross.data.images import inspect_image
from megatron_ross.data.lengths import STUB_LENGTH, map_samples
from megatron_ross.data.order import SampleOrder
from megatron_ross.data.packing import PackedOrder, utilisation
from megatron_ross.data.records import Record
from megatron_ross.data.rgb import CONVERSIONS, KINDS
from megatron_ross.text_files import replace_text

SKIPPED = ("bad_record", "bad_conversation", "bad_image")
"""Kinds of findings for which training skips the sample, and counts it as `bad`."""

COUNTED = (*SKIPPED, "mismatch", "lacks_images")
"""Kinds that training counts against its limits."""

_MAX_EXAMPLES = 5
_SPAWN_ABOVE_IMAGES = 2_000  # images take ten times as long as texts


@dataclass
class Survey:
    """Sizes by sample as training will see it, and findings: kind -> the samples that have it, and a few examples.

    A skipped sample has one finding of `SKIPPED`. Others may be masked (`mismatch`) or lose images (`images_cut`); as
    in training, what is masked does not count as cut. For the user only: `empty_answer`, `nothing_supervised`,
    `no_image` (where images are all that is trained on), `bad_image_cut` (a broken image behind the sample's cut, which
    training never opens), and `rgb.KINDS`: samples with an image that `image_conversion` decides about.
    """

    num_tokens: list[int] = field(default_factory=list)
    num_images: list[int] = field(default_factory=list)
    num_supervised: list[int] = field(default_factory=list)
    found: dict[str, list[int]] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)

    @property
    def counts(self) -> dict[str, int]:
        """Samples by kind of finding."""
        return {kind: len(samples) for kind, samples in sorted(self.found.items())}

    @property
    def skipped(self) -> set[int]:
        """Samples that training skips."""
        return {index for kind in SKIPPED for index in self.found.get(kind, [])}

    @property
    def counted(self) -> dict[str, set[int]]:
        """Samples that training counts against its limits, by the name of `quarantine.Quarantine`'s count: of several
        findings a sample has one."""
        bad = self.skipped
        mismatch = set(self.found.get("mismatch", [])) - bad
        lacks_images = set(self.found.get("lacks_images", [])) - bad - mismatch
        return {"bad": bad, "mismatch": mismatch, "lacks_images": lacks_images}

    def find(self, kind: str, index: int, message: str) -> None:
        """Note a finding."""
        self.found.setdefault(kind, []).append(index)
        shown = self.examples.setdefault(kind, [])
        if len(shown) < _MAX_EXAMPLES:
            shown.append(message)

    def add(self, other: Survey, offset: int = 0) -> None:
        """Append the survey of the following samples, whose ids become larger by `offset`."""
        self.num_tokens += other.num_tokens
        self.num_images += other.num_images
        self.num_supervised += other.num_supervised
        for kind, samples in other.found.items():
            self.found.setdefault(kind, []).extend(index + offset for index in samples)
            self.examples[kind] = (self.examples.get(kind, []) + other.examples[kind])[:_MAX_EXAMPLES]


@dataclass(frozen=True)
class Checker:
    """Checks pieces of a data set; picklable, for worker processes. `decode`: read and decode every image."""

    decode: bool

    def __call__(self, dataset: RossDataset, indices: range) -> Survey:
        survey = Survey()
        for index in indices:
            sizes = self._check(dataset, index, survey)
            survey.num_tokens.append(sizes.num_tokens)
            survey.num_images.append(sizes.num_images)
            survey.num_supervised.append(sizes.num_supervised)
        return survey

    def _check(self, dataset: RossDataset, index: int, survey: Survey) -> Measurement:
        """Sizes of one sample as training will see it."""
        try:
            record = dataset.record(index)
            sizes = dataset.measure_record(record)
        except RecordError as error:
            survey.find("bad_record", index, str(error))
            return _STUB
        except ConversationError as error:
            survey.find("bad_conversation", index, str(error))
            return _STUB
        if dataset.supervise and any(turn.role == "gpt" and not turn.text.strip() for turn in record.turns):
            survey.find("empty_answer", index, record.where)
        if record.lacks_images:
            survey.find("lacks_images", index, f"{record.where}: says <image>, but names no image")
        if self.decode and not self._check_images(dataset, index, record, sizes.num_images, survey):
            return replace(sizes, num_supervised=0)
        if sizes.mismatch:
            survey.find("mismatch", index, record.where)
        elif sizes.num_images_cut:
            survey.find("images_cut", index, f"{record.where}: {sizes.num_images_cut} images do not fit seq_length")
        if not dataset.supervise:
            if not sizes.num_images:
                survey.find("no_image", index, f"{record.where}: with lm_loss_weight=0, nothing is left to train on")
        elif not sizes.mismatch and not sizes.num_supervised:
            survey.find("nothing_supervised", index, record.where)
        return sizes

    def _check_images(self, dataset: RossDataset, index: int, record: Record, num_used: int, survey: Survey) -> bool:
        """Whether training can decode the first `num_used` images of a record, which are all that it opens."""
        processor, seen = dataset.image_processor, set[str]()
        for number, name in enumerate(record.images):
            try:
                image, kinds = inspect_image(dataset.read_image(index, number, name), name, processor.conversion)
                processor.to_uint8(image)
                for kind in set(kinds) - seen if number < num_used else ():
                    how = KINDS[kind][CONVERSIONS.index(processor.conversion)]
                    survey.find(kind, index, f"{record.where}: image {name!r} is {how}")
                seen |= set(kinds)
            except ImageError as error:
                is_used = number < num_used
                survey.find("bad_image" if is_used else "bad_image_cut", index, f"{record.where}: {error}")
                return not is_used
        return True


_STUB = Measurement(STUB_LENGTH, num_supervised=0, num_images=0, num_images_cut=0, mismatch=False)


def survey_dataset(
    dataset: RossDataset,
    *,
    decode: bool,
    num_workers: int,
    progress_file: Path,
    show_progress: bool = True,
    block: int = 10_000,
) -> Survey:
    """Check every sample; goes on after the last finished block that `progress_file` holds for the same data.

    Raises:
        ValueError: the progress file belongs to other data or settings.
    """
    head = {"fingerprint": dataset.fingerprint, "images": dataset.images_fingerprint if decode else None}
    survey = Survey()
    for part in _read_progress(progress_file, head):
        survey.add(part)
    # Whole, so that a line which was being written when the survey was stopped is gone.
    replace_text(progress_file, f"{json.dumps(head)}\n{json.dumps(vars(survey))}\n")
    indices = range(len(survey.num_tokens), len(dataset))
    if show_progress and indices.start:
        print(f"{indices.start:,} samples were checked before; delete {progress_file} to check them again")
    spawn_above = _SPAWN_ABOVE_IMAGES if decode else None
    title = f"checking samples from {indices.start}"
    part = Survey()
    with progress_file.open("a") as file:
        for piece in map_samples(dataset, Checker(decode), indices, num_workers, show_progress, title, spawn_above):
            part.add(piece)
            if len(part.num_tokens) >= block:
                survey.add(part)
                file.write(json.dumps(vars(part)) + "\n")
                file.flush()
                part = Survey()
        survey.add(part)
        file.write(json.dumps(vars(part)) + "\n")
    return survey


def _read_progress(path: Path, head: dict[str, Any]) -> Iterator[Survey]:
    if not path.exists():
        return
    lines = path.read_text().splitlines()
    if lines and json.loads(lines[0]) != head:
        raise ValueError(f"{path} belongs to other data or settings; delete it to survey anew")
    for line in lines[1:]:
        try:
            yield Survey(**json.loads(line))
        except json.JSONDecodeError:  # half a line
            return


def training_plan(survey: Survey, order: SampleOrder, global_batch_size: int) -> dict[str, float]:
    """What the first epoch of an order will be; samples that a blend repeats count as often as they come."""
    lengths = np.array(survey.num_tokens)
    ids = order.epoch_ids(0)
    plan: dict[str, float] = {
        "samples": len(ids),
        "sequences": order.epoch_length(0),
        "steps": order.epoch_length(0) / global_batch_size,
        "tokens": int(lengths[ids].sum()),
        "supervised_tokens": int(np.array(survey.num_supervised)[ids].sum()),
        "images": int(np.array(survey.num_images)[ids].sum()),
    }
    if isinstance(order, PackedOrder):
        plan["pack_utilisation"] = utilisation(order.plan(0), lengths, order.capacity)
    return plan


def findings_per_epoch(survey: Survey, order: SampleOrder) -> dict[str, int]:
    """Samples of the first epoch of an order by kind of finding."""
    times = np.bincount(order.epoch_ids(0), minlength=len(survey.num_tokens))
    return {kind: int(times[samples].sum()) for kind, samples in sorted(survey.found.items())}


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
