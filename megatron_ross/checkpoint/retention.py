"""Which checkpoints of a run stay on disk: the last N, every M-th, and whatever a kept one is based on."""

from __future__ import annotations

import shutil
from pathlib import Path

from megatron_ross.checkpoint.manifest import LATEST_NAME, MANIFEST_NAME, Manifest, iteration_dir, iteration_of

PARTIAL_SUFFIX = ".incomplete"
"""Of the folder of a checkpoint that is being written."""


def complete_iterations(root: Path) -> list[int]:
    """Iterations with a complete checkpoint below `root`, oldest first."""
    found = ((iteration_of(path), path) for path in root.glob("iter_*"))
    return sorted(i for i, path in found if i is not None and (path / MANIFEST_NAME).is_file())


def earlier_checkpoint(directory: Path) -> str:
    """Words that offer the complete checkpoint before `directory`, or say that there is none."""
    root = directory.parent
    earlier = [i for i in complete_iterations(root) if iteration_dir(root, i) < directory]
    if not earlier:
        return " (there is none before it)"
    return f" (to go on from the one before: write {earlier[-1]} into {root / LATEST_NAME}, and load={root})"


def superseded(iterations: list[int], retain_last: int | None, retain_interval: int | None) -> list[int]:
    """Iterations that may go. Both None: none. The newest always stays.

    Args:
        iterations: of complete checkpoints, oldest first.
        retain_last: keep this many of the newest; None counts as 1 where `retain_interval` is set.
        retain_interval: keep every multiple of this.
    """
    if retain_last is None and retain_interval is None:
        return []
    newest = set(iterations[-(retain_last or 1) :])
    return [i for i in iterations if i not in newest and (retain_interval is None or i % retain_interval)]


def remove_superseded(root: Path, newest: int, retain_last: int | None, retain_interval: int | None) -> list[int]:
    """Delete what `superseded` names, except the bases of trainable-only checkpoints that stay; returns what went.

    Args:
        newest: the iteration just saved. Later ones are of a run that has gone back since: they are not counted, and
            stay until they are saved again or superseded.

    Raises:
        OSError: a folder cannot be removed or read.
    """
    iterations = complete_iterations(root)
    going = superseded([i for i in iterations if i <= newest], retain_last, retain_interval)
    if not going:
        return []
    needed = _bases(root, [i for i in iterations if i not in going])
    gone = [i for i in going if iteration_dir(root, i).resolve() not in needed]
    for iteration in gone:
        remove_checkpoint(iteration_dir(root, iteration))
    return gone


def remove_checkpoint(directory: Path) -> None:
    """Delete a complete checkpoint. Raises OSError: a file cannot be removed."""
    (directory / MANIFEST_NAME).unlink()  # from here on it is no checkpoint, should the rest be interrupted
    shutil.rmtree(directory)


def remove_leftovers(root: Path) -> list[str]:
    """Delete what killed processes left below `root`; returns the names that went.

    A save leaves `iter_N.incomplete`, a removal `iter_N` without a manifest. Nothing may be saving there.
    """
    found = [path for path in root.glob("iter_*") if _is_leftover(path)]
    for path in found:
        shutil.rmtree(path, ignore_errors=True)  # one that stays costs space, and no more
    return sorted(path.name for path in found if not path.exists())


def _is_leftover(path: Path) -> bool:
    named = iteration_of(path.with_name(path.name.removesuffix(PARTIAL_SUFFIX))) is not None
    complete = not path.name.endswith(PARTIAL_SUFFIX) and (path / MANIFEST_NAME).is_file()
    return named and not complete and path.is_dir() and not path.is_symlink()


def _bases(root: Path, iterations: list[int]) -> set[Path]:
    """Folders of all checkpoints that these are based on, directly or through others."""
    found: set[Path] = set()
    queue = [iteration_dir(root, i) for i in iterations]
    while queue:
        directory = queue.pop()
        try:
            base = Manifest.read(directory).base
        except ValueError:  # missing or damaged: nobody can load it, so it needs no base
            continue
        path = None if base is None else (directory / base).resolve()
        if path is not None and path not in found:
            found.add(path)
            queue.append(path)
    return found
