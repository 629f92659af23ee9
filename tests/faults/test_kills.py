"""Signals at chosen and at random points of torchrun runs of four ranks: nothing is lost, nothing is repeated.

Killed ranks are started again by torchrun, up to --max-restarts times, without help; they resume from the last complete
checkpoint. Ranks that are asked to stop save and leave, and the same command again goes on. Losses of every iteration,
and the digest of all samples seen, must equal those of a run without faults, to the last bit.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_ross.checkpoint.manifest import Manifest, iteration_dir, resolve_checkpoint
from tests.helpers import faulty_training
from tests.helpers.distributed import run_ranks
from tests.helpers.sources import ROOT
from tests.helpers.toy_run import train, write_data
from tests.helpers.variants import make_variant

pytestmark = pytest.mark.faults
NUM_RANKS, ITERATIONS, SAVE_INTERVAL, NUM_RANDOM = 4, 24, 3, 20
WRITERS = [0, 2, 3]
"""Rank 1 has a vision tower's copy: the same as rank 0's, which writes it."""
START_S, RESTART_S = 900.0, 90.0
"""Limits on a machine that has a lot else to do."""


class Run:
    """A run folder, and the torchrun command that trains in it."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder, self.log, self.faults = folder, folder / "log", folder / "faults.json"
        self.settings = settings | {"save": str(folder), "load": str(folder), "train_iters": ITERATIONS}

    def start(self, faults: list[dict[str, Any]], max_restarts: int = 0) -> int:
        """Train until torchrun ends; its exit code. Nothing that it started is left."""
        self.faults.write_text(json.dumps(faults))
        arguments = [
            text for name, value in self.settings.items() for text in (f"--{name.replace('_', '-')}", str(value))
        ]
        command = [sys.executable, "-W", "ignore", "-m", "tests.helpers.preloaded_torchrun", "--standalone"]
        command += ["--nproc-per-node", str(NUM_RANKS), "--max-restarts", str(max_restarts)]
        command += ["--signals-to-handle", "SIGTERM,SIGUSR1", faulty_training.__file__, str(self.faults)]
        environment = os.environ | {
            "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}",
            "OMP_NUM_THREADS": "1",
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # a restarted group would meet at the keys of the one before
        }
        with self.log.open("ab") as out:
            process = subprocess.Popen(
                [*command, *arguments],
                cwd=ROOT,
                env=environment,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            return process.wait(START_S + RESTART_S * max_restarts)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"torchrun did not end in time:\n{self.tail()}") from None
        finally:
            _kill_session(process)

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-6000:]

    def starts(self) -> list[int]:
        """At which iteration the ranks started each time."""
        return [int(found) for found in re.findall(r"starting at iteration (\d+)", self.log.read_text())]

    def sent(self) -> set[int]:
        """Numbers of the starts in which a signal was sent."""
        return set(map(int, self.faults.with_name("faults.json.sent").read_text().split()))

    def manifest(self) -> Manifest:
        """Of the last checkpoint."""
        return Manifest.read(resolve_checkpoint(self.folder / "checkpoints"))

    def folders(self) -> list[str]:
        """Of checkpoints, and of what is none."""
        return sorted(path.name for path in (self.folder / "checkpoints").iterdir() if path.is_dir())

    def history(self) -> tuple[list[tuple[Any, ...]], str]:
        """(iteration, losses, gradient norm) of every line of the log, and the digest of the samples seen."""
        lines = [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]
        rows = [(line["iteration"], line["lm_loss"], line["recon_loss"], line["grad_norm"]) for line in lines]
        return rows, self.manifest().training["data"]["digest"]


def _kill_session(process: subprocess.Popen[bytes]) -> None:
    """torchrun, and the server of its ranks with them."""
    with contextlib.suppress(ProcessLookupError):  # all have ended
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return {
        **write_data(tmp_path_factory.mktemp("data")),
        "init_from": str(make_variant(tmp_path_factory.mktemp("model"), "qwen2_siglip").path),
        "tensor_model_parallel_size": 2,
        "pipeline_model_parallel_size": 2,
        "layout": "V|Et*4NDH",
        "seq_length": 256,
        "global_batch_size": 4,
        "lr": 1e-3,
        "save_interval": SAVE_INTERVAL,
        "save_retain_last": 2,
        "async_save": True,
        "log_interval": 1,
        "tensorboard": False,
    }


@pytest.fixture(scope="module")
def expected(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[list[tuple[Any, ...]], str]:
    """What four ranks do without torchrun and without faults."""
    run = Run(tmp_path_factory.mktemp("uninterrupted"), settings)
    assert run_ranks(train, NUM_RANKS, run.settings, timeout_s=START_S) == [""] * NUM_RANKS
    rows, digest = run.history()
    assert [row[0] for row in rows] == list(range(1, ITERATIONS + 1))
    assert len(set(rows)) == ITERATIONS  # it does train
    return rows, digest


@pytest.fixture
def run(settings: dict[str, Any], tmp_path: Path) -> Run:
    return Run(tmp_path, settings)


LAST_TWO = [iteration_dir(Path(), iteration).name for iteration in (ITERATIONS - SAVE_INTERVAL, ITERATIONS)]
KILLS = [
    {"ranks": [2], "iteration": 3, "point": "half"},  # in the first save: starts afresh
    {"ranks": [3], "iteration": 5, "point": "optimizer"},
    {"ranks": [1], "iteration": 9, "point": "sums"},
    {"ranks": [0], "iteration": 12, "point": "publish"},
    {"ranks": [0], "iteration": 15, "point": "named"},
    {"ranks": [0, 1, 2, 3], "iteration": 20, "point": "forward"},
]


def test_six_kills_in_one_run(expected: Any, run: Run) -> None:
    """In the middle of a file, before its checksum, around `latest`, in the optimizer step, and all ranks at once."""
    assert run.start(KILLS, max_restarts=len(KILLS)) == 0, run.tail()
    assert run.sent() == set(range(len(KILLS)))
    assert len(run.starts()) == len(KILLS) + 1
    assert run.history() == expected
    assert run.folders() == LAST_TWO


def _random_kills() -> list[dict[str, Any]]:
    rng = random.Random(27)  # all points; and not `named` in the last save, which then has nobody to remove older ones
    kills = []
    for iteration in sorted(rng.randint(1, ITERATIONS) for _ in range(NUM_RANDOM)):
        point = rng.choice(["start", "forward", "optimizer", "write", "half", "sums", "publish", "named"])
        able = {"publish": [0], "named": [0], "half": WRITERS}.get(point, range(NUM_RANKS))
        ranks = rng.sample(able, rng.randint(1, len(able)))
        kills.append({"ranks": ranks, "iteration": 0 if point == "start" else iteration, "point": point})
    return kills


def test_twenty_random_kills(expected: Any, run: Run) -> None:
    """Random ranks, points and iterations from a fixed seed, in one run."""
    assert run.start(_random_kills(), max_restarts=NUM_RANDOM) == 0, run.tail()
    assert run.sent() == set(range(NUM_RANDOM))
    assert run.history() == expected
    assert run.folders() == LAST_TWO


STOPS = [
    {"ranks": [2], "iteration": 4, "point": "forward", "signal": "SIGUSR1"},
    {"ranks": [1], "iteration": 6, "point": "write", "signal": "SIGTERM"},
    {"ranks": [0], "iteration": 11, "point": "optimizer", "signal": "SIGTERM", "to": "torchrun"},
    {"ranks": [0], "iteration": 16, "point": "forward", "signal": "SIGUSR1", "to": "torchrun"},
]


def test_a_run_that_is_asked_to_stop_saves_and_goes_on_later(expected: Any, run: Run) -> None:
    """By a signal to one rank, also while it writes a checkpoint; and by one to torchrun, which hands it to all."""
    resumed_at = 0
    for stop in STOPS:
        code, saved = run.start([stop]), run.manifest().iteration
        assert f"stopped by {stop['signal']} after iteration {saved}" in run.tail()
        assert run.starts()[-1] == resumed_at
        late = 4 if stop["point"] == "write" else 0  # steps that go on beside a slow writer, until the next save is due
        assert stop["iteration"] <= saved <= stop["iteration"] + late
        assert code == 0 or "to" in stop, run.tail()  # torchrun itself, when it gets a signal, never ends with 0
        resumed_at = saved
    assert run.start([]) == 0, run.tail()
    assert run.starts() == [0, *run.starts()[1:-1], resumed_at]
    assert len(run.starts()) == len(STOPS) + 1  # torchrun restarted nobody
    assert run.history() == expected


HANG_MINUTES, REPORT_S = 0.5, 15.0
"""The limit, and what the report may take beyond it: a second to notice, twelve to ask the others, two to write."""


def test_a_rank_that_stands_still_is_replaced(expected: Any, run: Run) -> None:
    """Stopped by the system, it ignores SIGTERM, too. The others name it and leave, torchrun starts all again."""
    recipe = run.folder / "limits.yaml"
    recipe.write_text(f"hang_timeout_minutes: {HANG_MINUTES}\npreemption_grace_seconds: 10\n")
    run.settings = {"config": str(recipe)} | run.settings
    silent = 2
    stop = {"ranks": [silent], "iteration": 8, "point": "forward", "signal": "SIGSTOP"}
    assert run.start([stop], max_restarts=1) == 0, run.tail()
    assert run.sent() == {0}
    assert run.starts() in ([0, 3], [0, 6])  # the save of iteration 6 goes on beside the next steps
    assert run.history() == expected
    reports = {path: path.read_text() for path in (run.folder / "hang").glob("rank-*.txt")}
    assert {path.name for path in reports} == {f"rank-{rank}.txt" for rank in range(NUM_RANKS) if rank != silent}
    assert all("no progress for 30 s in iteration 8; it stands at" in text for text in reports.values())
    assert all("in _step" in text for text in reports.values())
    assert any(f"ranks [{silent}] do not answer" in text for text in reports.values())
    stopped_at = run.faults.with_name("faults.json.sent").stat().st_mtime
    latest = max(path.stat().st_mtime for path in reports)
    assert latest - stopped_at < 60 * HANG_MINUTES + REPORT_S + 10.0  # beside a lot else
