"""What a run has written for TensorBoard."""

from __future__ import annotations

from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import IMAGES, SCALARS, TENSORS, EventAccumulator


def tensorboard_events(run_folder: Path) -> EventAccumulator:
    """All events of a run, nothing thinned out."""
    events = EventAccumulator(str(run_folder / "tensorboard"), size_guidance={SCALARS: 0, TENSORS: 0, IMAGES: 0})
    return events.Reload()
