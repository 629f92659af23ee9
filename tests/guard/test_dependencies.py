"""What the sources import is declared in setup.py, and the oldest supported versions are written down once."""

from __future__ import annotations

import sys

from tests.helpers.requirements import extras, required
from tests.helpers.sources import ROOT, imports_of, project_files

# Import names that differ from the distribution's name.
DISTRIBUTIONS = {
    "PIL": "pillow",
    "yaml": "pyyaml",
    "skimage": "scikit-image",
    "megatron": "megatron-core",
    "nvidia": "nvidia-dali-cuda130",
}
OURS = {"megatron_ross", "ross_kernels"}
FROM_SOURCE = {"apex", "lmms_eval", "vlmeval", "vllm"}
"""Used where they are found. They cannot be declared: the released apex is another package, lmms-eval and vLLM declare
more than a host without CUDA can install (tools/setup_venv.sh, tools/setup_clients.sh), and vlmeval is not released."""
LOWEST = ROOT / "tests" / "lowest-requirements.txt"


def distribution(module: str) -> str:
    root = module.split(".")[0]
    return DISTRIBUTIONS.get(root, root.replace("_", "-"))


def undeclared(prefixes: tuple[str, ...], declared: set[str], local: set[str]) -> list[str]:
    found = [i for path in project_files(".py") if path.startswith(prefixes) for i in imports_of(path)]
    known = sys.stdlib_module_names | OURS | FROM_SOURCE | local
    return [str(i) for i in found if i.module.split(".")[0] not in known and distribution(i.module) not in declared]


def test_imports_of_the_packages_are_declared() -> None:
    declared = {r.name.lower() for r in required()}
    for extra in set(extras()) - {"dev", "quickstart"}:
        declared |= {r.name.lower() for r in extras()[extra]}
    missing = undeclared(("megatron_ross/", "kernels/", "pretrain_ross.py"), declared, set())
    assert not missing, "add these to setup.py"


def test_imports_of_tools_examples_and_tests_are_declared() -> None:
    declared = {r.name.lower() for r in required()} | {r.name.lower() for rs in extras().values() for r in rs}
    programs = ("benchmarks/", "examples/", "tools/")
    scripts = {p.split("/")[-1].removesuffix(".py") for p in project_files(".py") if p.startswith(programs)}
    missing = undeclared((*programs, "tests/"), declared, scripts | {"tests", "tools", "examples"})
    assert not missing, "add these to setup.py"


def test_every_dependency_has_a_lower_bound() -> None:
    for requirement in [*required(), *(r for rs in extras().values() for r in rs)]:
        if requirement.name != "megatron-ross":
            assert any(s.operator == ">=" for s in requirement.specifier), f"{requirement} has no lower bound"


def test_lowest_requirements_are_the_lower_bounds() -> None:
    """`make test-lowest` installs LOWEST: it must be what setup.py promises. torch is chosen by tools/setup_venv.sh."""
    bounds = {
        r.name: next(s.version for s in r.specifier if s.operator == ">=")
        for r in [*required(), *extras()["quickstart"], *extras()["gpu"]]
        if r.name != "torch"
    }
    pins = dict(line.split("==") for line in LOWEST.read_text().splitlines() if line and not line.startswith("#"))
    assert pins == bounds
