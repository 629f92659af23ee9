"""`megatron-ross COMMAND ...`: finds the command and hands the other arguments on."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Sequence

from megatron_ross import __version__

COMMANDS = {
    "train": ("train", "train Ross or LLaVA; under torchrun on many ranks"),
    "import": ("import_checkpoint", "Hugging Face checkpoints -> a Megatron checkpoint"),
    "export": ("export_checkpoint", "a Megatron checkpoint -> a Hugging Face folder"),
    "generate": ("generate", "ask a model about images, or chat with it"),
    "reconstruct": ("reconstruct", "paint images from what a model remembers of them"),
    "evaluate": ("evaluate", "score a model on benchmarks"),
    "plan": ("plan", "rank parallel layouts by predicted step time"),
    "prepare-data": ("prepare_data", "check the data of a run, and pack it into shards"),
    "cache-latents": ("cache_latents", "compute the VAE latents of a data set once"),
    "ablate": ("ablate", "train, evaluate and compare the arms of an experiment"),
    "answer-questions": ("answer_questions", "accuracy on questions with short answers, by category"),
}
"""Command -> its module in this package, and what it does."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: the command's, or 1 after one line that says what is wrong."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    name, rest = (words[0], words[1:]) if words else ("", [])
    if name in ("-h", "--help"):
        print(usage())
        return 0
    if name == "--version":
        print(__version__)
        return 0
    command = name.replace("_", "-")
    if command not in COMMANDS:
        print(f"error: {_unknown(name)}", file=sys.stderr)
        return 1
    if arguments is None:
        sys.argv = [f"megatron-ross {command}", *rest]  # what parsers call the program
    module = importlib.import_module(f"megatron_ross.cli.{COMMANDS[command][0]}")
    return int(module.main(rest))


def usage() -> str:
    """What `--help` shows."""
    width = max(map(len, COMMANDS))
    rows = "\n".join(f"  {name:<{width}}  {summary}" for name, (_, summary) in COMMANDS.items())
    return (
        "usage: megatron-ross COMMAND [OPTION...]\n\n"
        f"Reconstructive visual instruction tuning on Megatron Core, version {__version__}.\n\n{rows}\n\n"
        "megatron-ross COMMAND --help shows the command's options. On several ranks:\n"
        "  torchrun --nproc-per-node N -m megatron_ross.cli COMMAND [OPTION...]"
    )


def _unknown(name: str) -> str:
    if not name:
        return "name a command: " + ", ".join(COMMANDS)
    close = difflib.get_close_matches(name.replace("_", "-"), COMMANDS, n=1)
    return f"{name}: no such command; " + (f"did you mean {close[0]}?" if close else f"use {', '.join(COMMANDS)}")
