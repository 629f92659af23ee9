"""Which commit figures are of, in a checkout and in a copy without history."""

from __future__ import annotations

import subprocess
from pathlib import Path

import environment
import pytest


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the benchmarks are said to lie; no variable tells the commit."""
    monkeypatch.delenv("COMMIT", raising=False)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "environment.py"))
    return tmp_path


def test_a_copy_without_history_says_what_it_was_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert environment.commit() == "unknown"
    monkeypatch.setenv("COMMIT", "1234abc")
    assert environment.commit() == "1234abc"


def test_without_git_the_commit_is_unknown(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setenv("PATH", str(folder))
    assert environment.commit() == "unknown"


def test_a_checkout_knows_its_commit_and_its_changes(folder: Path) -> None:
    def git(*arguments: str) -> str:
        who = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        return subprocess.run(["git", *who, *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout

    git("init")
    (folder / "file").write_text("1")
    git("add", "file")
    git("commit", "-m", "first")
    head = git("rev-parse", "--short", "HEAD").strip()
    assert environment.commit() == head
    (folder / "file").write_text("2")
    assert environment.commit() == f"{head}+"
