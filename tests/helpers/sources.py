"""Reading the project's own sources: which files it has and what they import. Used by the guard tests."""

from __future__ import annotations

import ast
import subprocess
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


@dataclass(frozen=True)
class Import:
    """One imported module, e.g. `megatron.core.optimizer` for `from megatron.core import optimizer`."""

    path: str  # importing file, relative to the root
    line: int
    module: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: imports {self.module}"


def project_files(suffix: str = "") -> list[str]:
    """Files that are, or would be, committed, relative to the root; golden data left out."""
    command = ["git", "-c", "safe.directory=*", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    names = sorted(set(filter(None, listing.split("\0"))))
    return [n for n in names if n.endswith(suffix) and not n.startswith("tests/golden/") and (ROOT / n).is_file()]


def parse(path: str) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"), filename=path)


def imports_of(path: str, tree: ast.Module | None = None) -> list[Import]:
    """Every import statement in a file, those inside functions and under TYPE_CHECKING too.

    `from a import b` counts as `a.b`, because b may be a module; relative imports are made absolute.
    """
    found = []
    for node in ast.walk(tree or parse(path)):
        if isinstance(node, ast.Import):
            found += [Import(path, node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(filter(None, [_relative_base(path, node.level), node.module]))
            found += [Import(path, node.lineno, f"{base}.{alias.name}") for alias in node.names]
    return found


def _relative_base(path: str, level: int) -> str:
    """Package that a relative import with `level` dots in `path` starts from; empty for an absolute one."""
    if level == 0:
        return ""
    parts = path.removeprefix("kernels/").split("/")
    return ".".join(parts[: len(parts) - level])
