"""The dependencies that setup.py declares, read without running it. Used by the guard tests."""

from __future__ import annotations

import ast
from typing import Any

from packaging.requirements import Requirement

from tests.helpers.sources import parse


def setup_constant(name: str) -> Any:
    """A literal assigned at the top of setup.py."""
    for node in parse("setup.py").body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            return ast.literal_eval(node.value)
    raise LookupError(f"setup.py does not assign {name}")


def required() -> list[Requirement]:
    return [Requirement(text) for text in setup_constant("INSTALL_REQUIRES")]


def extras() -> dict[str, list[Requirement]]:
    table: dict[str, list[str]] = setup_constant("EXTRAS_REQUIRE")
    return {extra: [Requirement(text) for text in texts] for extra, texts in table.items()}
