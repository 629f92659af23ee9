"""The cluster scripts with stand-ins for srun, scontrol and torchrun: arguments, signals, exit codes, requeueing."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

CLUSTER = Path(__file__).resolve().parents[3] / "examples" / "cluster"

# A rank that finishes at once, fails, or trains until USR1 asks it to save; one that starts slowly would die of USR1.
RANK = """import os, signal, sys, time
log = open(os.environ["LOG"], "a", buffering=1)
print("started", os.environ["RANK"], os.environ["WORLD_SIZE"], os.environ["MASTER_ADDR"], *sys.argv[1:], file=log)
def save(number, frame):
    time.sleep(0.3)
    print("saved", file=log)
    sys.exit(0)
behaviour = os.environ["BEHAVIOUR"]
if behaviour == "start slowly":
    print("starting", file=log)
    time.sleep(2)
signal.signal(signal.SIGUSR1, save)
if behaviour in ("train", "start slowly"):
    print("training", file=log)
    time.sleep(60)
sys.exit(3 if behaviour == "fail" else 0)
"""
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NTASKS=8 exec "$@"
"""
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then echo node7; echo node8; else echo "scontrol $*" >> "$LOG"; fi
"""
TORCHRUN = """#!/bin/bash
script=(); seen=false
for word in "$@"; do [ "$word" = pretrain_ross.py ] && seen=true; $seen && script+=("$word"); done
echo "launcher ${@:1:$(($# - ${#script[@]}))}" >> "$LOG"
[ "$BEHAVIOUR" = alone ] && exec sleep 60
RANK=0 WORLD_SIZE=16 python "${script[@]}" &
wait $!
"""


class Cluster:
    """A folder with a stand-in trainer, and a PATH with the stand-in programs."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log = folder, folder / "log"
        (folder / "pretrain_ross.py").write_text(RANK)
        programs = folder / "bin"
        programs.mkdir()
        for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("torchrun", TORCHRUN)):
            (programs / name).write_text(text)
            (programs / name).chmod(stat.S_IRWXU)
        (programs / "python").write_text(f'#!/bin/bash\nexec {sys.executable} "$@"\n')
        (programs / "python").chmod(stat.S_IRWXU)
        self.env = os.environ | {
            "PATH": f"{programs}:{os.environ['PATH']}",
            "LOG": str(self.log),
            "SLURM_JOB_ID": "123456",
            "SLURM_JOB_NODELIST": "node[7-8]",
            "NNODES": "2",
            "NODE_RANK": "1",
            "MASTER_ADDR": "127.0.0.1",
        }

    def start(self, script: str, behaviour: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [str(CLUSTER / script), "--config", "a recipe.yaml"],
            cwd=self.folder,
            env=self.env | {"BEHAVIOUR": behaviour},
            text=True,
        )

    def wait_for(self, text: str) -> None:
        deadline = time.monotonic() + 30
        while not (self.log.exists() and text in self.log.read_text()):
            assert time.monotonic() < deadline, f"{text!r} was never logged"
            time.sleep(0.05)


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path)


def test_slurm_gives_every_task_its_rank_and_all_arguments(cluster: Cluster) -> None:
    assert cluster.start("slurm.sh", "finish").wait(30) == 0
    assert cluster.log.read_text() == "started 0 8 node7 --config a recipe.yaml\n"  # and was not queued again


def test_slurm_queues_again_when_time_is_up(cluster: Cluster) -> None:
    job = cluster.start("slurm.sh", "train")
    cluster.wait_for("training")
    job.send_signal(signal.SIGUSR1)
    assert job.wait(30) == 0
    assert cluster.log.read_text().splitlines()[-2:] == ["saved", "scontrol requeue 123456"]


def test_slurm_does_not_queue_a_mistake_again(cluster: Cluster) -> None:
    """It fails at once."""
    assert cluster.start("slurm.sh", "fail").wait(30) == 3
    assert "requeue" not in cluster.log.read_text()


def test_slurm_queues_a_late_failure_again_a_bounded_number_of_times(cluster: Cluster) -> None:
    cluster.env |= {"RETRY_AFTER_S": "0", "MAX_RETRIES": "2"}
    for expected in (1, 2, 2):
        assert cluster.start("slurm.sh", "fail").wait(30) == 3
        assert cluster.log.read_text().count("scontrol requeue 123456") == expected
    assert len((cluster.folder / "slurm-123456.retries").read_text().splitlines()) == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_torchrun_script_lets_the_ranks_save(cluster: Cluster, number: signal.Signals) -> None:
    job = cluster.start("torchrun.sh", "train")
    cluster.wait_for("training")
    job.send_signal(number)
    assert job.wait(30) == 0
    log = cluster.log.read_text().splitlines()
    assert log[0].startswith("launcher --nnodes 2 --nproc-per-node 8 --max-restarts 5 --rdzv-backend c10d")
    assert "--rdzv-endpoint 127.0.0.1:29500 --rdzv-id megatron-ross --rdzv-conf is_host=false," in log[0]
    assert log[-1] == "saved"


def test_torchrun_script_asks_a_rank_only_when_it_listens(cluster: Cluster) -> None:
    job = cluster.start("torchrun.sh", "start slowly")
    cluster.wait_for("starting")
    job.send_signal(signal.SIGUSR1)
    assert job.wait(30) == 0
    assert cluster.log.read_text().count("saved") == 1


def test_torchrun_script_ends_while_it_waits_for_other_machines(cluster: Cluster) -> None:
    job = cluster.start("torchrun.sh", "alone")
    cluster.wait_for("launcher")
    job.send_signal(signal.SIGTERM)
    assert job.wait(30) == 128 + signal.SIGTERM


def test_torchrun_script_passes_failures_on_and_needs_its_variables(cluster: Cluster) -> None:
    assert cluster.start("torchrun.sh", "fail").wait(30) == 3
    assert "NNODES=1:2: give one number" in refusal(cluster.env | {"NNODES": "1:2"})
    del cluster.env["NODE_RANK"]
    assert "NODE_RANK" in refusal(cluster.env)


def refusal(env: dict[str, str]) -> str:
    """What torchrun.sh says when it does not start."""
    done = subprocess.run([str(CLUSTER / "torchrun.sh")], env=env, capture_output=True, text=True)
    assert done.returncode != 0
    return done.stderr
