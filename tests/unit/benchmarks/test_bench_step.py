"""The step benchmark at a tiny size: equal losses, complete figures, ratios that come from the measured times."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import bench_step
import pytest
import torch
from step_rows import Row
from step_samples import make_samples, plan_steps
from step_sizes import CONVERSATIONS, step_size

ROWS = {"ours", "ours, cached latents", "peer"}
ROUNDS = 2


@pytest.fixture(scope="module")
def figures(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Results of one run of the script."""
    path = tmp_path_factory.mktemp("step") / "figures.json"
    command = [sys.executable, "-W", "ignore", "benchmarks/bench_step.py", "--size", "tiny", "--rounds", str(ROUNDS)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(repository), str(repository / "kernels")])}
    done = subprocess.run(
        [*command, "--memory", "false", "--json", str(path)],
        cwd=repository,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "ours, cached latents" in done.stdout
    return json.loads(path.read_text())


def test_the_file_says_where_it_comes_from(figures: dict[str, Any]) -> None:
    assert figures["command"].startswith("python benchmarks/bench_step.py --size tiny")
    assert figures["versions"]["torch"]
    assert figures["machine"]
    assert len(figures["date"]) == len("2026-01-01")
    assert set(figures["stages"]) == {"1", "2"}


@pytest.mark.parametrize("stage", ["1", "2"])
def test_losses_are_equal_and_not_trivial(figures: dict[str, Any], stage: str) -> None:
    rows = figures["stages"][stage]["rows"]
    assert set(rows) == ROWS
    peer = rows["peer"]["losses"]
    assert len(peer) == ROUNDS + 1
    for row in rows.values():
        for got, want in zip(row["losses"], peer, strict=True):
            assert got == pytest.approx(want, rel=bench_step.LOSS_TOLERANCE["fp32"])
    assert len({tuple(losses) for losses in peer}) == len(peer), "every step has samples of its own"


@pytest.mark.parametrize("stage", ["1", "2"])
def test_ratios_are_those_of_the_times(figures: dict[str, Any], stage: str) -> None:
    result = figures["stages"][stage]
    times = {name: row["seconds"] for name, row in result["rows"].items()}
    assert set(result["ratios"]) == ROWS - {"peer"}
    for name, ratio in result["ratios"].items():
        expected = [peer / ours for peer, ours in zip(times["peer"], times[name], strict=True)]
        assert ratio["rounds"] == pytest.approx(expected)
        assert ratio["median"] == pytest.approx(statistics.median(expected))
    for row in result["rows"].values():
        rates = [n / s for n, s in zip(result["samples"], row["seconds"], strict=True)]
        assert row["samples_per_second"] == pytest.approx(statistics.median(rates))
        assert sum(row["part_seconds"].values()) == pytest.approx(statistics.mean(row["seconds"]), rel=0.05)


def test_other_losses_are_refused() -> None:
    """A benchmark of two computations that differ must not give figures."""
    rows = [Row(name, losses=[losses]) for name, losses in
            (("ours", (2.0, 1.001)), ("peer", (2.0, 1.0)))]  # fmt: skip
    with pytest.raises(RuntimeError, match=r"reconstruction loss of ours is 1\.001, of peer 1"):
        bench_step.assert_same_losses(rows, 1e-4)
    bench_step.assert_same_losses(rows, 1e-2)


def test_gpu_memory_is_counted_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a row allocates while it is built and while it steps, and nothing of another row in the same process."""
    memory = {"now": 100, "most": 100}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: memory["now"])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: memory["most"])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: memory.update(most=memory["now"]))
    row = Row("ours")
    with row.allocations():
        memory.update(now=150, most=170)
    assert (row.own_bytes, row.peak_bytes) == (50, 70)
    memory.update(now=500, most=900)  # another row
    with row.allocations():  # its first step leaves 10 of optimizer state
        memory.update(now=510, most=560)
    assert (row.own_bytes, row.peak_bytes) == (60, 110)


def test_steps_hold_full_packs_and_padding_is_counted() -> None:
    size = step_size("cpu")
    steps = plan_steps(size, size.seq_length[2], CONVERSATIONS, 4, seed=7)
    for packs in steps:
        work = bench_step.work_of(packs, size)
        assert 0.95 * size.seq_length[2] * size.sequences <= work.tokens <= size.seq_length[2] * size.sequences
        assert bench_step.padded_tokens(packs, 16) >= work.tokens
        assert bench_step.padded_tokens(packs, 1) == work.tokens


def test_lengths_are_those_that_are_claimed() -> None:
    size = step_size("cpu")
    samples = make_samples(size, CONVERSATIONS, 2000, seed=1)
    texts = [len(s.input_ids) - 729 * len(s.images) for s in samples]
    assert statistics.mean(texts) == pytest.approx(CONVERSATIONS.mean, rel=0.1)
    assert sum(not s.images for s in samples) == 200
