"""The table of results is made from the JSON files that are committed, and every figure says where it comes from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import results_table


@pytest.mark.parametrize("name", ["step_1_cpu", "step_2_cpu"])
def test_the_table_has_every_row_of_the_files(repository: Path, tmp_path: Path, name: str) -> None:
    step = json.loads((repository / "benchmarks" / "results" / f"{name}.json").read_text())
    (tmp_path / "step.json").write_text(json.dumps(step))
    results_table.main(tmp_path)
    text = (tmp_path / "README.md").read_text()
    for stage, result in step["stages"].items():
        for name, ratio in result["ratios"].items():
            (line,) = [row for row in text.splitlines() if row.startswith(f"| {stage} | {name} |")]
            assert f" {ratio['median']:.2f} " in line
            assert f" {result['rows'][name]['tflops']:.3f} " in line
        assert f"{result['matmul_flops_per_second'] / 1e12:.3f} TFLOP/s" in text
    assert step["commit"] in text
    assert step["command"] in text


@pytest.mark.parametrize("name", ["step_1_cpu", "step_2_cpu", "data_cpu", "kernels_dry_run"])
def test_every_file_says_where_its_figures_come_from(repository: Path, name: str) -> None:
    figures = json.loads((repository / "benchmarks" / "results" / f"{name}.json").read_text())
    for key in ("date", "machine", "versions", "command", "commit"):
        assert figures[key]
