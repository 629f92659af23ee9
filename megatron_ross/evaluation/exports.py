"""From whatever names a checkpoint to a folder that can be loaded: training checkpoints are exported once.

RUN/checkpoints/iter_0002000        a training checkpoint
RUN/checkpoints-exports/iter_0002000-ross   its export, used again as long as the checkpoint is the same
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from pathlib import Path
from typing import Literal

from megatron_ross.checkpoint.locate import Kind, Located, identify, look_up, megatron_checkpoint, unreachable_hub
from megatron_ross.checkpoint.manifest import MANIFEST_NAME
from megatron_ross.convert.unsupported import check_supported
from megatron_ross.text_files import replace_text

ExportedFormat = Literal["ross", "llava"]
WAIT_SECONDS = 3600.0
"""How long the other ranks wait for the first one's export."""

MARK = "exported_from.json"
"""In an export: the SHA-256 of the manifest it was made from."""


def exported_folder(
    checkpoint: str,
    format: ExportedFormat = "ross",
    *,
    rank: int = 0,
    wait_seconds: float = WAIT_SECONDS,
) -> Path:
    """Folder with a Hugging Face checkpoint of a whole model.

    Args:
        checkpoint: run folder, Megatron checkpoint (root or one iteration), exported folder, or hub id.
        format: of a new export.
        rank: rank 0 exports, the others wait until it has. They look at the file system, because a framework may want
            to make the process groups itself.
        wait_seconds: how long.

    Raises:
        ValueError: it is none of these, its export's place is taken by something else, or the export does not come.
        OSError: writing failed.
    """
    found = check_model(checkpoint)
    if found.kind in (Kind.RUN, Kind.CHECKPOINT):
        return _export(megatron_checkpoint(checkpoint, "checkpoint"), format, rank, wait_seconds)
    if found.path is not None:
        return found.path
    from megatron_ross.huggingface.hub import local_folder  # imports transformers, which takes seconds

    return local_folder(checkpoint, local_files_only=bool(unreachable_hub()))


def check_model(checkpoint: str, *, reconstructs: bool = False) -> Located:
    """What `checkpoint` names, if it is a whole model. Reads no weights and imports no torch.

    Args:
        reconstructs: a stock LLaVA, which has no denoiser, is refused, too.

    Raises:
        ValueError: it is something else, or nothing; one line.
    """
    found = look_up(identify(checkpoint))
    found.require("checkpoint", Kind.RUN, Kind.CHECKPOINT, Kind.ROSS, *([] if reconstructs else [Kind.LLAVA]))
    if found.path is not None:
        check_supported(found.path)
    return found


def fingerprint(folder: Path) -> str:
    """Another one whenever a file of the checkpoint in `folder` is another, or was written again."""
    stats = [(path.name, path.stat()) for path in sorted(folder.iterdir()) if path.is_file()]
    described = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()[:16]


def _export(iteration: Path, format: ExportedFormat, rank: int, wait_seconds: float) -> Path:
    """The export of one iteration, made if there is none or an old one."""
    iteration = iteration.resolve()
    root = iteration.parent
    output = root.parent / f"{root.name}-exports" / f"{iteration.name}-{format}"
    digest = hashlib.sha256((iteration / MANIFEST_NAME).read_bytes()).hexdigest()
    mark = output / MARK
    if rank:
        _wait(mark, digest, wait_seconds)
        return output
    if _is_current(mark, digest):
        return output
    if mark.is_file():
        shutil.rmtree(output)  # of an earlier checkpoint with the same number
    elif output.exists():
        raise ValueError(f"{output} was not made by evaluation, or not completed: remove it")
    from megatron_ross.convert.cli import export_checkpoint
    from megatron_ross.huggingface.chat_templates import chat_template

    export_checkpoint(iteration, output, format, templates=chat_template)
    replace_text(mark, json.dumps({"manifest": digest}) + "\n")
    return output


def _is_current(mark: Path, digest: str) -> bool:
    try:
        return bool(json.loads(mark.read_text()).get("manifest") == digest)
    except (FileNotFoundError, json.JSONDecodeError):  # not there yet, or damaged
        return False


def _wait(mark: Path, digest: str, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not _is_current(mark, digest):
        if time.monotonic() > end:
            raise ValueError(
                f"{mark.parent} did not appear within {seconds:.0f} s: the ranks must share this file system; or "
                "export first with megatron-ross export"
            )
        time.sleep(0.5)
