"""Carries out the runs of an ablation: the project's own programs as processes, several runs at a time, resumable.

What is finished is not done again: a run with result.json is skipped, an interrupted training resumes from its last
checkpoint; both are refused if the ablation has changed since. The first failure ends the other processes and names the
run, the step and its log.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_ross.checkpoint.manifest import CHECKPOINTS_NAME, LATEST_NAME
from megatron_ross.evaluation.ablation.conditions import (
    START_CONDITIONS,
    conditions_of,
    read_record,
    refuse_changes,
    write_record,
)
from megatron_ross.evaluation.ablation.plan import AblationConfig, Run
from megatron_ross.evaluation.ablation.results import BEGUN_NAME, RESULT_NAME, collect_result, is_finished
from megatron_ross.programs import end_group, start_program
from megatron_ross.text_files import replace_text

POLL_S = 0.1
GRACE_S = 10.0
STOPPED_BY = "stopped by "
"""How the last line of a training begins that a signal ended early."""
PROGRAM = (sys.executable, "-m", "megatron_ross.cli")
"""`megatron-ross`, wherever this interpreter finds the package."""
Say = Callable[[str], None]


class AblationError(RuntimeError):
    """A run failed, or runs are no pairs; says which. Of a failure also in what step, and where its log is."""


@dataclass(frozen=True)
class Step:
    """A command. It is skipped where `product` exists: the command makes it whole or not at all."""

    name: str
    command: list[str]
    product: Path | None = None


def start_folder(config: AblationConfig, seed: int) -> Path:
    """The checkpoint that runs of one seed start from."""
    return Path(config.output) / "start" / f"seed{seed}"


def common_training(config: AblationConfig, seed: int) -> Path:
    """Run folder of the training that all arms of a seed have in common."""
    return Path(config.output) / "start" / f"seed{seed}-trained"


def init_from(config: AblationConfig, seed: int) -> Path:
    """The checkpoint that the arms of one seed start from."""
    return common_training(config, seed) / CHECKPOINTS_NAME if config.start.train else start_folder(config, seed)


def begin_start(config: AblationConfig, seed: int, conditions: dict[str, str]) -> None:
    """Remember under which conditions the checkpoint that runs of one seed start from is made.

    Raises:
        ValueError: there is one that was made under others.
    """
    folder = start_folder(config, seed)
    record, wanted = folder.with_name(f"{folder.name}.json"), {name: conditions[name] for name in START_CONDITIONS}
    if record.exists() or folder.exists():
        refuse_changes(folder.parent, read_record(record), wanted)
    write_record(record, wanted)


def start_steps(config: AblationConfig, seed: int) -> list[Step]:
    """Convert the shared parts, with projector and denoiser fresh from `seed`, and train what arms have in common."""
    start = config.start
    command = [*PROGRAM, "import", "--llm", start.llm, "--vae", start.vae]
    command += ["--vision-tower", start.vision_tower, "--denoiser-type", start.denoiser_type, "--seed", str(seed)]
    if start.denoiser_width is not None:
        command += ["--denoiser-width", str(start.denoiser_width)]
    folder = start_folder(config, seed)
    steps = [Step("conversion", [*command, "--output", str(folder)], folder)]
    if config.start.train:
        save = str(common_training(config, seed))
        configs = [part for path in config.start.train for part in ("--config", path)]
        own = ["--init-from", str(folder), "--save", save, "--load", save, "--seed", str(seed)]
        product = init_from(config, seed) / LATEST_NAME
        steps.append(Step("common training", [*launcher(config), *configs, *own], product))
    return steps


def launcher(config: AblationConfig) -> list[str]:
    """What starts a training on the ablation's number of processes."""
    if config.processes == 1:
        return [*PROGRAM, "train"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    return [*torchrun, str(config.processes), *PROGRAM[1:], "train"]


def run_steps(config: AblationConfig, run: Run) -> list[Step]:
    """Train, export, answer and, where the denoiser has learned, reconstruct."""
    trained, exported = run.folder / "run", run.folder / "hf"
    configs = [part for path in (*config.train, overlay_path(run)) for part in ("--config", str(path))]
    answer = ["--checkpoint", str(exported), "--questions", config.questions, "--images", config.image_folder]
    steps = [
        Step("training", [*launcher(config), *configs]),
        Step(
            "export",
            [
                *(*PROGRAM, "export", "--checkpoint", str(trained / CHECKPOINTS_NAME)),
                *("--format", "ross", "--output", str(exported)),
            ],
            exported,
        ),
        Step("answers", [*PROGRAM, "answer-questions", *answer, "--output", str(run.folder / "answers.json")]),
    ]
    if run.arm.reconstructs:
        paint = [*PROGRAM, "reconstruct", "--checkpoint", str(exported), "--images", config.paint.images]
        paint += ["--output", str(run.folder / "reconstructions"), "--limit", str(config.paint.limit)]
        steps.append(Step("reconstruction", paint if run.arm.regresses else [*paint, "--steps", config.paint.steps]))
    return steps


def overlay_path(run: Run) -> Path:
    """The run's own settings, as the last configuration file of its training."""
    return run.folder / "settings.yaml"


def overlay(config: AblationConfig, run: Run) -> dict[str, Any]:
    """Settings in which this run differs from the files that all share."""
    trained = str(run.folder / "run")
    own = {"init_from": str(init_from(config, run.seed)), "save": trained, "load": trained, "seed": run.seed}
    return {**config.shared, **run.arm.settings, **own}


def execute(config: AblationConfig, runs: Sequence[Run], jobs: int, root: Path, say: Say = print) -> None:
    """Bring every run to its result.

    Args:
        jobs: runs at a time.
        root: where the commands run and the ablation's paths start.

    Raises:
        AblationError: a step failed, or the ablation's files changed meanwhile.
        ValueError: what is there was run with other settings or conditions than asked for.
    """
    conditions = conditions_of(config, root)
    pending = [run for run in runs if not is_finished(run, overlay(config, run), conditions)]
    seeds = sorted({run.seed for run in pending})
    for seed in seeds:
        begin_start(config, seed, conditions)
    say(f"{len(runs)} runs, {len(runs) - len(pending)} of them finished before; {jobs} at a time")
    stop = threading.Event()
    done = 0

    def make_start(seed: int) -> None:
        log = start_folder(config, seed).parent / f"seed{seed}.log"
        for step in start_steps(config, seed):
            _run_step(step, f"start, seed {seed}", log, root, stop)

    def carry_out(run: Run) -> None:
        nonlocal done
        begin = time.monotonic()
        _carry_out(config, run, conditions, root, stop)
        done += 1
        say(f"{done}/{len(pending)} {run.name}: {time.monotonic() - begin:.0f} s")

    with ThreadPoolExecutor(jobs) as pool:
        try:
            _all([pool.submit(make_start, seed) for seed in seeds])
            _all([pool.submit(carry_out, run) for run in pending])
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


def _all(futures: list[Future[None]]) -> None:
    """Wait for all, or raise the first error of one."""
    finished, _ = wait(futures, return_when=FIRST_EXCEPTION)
    for future in finished:
        future.result()


class _Stopped(RuntimeError):
    """Another run failed first."""


def _carry_out(config: AblationConfig, run: Run, conditions: dict[str, str], root: Path, stop: threading.Event) -> None:
    begin = time.monotonic()
    if conditions_of(config, root) != conditions:
        raise AblationError(
            f"{run.name}: the ablation's files have changed since its start; undo that and run it again"
        )
    settings = overlay(config, run)
    write_record(run.folder / BEGUN_NAME, {**settings, **conditions})
    overlay_path(run).write_text(yaml.safe_dump(settings, sort_keys=False))
    for step in run_steps(config, run):
        _run_step(step, run.name, run.folder / "log.txt", root, stop)
    result = collect_result(run, settings, conditions, (time.monotonic() - begin) / 60)
    replace_text(run.folder / RESULT_NAME, json.dumps(result, indent=1) + "\n")


def _run_step(step: Step, name: str, log: Path, root: Path, stop: threading.Event) -> None:
    if stop.is_set():
        raise _Stopped
    if step.product is not None and step.product.exists():
        return
    with log.open("a") as stream:
        stream.write(f"$ {' '.join(step.command)}\n")
        stream.flush()
        process = start_program(step.command, root, stream)
        try:
            while process.poll() is None:
                if stop.wait(POLL_S):
                    raise _Stopped
        finally:
            end_group(process, GRACE_S)
    if process.returncode:
        raise AblationError(
            f"{name}: {step.name} failed with exit code {process.returncode}: {_last_line(log)}; see {log}"
        )
    if _last_line(log).startswith(STOPPED_BY):  # a signal to the training alone: it has saved and ended well
        raise AblationError(f"{name}: {step.name} was {_last_line(log)}; the same command goes on from there")


def _last_line(log: Path) -> str:
    """The last line that says something; a progress bar's line is what stands after its last return."""
    lines = [line.rpartition("\r")[2].strip() for line in log.read_text(errors="replace").splitlines()]
    return next((line for line in reversed(lines) if line), "no output")
