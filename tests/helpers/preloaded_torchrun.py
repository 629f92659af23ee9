"""torchrun whose ranks start in a fraction of a second: python preloaded_torchrun.py [torchrun's arguments] SCRIPT ...

torchrun's own agent, rendezvous, restarts and signals, and a process per rank. But ranks run SCRIPT in a fork of a
server that has imported torch and Megatron, instead of in a fresh interpreter that spends twelve seconds on it.
"""

from __future__ import annotations

import multiprocessing
import os
import sys

from tests.helpers.distributed import PRELOAD

PID_NAME = "TORCHRUN_PID"
"""Variable in the environment of the ranks: torchrun's process id. Their parent is the server."""

if __name__ == "__main__":
    os.environ[PID_NAME] = str(os.getpid())
    multiprocessing.set_forkserver_preload(PRELOAD)
    from torch.distributed.run import main

    main(["--run-path", "--start-method", "forkserver", *sys.argv[1:]])
