"""Every command shown in README, CONTRIBUTING and docs refers to targets, files, extras and flags that exist."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_ross.cli.main import COMMANDS
from megatron_ross.config.recipes import recipe_names
from tests.helpers.requirements import extras
from tests.helpers.sources import ROOT, project_files

BLOCK = re.compile(r"^```(?:bash|sh|shell|console)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s#]+)(?:#[^)]*)?\)|<img[^>]*src=\"([^\"]+)\"")
TARGET = re.compile(r"^([a-z][a-z-]*):(?!=)", re.MULTILINE)
VARIABLE = re.compile(r"^([A-Z_]+) *[?:]?=", re.MULTILINE)
ASSIGNMENT = re.compile(r"^[A-Za-z_][A-Za-z_0-9]*=")

# Commands of the shell and of other tools, whose arguments we do not check.
FOREIGN = {"cd", "export", "source", "git", "ls", "cat", "cp", "mkdir", "less", "open", "xdg-open"} | {
    "nvidia-smi",
    "tensorboard",
    "srun",
    "sbatch",
    "docker",
    "vllm",
}
# Options of torchrun before the script that take a value, by = or as the next word; - and _ are the same to it.
TORCHRUN_FLAGS = {"nproc-per-node", "nnodes", "node-rank", "master-addr", "master-port", "max-restarts"} | {
    "rdzv-backend",
    "rdzv-endpoint",
    "rdzv-id",
}
OUR_FOLDERS = ("examples/", "tools/", "tests/", "docs/", "kernels/", "megatron_ross/")


@dataclass(frozen=True)
class Command:
    """One command line of a document, split into words, without leading variable assignments."""

    where: str
    words: tuple[str, ...]


def documents() -> list[str]:
    return ["README.md", "CONTRIBUTING.md", *[p for p in project_files(".md") if p.startswith("docs/")]]


def commands_in(name: str, text: str) -> list[Command]:
    found = []
    for block in BLOCK.findall(text):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line.strip().removeprefix("$ "), comments=True)
            for part in _split_at_operators(words):
                while part and ASSIGNMENT.match(part[0]):
                    part = part[1:]
                if part:
                    found.append(Command(f"{name}: {line.strip()}", tuple(part)))
    return found


def _split_at_operators(words: list[str]) -> list[list[str]]:
    """`a && b | c > file` -> [a], [b], [c]."""
    parts: list[list[str]] = [[]]
    for word in words:
        if word in {"&&", "||", ";", "|", "&"}:
            parts.append([])
        elif word in {">", ">>", "2>&1", "<"}:
            parts.append([])  # what follows is a file name; dropped below
            parts[-1].append("#redirect")
        else:
            parts[-1].append(word)
    return [part for part in parts if part and part[0] != "#redirect"]


def problem(command: Command) -> str | None:
    """What is wrong with a command, or None."""
    program, *arguments = command.words
    name = program.rpartition("/")[2]
    if name == "make":
        return make_problem(arguments)
    if name == "torchrun":
        return torchrun_problem(after_torchrun_options(arguments))
    if name == "megatron-ross":
        return own_problem(arguments)
    if re.fullmatch(r"python[\d.]*", name):
        return python_problem(arguments)
    if name == "pip":
        return pip_problem(arguments)
    if name in {"bash", "sh"}:
        return path_problem(arguments)
    if name in {"ruff", "pytest", "mypy", "pre-commit"}:
        return path_problem(arguments)
    if program.startswith(OUR_FOLDERS) or program.startswith("./"):
        return path_problem([program.removeprefix("./")])
    return None if program in FOREIGN else f"unknown command {program}: teach it to this test or list it in FOREIGN"


def make_problem(arguments: list[str]) -> str | None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    script = (ROOT / "tools" / "setup_venv.sh").read_text(encoding="utf-8")
    for argument in arguments:
        if "=" in argument:
            variable = argument.partition("=")[0]
            if variable not in VARIABLE.findall(makefile) and f"${{{variable}:-" not in script:
                return f"make has no variable {variable}"
        elif not argument.startswith("-") and argument not in TARGET.findall(makefile):
            return f"make has no target {argument}"
    return None


def python_problem(arguments: list[str]) -> str | None:
    if arguments[:1] == ["-m"]:
        module, rest = arguments[1], arguments[2:]
        if module == "megatron_ross.cli":
            return own_problem(rest)
        if importlib.util.find_spec(module) is None:
            return f"no module {module}"
        return pip_problem(rest) if module == "pip" else path_problem(rest)
    if arguments[:1] == ["-c"] or not arguments:
        return None
    return script_problem(arguments)


def pip_problem(arguments: list[str]) -> str | None:
    for argument in arguments:
        chosen = re.fullmatch(r"(?:\.|megatron-ross)\[([\w,-]+)\]", argument)
        unknown = set(chosen[1].split(",")) - set(extras()) if chosen else set()
        if unknown:
            return f"setup.py has no extra {sorted(unknown)}"
    return None


def path_problem(arguments: list[str]) -> str | None:
    for argument in arguments:
        value = argument.partition("=")[2] if argument.startswith("-") else argument
        if value.startswith(OUR_FOLDERS) and not (ROOT / value.partition("::")[0]).exists():
            return f"no file {value}"
    return None


def own_problem(arguments: list[str]) -> str | None:
    """`megatron-ross COMMAND` with its flags."""
    command, *rest = arguments or ["--help"]
    if command in ("--help", "--version"):
        return None
    if command not in COMMANDS:
        return f"megatron-ross has no command {command}"
    return flag_problem(f"megatron-ross {command}", ("-m", "megatron_ross.cli", command), rest)


def torchrun_problem(arguments: list[str]) -> str | None:
    """What torchrun starts: a script of ours, `-m MODULE`, or after --no-python a program."""
    if arguments[:1] == ["--no-python"]:
        return own_problem(arguments[2:]) if arguments[1:2] == ["megatron-ross"] else f"unknown {arguments[1:2]}"
    return python_problem(arguments) if arguments[:1] == ["-m"] else script_problem(arguments)


def after_torchrun_options(arguments: list[str]) -> list[str]:
    while arguments and arguments[0].startswith("-") and arguments[0] not in ("-m", "--no-python"):
        flag, equals, _ = arguments[0].lstrip("-").partition("=")
        if flag.replace("_", "-") not in TORCHRUN_FLAGS and flag != "standalone":
            return [f"torchrun option --{flag} (unknown to this test)"]
        arguments = arguments[1 if equals or flag == "standalone" else 2 :]
    return arguments


def script_problem(arguments: list[str]) -> str | None:
    """A script of ours with its flags."""
    script, *rest = arguments
    if not (ROOT / script).is_file():
        return f"no file {script}"
    return flag_problem(script, (script,), rest)


def flag_problem(name: str, program: tuple[str, ...], words: list[str]) -> str | None:
    """A flag that the program's --help does not show, a recipe that there is not, or a path."""
    known = flags_of(program) if any(word.startswith("--") for word in words) else frozenset()
    for word in words:
        flag = word.partition("=")[0]
        if flag.startswith("--") and flag.replace("-", "_") not in known:
            return f"{name} has no flag {flag}"
        recipe = word.removeprefix("--config=").removeprefix("recipe:")
        if word.removeprefix("--config=").startswith("recipe:") and recipe not in recipe_names():
            return f"no recipe {recipe}"
    return path_problem(words)


@functools.cache
def flags_of(program: tuple[str, ...]) -> frozenset[str]:
    """Flags in the program's --help; what python is called with."""
    env = os.environ | {"COLUMNS": "200", "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    command = [sys.executable, *program, "--help"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"{program} --help failed: {done.stderr[-2000:]}"
    # - and _ are the same to our programs
    return frozenset(flag.replace("-", "_") for flag in [*re.findall(r"--[A-Za-z][\w.-]*", done.stdout), "--help"])


def dead_links(name: str, text: str) -> list[str]:
    targets = [a or b for a, b in LINK.findall(text)]
    local = [t for t in targets if not t.startswith(("http://", "https://", "mailto:"))]
    return [t for t in local if not (ROOT / Path(name).parent / t).exists()]


@pytest.mark.parametrize("name", documents())
def test_commands_exist(name: str) -> None:
    commands = commands_in(name, (ROOT / name).read_text(encoding="utf-8"))
    wrong = [f"{c.where}\n    -> {problem(c)}" for c in commands if problem(c)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", documents())
def test_links_exist(name: str) -> None:
    dead = dead_links(name, (ROOT / name).read_text(encoding="utf-8"))
    assert not dead


def test_readme_shows_the_two_commands() -> None:
    words = {c.words for c in commands_in("README.md", (ROOT / "README.md").read_text(encoding="utf-8"))}
    assert {("make", "quickstart"), ("make", "test")} <= words


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("make test PYTHON=python3.12", None),
        ("make tset", "no target tset"),
        ("make test SPEED=1", "no variable SPEED"),
        ("pip install -e '.[gpu,dali]'", None),
        ("pip install -e '.[gpus]'", "no extra"),
        ("OMP_NUM_THREADS=1 python tools/no_such_tool.py --x 1", "no file tools/no_such_tool.py"),
        ("torchrun --nproc-per-node 4 no_such_program.py --config examples/none.yaml", "no file no_such_program.py"),
        ("torchrun --standalone --nproc-per-node=4 no_such_program.py", "no file no_such_program.py"),
        ("python tests/guard/flags_example.py --depth 3 --sizes=1", None),
        ("python tests/guard/flags_example.py --deep 3", "no flag --deep"),
        ("cd somewhere && frobnicate --all", "unknown command frobnicate"),
        ("megatron-ross trian", "no command trian"),
        ("megatron-ross train --lr 1 --config recipe:ross/finetune_siglip_qwen2", None),
        ("megatron-ross train --learning-rate 1", "no flag --learning-rate"),
        ("torchrun --nproc-per-node 2 -m megatron_ross.cli train --config recipe:ross/none", "no recipe ross/none"),
        ("torchrun --nproc-per-node 2 --no-python megatron-ross generate --imag x", "no flag --imag"),
        ("python -m no_such_module", "no module"),
        ("pytest tests/guard/no_such_test.py", "no file"),
    ],
)
def test_the_check_sees_mistakes(line: str, expected: str | None) -> None:
    found = [problem(c) for c in commands_in("text", f"```bash\n$ {line}  # comment\n```\n")]
    assert found
    if expected is None:
        assert found == [None] * len(found)
    else:
        assert any(expected in (text or "") for text in found)
