"""The Dockerfile is not built here: its versions are held to setup.py, its files to the tree."""

from __future__ import annotations

import re

from packaging.version import Version

from tests.helpers.requirements import extras, required
from tests.helpers.sources import ROOT

TEXT = (ROOT / "Dockerfile").read_text(encoding="utf-8")
PINNED = {
    "TORCH": "torch",
    "TRANSFORMER_ENGINE": "transformer-engine",
    "MEGATRON_CORE": "megatron-core",
    "DALI": "nvidia-dali-cuda130",
}


def test_pinned_versions_are_supported() -> None:
    """The newest Megatron Core series that setup.py allows, and nothing that it excludes."""
    requirements = {r.name: r for rows in (required(), *extras().values()) for r in rows}
    pinned = dict(re.findall(r"^ARG ([A-Z_]+)=([0-9.]+)$", TEXT, re.MULTILINE))
    for argument, package in PINNED.items():
        assert Version(pinned[argument]) in requirements[package].specifier, f"{package} {pinned[argument]}"
    (upper,) = (s for s in requirements["megatron-core"].specifier if s.operator == "<")
    newest, limit = Version(pinned["MEGATRON_CORE"]), Version(upper.version)
    assert (newest.major, newest.minor + 1) == (limit.major, limit.minor)


def test_the_cuda_of_the_image_is_that_of_dali_and_transformer_engine() -> None:
    (cuda,) = re.findall(r"^ARG CUDA=(\d+)\.", TEXT, re.MULTILINE)
    assert f"nvidia-dali-cuda{cuda}0==" in TEXT
    assert f"core_cu{cuda}," in TEXT


def test_copied_files_exist_and_setup_py_finds_what_it_packages() -> None:
    copied = [name for line in re.findall(r"^COPY (?!--from)(.*)$", TEXT, re.MULTILINE) for name in line.split()]
    names = [name for name in copied if not name.startswith(("--", "/")) and name != "./"]
    assert {name for name in names if not (ROOT / name).exists()} == set()
    assert {"setup.py", "megatron_ross", "kernels", "README.md", "LICENSE"} <= set(names)


def test_the_image_that_runs_has_no_toolkit() -> None:
    """Two stages: the second starts from a small image and takes the environment from the first."""
    stages = re.findall(r"^FROM \S+:\$\{CUDA\}-(\w+)-ubuntu\S+ AS (\w+)$", TEXT, re.MULTILINE)
    assert stages == [("devel", "build"), ("base", "run")]
    assert "COPY --from=build /venv /venv" in TEXT
