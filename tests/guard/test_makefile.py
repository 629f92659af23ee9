"""The Makefile: old or missing interpreters are refused on one line, each interpreter has its own environment."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.sources import ROOT


def make(*arguments: str, tree: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run make, independent of a make that may have started this test."""
    env = {
        k: v for k, v in os.environ.items() if k not in {"MAKEFLAGS", "MFLAGS", "MAKEOVERRIDES", "MAKELEVEL", "PYTHON"}
    }
    command = ["make", "-C", str(tree), *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of what `make` needs, so that a failing check cannot touch the real environment."""
    for name in ("Makefile", "setup.py", "tools/setup_venv.sh"):
        target = tmp_path / "project" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / name).read_bytes())
        target.chmod(0o755)
    return tmp_path / "project"


def old_python(folder: Path) -> Path:
    """An interpreter that says it is 3.9."""
    path = folder / "old-python"
    path.write_text(
        f'#!/bin/sh\nexec "{sys.executable}" -c "import sys; sys.version_info = (3, 9, 18); exec(sys.argv[1])" "$2"\n'
    )
    path.chmod(0o755)
    return path


def test_old_python_is_refused_on_one_line(tree: Path, tmp_path: Path) -> None:
    python = old_python(tmp_path)
    done = make("test", f"PYTHON={python}", tree=tree)
    errors = [line for line in done.stderr.splitlines() if not line.startswith("make")]
    assert done.returncode != 0
    assert len(errors) == 1
    assert f"Python 3.11 or newer is needed, but PYTHON={python} is 3.9" in errors[0]
    assert not list(tree.glob(".venv*"))


def test_missing_python_is_refused_on_one_line(tree: Path) -> None:
    done = make("quickstart", "PYTHON=no-such-python", tree=tree)
    errors = [line for line in done.stderr.splitlines() if not line.startswith("make")]
    assert done.returncode != 0
    assert len(errors) == 1
    assert "cannot run PYTHON=no-such-python" in errors[0]
    assert not list(tree.glob(".venv*"))


def test_each_interpreter_has_its_own_environment() -> None:
    assert ".venv/bin/python -m pytest" in make("-n", "test").stdout
    folder = ".venv-{}.{}".format(*sys.version_info[:2])
    assert f"{folder}/bin/python -m pytest" in make("-n", "test", f"PYTHON={sys.executable}").stdout


def test_the_environment_is_used_again(tree: Path) -> None:
    (tree / ".venv").mkdir()
    (tree / ".venv" / ".ready").touch()
    assert "setup_venv" not in make("-n", "test", tree=tree).stdout
    assert "setup_venv" in make("-n", "-W", "setup.py", "test", tree=tree).stdout


def test_eval_tests_are_not_skipped_without_lmms_eval(tree: Path) -> None:
    """An environment that says it is ready may have lost the package; then every test would be skipped."""
    python = tree / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\n[ \"$2\" != 'import lmms_eval' ]\n")
    python.chmod(0o755)
    (tree / ".venv" / ".ready").touch()
    (tree / ".venv" / ".ready-eval").touch()
    done = make("test-eval", tree=tree)
    assert done.returncode != 0
    assert "error: lmms-eval cannot be imported in .venv (see above): rm .venv/.ready-eval" in done.stderr


def test_help_lists_every_target() -> None:
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert phony is not None
    listed = re.findall(r"^  make ([a-z-]+) ", make("help").stdout, re.MULTILINE)
    assert sorted(listed) == sorted(phony[1].split())


def test_clients_have_an_environment_of_their_own() -> None:
    """vLLM holds other versions than ours; `make test` must not look at these tests."""
    assert "tests/clients -m clients" in make("-n", "test-clients").stdout
    assert ".venv-clients/bin/python -m pytest" in make("-n", "test-clients").stdout
    for target in ("test", "test-lowest"):
        assert "and not clients" in make("-n", target).stdout
