"""Samples that cannot be used: skipped in place, counted, written down, and a reason to stop when there are too many.

A broken sample keeps its place in the order and in the batch, so shapes and positions do not depend on who noticed.
Only the rank that decodes an image learns that it is broken, so all ranks agree on one flag per sample of the global
batch before the step is handed out; a flagged sample then has no supervised token and no reconstructed image anywhere.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_ross.config.model import IGNORE_LABEL
from megatron_ross.data.batch import RossMicrobatch, RossSample
from megatron_ross.data.run_files import RunFiles

MAX_EXAMPLES = 5
_ROUNDING = 1e-6  # 0.29 * 100 is below 29


class SampleStatus(IntEnum):
    """What became of a sample; the larger value wins when ranks see different things."""

    GOOD = 0
    IMAGES_CUT = 1  # `max_length` left no room for one of its images
    LACKS_IMAGES = 2  # says <image> and brings none: trained as text, as published
    MISMATCH = 3  # tokenisation mismatch: masked, as published
    BAD = 4  # record or image broken: skipped


@dataclass(frozen=True)
class BadSamplePolicy:
    """How to treat broken samples.

    Attributes:
        agree: reduces an int32 tensor (one status per sample of the global batch) to its maximum over ALL ranks of the
            run. It is called once per step on every rank, from the thread that calls `next_step`.
        max_bad_share, max_mismatch_share: the run stops above these shares of the samples consumed so far.
        min_samples: until so many samples are consumed, shares are taken of this number. `samples_for_a_share` says
            how many suit a data set.
        template: of the conversations, for messages.
        quarantine_path: JSONL file to append this rank's findings to; None writes nothing.
        files: writes that file.
    """

    agree: Callable[[Tensor], Tensor] = lambda flags: flags
    max_bad_share: float = 0.01
    max_mismatch_share: float = 0.01
    min_samples: int = 1000
    template: str = ""
    quarantine_path: Path | None = None
    files: RunFiles = field(default_factory=RunFiles)


def samples_for_a_share(samples_per_epoch: int) -> int:
    """How many samples a share is taken of at least.

    The first bad sample of a large set says little about its share: ten in a thousand may be chance. Of a set below a
    thousand the share is exact from the start, because no more samples follow than it has: eight bad ones of eight are
    too many, and so is one of ten where 1 % is allowed.
    """
    return min(1000, samples_per_epoch)


class TooManyBadSamplesError(ValueError):
    """More samples than allowed are broken. Raised in the same step on every rank."""


@dataclass(frozen=True)
class Finding:
    """What this rank found out about one sample."""

    status: SampleStatus
    reason: str


def stub_sample(sample_id: int) -> RossSample:
    """Stands in for a sample whose record cannot be used: one token, nothing supervised, no image."""
    return RossSample(sample_id, torch.zeros(1, dtype=torch.int64), torch.full((1,), IGNORE_LABEL))


def finding_of(sample: RossSample, template: str = "") -> Finding | None:
    """What is wrong with a sample that could be tokenised, if anything; `template` is for the message."""
    if sample.mismatch:
        under = f" under template {template}" if template else ""
        return Finding(SampleStatus.MISMATCH, f"tokenization mismatch{under}: all labels are masked")
    if sample.lacks_images:
        return Finding(SampleStatus.LACKS_IMAGES, "says <image>, but the record names no image")
    if sample.num_images_cut:
        return Finding(SampleStatus.IMAGES_CUT, f"seq_length left no room for {sample.num_images_cut} of its images")
    return None


class Quarantine:
    """Counts the samples of a run by status, writes findings down, stops the run above the allowed share."""

    def __init__(self, policy: BadSamplePolicy):
        self.policy = policy
        self.counts: Counter[str] = Counter()
        self.examples: list[str] = []

    def clear(self) -> None:
        """Forget everything."""
        self.counts.clear()
        self.examples.clear()

    def settle(self, keys: np.ndarray, findings: Mapping[int, Finding]) -> list[int]:
        """Agree with all ranks on one global batch.

        Args:
            keys: int64 [m, 2], (epoch, sample id) of every sample of the global batch.
            findings: this rank's, by position in `keys`.

        Returns:
            Positions of the samples to skip, the same on every rank.
        """
        flags = torch.zeros(len(keys), dtype=torch.int32)
        for position, finding in findings.items():
            flags[position] = int(finding.status)
        self._write(keys, findings)
        statuses = self.policy.agree(flags).tolist()
        self.counts.update(SampleStatus(s).name.lower() for s in statuses if s != SampleStatus.GOOD)
        for position, status in enumerate(statuses):
            if status >= SampleStatus.LACKS_IMAGES and len(self.examples) < MAX_EXAMPLES:
                known = findings[position].reason if position in findings else "found by another rank"
                self.examples.append(f"sample {keys[position, 1]}: {known}")
        return [position for position, status in enumerate(statuses) if status == SampleStatus.BAD]

    def check(self, consumed_samples: int) -> None:
        """
        Raises:
            TooManyBadSamplesError: a share passed its limit; the message gives examples.
        """
        for excess in self.excesses(consumed_samples):
            raise TooManyBadSamplesError(excess)

    def excesses(self, consumed_samples: int) -> list[str]:
        """A line for every share that passed its limit, with examples."""
        policy = self.policy
        total = max(consumed_samples, policy.min_samples)
        why = f" under template {policy.template}" if policy.template else ""
        limits = {
            "bad": ("max_bad_sample_share", policy.max_bad_share, "bad: their records or images are broken"),
            "lacks_images": (
                "max_bad_sample_share",
                policy.max_bad_share,
                "lacks_images: they say <image>, but their records name no image",
            ),
            "mismatch": ("max_mismatch_share", policy.max_mismatch_share, f"mismatch: their tokens do not add up{why}"),
        }
        return [
            f"{self.counts[name]} of {consumed_samples} samples are {text}; more than the allowed share "
            f"({setting}={limit}); check the data with tools/prepare_data.py, or allow more. "
            f"Examples: {'; '.join(self.examples)}"
            for name, (setting, limit, text) in limits.items()
            if self.counts[name] > limit * total + _ROUNDING
        ]

    def _write(self, keys: np.ndarray, findings: Mapping[int, Finding]) -> None:
        if self.policy.quarantine_path is None or not findings:
            return
        lines = []
        for position, finding in sorted(findings.items()):
            epoch, sample_id = (int(x) for x in keys[position])
            entry: dict[str, Any] = {"epoch": epoch, "sample_id": sample_id, "status": finding.status.name.lower()}
            lines.append(json.dumps(entry | {"reason": finding.reason}, ensure_ascii=False) + "\n")
        self.policy.files.append(self.policy.quarantine_path, "".join(lines))


def skip_samples(batch: RossMicrobatch, segments: list[tuple[int, int, int]]) -> None:
    """Take samples out of a microbatch, in place, without changing any shape.

    Args:
        segments: (row, first token, one past the last token) of each sample to skip.
    """
    row_length = batch.tokens.shape[1]
    for row, begin, end in segments:
        batch.labels[row, begin:end] = IGNORE_LABEL
        first = row * row_length + begin
        inside = (batch.recon_start >= first) & (batch.recon_start < row * row_length + end)
        batch.recon_weight[inside] = 0.0
    batch.num_supervised_tokens = int((batch.labels >= 0).sum())
