"""`pretrain_ross.py` with a fault: python faulty_training.py FAULTS [settings]; torchrun starts it on every rank.

FAULTS is a JSON list; the n-th entry belongs to the n-th start of the ranks, and later starts have none. An entry says
who is killed where: {"ranks": [2], "iteration": 5, "point": "forward"}. Points: `forward` and `optimizer` of a step,
`write` (of a checkpoint's files) and `publish` (after its folder has its name, before `latest` is written).
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def _kill_before(function: Callable[..., Any], is_time: Callable[[], bool]) -> Callable[..., Any]:
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if is_time():
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    return wrapped


def plant(fault: dict[str, Any]) -> None:
    """Make this process end itself at `fault["point"]`, if it is one of its ranks."""
    if int(os.environ["RANK"]) not in fault["ranks"]:
        return
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    from megatron_ross.checkpoint import saver, writer
    from megatron_ross.models.ross_stage import RossStage
    from megatron_ross.training.trainer import Trainer

    now = [0]
    step, save = Trainer._step, Trainer.save

    def counted_step(self: Trainer) -> Any:
        now[0] = self.iteration + 1
        return step(self)

    def counted_save(self: Trainer, **kwargs: Any) -> Any:
        now[0] = self.iteration
        return save(self, **kwargs)

    Trainer._step, Trainer.save = counted_step, counted_save  # type: ignore[method-assign]

    def is_time() -> bool:
        return now[0] >= fault["iteration"]

    owner, name = {
        "forward": (RossStage, "forward"),
        "optimizer": (DistributedOptimizer, "step_with_ready_grads"),
        "write": (writer._Writer, "write_data"),
        "publish": (saver, "write_latest"),
    }[fault["point"]]
    setattr(owner, name, _kill_before(getattr(owner, name), is_time))


def main(argv: list[str]) -> int:
    faults, restart = json.loads(argv[0]), int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    if restart < len(faults):
        plant(faults[restart])
    from megatron_ross.training.main import main as train

    return train(argv[1:])


if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[2] / "kernels")]
    sys.exit(main(sys.argv[1:]))
