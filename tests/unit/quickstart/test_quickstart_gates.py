"""The quickstart fails exactly when it should: gates at their bounds, NaN, damaged metrics, exit codes."""

from __future__ import annotations

import json
import math
import re
import time

import gates
import pytest
import report
import run
from PIL import Image


def _accuracy(image: float, blank: float) -> dict[str, dict[str, float]]:
    return {"image": {"color": image, "all": image}, "blank": {"color": blank, "all": blank}}


def _metrics(losses: list[float]) -> list[dict]:
    names = ("lm_loss", "grad_norm", "learning_rate", "samples_per_second", "tokens_per_second", "memory_gib")
    return [
        {"iteration": 5 * (i + 1), "consumed_samples": 80 * (i + 1), "recon_loss": loss, **dict.fromkeys(names, 1.5)}
        for i, loss in enumerate(losses)
    ]


@pytest.mark.parametrize(
    ("image", "blank", "losses", "passed"),
    [
        (60, 30, [1.0, 0.59], [True, True]),
        (59.9, 30, [1.0, 0.59], [False, True]),
        (60, 30, [0.1, 0.6], [True, False]),
        (60, 30, [0.1, math.nan], [True, False]),
        (math.nan, 30, [0.5], [False, True]),
    ],
)
def test_gates(image: float, blank: float, losses: list[float], passed: list[bool]) -> None:
    assert [g.passed for g in gates.check_gates(_accuracy(image, blank), _metrics(losses))] == passed


def test_final_loss_is_the_mean_of_the_last_tenth() -> None:
    assert gates.final_loss(_metrics([9.0] * 18 + [0.2, 0.4]), "recon_loss") == pytest.approx(0.3)
    assert gates.final_loss(_metrics([0.7]), "recon_loss") == 0.7


@pytest.mark.parametrize(("text", "message"), [("", "no entry"), ('{"a": 1}\n{"a"', "damaged")])
def test_bad_metrics_are_named(tmp_path, text: str, message: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        gates.read_metrics(path)
    assert str(path) in str(error.value)


def _fake_run(folder, *, image: float) -> None:
    for stage in report.STAGES:
        (folder / stage).mkdir()
        lines = [json.dumps(row) for row in _metrics([0.9, 0.5, 0.4])]
        (folder / stage / "metrics.jsonl").write_text("\n".join(lines))
        held_out = [row | {"recon_loss_by_timestep": {"000-499": 0.9, "500-999": 0.4}} for row in _metrics([0.8, 0.6])]
        (folder / stage / "validation.jsonl").write_text("\n".join(map(json.dumps, held_out)))
    row = {"image": "1.jpg", "question": "What <b>?", "expected": "red", "answer": "red", "blank_answer": "blue"}
    (folder / "answers.json").write_text(json.dumps({"accuracy": _accuracy(image, 20.0), "answers": [row]}))
    (folder / "reconstructions").mkdir()
    Image.new("RGB", (392, 128), "red").save(folder / "reconstructions" / "1.jpg.png")


def test_report_is_one_self_contained_file(tmp_path) -> None:
    _fake_run(tmp_path, image=80.0)
    report.write_report(tmp_path)
    page = (tmp_path / "report.html").read_text()
    sources = re.findall(r'src="([^"]{0,30})', page)
    assert len(sources) == 3  # loss curves, losses by timestep and one row of pictures
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert "href=" not in page
    assert "What &lt;b&gt;?" in page
    assert "80.0 %" in page
    assert "20.0 %" in page


def test_missed_gate_exits_non_zero_but_still_writes_the_report(tmp_path) -> None:
    _fake_run(tmp_path, image=40.0)
    with pytest.raises(SystemExit) as error:
        report.write_report(tmp_path)
    assert error.value.code not in (0, None)
    assert "MISSED" in (tmp_path / "report.html").read_text()


def test_report_without_reconstructions_says_so(tmp_path) -> None:
    _fake_run(tmp_path, image=80.0)
    (tmp_path / "reconstructions" / "1.jpg.png").unlink()
    with pytest.raises(ValueError, match="no reconstructed images"):
        report.build_report(tmp_path)


def test_ranks_follow_the_gpus() -> None:
    assert run.choose_ranks(0) == run.choose_ranks(4) == run.choose_ranks(8)
    assert run.choose_ranks(0).count == 4
    assert not run.choose_ranks(0).flags
    assert run.choose_ranks(1).count == 1
    assert run.choose_ranks(3).count == 2


def test_failed_step_gives_its_exit_code_and_leaves_no_process(tmp_path) -> None:
    marker = tmp_path / "late"
    script = f"(sleep 1.5; touch {marker}) & exit 3"
    assert run.run_step(run.Step("fails", ["bash", "-c", script])) == 3
    time.sleep(2)
    assert not marker.exists()
