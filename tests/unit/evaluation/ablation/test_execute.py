"""Runs as processes: order, resuming, and a failure that ends everything else. The commands are small scripts."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_ross.evaluation.ablation import execute as module
from megatron_ross.evaluation.ablation.execute import AblationError, Step, execute
from megatron_ross.evaluation.ablation.plan import AblationConfig, Run, read_ablation, runs_of

from .conftest import write_ablation, write_results

Change = Callable[[Path], object]
ACCURACY = {"off": [50.0, 50.0], "denoise": [60.0, 61.0], "regress": [55.0, 54.0], "weight-3": [58.0]}


class Scripts:
    """Stands in for the programs: a run's step writes a file, fails, or waits."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.code: dict[str, str] = {}
        monkeypatch.setattr(module, "start_steps", lambda config, seed: [Step("conversion", self._command("start"))])
        monkeypatch.setattr(module, "run_steps", lambda config, run: [self.step(run)])
        monkeypatch.setattr(module, "collect_result", lambda run, *given: _result(*given))

    def step(self, run: Run) -> Step:
        return Step("training", self._command(run.arm.name, str(run.folder / "ran")))

    def _command(self, name: str, *arguments: str) -> list[str]:
        default = "import sys; open(sys.argv[1], 'a').write('x')" if arguments else "pass"
        return [sys.executable, "-c", self.code.get(name, default), *arguments]


def _result(settings: dict[str, Any], conditions: dict[str, str], minutes: float) -> dict[str, Any]:
    return {
        "settings": settings,
        "conditions": conditions,
        "samples": "",
        "scores": {},
        "figures": {},
        "curves": {},
        "seconds_per_iteration": 1.0,
        "minutes": minutes,
    }


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Scripts:
    return Scripts(monkeypatch)


def test_finished_runs_are_not_run_again(config: AblationConfig, scripts: Scripts, tmp_path: Path) -> None:
    said: list[str] = []
    runs = runs_of(config, 1)
    execute(config, runs[:2], 2, tmp_path, said.append)
    execute(config, runs, 2, tmp_path, said.append)
    assert [(run.folder / "ran").read_text() for run in runs] == ["x"] * 4
    assert "4 runs, 2 of them finished before" in said[3]


def test_a_failure_names_run_step_and_log_and_ends_the_others(
    config: AblationConfig, scripts: Scripts, tmp_path: Path
) -> None:
    scripts.code["off"] = "import time; time.sleep(60)"
    scripts.code["denoise"] = "print('step 1'); raise SystemExit('error: no such tower')"
    begin = time.monotonic()
    with pytest.raises(AblationError, match="denoise, seed 1: training failed with exit code 1: error: no such tower"):
        execute(config, runs_of(config, 2), 2, tmp_path, lambda _: None)
    assert time.monotonic() - begin < 30
    assert not any((run.folder / "result.json").exists() for run in runs_of(config, 2))
    log = runs_of(config, 1)[1].folder / "log.txt"
    assert "step 1" in log.read_text()


def test_a_training_that_a_signal_ended_early_is_no_result(
    config: AblationConfig, scripts: Scripts, tmp_path: Path
) -> None:
    scripts.code["off"] = "print('stopped by SIGTERM after iteration 3')"
    with pytest.raises(AblationError, match="training was stopped by SIGTERM after iteration 3; the same command"):
        execute(config, runs_of(config, 1)[:1], 1, tmp_path, lambda _: None)
    assert not (runs_of(config, 1)[0].folder / "result.json").exists()


def test_results_of_other_settings_are_refused(tmp_path: Path, scripts: Scripts) -> None:
    write_results(read_ablation(write_ablation(tmp_path)), 2, ACCURACY)
    changed = read_ablation(write_ablation(tmp_path, lambda v: v["shared"].update(train_iters=8)))
    with pytest.raises(ValueError, match=r"was run with other settings \(train_iters\)"):
        execute(changed, runs_of(changed, 2), 1, tmp_path, lambda _: None)


def _rewrite(name: str, text: str) -> Change:
    return lambda folder: (folder / name).write_text(text)


def _ablation(change: Any) -> Change:
    return lambda folder: write_ablation(folder, change)


CHANGES = [
    (_rewrite("train.yaml", "lr: 0.3\n"), "train"),
    (_rewrite("align.yaml", "lr: 0.3\n"), "start"),
    (_rewrite("heldout.json", "[1]\n"), "questions"),
    (_ablation(lambda values: values["start"].update(llm="other")), "start"),
    (_ablation(lambda values: values["paint"].update(limit=3)), "paint"),
    (_ablation(lambda values: values.update(image_folder="elsewhere")), "questions"),
    (_ablation(lambda values: values.update(processes=2)), "processes"),
]


@pytest.mark.parametrize(("change", "name"), CHANGES)
def test_finished_runs_of_another_recipe_are_refused(
    change: Change, name: str, config: AblationConfig, scripts: Scripts, tmp_path: Path
) -> None:
    """Their report would pair them with runs of the present one."""
    runs = runs_of(config, 1)
    execute(config, runs[:1], 1, tmp_path, lambda _: None)
    change(tmp_path)
    with pytest.raises(ValueError, match=rf"off/seed1 was run with other settings \({name}\): remove it, or name"):
        execute(read_ablation(tmp_path / "ablation.yaml"), runs, 1, tmp_path, lambda _: None)
    assert not (runs[1].folder).exists()


@pytest.mark.parametrize(("change", "name"), [*CHANGES[:3], (_ablation(lambda v: v.update(shared={})), "train_iters")])
def test_a_training_broken_off_under_another_recipe_is_not_resumed(
    change: Change, name: str, config: AblationConfig, scripts: Scripts, tmp_path: Path
) -> None:
    run = runs_of(config, 1)[0]
    scripts.code["off"] = "raise SystemExit(1)"
    with pytest.raises(AblationError):
        execute(config, [run], 1, tmp_path, lambda _: None)
    scripts.code.clear()
    change(tmp_path)
    with pytest.raises(ValueError, match=rf"off/seed1 was run with other settings \({name}\)"):
        execute(read_ablation(tmp_path / "ablation.yaml"), [run], 1, tmp_path, lambda _: None)
    assert not (run.folder / "ran").exists()


def test_a_recipe_that_changes_meanwhile_ends_the_ablation(
    config: AblationConfig, scripts: Scripts, tmp_path: Path
) -> None:
    scripts.code["off"] = "open('train.yaml', 'w').write('lr: 0.3')"
    first, second, *_ = runs_of(config, 1)
    with pytest.raises(AblationError, match="denoise, seed 1: the ablation's files have changed since its start"):
        execute(config, [first, second], 1, tmp_path, lambda _: None)
    assert not second.folder.exists()


def test_a_start_made_under_another_recipe_is_refused(config: AblationConfig, scripts: Scripts, tmp_path: Path) -> None:
    """Also when the runs that began from it are gone."""
    first, second, *_ = runs_of(config, 1)
    execute(config, [first], 1, tmp_path, lambda _: None)
    shutil.rmtree(first.folder)
    (tmp_path / "align.yaml").write_text("lr: 0.3\n")
    with pytest.raises(ValueError, match=r"arms/start was run with other settings \(start\)"):
        execute(config, [second], 1, tmp_path, lambda _: None)
    shutil.rmtree(tmp_path / "arms" / "start")
    execute(config, [second], 1, tmp_path, lambda _: None)


def test_comments_and_names_of_files_may_change(config: AblationConfig, scripts: Scripts, tmp_path: Path) -> None:
    runs = runs_of(config, 1)
    execute(config, runs, 2, tmp_path, lambda _: None)
    write_ablation(tmp_path, lambda values: values.update(train=["renamed.yaml"], questions="renamed.json"))
    (tmp_path / "renamed.yaml").write_text("# Not so high.\nlr: 0.1\n")
    (tmp_path / "heldout.json").rename(tmp_path / "renamed.json")
    execute(read_ablation(tmp_path / "ablation.yaml"), runs, 2, tmp_path, lambda _: None)
    assert {(run.folder / "ran").read_text() for run in runs} == {"x"}


def test_a_product_that_exists_is_not_made_again(config: AblationConfig, scripts: Scripts, tmp_path: Path) -> None:
    run = runs_of(config, 1)[0]
    run.folder.mkdir(parents=True)
    made = Step("export", scripts.step(run).command, run.folder)
    module._run_step(made, run.name, run.folder / "log.txt", tmp_path, module.threading.Event())
    assert not (run.folder / "ran").exists()
