"""`benchmarks/run_gpu.sh`: budgets are kept, a part that fails stops nothing, and the summary and exit code say so."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest


def run(
    repository: Path, folder: Path, parts: str | None, *flags: str, total: int = 60, python: str = sys.executable
) -> tuple[int, dict[str, str]]:
    """Exit code, and the line of summary.txt by part."""
    environment = {**os.environ, "PYTHON": python, "TOTAL": str(total)}
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


PARTS = [
    "install",
    "environment",
    "step-1",
    "step-2",
    "step-2-deep",
    "step-2-fp8",
    "kernels",
    "tests",
    "data",
    "tables",
]


def test_parts_of_a_gpu_run_fit_into_nine_minutes(repository: Path) -> None:
    script = (repository / "benchmarks" / "run_gpu.sh").read_text()
    lines = [line.removeprefix('PARTS="').split() for line in map(str.strip, script.splitlines())]
    budgets = {line[0]: int(line[1]) for line in lines if len(line) > 2 and line[0] in PARTS and line[1].isdigit()}
    assert set(budgets) == set(PARTS)
    assert sum(budgets.values()) <= 530
    assert "TOTAL:-530" in script


def test_a_gpu_run_starts_every_part_with_the_wheels_it_was_given(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real table, with programs in place of Python and nvidia-smi that write down how they are called."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "wheels of a host").mkdir()
    (tmp_path / "wheels of a host" / "a.whl").touch()
    for name in ("python", "nvidia-smi"):
        program = tmp_path / "bin" / name
        program.write_text('#!/bin/sh\necho "$PYTHONPATH|$NVTE_FRAMEWORK|$HF_HUB_OFFLINE|$*"\n')
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("WHEELS", str(tmp_path / "wheels of a host"))
    out = tmp_path / "results"
    code, summary = run(repository, out, None, python=str(tmp_path / "bin" / "python"))
    assert code == 0
    assert list(summary) == [*PARTS, "total"]
    calls = {part: (out / f"{part}.log").read_text().strip().splitlines()[-1].split("|") for part in PARTS}
    site = calls["install"][0].split(":")[0]
    assert calls["install"][3].endswith(f"--target {site} {tmp_path}/wheels of a host/a.whl")
    for path, framework, offline, _ in calls.values():
        assert path.split(":")[:3] == [site, str(repository), str(repository / "kernels")]
        assert (framework, offline) == ("pytorch", "1")
    assert not Path(site).exists(), "it is removed at the end"
    for part in ("step-1", "step-2", "step-2-deep", "step-2-fp8", "kernels", "data"):
        assert calls[part][3].endswith(f"--json {out}/{part}.json")
    assert "--settings {fp8: hybrid} " in calls["step-2-fp8"][3]


def test_all_gpu_tests_are_in_the_files_that_are_run(repository: Path) -> None:
    (line,) = [line for line in (repository / "benchmarks" / "run_gpu.sh").read_text().splitlines() if "tests=" in line]
    named = [repository / path for path in line.split('"')[1].split()]
    for path in (repository / "tests").rglob("*.py"):
        if "mark.gpu" in path.read_text() and path != Path(__file__):
            assert any(path.is_relative_to(folder) for folder in named), path


@pytest.mark.slow
def test_dry_run(repository: Path, tmp_path: Path) -> None:
    code, summary = run(repository, tmp_path, None, "--dry-run", total=400)
    assert code == 0, summary
    assert {p.name for p in tmp_path.glob("*.json")} == {"kernels.json", "step-1.json", "step-2.json"}
    assert "## step-2" in (tmp_path / "README.md").read_text()
