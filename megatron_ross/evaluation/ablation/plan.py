"""What an ablation compares: groups of arms read from YAML, and the runs (arm x seed) they stand for.

An arm is a name and the settings of `config/schema.py` in which it differs. Runs of one seed share everything else:
fresh weights, order of the samples, noise, number of steps.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megatron_ross.config.schema import RunConfig
from megatron_ross.config.yaml_safety import check_yaml_file

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")
_OWN_SETTINGS = ("seed", "save", "load", "init_from")
FIRST_SEED = 1


@dataclass(frozen=True)
class Arm:
    """A variant: its name, also of its folder, and the settings in which it differs."""

    name: str
    settings: dict[str, Any]

    @property
    def reconstructs(self) -> bool:
        """Its denoiser learns something that can be painted."""
        return RunConfig.from_flat(self.settings).loss.denoiser_passes > 0

    @property
    def regresses(self) -> bool:
        return RunConfig.from_flat(self.settings).loss.recon_objective == "regress"


@dataclass(frozen=True)
class Group:
    """Arms that are shown together. `comparisons` are pairs (arm, baseline), of any group; `seeds` caps the number."""

    title: str
    arms: tuple[Arm, ...]
    comparisons: tuple[tuple[str, str], ...]
    seeds: int | None = None


@dataclass(frozen=True)
class Start:
    """Hugging Face parts every run starts from; projector and denoiser are fresh and depend on the seed only.

    `train` are the configuration files of a training that all arms of a seed have in common; none: there is none.
    """

    llm: str
    vision_tower: str
    vae: str
    denoiser_type: str = "denoiser_vit3x"
    denoiser_width: int | None = None
    train: tuple[str, ...] = ()


@dataclass(frozen=True)
class Painting:
    """Images to reconstruct: a folder, how many, and the sampling steps of arms that denoise."""

    images: str
    limit: int = 16
    steps: str = "100"


@dataclass(frozen=True)
class AblationConfig:
    """One ablation. `train` are configuration files of `pretrain_ross.py` that all runs share."""

    train: tuple[str, ...]
    output: str
    start: Start
    questions: str
    image_folder: str
    paint: Painting
    groups: tuple[Group, ...]
    processes: int = 1
    shared: dict[str, Any] = field(default_factory=dict)

    @property
    def arms(self) -> dict[str, Arm]:
        """All arms by name."""
        return {arm.name: arm for group in self.groups for arm in group.arms}


@dataclass(frozen=True)
class Run:
    """One arm with one seed, and its folder."""

    arm: Arm
    seed: int
    folder: Path

    @property
    def name(self) -> str:
        return f"{self.arm.name}, seed {self.seed}"


def runs_of(config: AblationConfig, seeds: int) -> list[Run]:
    """Every run, seed by seed within a group, so that whole comparisons are finished first.

    Raises:
        ValueError: there are no seeds.
    """
    if seeds < 1:
        raise ValueError(f"seeds is {seeds}, it must be at least 1")
    return [
        Run(arm, seed, run_folder(config, arm.name, seed))
        for group in config.groups
        for seed in seeds_of(group, seeds)
        for arm in group.arms
    ]


def seeds_of(group: Group, seeds: int) -> range:
    """The seeds of a group when `seeds` are asked for."""
    count = seeds if group.seeds is None else min(seeds, group.seeds)
    return range(FIRST_SEED, FIRST_SEED + count)


def run_folder(config: AblationConfig, arm: str, seed: int) -> Path:
    return Path(config.output) / arm / f"seed{seed}"


def read_ablation(path: Path) -> AblationConfig:
    """Read an ablation.

    Raises:
        ValueError: a field is missing, unknown or wrong, two arms have one name, or a comparison names no arm.
        OSError: the file cannot be read.
    """
    check_yaml_file(path)
    values = yaml.safe_load(path.read_text())
    try:
        config = AblationConfig(
            **{
                **values,
                "train": tuple(values["train"]),
                "start": Start(**{**values["start"], "train": tuple(values["start"].get("train", ()))}),
                "paint": Painting(**values["paint"]),
                "groups": tuple(_group(group) for group in values["groups"]),
            }
        )
    except KeyError as error:
        raise ValueError(f"{path}: {error.args[0]} is missing") from None
    except (TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no ablation: {error}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    try:
        _check(config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return config


def _group(values: dict[str, Any]) -> Group:
    return Group(
        **{
            **values,
            "arms": tuple(Arm(str(name), dict(settings or {})) for name, settings in values["arms"].items()),
            "comparisons": tuple((arm, baseline) for arm, baseline in values.get("comparisons", ())),
        }
    )


def _check(config: AblationConfig) -> None:
    names = [arm.name for group in config.groups for arm in group.arms]
    for name in names:
        if not _NAME.fullmatch(name):
            raise ValueError(f"arm {name!r}: a name has lower-case letters, digits, dots and dashes")
        if names.count(name) > 1:
            raise ValueError(f"arm {name!r} is there twice; comparisons may name an arm of another group")
    for settings in (config.shared, *(arm.settings for arm in config.arms.values())):
        RunConfig.from_flat(settings)  # refuses unknown settings
        for name in _OWN_SETTINGS:
            if name in settings:
                raise ValueError(f"{name} is set by the ablation itself; leave it out")
    for pair in (pair for group in config.groups for pair in group.comparisons):
        for name in pair:
            if name not in names:
                raise ValueError(f"comparison {list(pair)}: there is no arm {name!r}; arms are {', '.join(names)}")
