"""From YAML to runs: every arm with every seed, what they share, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_ross.config.schema import RunConfig
from megatron_ross.evaluation.ablation.execute import overlay, run_steps
from megatron_ross.evaluation.ablation.plan import AblationConfig, read_ablation, runs_of

from .conftest import write_ablation

ROOT = Path(__file__).resolve().parents[4]


def test_every_arm_runs_with_every_seed(config: AblationConfig) -> None:
    runs = [(run.arm.name, run.seed) for run in runs_of(config, 2)]
    assert runs == [
        *((arm, seed) for seed in (1, 2) for arm in ("off", "denoise", "regress")),
        ("weight-3", 1),
    ]
    assert len({run.folder for run in runs_of(config, 2)}) == len(runs)
    with pytest.raises(ValueError, match="seeds is 0"):
        runs_of(config, 0)


def test_arms_of_a_seed_differ_in_their_own_settings_only(config: AblationConfig) -> None:
    """Seed, start and steps are shared; the folder and the arm's settings are not."""
    overlays = {run.arm.name: overlay(config, run) for run in runs_of(config, 1)}
    own: dict[str, dict[str, Any]] = {
        name: {k: v for k, v in settings.items() if k not in ("save", "load")} for name, settings in overlays.items()
    }
    shared = {
        "train_iters": 7,
        "seed": 1,
        "init_from": str(Path(config.output) / "start" / "seed1-trained" / "checkpoints"),
    }
    assert own["denoise"] == shared
    assert own["off"] == shared | {"recon_loss_weight": 0}
    assert own["regress"] == shared | {"recon_objective": "regress"}
    second = overlay(config, runs_of(config, 2)[3])
    assert (second["seed"], Path(second["init_from"]).parent.name) == (2, "seed2-trained")


def test_pictures_are_painted_by_arms_that_learn_it_in_their_own_way(config: AblationConfig) -> None:
    commands = {run.arm.name: [step.command for step in run_steps(config, run)] for run in runs_of(config, 1)}
    painting = {name: [c for c in found if "reconstruct" in c] for name, found in commands.items()}
    assert painting["off"] == []
    assert painting["denoise"][0][-2:] == ["--steps", "6,6,1"]
    assert "--steps" not in painting["regress"][0]


def _add(name: str, settings: dict[str, Any]) -> Any:
    return lambda values: values["groups"][1]["arms"].update({name: settings})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.pop("train"), "train is missing"),
        (lambda v: v.update(colour="red"), "colour"),
        (lambda v: v["start"].pop("llm"), "llm"),
        (lambda v: v.update(groups=[3]), "is no ablation"),
        (_add("Big Arm", {}), "a name has lower-case letters"),
        (_add("off", {}), "'off' is there twice"),
        (_add("x", {"recon_weight": 0}), "unknown setting"),
        (_add("x", {"seed": 3}), "seed is set by the ablation itself"),
        (lambda v: v["shared"].update(save="here"), "save is set by the ablation itself"),
        (lambda v: v["groups"][0]["comparisons"].append(["denoise", "none"]), "there is no arm 'none'"),
    ],
)
def test_mistakes_are_named(change: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        read_ablation(write_ablation(tmp_path, change))


def test_the_committed_ablation_is_valid(tmp_path: Path) -> None:
    config = read_ablation(ROOT / "examples" / "ablation" / "ablation.yaml")
    shared = yaml.safe_load((ROOT / config.train[0]).read_text())
    for run in runs_of(config, 3):
        RunConfig.from_flat({**shared, **overlay(config, run)})
    assert [arm.name for arm in config.groups[0].arms] == ["off", "denoise", "regress"]
