"""A run on Weights & Biases: one run there, however often training is started again."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

from PIL import Image

from megatron_ross.config.cli import ConfigError
from megatron_ross.text_files import replace_text

ID_FILE = "wandb-id"


class WandbRun:
    """Opened on the logging rank. `folder` is the run folder: its file `wandb-id` says which run to go on with."""

    def __init__(self, project: str, settings: dict[str, Any], folder: Path) -> None:
        """
        Raises:
            ConfigError: Weights & Biases cannot start, e.g. without a login.
        """
        import wandb

        self._wandb = wandb
        try:
            self._run = wandb.init(
                project=project, id=_kept_id(folder), config=settings, dir=str(folder), resume="allow"
            )
        except wandb.Error as error:
            raise ConfigError(
                f"wandb_project={project!r}: Weights & Biases does not start: {' '.join(str(error).split())}; "
                "log in (wandb login), or set WANDB_MODE=offline"
            ) from error

    def log_scalars(self, values: dict[str, float], step: int) -> None:
        self._run.log(values, step=step)

    def log_table(self, name: str, columns: list[str], rows: list[list[str]], step: int) -> None:
        self._run.log({name: self._wandb.Table(columns=columns, data=rows)}, step=step)

    def log_image(self, name: str, image: Image.Image, step: int) -> None:
        self._run.log({name: self._wandb.Image(image)}, step=step)

    def finish(self) -> None:
        """Wait until everything is uploaded."""
        self._run.finish()


def _kept_id(folder: Path) -> str:
    """The id of the run that this folder belongs to; made and written down at its first start."""
    path = folder / ID_FILE
    if not path.exists():
        replace_text(path, f"{uuid.uuid4().hex}\n")
    return path.read_text().strip()
