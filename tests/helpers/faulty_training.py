"""`pretrain_ross.py` with a fault: python faulty_training.py FAULTS [settings]; torchrun starts it on every rank.

FAULTS is a JSON file with a list; the n-th entry belongs to the n-th start of the ranks, and later starts have none.
An entry says who gets which signal where: {"ranks": [2], "iteration": 5, "point": "forward"}. `signal` is a name,
SIGKILL if it is left out. With `"to": "torchrun"`, the ranks send it to torchrun instead, and wait until it comes back
to them. FAULTS.sent has a line for every signal: the number of the start. Points:

- `start`: before the first step; `forward` and `optimizer`: in a step;
- `write`: before a rank writes to its file; `half`: when it has written a part of it; `sums`: before its checksum;
- on rank 0 alone, `publish`: when the checkpoint's folder has its name and `latest` is not yet written; `named`: when
  it is, and older checkpoints are not yet removed.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[2] / "kernels")]

from tests.helpers.preloaded_torchrun import PID_NAME  # noqa: E402

HALF_OF_A_FILE = 45
"""Tensors in a rank's file before the point `half`. The smallest file of `test_kills.py` has 96."""


def _once_before(
    function: Callable[..., Any], is_time: Callable[[], bool], action: Callable[[], None], passes: int
) -> Any:
    """`function`, and `action` before the call in time after `passes` others."""
    calls = []

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if len(calls) <= passes and is_time():
            calls.append(True)
            if len(calls) > passes:
                action()
        return function(*args, **kwargs)

    return wrapped


def plant(fault: dict[str, Any], note: Callable[[], None]) -> None:
    """Make this process send the signal at `fault["point"]`, after a note of it, if it is one of its ranks."""
    if int(os.environ["RANK"]) not in fault["ranks"]:
        return
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from torch.distributed.checkpoint import filesystem

    from megatron_ross.checkpoint import checksums, saver, writer
    from megatron_ross.models.ross_stage import RossStage
    from megatron_ross.training import trainer
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
        "start": (trainer, "build_optimizer"),
        "forward": (RossStage, "forward"),
        "optimizer": (DistributedOptimizer, "step_with_ready_grads"),
        "write": (writer._Writer, "write_data"),
        "half": (filesystem, "_write_item"),
        "sums": (checksums, "sha256_of"),
        "publish": (saver, "write_latest"),
        "named": (saver, "remove_superseded"),
    }[fault["point"]]
    pid = int(os.environ[PID_NAME]) if fault.get("to") == "torchrun" else os.getpid()
    number = signal.Signals[fault.get("signal", "SIGKILL")]

    def send() -> None:
        note()
        os.kill(pid, number)
        while pid != os.getpid() and not _is_asked_to_stop():
            time.sleep(0.01)

    passes = HALF_OF_A_FILE if fault["point"] == "half" else 0
    setattr(owner, name, _once_before(getattr(owner, name), is_time, send, passes))


def _is_asked_to_stop() -> bool:
    """Torchrun has handed the signal on, and the trainer's handler has seen it."""
    handler = signal.getsignal(signal.SIGTERM)
    return isinstance(handler, MethodType) and bool(handler.__self__.number)


def main(argv: list[str]) -> int:
    path, start = Path(argv[0]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    faults = json.loads(path.read_text())

    def note() -> None:
        with path.with_name(path.name + ".sent").open("a") as file:
            file.write(f"{start}\n")

    if start < len(faults):
        plant(faults[start], note)
    from megatron_ross.training.main import main as train

    return train(argv[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
