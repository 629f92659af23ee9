"""What must never be committed: other machines' paths and hosts, traps for imports, files nobody can read."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest

from tests.helpers.sources import ROOT, parse, project_files

MAX_FILE_LINES = 600
MAX_FUNCTION_LINES = 60  # docstring not counted
MAX_BYTES = 4 * 2**20

# Hosts that may be named: papers, sources and conventions. Package registries are the user's own choice.
ALLOWED_HOSTS = {
    "arxiv.org",
    "github.com",
    "huggingface.co",
    "example.com",
    "keepachangelog.com",
    "semver.org",
    "apache.org",
}
HOST = re.compile(r"(?:https?://|(?<![\w./@-]))(?:[a-z0-9-]+\.)*?([a-z0-9-]+\.(?:org|com|co|net|io))(?![\w-]|\.[a-z])")
PYTHON_ATTRIBUTE = re.compile(r"\b(?:skimage|scipy|torch|torchvision|np|os|hf)\.(?:io|net|co)\b")
MACHINE_PATH = re.compile(r"(?<![\w.~$}-])/(?:work|root|home|Users|mnt|opt/[a-z])\b/?")
LEFT_THE_TREE = re.compile(r"\.\./shared")
OPEN_NOTE = re.compile(r"\b(?:TODO|FIXME|XXX|HACK)\b(?!\(#\d+\))")
CONFLICT = re.compile(r"^(?:<{7}|>{7}) ", re.MULTILINE)

RULES = {
    "names a machine's own path": MACHINE_PATH,
    "leans on a folder beside the project": LEFT_THE_TREE,
    "has an open note without an issue, write it as (#12)": OPEN_NOTE,
    "has a merge conflict": CONFLICT,
}
EXEMPT = {"tests/guard/test_hygiene.py", "LICENSE"}


def text_files() -> Iterator[tuple[str, str]]:
    for path in project_files():
        data = (ROOT / path).read_bytes()
        if b"\0" not in data and path not in EXEMPT:
            yield path, data.decode("utf-8")


def violations(pattern: re.Pattern[str], path: str, text: str) -> list[str]:
    return [f"{path}:{text.count(chr(10), 0, m.start()) + 1}: {m.group()!r}" for m in pattern.finditer(text)]


def foreign_hosts(path: str, text: str) -> list[str]:
    text = PYTHON_ATTRIBUTE.sub("", text)
    return [f"{path}: {m.group()}" for m in HOST.finditer(text) if m.group(1) not in ALLOWED_HOSTS]


def body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines from the signature to the end, without the docstring."""
    lines = (function.end_lineno or 0) - function.lineno + 1
    first = function.body[0]
    if ast.get_docstring(function, clean=False) is not None:
        lines -= (first.end_lineno or 0) - first.lineno + 1
    return lines


@pytest.mark.parametrize("rule", RULES)
def test_texts(rule: str) -> None:
    found = [v for path, text in text_files() for v in violations(RULES[rule], path, text)]
    assert not found, f"a file {rule}"


def test_no_foreign_hosts() -> None:
    found = [v for path, text in text_files() for v in foreign_hosts(path, text)]
    assert not found, f"only these hosts may be named: {sorted(ALLOWED_HOSTS)}"


def test_file_sizes() -> None:
    bad = [p for p in project_files() if (ROOT / p).stat().st_size > MAX_BYTES]
    assert not bad
    lengths = {p: len((ROOT / p).read_text(encoding="utf-8").splitlines()) for p in project_files(".py")}
    long = {p: n for p, n in lengths.items() if n > MAX_FILE_LINES}
    assert not long


def test_functions_fit_on_a_screen() -> None:
    found = []
    for path in project_files(".py"):
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and body_lines(node) > MAX_FUNCTION_LINES:
                found.append(f"{path}:{node.lineno}: {node.name} has {body_lines(node)} lines")
    assert not found


def test_modules_say_what_they_are_for() -> None:
    bad = [p for p in project_files(".py") if ast.get_docstring(parse(p)) is None and parse(p).body]
    assert not bad


def test_packages_that_would_shadow_others() -> None:
    """`apex` makes Megatron choose NVIDIA's norms; `kernels` with `__init__.py` hides Hugging Face's package."""
    paths = project_files()
    bad = [p for p in paths if "apex" in p.split("/")]
    assert not bad
    bad = [p for p in ("kernels", "tools", "tests", "examples") if f"{p}/__init__.py" in paths]
    assert not bad


def test_packages_are_complete() -> None:
    """A folder without `__init__.py` would be left out of the wheel."""
    folders = {
        p.rpartition("/")[0] for p in project_files(".py") if p.startswith(("megatron_ross/", "kernels/ross_kernels/"))
    }
    bad = [f for f in sorted(folders) if not (ROOT / f / "__init__.py").is_file()]
    assert not bad


@pytest.mark.parametrize(
    ("text", "bad"),
    [
        ("see https://arxiv.org/abs/2410.09575 and https://www.apache.org/licenses", False),
        ("pip install --index-url https://packages.registry.org/simple", True),
        ("mirror.company.com", True),
        ("from skimage import io; skimage.io.imread(path); self.config.compute()", False),
    ],
)
def test_the_host_check(text: str, bad: bool) -> None:
    assert bool(foreign_hosts("file", text)) == bad


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        (MACHINE_PATH, "load('/work/data/x.json')"),
        (MACHINE_PATH, "cd /home/me"),
        (LEFT_THE_TREE, "cp -r ../shared/golden ."),
        (OPEN_NOTE, "# TODO: later"),
        (CONFLICT, "a\n<<<<<<< HEAD\n"),
    ],
)
def test_the_text_checks_see(rule: re.Pattern[str], text: str) -> None:
    assert violations(rule, "file", text)
    assert not violations(rule, "file", "framework/data, a/home/b, TODO(#12): with an issue, <<<<<<<<, ./shared\n")
