"""What all runs of an ablation depend on besides their own settings, and what a folder remembers of it.

Runs are paired only if these conditions are the same, so a folder that was begun under others is refused: neither
resumed nor taken for finished.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from megatron_ross.config.json_files import read_json
from megatron_ross.config.yaml_safety import check_yaml_file
from megatron_ross.evaluation.ablation.plan import AblationConfig
from megatron_ross.text_files import replace_text

START_CONDITIONS = ("start", "processes")
"""Those of the checkpoint that runs start from."""


def conditions_of(config: AblationConfig, root: Path) -> dict[str, str]:
    """A digest of each part of the ablation that all runs share, by its name there.

    Files count by what they say: comments of YAML, and names, may change.

    Raises:
        ValueError: a configuration file holds no settings; OSError: a file cannot be read.
    """
    questions = hashlib.sha256((root / config.questions).read_bytes()).hexdigest()
    parts: dict[str, Any] = {
        "train": _settings(config.train, root),
        "start": {**asdict(config.start), "train": _settings(config.start.train, root)},
        "questions": [questions, config.image_folder],
        "paint": asdict(config.paint),
        "processes": config.processes,
    }
    return {name: _digest(part) for name, part in parts.items()}


def _settings(files: Sequence[str], root: Path) -> dict[str, Any]:
    """What the files say together, the last one first."""
    settings: dict[str, Any] = {}
    for file in files:
        check_yaml_file(root / file)
        settings |= yaml.safe_load((root / file).read_text())
    return settings


def _digest(part: Any) -> str:
    return hashlib.sha256(json.dumps(part, sort_keys=True, default=str).encode()).hexdigest()[:16]


def write_record(path: Path, values: Mapping[str, Any]) -> None:
    """Remember with what a folder is begun."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, json.dumps(values, indent=1) + "\n")


def read_record(path: Path) -> dict[str, Any]:
    """What `write_record` wrote; empty if it did not."""
    return dict(read_json(path)) if path.exists() else {}


def refuse_changes(folder: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raises ValueError if a folder was begun with other settings or conditions than are wanted now."""
    changed = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
    if changed:
        raise ValueError(
            f"{folder} was run with other settings ({', '.join(changed)}): remove it, or name another output folder"
        )
