"""Evaluate a checkpoint on benchmarks, with built-in evaluators, lmms-eval or VLMEvalKit. See docs/evaluation.md.

megatron-ross evaluate --checkpoint runs/NAME --tasks gqa,mmlu --output results
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_ross.cli.command import at_least_one, run_command
from megatron_ross.evaluation.benchmarks import jobs
from megatron_ross.evaluation.command_line import parse
from megatron_ross.evaluation.exports import check_model
from megatron_ross.evaluation.options import check_device


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 1 after a one-line error."""

    def body() -> int:
        options = parse(arguments)
        jobs(options.tasks, options.framework)  # what is wrong here is told before frameworks are imported
        check_device(options.device)
        at_least_one(options, "batch_size", *(["limit"] if options.limit is not None else []))
        check_model(options.checkpoint)
        from megatron_ross.evaluation.main import report

        return report(options)

    return run_command(body)
