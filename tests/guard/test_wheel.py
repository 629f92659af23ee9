"""The wheel holds `megatron_ross` and `ross_kernels`, all of them, and nothing that could shadow other packages."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

from megatron_ross.config.recipes import FOLDERS
from tests.helpers.sources import ROOT, project_files

PACKAGES = ("megatron_ross", "ross_kernels")


def build(tree: Path, hook: str, out: Path) -> Path:
    """Call a hook of the build backend, as pip does: `build_wheel` or `build_editable`."""
    code = f"import sys; from setuptools import build_meta; build_meta.{hook}(sys.argv[1])"
    out.mkdir()
    done = subprocess.run([sys.executable, "-c", code, str(out)], cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = out.glob("*.whl")
    return wheel


def import_packages(code: str, cwd: Path, env: dict[str, str]) -> list[str]:
    """Folders that our packages are imported from in a fresh interpreter started in `cwd`."""
    code += f"\nfor name in {PACKAGES}: print(__import__(name).__path__[0])"
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | env
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is committed, so that building leaves nothing behind in the project."""
    tree = tmp_path_factory.mktemp("project")
    for path in project_files():
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, tree / path)
    return tree


@pytest.fixture(scope="module")
def wheel(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tree, "build_wheel", tmp_path_factory.mktemp("wheel") / "out")


def test_top_level_names(wheel: Path) -> None:
    names = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    dist_info = {name for name in names if name.endswith(".dist-info")}
    assert len(dist_info) == 1
    assert names - dist_info == set(PACKAGES)


def test_every_module_is_in_the_wheel(wheel: Path) -> None:
    committed = {
        p.removeprefix("kernels/") for p in project_files(".py") if p.startswith(("megatron_ross/", "kernels/ross_"))
    }
    assert {n for n in zipfile.ZipFile(wheel).namelist() if n.endswith(".py")} == committed


def test_recipes_and_the_program_are_in_the_wheel(wheel: Path, tmp_path: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    recipes = {f"megatron_ross/recipes/{f}/{p.name}" for f in FOLDERS for p in (ROOT / "examples" / f).glob("*.yaml")}
    assert {name for name in names if name.startswith("megatron_ross/recipes/")} == recipes
    (entries,) = (name for name in names if name.endswith(".dist-info/entry_points.txt"))
    assert "megatron-ross = megatron_ross.cli.main:main" in zipfile.ZipFile(wheel).read(entries).decode()
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    code = "from megatron_ross.config.recipes import recipe_file; print(recipe_file('ross/finetune_siglip_qwen2'))"
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PYTHONPATH": str(site)}
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    found = Path(done.stdout.strip())
    assert found.is_relative_to(site), done.stderr
    assert found.read_bytes() == (ROOT / "examples/ross/finetune_siglip_qwen2.yaml").read_bytes()


def test_metadata(wheel: Path) -> None:
    import megatron_ross

    archive = zipfile.ZipFile(wheel)
    (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
    metadata = Parser().parsestr(archive.read(name).decode())
    assert metadata["Name"] == "megatron-ross"
    assert metadata["Version"] == megatron_ross.__version__
    assert metadata["Requires-Python"] == ">=3.11"
    assert {"gpu", "dali", "te", "eval", "dev"} <= set(metadata.get_all("Provides-Extra"))
    assert "megatron_ross/py.typed" in archive.namelist()
    assert any(n.endswith("/LICENSE") for n in archive.namelist())


def test_the_installed_wheel_imports(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    assert import_packages("", tmp_path, {"PYTHONPATH": str(site)}) == [str(site / name) for name in PACKAGES]


def test_the_editable_install_imports(tree: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    zipfile.ZipFile(build(tree, "build_editable", tmp_path / "out")).extractall(site)
    # addsitedir runs the folder's .pth files. Forget this project's other editable install, if there is one.
    code = f"""
import site, sys
ours = [name for name in sys.modules if name.startswith("__editable___megatron_ross")]
finders = [sys.modules.pop(name)._EditableFinder for name in ours]
sys.meta_path[:] = [finder for finder in sys.meta_path if finder not in finders]
sys.path.insert(0, {str(site)!r})
site.addsitedir({str(site)!r})
"""
    folders = [str(tree / "megatron_ross"), str(tree / "kernels" / "ross_kernels")]
    assert import_packages(code, tmp_path, {}) == folders
