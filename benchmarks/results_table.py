"""Writes a folder's README.md from the JSON files beside it.

python benchmarks/results_table.py                   # benchmarks/results
python benchmarks/results_table.py runs/gpu
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"


def step_section(figures: dict[str, Any]) -> list[str]:
    """Rows of bench_step.py."""
    head = ["stage", "row", "samples/s", "times the peer, median (min to max)", "by CPU time", "TFLOP/s", "MFU"]
    lines = [f"| {' | '.join([*head, 'peak memory, MiB'])} |", "|---" * (len(head) + 1) + "|"]
    for stage, result in figures["stages"].items():
        for name, row in result["rows"].items():
            ratio, cpu = (result[kind].get(name) for kind in ("ratios", "cpu_time_ratios"))
            times = f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})" if ratio else ""
            by_cpu = f"{cpu['median']:.2f}" if cpu else ""
            peak = result.get("row_peak_memory_mib", {}).get(name)
            cells = [stage, name, f"{row['samples_per_second']:.3f}", times, by_cpu, f"{row['tflops']:.3f}",
                     f"{row['mfu']:.0%}", "" if peak is None else f"{peak:.0f}"]  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
    rates = ", ".join(f"{r['matmul_flops_per_second'] / 1e12:.3f}" for r in figures["stages"].values())
    return [*lines, "", f"MFU is against a matrix product in the same run: {rates} TFLOP/s."]


def kernel_section(figures: dict[str, Any]) -> list[str]:
    """Rows of bench_kernels.py."""
    if figures["dry_run"]:
        return ["A dry run in Triton's interpreter: kernels agree with their definitions, times mean nothing."]
    lines = ["| kernel | dtype | of copy bandwidth | times eager | times torch.compile |", "|---|---|---|---|---|"]
    for r in figures["results"]:
        ratios = [f"{r[key]:.2f}" if r[key] else "" for key in ("ratio_to_eager", "ratio_to_compile")]
        lines.append(f"| {r['name']} | {r['dtype']} | {r['fraction_of_copy']:.0%} | {' | '.join(ratios)} |")
    return lines


def data_section(figures: dict[str, Any]) -> list[str]:
    """Rows of bench_data.py."""
    lines = ["| path | images/s, best | median | CPU ms per image, least |", "|---|---|---|---|"]
    for name, rates in figures["images_per_second"].items():
        cpu = min(figures["cpu_ms_per_image"][name])
        lines.append(f"| {name} | {max(rates):.1f} | {statistics.median(rates):.1f} | {cpu:.2f} |")
    return lines


def section(path: Path) -> str:
    """A file's figures and where they come from."""
    figures = json.loads(path.read_text())
    make = step_section if "stages" in figures else data_section if "images_per_second" in figures else kernel_section
    about = [
        f"- date {figures['date']}, commit {figures['commit']}",
        f"- {figures['machine']}",
        f"- {', '.join(f'{name} {version}' for name, version in figures['versions'].items())}",
        f"- `{figures['command']}`",
    ]
    return "\n".join([f"## {path.stem}", "", *about, "", *make(figures), ""])


def main(folder: Path = RESULTS) -> None:
    """Write the file."""
    title = "# Benchmark results\n\nMade from the JSON files here; `+`: a commit with changes.\n\n"
    text = title + "\n".join(section(path) for path in sorted(folder.glob("*.json")))
    (folder / "README.md").write_text(text)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
