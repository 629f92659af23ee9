"""What all commands share: options of their own, read before anything large is imported, and exit statuses.

0: done. 1: one line says what was wrong, or the answer is no (broken samples, a run that would stop). 130: interrupted;
75: a conversion was, and nothing was written.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from megatron_ross.config.cli import AddOptions, parse_flat

EXIT_ERROR = 1
EXIT_INTERRUPTED = 130
MODEL_HELP = "run folder, Megatron checkpoint, exported folder (either format) or hub id"


def parse_options(description: str, add_options: AddOptions, arguments: Sequence[str] | None) -> Namespace:
    """A command line without the settings of a run; dashes are as good as underscores.

    Raises:
        ConfigError: an unknown option, a wrong value, or one that is missing. SystemExit: after --help.
    """
    parser = ArgumentParser(description=description, exit_on_error=False, default_env=False, allow_abbrev=False)
    add_options(parser)
    return Namespace(**parse_flat(parser, sys.argv[1:] if arguments is None else arguments))


def run_command(body: Callable[[], int], interrupted: str = "interrupted") -> int:
    """Exit status of a command; what the user can do something about ends in one line on stderr."""
    try:
        return body()
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return EXIT_INTERRUPTED


def at_least_one(options: Any, *names: str) -> None:
    """Raises ValueError where one of these options is below 1."""
    for name in names:
        if getattr(options, name) < 1:
            raise ValueError(f"{name}={getattr(options, name)}: must be at least 1")
