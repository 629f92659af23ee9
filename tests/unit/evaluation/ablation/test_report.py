"""The report: figures as computed by hand, verdicts that the intervals allow, text of people left alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from megatron_ross.evaluation.ablation.execute import AblationError, overlay
from megatron_ross.evaluation.ablation.figures import split_panels
from megatron_ross.evaluation.ablation.plan import AblationConfig, Run, runs_of
from megatron_ross.evaluation.ablation.report import BEGIN, END, replace_between, write_report

from .conftest import write_results

ACCURACY = {
    "off": [50.0, 52.0, 54.0],
    "denoise": [60.0, 62.1, 63.9],  # +10, +10.1, +9.9: shown
    "regress": [51.0, 50.0, 57.0],  # +1, -2, +3: not shown
    "weight-3": [49.0],
}


@pytest.fixture
def report(config: AblationConfig, tmp_path: Path) -> str:
    write_results(config, 3, ACCURACY)
    document = tmp_path / "docs" / "ablation.md"
    document.parent.mkdir()
    write_report(config, 3, "the command", document, tmp_path / "docs" / "images", tmp_path / "numbers.json")
    return document.read_text()


def test_tables_hold_means_deviations_and_intervals(report: str) -> None:
    assert "| off | 52.0 ± 2.0 | 52.0 ± 2.0 | 52.0 ± 2.0 |" in report
    assert "| denoise - off | accuracy | +10.0, +10.1, +9.9 | +10.0 | +9.8 to +10.2 |" in report
    assert "| weight-3 - off | accuracy | -1.0 | -1.0 | - |" in report
    assert "the command" in report
    assert "Wall time of the command that finished a run: 3.0 to 5.0 minutes." in report


def test_verdicts_claim_what_the_intervals_allow(report: str) -> None:
    assert "denoise answers more questions than off: +10.0 points" in report
    assert "regress against off: +0.7 points; the interval holds 0, so no difference is shown." in report
    assert "weight-3 against off: -1.0 points with one seed" in report


def test_pictures_and_numbers_are_written(report: str, tmp_path: Path) -> None:
    images = tmp_path / "docs" / "images"
    for name in ("ablation_accuracy.png", "ablation_losses.png", "ablation_images.png"):
        assert f"](images/{name})" in report
        with Image.open(images / name) as picture:
            picture.load()
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    assert numbers["results"]["denoise"]["2"]["scores"]["accuracy"]["all"] == 62.1


def test_an_unfinished_run_is_named(config: AblationConfig, tmp_path: Path) -> None:
    write_results(config, 2, ACCURACY)
    with pytest.raises(ValueError, match="off, seed 3 has not finished"):
        write_report(config, 3, "", tmp_path / "a.md", tmp_path, tmp_path / "n.json")


def _take(run: Run, **values: object) -> None:
    path = run.folder / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_pairs_have_seen_the_same_samples(config: AblationConfig, tmp_path: Path) -> None:
    """Those whose data settings say so."""
    write_results(config, 2, ACCURACY)
    denoise = next(run for run in runs_of(config, 2) if run.name == "denoise, seed 2")
    _take(denoise, samples="another order")
    arguments = (config, 2, "", tmp_path / "a.md", tmp_path, tmp_path / "n.json")
    with pytest.raises(AblationError, match="off and denoise, seed 2, were not trained on the same samples"):
        write_report(*arguments)
    assert not (tmp_path / "a.md").exists()
    _take(denoise, settings=overlay(config, denoise) | {"train_iters": 3})
    write_report(*arguments)


def test_what_people_wrote_around_the_report_stays(tmp_path: Path) -> None:
    document = tmp_path / "a.md"
    document.write_text(f"# Title\n\nBefore.\n\n{BEGIN}\nold\n{END}\n\nAfter.\n")
    text = replace_between(document, "new")
    assert text == f"# Title\n\nBefore.\n\n{BEGIN}\n\nnew\n\n{END}\n\nAfter.\n"
    document.write_text("# Title\n")
    with pytest.raises(ValueError, match="has no place for the report"):
        replace_between(document, "new")


def test_panels_are_taken_apart_as_they_were_put_together(report: str, tmp_path: Path, config: AblationConfig) -> None:
    row = Path(config.output) / "denoise" / "seed1" / "reconstructions" / "0.jpg.png"
    assert [panel.getpixel((8, 8)) for panel in split_panels(row)] == [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
