"""The cluster scripts with real ranks on two "machines", process trees on loopback: one is lost, stopped, queued again.

Whatever happens on the way, metrics.jsonl ends up with every iteration once and with exactly the numbers of a run of
the same layout on one machine that nothing disturbed, and the last checkpoint with the digest of the same samples.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_ross.checkpoint.manifest import Manifest, resolve_checkpoint
from tests.helpers.distributed import run_ranks
from tests.helpers.nodes import LIMIT_S, Node, free_port
from tests.helpers.sources import ROOT
from tests.helpers.toy_run import train, write_data
from tests.helpers.variants import make_variant

pytestmark = pytest.mark.faults

RANKS_PER_NODE = 2
DISTURBED_AFTER = 3  # iterations; the last checkpoint is then older than the last line of metrics.jsonl
SETTINGS = {
    "tensor_model_parallel_size": 2,
    "layout": "VEt*4NDH",
    "seq_length": 256,
    "micro_batch_size": 1,
    "global_batch_size": 4,
    "lr": 1e-3,
    "train_iters": 8,
    "save_interval": 2,
    "log_interval": 1,
    "seed": 5,
    "tensorboard": False,
}

Steps = list[tuple[int, float, float, float]]
History = tuple[Steps, str]


class Run:
    """A run folder with its configuration file."""

    def __init__(self, folder: Path, settings: dict) -> None:
        self.folder, self.config, self.metrics = folder, folder / "recipe.yaml", folder / "metrics.jsonl"
        folder.mkdir()
        self.config.write_text(json.dumps(settings | {"save": str(folder), "load": str(folder)}))

    def lines(self) -> list[str]:
        return self.metrics.read_text().splitlines() if self.metrics.exists() else []

    def steps(self) -> Steps:
        """(iteration, losses, gradient norm) of every line."""
        records = [json.loads(line) for line in self.lines()]
        return [(r["iteration"], r["lm_loss"], r["recon_loss"], r["grad_norm"]) for r in records]

    def saved(self) -> int:
        """Iteration of the last checkpoint."""
        return self.manifest().iteration

    def manifest(self) -> Manifest:
        """Of the last checkpoint."""
        return Manifest.read(resolve_checkpoint(self.folder / "checkpoints"))

    def history(self) -> History:
        """The steps, and the digest of the samples that they saw."""
        manifest = self.manifest()
        assert manifest.iteration == SETTINGS["train_iters"]
        return self.steps(), manifest.training["data"]["digest"]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict:
    stored = make_variant(tmp_path_factory.mktemp("model"), "qwen2_siglip")
    return SETTINGS | write_data(tmp_path_factory.mktemp("data")) | {"init_from": str(stored.path)}


@pytest.fixture
def run(settings: dict, tmp_path: Path) -> Run:
    return Run(tmp_path / "run", settings)


@pytest.fixture(scope="module")
def undisturbed(settings: dict, tmp_path_factory: pytest.TempPathFactory) -> History:
    """The four ranks on one machine, started without a script."""
    run = Run(tmp_path_factory.mktemp("alone") / "run", settings)
    ranks = 2 * RANKS_PER_NODE
    assert run_ranks(train, ranks, settings | {"save": str(run.folder)}, timeout_s=LIMIT_S) == [""] * ranks
    steps, digest = run.history()
    assert [step[0] for step in steps] == list(range(1, SETTINGS["train_iters"] + 1))
    assert len(set(steps)) == len(steps)  # training does something
    return steps, digest


def torchrun_node(folder: Path, number: int, port: int, **env: str) -> Node:
    settings = {
        "NNODES": "2",
        "NODE_RANK": str(number),
        "GPUS_PER_NODE": str(RANKS_PER_NODE),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "LOCAL_ADDR": f"127.0.0.{2 + number}",
    }
    return Node(folder / f"node{number}", **(settings | env))


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[list[Node]]:
    """Two machines for torchrun.sh."""
    port = free_port()
    both = [torchrun_node(tmp_path, number, port) for number in range(2)]
    yield both
    for node in both:
        node.lose_power()


def start_all(nodes: list[Node], run: Run) -> None:
    for node in nodes:
        node.start("torchrun.sh", "--config", str(run.config))


def wait_for_lines(node: Node, run: Run, count: int) -> None:
    node.wait_until(lambda: len(run.lines()) >= count, f"iteration {count}")


def wait_for_new_line(node: Node, run: Run, old: list[str]) -> None:
    """A line that the run wrote after it was started again; times differ, so no two lines are the same."""
    node.wait_until(lambda: any(line not in old for line in run.lines()), "an iteration after the restart")


def test_another_machine_replaces_a_lost_one(
    nodes: list[Node], run: Run, undisturbed: History, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its address sorts before that of machine 0, which therefore is not the first machine any more."""
    start_all(nodes, run)
    wait_for_lines(nodes[0], run, DISTURBED_AFTER)
    nodes[1].lose_power()
    lost_at, before = time.monotonic(), run.lines()
    assert len(before) < SETTINGS["train_iters"], "it was lost too late"
    nodes[1].env["LOCAL_ADDR"] = "127.0.0.1"
    nodes[1].start("torchrun.sh", "--config", str(run.config))
    wait_for_new_line(nodes[0], run, before)
    with capsys.disabled():
        print(f"\n{time.monotonic() - lost_at:.1f} s from the loss of a machine to the next iteration")
    assert [node.wait() for node in nodes] == [0, 0], nodes[0].tail()
    assert run.history() == undisturbed


def test_one_machine_is_asked_to_stop(nodes: list[Node], run: Run, undisturbed: History) -> None:
    start_all(nodes, run)
    wait_for_lines(nodes[0], run, DISTURBED_AFTER)
    nodes[1].signal(signal.SIGUSR1)
    assert [node.wait() for node in nodes] == [0, 0], nodes[0].tail()
    done = run.steps()
    assert DISTURBED_AFTER <= len(done) < SETTINGS["train_iters"]
    assert run.saved() == len(done)
    assert sum(node.tail().count("starting at iteration") for node in nodes) == 1  # nobody restarted the ranks
    start_all(nodes, run)
    assert [node.wait() for node in nodes] == [0, 0], nodes[0].tail()
    assert run.history() == undisturbed


def test_a_rank_that_dies_is_started_again(nodes: list[Node], run: Run, undisturbed: History) -> None:
    """And all others with it, on both machines."""
    start_all(nodes, run)
    wait_for_lines(nodes[0], run, DISTURBED_AFTER)
    (victim,) = nodes[1].pids(LOCAL_RANK="1")
    os.kill(victim, signal.SIGKILL)
    assert len(run.lines()) < SETTINGS["train_iters"], "it was killed too late"
    assert [node.wait() for node in nodes] == [0, 0], nodes[0].tail()
    assert sum(node.log.read_text().count("starting at iteration") for node in nodes) == 2
    assert run.history() == undisturbed


def test_loss_of_machine_0_ends_the_run_with_a_message(nodes: list[Node], run: Run) -> None:
    start_all(nodes, run)
    wait_for_lines(nodes[0], run, DISTURBED_AFTER)
    nodes[0].lose_power()
    assert nodes[1].wait() not in (0, None)
    assert "error: machine 0 (127.0.0.1:" in nodes[1].tail().splitlines()[-1]
    assert not nodes[1].pids()
    assert run.saved() >= SETTINGS["save_interval"]


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[Node]:
    """The first node of a Slurm job, with stand-ins that start all tasks of the job on it."""
    job_id = free_port(10000, 59999) - 10000  # the script makes a port of it
    node = Node(
        tmp_path / "slurm",
        SLURM_JOB_ID=str(job_id),
        SLURM_JOB_NODELIST="localhost,localhost",
        SLURM_NNODES="2",
        SLURM_NTASKS_PER_NODE=str(RANKS_PER_NODE),
        RETRY_AFTER_S="0",
        RETRIES_FILE=str(tmp_path / "retries"),
    )
    node.add_program("srun", f'exec python {ROOT / "tests" / "helpers" / "slurm_step.py"} "$@"')
    node.add_program("scontrol", 'if [ "$1" = show ]; then echo localhost; else echo "scontrol $*"; fi')
    yield node
    node.lose_power()


def test_a_slurm_job_is_queued_again(slurm: Node, run: Run, undisturbed: History) -> None:
    """First its time is up, then a rank is killed, then it finishes."""
    requeue = f"scontrol requeue {slurm.env['SLURM_JOB_ID']}"
    slurm.start("slurm.sh", "--config", str(run.config))
    wait_for_lines(slurm, run, DISTURBED_AFTER)
    slurm.signal(signal.SIGUSR1)
    assert slurm.wait() == 0, slurm.tail()
    before = run.lines()
    assert run.saved() == len(before) < SETTINGS["train_iters"]
    assert slurm.log.read_text().count(requeue) == 1

    slurm.start("slurm.sh", "--config", str(run.config))
    wait_for_new_line(slurm, run, before)
    slurm.kill(RANK="3")
    assert slurm.wait() == 128 + signal.SIGKILL, slurm.tail()
    assert not slurm.pids()
    assert slurm.log.read_text().count(requeue) == 2

    slurm.start("slurm.sh", "--config", str(run.config))
    assert slurm.wait() == 0, slurm.tail()
    assert slurm.log.read_text().count(requeue) == 2
    assert run.history() == undisturbed
