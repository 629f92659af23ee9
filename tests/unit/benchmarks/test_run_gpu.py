"""`benchmarks/run_gpu.sh`: budgets are kept, a part that fails stops nothing, and the summary and exit code say so."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest


def run(repository: Path, folder: Path, parts: str | None, *flags: str, total: int = 60) -> tuple[int, dict[str, str]]:
    """Exit code, and the line of summary.txt by part."""
    environment = {**os.environ, "PYTHON": sys.executable, "TOTAL": str(total)}
    environment.pop("PARTS", None)
    if parts is not None:
        environment["PARTS"] = parts
    command = ["sh", "benchmarks/run_gpu.sh", *flags, str(folder)]
    done = subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True)
    lines = (folder / "summary.txt").read_text().splitlines()
    assert done.stdout.splitlines() == lines
    return done.returncode, dict(line.split(": ", 1) for line in lines)


def test_all_parts_run_one_after_the_other(repository: Path, tmp_path: Path) -> None:
    parts = 'first 5 echo "$OUT" > "$OUT/a.json"\n\nsecond 5 test -f "$OUT/a.json" && echo "it is there"\n'
    code, summary = run(repository, tmp_path / "results", parts)
    assert code == 0
    assert summary["first"].startswith("ok")
    assert summary["second"].startswith("ok")
    assert (tmp_path / "results" / "second.log").read_text() == "it is there\n"
    assert summary["total"].endswith("exit code 0")


def test_a_failing_part_stops_nothing_but_counts(repository: Path, tmp_path: Path) -> None:
    code, summary = run(repository, tmp_path, "bad 5 echo why >&2; exit 3\ngood 5 true\n")
    assert code == 1
    assert summary["bad"].startswith("failed with exit code 3")
    assert (tmp_path / "bad.log").read_text() == "why\n"
    assert summary["good"].startswith("ok")
    assert summary["total"].endswith("exit code 1")


@pytest.mark.parametrize("sleep", ["sleep 30", "trap '' TERM; while true; do sleep 0.1; done"])
def test_a_part_is_ended_when_its_budget_is_spent(repository: Path, tmp_path: Path, sleep: str) -> None:
    begin = time.monotonic()
    code, summary = run(repository, tmp_path, f"slow 1 {sleep}\nnext 5 true\n")
    assert time.monotonic() - begin < 15
    assert code == 1
    assert summary["slow"] == "ended after its 1 s"
    assert summary["next"].startswith("ok")


def test_the_total_bounds_every_part(repository: Path, tmp_path: Path) -> None:
    code, summary = run(repository, tmp_path, "slow 30 sleep 30\nlate 30 true\n", total=1)
    assert code == 1
    assert summary["slow"] == "ended after its 1 s"
    assert summary["late"] == "not started, the total of 1 s is spent"


def test_parts_of_a_gpu_run_fit_into_nine_minutes(repository: Path) -> None:
    script = (repository / "benchmarks" / "run_gpu.sh").read_text()
    table = script.split('PARTS="')[2].split('"\n')[0]
    budgets = [int(line.split()[1]) for line in table.strip().splitlines()]
    assert len(budgets) == 8
    assert sum(budgets) <= 600
    assert "TOTAL:-530" in script


@pytest.mark.slow
def test_dry_run(repository: Path, tmp_path: Path) -> None:
    code, summary = run(repository, tmp_path, None, "--dry-run", total=400)
    assert code == 0, summary
    assert {p.name for p in tmp_path.glob("*.json")} == {"kernels.json", "step-1.json", "step-2.json"}
