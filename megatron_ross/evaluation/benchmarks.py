"""The benchmarks of the published evaluation (`benchmarks.yaml`), and which framework runs a task that is asked for."""

from __future__ import annotations

import difflib
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_ross.evaluation.presets import FRAMEWORKS, Framework

TABLE = Path(__file__).with_name("benchmarks.yaml")


@dataclass(frozen=True)
class TaskOfFramework:
    """One framework's form of a benchmark; see benchmarks.yaml."""

    task: str
    metric: str | None = None
    scale: float = 1.0
    downloads: str | None = None


@dataclass(frozen=True)
class Benchmark:
    """One benchmark and the frameworks that have it."""

    name: str
    label: str
    published_with: Framework
    frameworks: dict[Framework, TaskOfFramework]


@dataclass(frozen=True)
class Job:
    """A benchmark to run, and in which framework."""

    benchmark: Benchmark
    framework: Framework

    @property
    def task(self) -> TaskOfFramework:
        """The framework's form of it."""
        return self.benchmark.frameworks[self.framework]


@functools.cache
def benchmarks() -> dict[str, Benchmark]:
    """All of benchmarks.yaml, by name."""
    return {row["name"]: _benchmark(row) for row in yaml.safe_load(TABLE.read_text(encoding="utf-8"))}


def _benchmark(row: dict[str, Any]) -> Benchmark:
    tasks = {framework: TaskOfFramework(**row[framework]) for framework in FRAMEWORKS if framework in row}
    return Benchmark(row["name"], row["label"], row["published_with"], tasks)


def job(name: str, framework: Framework | None = None) -> Job:
    """What to run for a name on the command line.

    Args:
        name: of a benchmark, or a framework's own name of it; with a framework other than builtin, also any other task
            of that framework.
        framework: default: the one whose own name it is, else the one whose figures were published.

    Raises:
        ValueError: unknown name, or the framework does not have the benchmark.
    """
    known = benchmarks()
    if name in known:
        chosen = framework or known[name].published_with
        if chosen not in known[name].frameworks:
            raise ValueError(
                f"{name} is not in {chosen}; --framework can be {' or '.join(known[name].frameworks)} for it"
            )
        return Job(known[name], chosen)
    for benchmark in known.values():  # a framework's own name of a benchmark in the table
        for one, task in benchmark.frameworks.items():
            if task.task == name and framework in (None, one):
                return Job(benchmark, one)
    if framework in ("lmms-eval", "vlmevalkit"):
        return Job(Benchmark(name, name, framework, {framework: TaskOfFramework(name)}), framework)
    near = difflib.get_close_matches(name, known, n=2)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise ValueError(
        f"task {name!r} is unknown: {hint}known are {', '.join(known)}; for any other task of a framework add "
        "--framework lmms-eval or --framework vlmevalkit"
    )


def jobs(names: str, framework: Framework | None = None) -> list[Job]:
    """What to run for comma-separated names. Raises ValueError: there is none, or as `job`."""
    found = [job(name.strip(), framework) for name in names.split(",") if name.strip()]
    if not found:
        raise ValueError("--tasks names no task; known are " + ", ".join(benchmarks()))
    return found
