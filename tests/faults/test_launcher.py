"""torchrun itself is killed: its ranks save and leave, and the same command goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_ross.checkpoint.manifest import Manifest, resolve_checkpoint
from megatron_ross.training.lease import LEASE_NAME
from tests.helpers.nodes import LIMIT_S, Node
from tests.helpers.sources import ROOT
from tests.helpers.toy_run import two_stage_settings

pytestmark = pytest.mark.faults

END_S = 60.0
"""A step, a save and the end of two ranks beside a lot else; without the signal they train for hours."""


@pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel of Linux")
def test_ranks_end_when_torchrun_is_killed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, recipe = tmp_path / "run", tmp_path / "recipe.yaml"
    settings = two_stage_settings(tmp_path) | {"save": str(folder), "load": str(folder), "log_interval": 1}
    recipe.write_text(json.dumps(settings | {"train_iters": 1_000_000}))
    machine = Node(tmp_path / "machine")
    command = [str(machine.folder / "bin" / "torchrun"), "--standalone", "--nproc-per-node", "2", "pretrain_ross.py"]
    environment = machine.env | {"OMP_NUM_THREADS": "1"}
    with machine.log.open("ab") as log:
        machine.process = subprocess.Popen(
            [*command, "--config", str(recipe)], cwd=ROOT, env=environment, stdout=log, stderr=log
        )
    try:
        metrics = folder / "metrics.jsonl"
        machine.wait_until(lambda: metrics.exists() and len(metrics.read_text().splitlines()) > 2, "iteration 3")
        begin = time.monotonic()
        os.kill(machine.process.pid, signal.SIGKILL)
        machine.process.wait(LIMIT_S)
        while machine.pids() and time.monotonic() - begin < END_S:
            time.sleep(0.05)
        seconds = time.monotonic() - begin
        assert not machine.pids(), machine.tail()
        saved = Manifest.read(resolve_checkpoint(folder / "checkpoints")).iteration
        assert saved >= 3
        assert f"stopped by SIGTERM after iteration {saved}" in machine.tail()
        assert not (folder / LEASE_NAME).exists()
    finally:
        machine.lose_power()
    with capsys.disabled():
        print(f"\nranks ended {seconds:.1f} s after torchrun was killed, with a checkpoint of iteration {saved}")
