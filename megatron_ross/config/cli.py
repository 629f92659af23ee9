"""Command line and YAML to a `RunConfig`, and back.

    torchrun pretrain_ross.py --config examples/quickstart/stage1.yaml --tensor-model-parallel-size 2

Every field of `config/schema.py` is one flag and one YAML key of the same name; dashes are as good as underscores.
`--config` may come several times, the last one wins; `--config recipe:ross/finetune_siglip_qwen2` is a file of the
package (`config/recipes.py`). Nothing here imports torch, so `--help` and refusals come at once.
"""

from __future__ import annotations

import contextlib
import difflib
import io
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser, Namespace, set_parsing_settings

from megatron_ross.config.other_names import other_name
from megatron_ross.config.recipes import recipe_file
from megatron_ross.config.schema import SECTIONS, RunConfig
from megatron_ross.config.shown import shown
from megatron_ross.config.yaml_safety import check_yaml_file

_LONGEST_MESSAGE = 1000


class ConfigError(ValueError):
    """A setting is wrong; the message names the setting, its value, the rule and the fix, on one line."""


AddOptions = Callable[[ArgumentParser], None]
"""Adds the options that a command has besides the settings of a run."""


def build_parser(
    description: str,
    add_options: AddOptions | None = None,
    usage: str = "%(prog)s [--config FILE]... [--SETTING VALUE]...",
) -> ArgumentParser:
    """A parser with one flag per field of `RunConfig`, by section, and `--config FILE`.

    Args:
        add_options: what the command itself understands; shown first.
    """
    # The help of a setting is the text below its field. jsonargparse reads it only if asked, and only for all parsers.
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        description=description, exit_on_error=False, default_env=False, allow_abbrev=False, usage=usage
    )
    if add_options is not None:
        add_options(parser)
    parser.add_argument(
        "--config",
        action="config",
        help="YAML file with settings from below, or recipe:NAME; several are read in order, flags override them",
    )
    for section in SECTIONS.values():
        parser.add_class_arguments(section, as_group=True, sub_configs=False)
    return parser


def parse_run_config(argv: Sequence[str], description: str = "") -> RunConfig:
    """Read a run's configuration.

    Raises:
        ConfigError: an unknown key, a value of the wrong type, or an unreadable file.
        SystemExit: after --help.
    """
    return run_config(parse_flat(build_parser(description), argv))


def run_config(flat: dict[str, Any]) -> RunConfig:
    """The settings of a run by name -> its configuration. Raises ConfigError: null where a value is needed."""
    for field in (field for section in SECTIONS.values() for field in fields(section)):
        if flat.get(field.name, field) is None and "None" not in str(field.type):
            raise ConfigError(f"{field.name}=null: must have a value; leave it out for the default")
    return RunConfig.from_flat(flat)


def parse_command(description: str, add_options: AddOptions, argv: Sequence[str]) -> tuple[Namespace, RunConfig]:
    """A command's own options, and the run that its other arguments configure. Raises as `parse_run_config`."""
    usage = "%(prog)s [OPTION]... [--config FILE]... [--SETTING VALUE]..."
    parser = build_parser(description, add_options, usage)
    flat = parse_flat(parser, argv)
    settings = {field.name for section in SECTIONS.values() for field in fields(section)}
    own = {name: value for name, value in flat.items() if name not in settings}
    return Namespace(**own), run_config({name: value for name, value in flat.items() if name in settings})


def parse_flat(parser: ArgumentParser, argv: Sequence[str]) -> dict[str, Any]:
    """All settings of `parser` by name, from YAML files and flags. Raises as `parse_run_config`."""
    captured = io.StringIO()
    args = _with_recipes(_normalise(argv, parser))
    try:
        for path in _config_files(args):
            check_yaml_file(path)
        with contextlib.redirect_stderr(captured):
            namespace = parser.parse_args(args)
    except RecursionError:
        raise ConfigError("a setting is nested too deeply; every setting is a plain value or a list of them") from None
    except (ArgumentError, ValueError) as error:
        raise ConfigError(_one_line(str(error), _names(parser))) from None
    except OSError as error:
        raise ConfigError(f"cannot read {error.filename}: {error.strerror}") from None
    flat = namespace.as_dict()
    if isinstance(parser._option_string_actions.get("--config"), ActionConfigFile):
        flat.pop("config", None)  # its settings are in the others
    return flat


def _with_recipes(args: Sequence[str]) -> list[str]:
    """`--config recipe:NAME` with the file that it stands for."""
    result = list(args)
    for position, arg in enumerate(args):
        previous = args[position - 1] if position else ""
        if previous == "--config" and arg.startswith("recipe:"):
            result[position] = _recipe(arg)
        elif arg.startswith("--config=recipe:"):
            result[position] = f"--config={_recipe(arg.partition('=')[2])}"
    return result


def _recipe(name: str) -> str:
    try:
        return str(recipe_file(name.partition(":")[2]))
    except ValueError as error:
        raise ConfigError(f"config={name}: {error}") from None


def _config_files(args: Sequence[str]) -> list[Path]:
    """The files that `--config` names."""
    named = [args[i + 1] for i, arg in enumerate(args[:-1]) if arg == "--config"]
    named += [arg.partition("=")[2] for arg in args if arg.startswith("--config=")]
    for name in named:
        if os.path.isdir(name):
            raise ConfigError(f"config={shown(name)}: is a folder; name a YAML file")
        if not os.path.exists(name) and ":" not in name:  # with one, it may be YAML itself
            raise ConfigError(f"config={shown(name)}: no such file; recipe:NAME names one of the package")
    return [Path(name) for name in named if os.path.isfile(name)]


def _normalise(argv: Sequence[str], parser: ArgumentParser) -> list[str]:
    """Dashes are as good as underscores, and a bare `--bf16` is `--bf16 true`."""
    switches = {f"--{f.name}" for section in SECTIONS.values() for f in fields(section) if "bool" in str(f.type)}
    spelled = {_plain(option): option for option in parser._option_string_actions}
    result: list[str] = []
    for position, arg in enumerate(argv):
        name, equals, value = arg.partition("=")
        if arg.startswith("--"):
            arg = spelled.get(_plain(name), "--" + _plain(name)) + equals + value
        result.append(arg)
        is_bare = position + 1 == len(argv) or argv[position + 1].startswith("--")
        if arg in switches and is_bare:
            result.append("true")
    return result


def _plain(option: str) -> str:
    """Without leading dashes, with underscores."""
    return option.removeprefix("--").replace("-", "_")


def _names(parser: ArgumentParser) -> list[str]:
    return sorted({_plain(option) for option in parser._option_string_actions if option.startswith("--")})


def _one_line(message: str, names: Iterable[str]) -> str:
    message = re.sub(r"\s+", " ", message).strip()
    if unknown := re.search(r"Unrecognized arguments: (\S+)|Option '(\S+)' is not accepted", message, re.IGNORECASE):
        return unknown_name((unknown[1] or unknown[2]).partition("=")[0], names, is_flag=bool(unknown[1]))
    if wrong := re.search(r'Parser key "(\w+)": Expected an? (.+?)\.? Got value: (.+)', message):
        kind = re.sub(r"<class '(\w+)'>|typing\.", r"\1", wrong[2])
        return f"{wrong[1]}={shown(wrong[3])}: must be {kind}"
    return message if len(message) <= _LONGEST_MESSAGE else message[:_LONGEST_MESSAGE] + " ..."


def unknown_name(name: str, names: Iterable[str], *, is_flag: bool) -> str:
    """What to say of a setting or option that there is not: what another program calls so, or the closest name.

    Args:
        name: a word of the command line (`is_flag`), or a key of a YAML file.
    """
    if is_flag and not name.startswith("--"):
        return f"{shown(name)}: stands alone; every value follows its --NAME"
    name = _plain(name)
    if answer := other_name(name):
        return f"{name}: no such setting; {answer}"
    close = difflib.get_close_matches(name, names, n=1)
    return f"{name}: no such setting; " + (f"did you mean {close[0]}?" if close else "--help lists them all")


def write_resolved(run: RunConfig, path: Path) -> None:
    """Write every setting, defaults included, as YAML that `--config` reads back."""
    path.write_text(yaml.safe_dump(run.to_flat(), sort_keys=False))
