"""How lmms-eval's tasks want their answers chosen. lmms-eval itself is not needed to import this file."""

from __future__ import annotations

from typing import Any

from megatron_ross.evaluation.options import Decoding
from megatron_ross.evaluation.presets import Preset

DEFAULT_MAX_NEW_TOKENS = 1024


def task_decoding(gen_kwargs: dict[str, Any], preset: Preset) -> Decoding:
    """A task's `generation_kwargs` as decoding.

    Args:
        preset: says whether the task's stop strings (`until`, which every task has) count.

    Raises:
        ValueError: it asks for beam search.
    """
    beams = gen_kwargs.get("num_beams") or 1
    if beams != 1:
        raise ValueError(f"a task asks for num_beams {beams}; only sampling and greedy decoding are supported")
    until = gen_kwargs.get("until") or ()
    stop = (until,) if isinstance(until, str) else tuple(until)
    temperature = float(gen_kwargs.get("temperature") or 0.0)
    return Decoding(
        max_new_tokens=int(gen_kwargs.get("max_new_tokens") or DEFAULT_MAX_NEW_TOKENS),
        temperature=0.0 if gen_kwargs.get("do_sample") is False else temperature,
        top_p=float(gen_kwargs.get("top_p") or 1.0),
        top_k=int(gen_kwargs.get("top_k") or 0),
        stop=tuple(text for text in stop if text) if preset.task_stop_strings else (),
    )
