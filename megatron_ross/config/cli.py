"""Command line and YAML to a `RunConfig`, and back.

    torchrun pretrain_ross.py --config examples/quickstart/stage1.yaml --tensor-model-parallel-size 2

Every field of `config/schema.py` is one flag and one YAML key of the same name; dashes are as good as underscores.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from megatron_ross.config.schema import SECTIONS, RunConfig
from megatron_ross.config.shown import shown
from megatron_ross.config.yaml_safety import check_yaml_file

_LONGEST_MESSAGE = 1000


class ConfigError(ValueError):
    """A setting is wrong; the message names the setting, its value, the rule and the fix, on one line."""


def build_parser(description: str) -> ArgumentParser:
    """A parser with one flag per field of `RunConfig`, and `--config FILE`."""
    parser = ArgumentParser(description=description, exit_on_error=False, default_env=False)
    parser.add_argument("--config", action="config", help="YAML file with any of these settings; flags override it")
    for section in SECTIONS.values():
        parser.add_class_arguments(section, as_group=False, sub_configs=False)
    return parser


def parse_run_config(argv: Sequence[str], description: str = "") -> RunConfig:
    """Read a run's configuration.

    Raises:
        ConfigError: an unknown key, a value of the wrong type, or an unreadable file.
        SystemExit: after --help.
    """
    flat = parse_flat(build_parser(description), argv)
    for field in (field for section in SECTIONS.values() for field in fields(section)):
        if flat.get(field.name, field) is None and "None" not in str(field.type):
            raise ConfigError(f"{field.name}=null: must have a value; leave it out for the default")
    return RunConfig.from_flat(flat)


def parse_flat(parser: ArgumentParser, argv: Sequence[str]) -> dict[str, Any]:
    """All settings of `parser` by name, from YAML files and flags. Raises as `parse_run_config`."""
    captured = io.StringIO()
    args = _normalise(argv)
    try:
        for path in _config_files(args):
            check_yaml_file(path)
        with contextlib.redirect_stderr(captured):
            namespace = parser.parse_args(args)
    except RecursionError:
        raise ConfigError("a setting is nested too deeply; every setting is a plain value or a list of them") from None
    except (ArgumentError, ValueError) as error:
        raise ConfigError(_one_line(str(error))) from None
    except OSError as error:
        raise ConfigError(f"cannot read {error.filename}: {error.strerror}") from None
    flat = namespace.as_dict()
    flat.pop("config", None)
    return flat


def _config_files(args: Sequence[str]) -> list[Path]:
    """Existing files that `--config` names; what is no file is left to the parser."""
    named = [args[i + 1] for i, arg in enumerate(args[:-1]) if arg == "--config"]
    named += [arg.partition("=")[2] for arg in args if arg.startswith("--config=")]
    return [Path(name) for name in named if os.path.isfile(name)]


def _normalise(argv: Sequence[str]) -> list[str]:
    """Megatron's spelling: `--micro-batch-size 4` is `--micro_batch_size 4`, a bare `--bf16` is `--bf16 true`."""
    switches = {f"--{f.name}" for section in SECTIONS.values() for f in fields(section) if "bool" in str(f.type)}
    result: list[str] = []
    for position, arg in enumerate(argv):
        arg = re.sub(r"^--[^=]+", lambda m: "--" + m[0][2:].replace("-", "_"), arg)
        result.append(arg)
        is_bare = position + 1 == len(argv) or argv[position + 1].startswith("--")
        if arg in switches and is_bare:
            result.append("true")
    return result


def _one_line(message: str) -> str:
    message = re.sub(r"\s+", " ", message).strip()
    if unknown := re.search(r"Unrecognized arguments: (\S+)|Option '(\S+)' is not accepted", message, re.IGNORECASE):
        return f"{(unknown[1] or unknown[2]).lstrip('-')}: no such setting; --help lists them all"
    if wrong := re.search(r'Parser key "(\w+)": Expected an? (.+?)\.? Got value: (.+)', message):
        kind = re.sub(r"<class '(\w+)'>|typing\.", r"\1", wrong[2])
        return f"{wrong[1]}={shown(wrong[3])}: must be {kind}"
    return message if len(message) <= _LONGEST_MESSAGE else message[:_LONGEST_MESSAGE] + " ..."


def write_resolved(run: RunConfig, path: Path) -> None:
    """Write every setting, defaults included, as YAML that `--config` reads back."""
    path.write_text(yaml.safe_dump(run.to_flat(), sort_keys=False))
