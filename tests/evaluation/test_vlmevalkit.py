"""Questions through VLMEvalKit itself: `VLMEVALKIT=FOLDER make test-eval`, where its torchvision fits torch."""

from __future__ import annotations

import base64
import csv
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import golden
from tests.helpers.evaluation_data import png
from tests.helpers.sources import ROOT

pytestmark = pytest.mark.eval

CHECKPOINT = str(golden.checkpoint_dir("qwen2_siglip"))
NUM_QUESTIONS = 4


def vlmevalkit() -> Path:
    """Its source folder. Skips the test, with the reason, where it cannot run."""
    source = os.environ.get("VLMEVALKIT", "")
    if not source:
        pytest.skip("VLMEVALKIT names no clone of VLMEvalKit")
    try:
        importlib.import_module("torchvision")
    except ImportError:
        pytest.skip("VLMEvalKit needs torchvision, which is not installed here")
    except RuntimeError as error:  # one that was built for another torch
        pytest.skip(f"VLMEvalKit needs a torchvision that was built for this torch: {error}")
    return Path(source)


def write_table(file: Path) -> list[dict[str, Any]]:
    """Multiple choice with pictures, as VLMEvalKit's data sets are stored."""
    rows = [
        {
            "index": i,
            "image": base64.b64encode(png(i)).decode(),
            "question": f"Which one is {i}?",
            "A": "yes",
            "B": "no",
        }
        for i in range(NUM_QUESTIONS)
    ]
    with file.open("w", newline="") as stream:
        table = csv.DictWriter(stream, [*rows[0], "answer"], delimiter="\t")
        table.writeheader()
        table.writerows({**row, "answer": "AB"[row["index"] % 2]} for row in rows)
    return rows


def test_a_data_set_of_its_own_and_one_that_is_not_there(tmp_path: Path) -> None:
    """The score of one, the loss of the other; a second call takes up the score; asked again, the answers are equal."""
    source = vlmevalkit()
    rows = write_table(tmp_path / "Toy.tsv")
    words = [
        sys.executable,
        str(ROOT / "tools" / "evaluate.py"),
        "--checkpoint",
        CHECKPOINT,
        "--framework",
        "vlmevalkit",
    ]
    words += ["--vlmevalkit", str(source), "--output", str(tmp_path / "results"), "--device", "cpu", "--dtype", "fp32"]
    paths = f"{ROOT}:{ROOT / 'kernels'}:{source}"
    environment = os.environ | {"PYTHONPATH": paths, "LMUData": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    outputs = []
    for extra in (
        ["--tasks", "MMVP,Toy"],
        ["--tasks", "MMVP,Toy"],
        ["--tasks", "Toy", "--reuse", "false"],
    ):
        done = subprocess.run(
            [*words, *extra], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=900
        )
        outputs.append(done)
    first, second, other = outputs
    assert first.returncode == second.returncode == 1, first.stderr[-3000:]
    assert "vlmevalkit left no score of MMVP" in first.stderr
    assert "missing: mmvp; the same command asks for nothing else again" in first.stderr
    assert "Toy (vlmevalkit): taken up from" in second.stdout
    assert other.returncode == 0, other.stderr[-3000:]
    assert "taken up" not in other.stdout
    (entry,) = json.loads((tmp_path / "results" / "results.json").read_text())["results"]
    assert entry["benchmark"] == "Toy"
    assert 0 <= entry["percent"] <= 1

    answered = sorted((tmp_path / "results" / "vlmevalkit").rglob("megatron_ross_Toy.xlsx"))
    assert answered
    import pandas

    predictions = [list(pandas.read_excel(file)["prediction"].astype(str)) for file in answered]
    assert len(predictions[0]) == len(rows)
    assert all(found == predictions[0] for found in predictions), "the same questions, asked twice"
