"""Timesteps of the diffusion schedule: how many training has, and which of them a sampler visits."""

from __future__ import annotations

NUM_TRAIN_TIMESTEPS = 1000


def respaced_timesteps(num_timesteps: int, respacing: str | int) -> list[int]:
    """Steps kept out of `num_timesteps`, ascending.

    Args:
        num_timesteps: length of the full schedule.
        respacing: one count, or comma-separated counts, e.g. "6,6,1". The schedule is cut into as many equal sections
            as there are counts (the first ones one longer if it does not divide), and each keeps that many steps,
            spread from its first to its last one; a count of 1 keeps the first.

    Raises:
        ValueError: not a list of positive integers, or a section has fewer steps than asked for.
    """
    parts = str(respacing).split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(
            f"respacing {respacing!r} is not a comma-separated list of positive step counts, e.g. '250' or '6,6,1'"
        )
    counts = [int(part) for part in parts]
    short, num_longer = divmod(num_timesteps, len(counts))
    kept: list[int] = []
    start = 0
    for section, count in enumerate(counts):
        size = short + (section < num_longer)
        if count > size:
            raise ValueError(
                f"respacing {respacing!r} asks for {count} steps in section {section + 1} of {len(counts)}, which has "
                f"only {size} of the {num_timesteps} steps; ask for at most {size}"
            )
        stride = (size - 1) / (count - 1) if count > 1 else 0.0
        position = 0.0  # accumulated, not multiplied: rounding at .5 must fall as in the reference
        for _ in range(count):
            kept.append(start + round(position))
            position += stride
        start += size
    return kept
