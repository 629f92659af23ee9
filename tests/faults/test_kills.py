"""SIGKILL at chosen and at random points of real torchrun runs of four ranks: nothing is lost, nothing is repeated.

torchrun starts all ranks again, up to --max-restarts times, without help; they resume from the last complete
checkpoint. Losses of every iteration, and the digest of all samples seen, must equal those of a run without faults.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_ross.checkpoint.manifest import Manifest, resolve_checkpoint
from tests.helpers import faulty_training
from tests.helpers.sources import ROOT
from tests.helpers.toy_run import write_data
from tests.helpers.variants import make_variant

pytestmark = pytest.mark.faults
NUM_RANKS, ITERATIONS, NUM_RANDOM = 4, 12, 20
RANDOM_ITERATIONS = 40


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
        "save_interval": 3,
        "async_save": True,
        "log_interval": 1,
        "tensorboard": False,
    }


def run(folder: Path, settings: dict[str, Any], faults: list[dict[str, Any]], iterations: int) -> None:
    """Train to the end under torchrun, which may start the ranks again as often as there are faults."""
    flat = settings | {"save": str(folder), "load": str(folder), "train_iters": iterations}
    arguments = [text for name, value in flat.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--nproc-per-node", str(NUM_RANKS)]
    command += ["--standalone", "--max-restarts", str(len(faults)), faulty_training.__file__, json.dumps(faults)]
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}",
        "OMP_NUM_THREADS": "1",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # a restarted group would meet at the keys of the one before
    }
    log = folder / "log"
    with log.open("wb") as out:
        done = subprocess.run(
            [*command, *arguments],
            cwd=ROOT,
            env=environment,
            stdout=out,
            stderr=subprocess.STDOUT,
            timeout=120 + 60 * len(faults),
            check=False,
        )
    assert done.returncode == 0, log.read_text()[-4000:]


def history(folder: Path) -> tuple[list[tuple[Any, ...]], str]:
    """(iteration, losses, gradient norm) of every line of the log, and the digest of the samples seen."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    digest = Manifest.read(resolve_checkpoint(folder / "checkpoints")).training["data"]["digest"]
    return [(line["iteration"], line["lm_loss"], line["recon_loss"], line["grad_norm"]) for line in lines], digest


@pytest.fixture(scope="module")
def uninterrupted(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    run(folder, settings, [], ITERATIONS)
    return folder


FAULTS = [
    {"ranks": [2], "iteration": 2, "point": "forward"},  # before the first save: starts afresh
    {"ranks": [0], "iteration": 5, "point": "forward"},
    {"ranks": [3], "iteration": 6, "point": "optimizer"},
    {"ranks": [1], "iteration": 6, "point": "write"},
    {"ranks": [0], "iteration": 9, "point": "publish"},
    {"ranks": [0, 1, 2, 3], "iteration": 11, "point": "forward"},
]


def test_six_kills_in_one_run(uninterrupted: Path, settings: dict[str, Any], tmp_path: Path) -> None:
    """In forward, in the optimizer step, in a save, before `latest` is written, and all ranks at once."""
    run(tmp_path, settings, FAULTS, ITERATIONS)
    assert (tmp_path / "log").read_text().count("starting at iteration") == len(FAULTS) + 1
    assert history(tmp_path) == history(uninterrupted)
    assert not list((tmp_path / "checkpoints").glob("*.incomplete"))


def test_twenty_random_kills(settings: dict[str, Any], tmp_path: Path) -> None:
    """Random ranks, points and iterations from a fixed seed, in one run of forty steps."""
    rng = random.Random(8)
    iterations = sorted(rng.randint(1, RANDOM_ITERATIONS) for _ in range(NUM_RANDOM))
    faults = []
    for iteration in iterations:
        point = rng.choice(["forward", "optimizer", "write", "publish"])
        ranks = [0] if point == "publish" else rng.sample(range(NUM_RANKS), rng.randint(1, NUM_RANKS))
        faults.append({"ranks": ranks, "iteration": iteration, "point": point})
    expected, got = tmp_path / "expected", tmp_path / "got"
    expected.mkdir()
    got.mkdir()
    run(expected, settings, [], RANDOM_ITERATIONS)
    run(got, settings, faults, RANDOM_ITERATIONS)
    assert history(got) == history(expected)
