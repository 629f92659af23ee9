"""Recipes that come with the package: `--config recipe:ross/finetune_siglip_qwen2`.

An installed package has them in `megatron_ross/recipes/`; setup.py takes them from the repository's `examples/`, where
they are read from when the package is used from there.
"""

from __future__ import annotations

import difflib
from pathlib import Path

FOLDERS = ("ross", "llava", "images", "shared", "layouts")
_PACKAGE = Path(__file__).resolve().parents[1]


def recipes_folder() -> Path:
    """Folder that the names of recipes start from."""
    installed = _PACKAGE / "recipes"
    return installed if installed.is_dir() else _PACKAGE.parent / "examples"


def recipe_names() -> list[str]:
    """All recipes, as `FOLDER/NAME`."""
    root = recipes_folder()
    return sorted(f"{folder}/{path.stem}" for folder in FOLDERS for path in (root / folder).glob("*.yaml"))


def recipe_file(name: str) -> Path:
    """The YAML file of a recipe.

    Raises:
        ValueError: there is none of this name.
    """
    name = name.removesuffix(".yaml")
    names = recipe_names()
    if name not in names:
        close = difflib.get_close_matches(name, names, n=1)
        raise ValueError(f"no such recipe; {f'did you mean {close[0]}?' if close else 'there are ' + ', '.join(names)}")
    return recipes_folder() / f"{name}.yaml"
