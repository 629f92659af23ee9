"""`megatron-ross evaluate`: from a checkpoint and names of tasks to a table of scores."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from megatron_ross.compat import versions
from megatron_ross.evaluation import results as results_module
from megatron_ross.evaluation.benchmarks import Job
from megatron_ross.evaluation.benchmarks import jobs as jobs_of
from megatron_ross.evaluation.builtin import run as builtin
from megatron_ross.evaluation.command_line import parse
from megatron_ross.evaluation.exports import exported_folder, fingerprint
from megatron_ross.evaluation.frameworks import OPENERS, Runner, builtin_options
from megatron_ross.evaluation.lmms_eval import run as lmms
from megatron_ross.evaluation.ranks import RanksApart, wait_for_other_ranks
from megatron_ross.evaluation.vlmevalkit.launcher import find_run_py

_RECORDED_PACKAGES = ("megatron-ross", "torch", "transformers", "lmms_eval", "vlmeval")


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 if every task has a score; otherwise 1, and the last line on stderr says what is missing."""
    return report(parse(arguments))


def report(args: Namespace) -> int:
    """Evaluate and print the scores. Exit status as `main`."""
    try:
        found, missing = evaluate(args)
    except (ValueError, OSError) as error:
        return _fail(str(error))
    for entry in found:
        shown = entry.scores if entry.percent is None else {entry.metric: entry.percent}
        print(f"{entry.benchmark} ({entry.framework}): " + "  ".join(f"{n} {v:.1f}" for n, v in shown.items()))
    if found:
        print(args.output / results_module.RESULTS_MD)
    if not missing:
        return 0
    names = ", ".join(name.partition(" ")[2] for name in missing)
    reason = next(iter(missing.values())) if len(missing) == 1 else "not every benchmark has a score, see above"
    return _fail(f"{reason}; missing: {names}; the same command asks for nothing else again")


def _fail(message: str) -> int:
    _say(message)
    return 1


def _say(message: str) -> None:
    # A framework's progress bar may have left the cursor in the middle of a line.
    print(f"\nerror: {' '.join(message.split())}", file=sys.stderr)


def evaluate(args: Namespace) -> tuple[list[results_module.Result], results_module.Missing]:
    """Run everything and save after every benchmark.

    Returns:
        Results and failures of this command's tasks, earlier ones that are taken up included; on the first rank only.

    Raises:
        ValueError: bad input, or, on one of several ranks, a benchmark failed there while the others go on with it.
    """
    jobs = jobs_of(args.tasks, args.framework)
    check(args, jobs)
    folder = exported_folder(args.checkpoint, args.export_format, rank=_rank())
    settings = _settings(args, folder)
    earlier = results_module.earlier_results(args.output, settings)
    record = _Record(args.output, earlier, results_module.read_missing(args.output), settings)
    todo = [j for j in jobs if not (args.reuse and record.takes_up(j))]
    # What crashed or stood still the last time must not keep the others from being asked.
    todo.sort(key=lambda j: results_module.missing_key(j) in record.missing)
    for framework, opener in OPENERS.items():
        of_framework = [j for j in todo if j.framework == framework]
        if of_framework:
            try:
                _ask(of_framework, partial(opener, args, str(folder), of_framework), record)
            except RanksApart as error:
                found, _ = record.of(jobs)
                left = [j.benchmark.name for j in jobs if j.benchmark.name not in {entry.benchmark for entry in found}]
                raise ValueError(f"{error}; missing: {', '.join(left)}") from error
            gc.collect()  # the model of one framework goes before the next comes
    return ([], {}) if _rank() else record.of(jobs)


class _Record:
    """Results and failures so far, on disk after every change; only the first rank writes."""

    def __init__(
        self,
        output: Path,
        results: list[results_module.Result],
        missing: results_module.Missing,
        settings: dict[str, Any],
    ) -> None:
        self.output, self.results, self.missing, self.settings = output, list(results), dict(missing), settings

    def takes_up(self, j: Job) -> bool:
        """Whether an earlier call has scored it with the same settings."""
        found = any(results_module.is_finished(entry, j, self.settings) for entry in self.results)
        if found and not _rank():
            print(f"{j.benchmark.name} ({j.framework}): taken up from {self.output / results_module.RESULTS_JSON}")
        return found

    def begins(self, j: Job) -> None:
        self.fails(j, "it was being asked when the process ended")

    def succeeds(self, j: Job, scores: dict[str, float]) -> None:
        """Raises FrameworkError: the metric of the table is not among the scores, which are kept all the same."""
        entry = results_module.result(j, scores, self.settings)
        self.results.append(entry)
        self.missing.pop(results_module.missing_key(j), None)
        self._write()
        results_module.check_headlines([entry])

    def fails(self, j: Job, reason: str) -> None:
        self.missing[results_module.missing_key(j)] = reason
        self._write()

    def _write(self) -> None:
        if not _rank():
            results_module.write_results(self.output, self.results, self.missing)

    def of(self, jobs: Sequence[Job]) -> tuple[list[results_module.Result], results_module.Missing]:
        """Results and failures of `jobs`, in their order."""
        newest = {(entry.benchmark, entry.framework): entry for entry in self.results}
        keys = [(j.benchmark.name, j.framework) for j in jobs]
        lost = {key: self.missing[key] for j in jobs if (key := results_module.missing_key(j)) in self.missing}
        return [newest[key] for key in keys if key in newest], lost


def _ask(jobs: Sequence[Job], open_runner: Callable[[], Runner], record: _Record) -> None:
    """Ask a framework for its benchmarks; one that fails costs only itself."""
    try:
        runner = open_runner()
    except (ValueError, OSError) as error:
        for j in jobs:
            record.fails(j, str(error))
        _say(f"{jobs[0].framework}: {error}")
        return
    for number, j in enumerate(jobs):
        record.begins(j)
        failure = ""
        try:
            scores = runner(j)
            if not _rank():
                record.succeeds(j, scores)
        except (ValueError, OSError) as error:
            failure = str(error)
            record.fails(j, failure)
            _say(f"{j.benchmark.name} ({j.framework}): {failure}")
        wait_for_other_ranks(f"{j.framework} {number}", failure)


def check(args: Namespace, jobs: Sequence[Job]) -> None:
    """Refuse, before anything is exported or loaded, what cannot work. Raises ValueError."""
    wanted = {j.framework for j in jobs}
    if "lmms-eval" in wanted:
        lmms.check_installed()
    if "vlmevalkit" in wanted:
        find_run_py(args.vlmevalkit)
        if args.limit is not None:
            raise ValueError("VLMEvalKit asks all questions: leave out --limit, or choose --framework lmms-eval")
    if "builtin" in wanted and _world_size() > 1:
        raise ValueError("built-in tasks run in one process: leave out torchrun, or choose --framework lmms-eval")
    for j in jobs:
        if j.framework == "builtin":
            builtin.check_options(j.task.task, builtin_options(args))


def _settings(args: Namespace, folder: Path) -> dict[str, Any]:
    """Command line, what was exported, and versions of what took part."""
    given = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    export = {"export": str(folder.resolve()), "fingerprint": fingerprint(folder)}
    return {**given, **export, "versions": versions(_RECORDED_PACKAGES)}


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))
