"""Runs as processes: order, resuming, and a failure that ends everything else. The commands are small scripts."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_ross.evaluation.ablation import execute as module
from megatron_ross.evaluation.ablation.execute import AblationError, Step, execute
from megatron_ross.evaluation.ablation.plan import AblationConfig, Run, read_ablation, runs_of

from .conftest import write_ablation, write_results

ACCURACY = {"off": [50.0, 50.0], "denoise": [60.0, 61.0], "regress": [55.0, 54.0], "weight-3": [58.0]}


class Scripts:
    """Stands in for the programs: a run's step writes a file, fails, or waits."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.code: dict[str, str] = {}
        monkeypatch.setattr(module, "start_steps", lambda config, seed: [Step("conversion", self._command("start"))])
        monkeypatch.setattr(module, "run_steps", lambda config, run: [self.step(run)])
        monkeypatch.setattr(module, "collect_result", lambda run, settings, minutes: _result(settings))

    def step(self, run: Run) -> Step:
        return Step("training", self._command(run.arm.name, str(run.folder / "ran")))

    def _command(self, name: str, *arguments: str) -> list[str]:
        default = "import sys; open(sys.argv[1], 'a').write('x')" if arguments else "pass"
        return [sys.executable, "-c", self.code.get(name, default), *arguments]


def _result(settings: dict[str, Any]) -> dict[str, Any]:
    return {
        "settings": settings,
        "scores": {},
        "figures": {},
        "curves": {},
        "seconds_per_iteration": 1.0,
        "minutes": 1.0,
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


def test_a_product_that_exists_is_not_made_again(config: AblationConfig, scripts: Scripts, tmp_path: Path) -> None:
    run = runs_of(config, 1)[0]
    run.folder.mkdir(parents=True)
    made = Step("export", scripts.step(run).command, run.folder)
    module._run_step(made, run.name, run.folder / "log.txt", tmp_path, module.threading.Event())
    assert not (run.folder / "ran").exists()
