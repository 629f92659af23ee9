"""VLMEvalKit's run.py with the model registered in memory: no fork, no change of its files."""

from __future__ import annotations

import importlib.util
import runpy
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

from megatron_ross.evaluation.vlmevalkit.adapter import VlmEvalKitAdapter

CLASS_NAME = "MegatronRoss"
INSTALL = (
    "git clone https://github.com/open-compass/VLMEvalKit, pip install -e VLMEvalKit, and "
    "name the clone with --vlmevalkit if it is elsewhere; or choose --framework lmms-eval"
)


def find_run_py(source: Path | None = None) -> Path:
    """VLMEvalKit's run.py, which is no part of its package.

    Args:
        source: its source folder; default: the one its package was installed from.

    Raises:
        ValueError: it is not there, or the package cannot be found.
    """
    spec = importlib.util.find_spec("vlmeval")
    if spec is None and source is None:
        raise ValueError(f"VLMEvalKit is not installed: {INSTALL}")
    if source is None:
        assert spec is not None
        assert spec.submodule_search_locations
        source = Path(next(iter(spec.submodule_search_locations))).parent
    run_py = source / "run.py"
    if not run_py.is_file():
        raise ValueError(f"{run_py} is missing: --vlmevalkit must name a source folder of VLMEvalKit")
    return run_py


def register(name: str, model: dict[str, Any]) -> type:
    """Make the model known to VLMEvalKit: for `--model NAME`, and as `"class": "MegatronRoss"` of its config files.

    Args:
        name: of the model in commands and result files.
        model: arguments of `VlmEvalKitAdapter`.

    Returns:
        The model's class.
    """
    import vlmeval.config
    import vlmeval.vlm
    from vlmeval.vlm.base import BaseModel

    joined = type(CLASS_NAME, (VlmEvalKitAdapter, BaseModel), {})
    setattr(vlmeval.vlm, CLASS_NAME, joined)
    # Every data set asks for the model by its name; it is loaded for the first of them.
    vlmeval.config.supported_VLM[name] = cache(partial(joined, **model))
    return joined


def launch(run_py: Path, arguments: Sequence[str]) -> None:
    """Run run.py in this process, as if started with `arguments`."""
    with _argv([str(run_py), *arguments]):
        runpy.run_path(str(run_py), run_name="__main__")


@contextmanager
def _argv(words: list[str]) -> Iterator[None]:
    """Another command line and, first in the search for modules, run.py's folder."""
    argv, path = list(sys.argv), list(sys.path)
    sys.argv[:] = words
    sys.path.insert(0, str(Path(words[0]).parent))
    try:
        yield
    finally:
        sys.argv[:] = argv
        sys.path[:] = path
