"""The life of one rank: configuration, process group, training, exit code."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_ross.config.cli import ConfigError, parse_run_config
from megatron_ross.config.schema import RunConfig

if TYPE_CHECKING:
    from megatron_ross.compat import Available
    from megatron_ross.config.layout import StageLayout
    from megatron_ross.training.start import Start

EXIT_ERROR = 1
EXIT_INTERRUPTED = 130
_SAY_IT_ONCE_S = 3.0


def main(argv: Sequence[str], parse: Callable[[Sequence[str]], RunConfig] = parse_run_config) -> int:
    """Run to the end; returns the process's exit code. A user's mistake is one line on the first rank.

    torch is imported when the command line is understood: `--help` and refusals of a flag come at once.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    try:
        _train(parse(argv), world_size)
    except KeyboardInterrupt:
        return _leave(EXIT_INTERRUPTED, rank, "interrupted; the last complete checkpoint is intact")
    except (ConfigError, ValueError, OSError) as error:
        return _leave(EXIT_ERROR, rank, f"error: {error}")
    except RuntimeError as error:
        if lost := _lost_peer(error):
            # At once: whoever waits for this rank learns of the loss when it leaves, one after the other.
            return _leave(EXIT_ERROR, rank, f"stopped: {lost}", say_it_once=False)
        if not _is_expected(error):
            raise
        return _leave(EXIT_ERROR, rank, f"error: {error}")
    import torch.distributed as dist

    dist.destroy_process_group()
    return 0


def _train(run: RunConfig, world_size: int) -> None:
    from megatron_ross.compat import probe

    start, layout, warnings = checked_start(run, world_size, probe)
    from megatron_ross.training.checkpoints import prepare_run_folder
    from megatron_ross.training.start import check_unchanged

    if run.training.save:
        prepare_run_folder(run)
    if int(os.environ.get("RANK", 0)) == 0:
        print("".join(f"warning: {warning}\n" for warning in warnings), end="", flush=True)
    start_process_group(run.parallel.distributed_timeout_minutes)
    from megatron_ross.parallel.groups import initialize_groups
    from megatron_ross.training.lease import leased
    from megatron_ross.training.trainer import Trainer

    groups = initialize_groups(
        run.parallel,
        layout,
        tie_embeddings=start.manifest.model.language.share_embeddings_and_output_weights,
        seed=run.loss.seed,
    )
    folder = run.training.save
    with leased(Path(folder), partial(check_unchanged, run, start)) if folder else nullcontext():
        Trainer(run, start, layout, groups).train()


def checked_start(
    run: RunConfig, world_size: int, available: Callable[[], Available | None]
) -> tuple[Start, StageLayout, list[str]]:
    """Everything that can be known before a process group exists: settings, checkpoint, layout, machine.

    Imports and checks in this order: mistakes are found before anything slow starts, most of them without torch.

    Args:
        available: what the machine offers, asked last; None: features are not checked.

    Returns:
        Where the run starts, its layout, and warnings for the log.

    Raises:
        ConfigError, ValueError: the first thing that is wrong.
    """
    from megatron_ross.config.validate import validate_run
    from megatron_ross.planner.auto import resolve_layout
    from megatron_ross.training.start import refuse_to_mix, start_of

    validate_run(run, world_size)
    start = start_of(run)
    refuse_to_mix(run)
    layout = resolve_layout(run, start.manifest.model, world_size)
    from megatron_ross.platform import quieten

    quieten()
    from megatron_ross.config.features import resolve_features
    from megatron_ross.training.resumed import check_trained_parts

    check_trained_parts(run, start)
    machine = available()
    if machine is not None:
        resolve_features(run, machine)
    if not run.data.latent_cache:
        return start, layout, []
    from megatron_ross.training.latents import check_latent_cache  # imports Megatron and diffusers

    return start, layout, check_latent_cache(run, start.directory)


def start_process_group(timeout_minutes: float) -> None:
    import torch
    import torch.distributed as dist

    from megatron_ross.platform import distributed_backend, ensure_platform

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    ensure_platform()
    if "RANK" not in os.environ:
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    dist.init_process_group(distributed_backend(), timeout=timedelta(minutes=timeout_minutes))


def _is_expected(error: RuntimeError) -> bool:
    """Errors that already say what to do need no traceback."""
    from megatron_ross.checkpoint.agreement import CheckpointError
    from megatron_ross.training.trainer import TrainingError

    return isinstance(error, CheckpointError | TrainingError)


def _lost_peer(error: RuntimeError) -> str:
    """What became of another rank, where a collective failed because of it; otherwise nothing."""
    text = str(error)
    if any(sign in text for sign in ("Connection closed by peer", "Connection reset by peer", "Broken pipe")):
        return "another rank ended or cannot be reached"  # it says itself what happened
    if any(sign in text for sign in ("Timed out waiting", "Application timeout", "Wait timeout", "wait timeout")):
        return (
            "another rank has not answered for distributed_timeout_minutes; look at its machine, or set "
            "hang_timeout_minutes below that limit to see where every rank stands"
        )
    return ""


def _leave(code: int, rank: int, message: str, *, say_it_once: bool = True) -> int:
    """Leave with a message, without waiting for the other ranks: torchrun ends them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if rank and say_it_once:
        time.sleep(_SAY_IT_ONCE_S)  # all ranks see most mistakes; torchrun ends this one as soon as the first has left
    print(message if rank == 0 else f"rank {rank}: {message}", file=sys.stderr, flush=True)
    os._exit(code)
