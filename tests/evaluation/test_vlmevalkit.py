"""Four questions through VLMEvalKit itself, where it can be imported (it needs torchvision)."""

from __future__ import annotations

import base64
import csv
from pathlib import Path

import pytest

from megatron_ross.evaluation.vlmevalkit.run import run_tasks
from tests.helpers import golden
from tests.helpers.evaluation_data import png

pytestmark = pytest.mark.eval


def test_four_questions_with_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        import vlmeval.dataset  # noqa: F401
    except (ImportError, RuntimeError) as error:  # the latter of a torchvision that was built for another torch
        pytest.skip(f"VLMEvalKit cannot be imported: {error}")
    monkeypatch.setenv("LMUData", str(tmp_path))
    with (tmp_path / "Toy.tsv").open("w", newline="") as file:
        table = csv.writer(file, delimiter="\t")
        table.writerow(["index", "image", "question", "A", "B", "answer"])
        for i in range(4):
            table.writerow([i, base64.b64encode(png(i)).decode(), "Which?", "yes", "no", "AB"[i % 2]])
    model = {"model_path": str(golden.checkpoint_dir("qwen2_siglip")), "device": "cpu", "dtype": "fp32"}
    (scores,) = run_tasks(model, ["Toy"], tmp_path / "results").values()
    assert all(0 <= value <= 1 for value in scores.values())
