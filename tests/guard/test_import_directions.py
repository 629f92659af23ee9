"""Imports go one way: a layer imports itself and the layers below it, and heavy packages stay where they belong.

The tables are the rule; docs/architecture.md shows the same order as a picture.
"""

from __future__ import annotations

import ast
import sys
from fnmatch import fnmatch

import pytest

from tests.helpers.sources import Import, imports_of, project_files

# Modules and packages of megatron_ross, lowest layer first.
LAYERS = [
    {"config", "platform", "compat", "programs", "text_files", "threads"},
    {"planner"},
    {"data"},
    {"parallel", "ops", "precision"},
    {"models", "losses"},
    {"checkpoint", "convert"},
    {"training", "huggingface", "evaluation"},
    {"parity"},
    {"cli"},
]

# Only the standard library, so that they run on a laptop without torch; exceptions by file.
STANDARD_LIBRARY_ONLY = {
    "megatron_ross/config/*": set(),
    "megatron_ross/planner/*": set(),
}
EXCEPTIONS = {
    "megatron_ross/config/cli.py": {"jsonargparse", "yaml"},
    "megatron_ross/config/yaml_safety.py": {"yaml"},
}

# Where a package may be imported; "nowhere" is an empty list. Longer names go first.
HEAVY = {
    "megatron.training": [],
    "megatron.core": ["megatron_ross/*", "pretrain_ross.py", "tools/*"],
    "torchvision": [],
    "timm": [],
    "apex": ["megatron_ross/training/adam.py"],
    "deepspeed": [],
    "diffusers": [
        "megatron_ross/models/latents.py",
        "megatron_ross/huggingface/*",
        "megatron_ross/convert/*",
        "megatron_ross/evaluation/*",
        "tools/*",
        "examples/*",
    ],
    "nvidia.dali": ["megatron_ross/data/dali_images.py"],
    "transformer_engine": ["megatron_ross/training/adam.py", "megatron_ross/training/user_buffers.py"],
    "flash_attn": ["megatron_ross/models/*"],
    "transformers": [
        "megatron_ross/data/*",
        "megatron_ross/models/vision.py",
        "megatron_ross/convert/*",
        "megatron_ross/huggingface/*",
        "megatron_ross/evaluation/*",
        "megatron_ross/parity/preprocessing.py",
        "megatron_ross/cli/*",
        "tools/*",
        "examples/*",
    ],
    "triton": ["kernels/*"],
    "ross_kernels": ["megatron_ross/ops.py", "kernels/*", "tools/*"],
    "skimage": ["megatron_ross/evaluation/*", "examples/*"],
    "wandb": ["megatron_ross/training/*"],
    "lmms_eval": ["megatron_ross/evaluation/lmms_eval/*"],
    "vlmeval": ["megatron_ross/evaluation/vlmevalkit/*"],
    "accelerate": ["megatron_ross/evaluation/lmms_eval/*"],
    "datasets": [],
    "pyarrow": ["megatron_ross/data/parquet.py", "megatron_ross/evaluation/builtin/*"],
}
# Data stays free of the engine: loaders run in worker processes that must start fast.
NO_ENGINE = ["megatron_ross/data/*", "kernels/*"]

PRODUCT = ("megatron_ross/", "kernels/", "tools/", "examples/", "pretrain_ross.py")


def product_imports() -> list[Import]:
    return [i for path in project_files(".py") if path.startswith(PRODUCT) for i in imports_of(path)]


def is_under(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def package_of(path: str) -> str:
    """`models` for megatron_ross/models/vision.py, `ops` for megatron_ross/ops.py, empty outside and for __init__."""
    parts = path.split("/")
    if parts[0] != "megatron_ross" or parts[1] == "__init__.py":
        return ""
    return parts[1].removesuffix(".py")


def layer_of(package: str) -> int:
    for number, layer in enumerate(LAYERS):
        if package in layer:
            return number
    raise LookupError(
        f"megatron_ross/{package} has no layer: add it to LAYERS in {__file__} and to docs/architecture.md"
    )


def internal_edges(imports: list[Import]) -> list[tuple[str, str, Import]]:
    """(importing package, imported package, where) between different packages of megatron_ross."""
    packages = {package_of(path) for path in project_files(".py") if path.startswith("megatron_ross/")} - {""}
    edges = []
    for found in imports:
        source = package_of(found.path)
        parts = found.module.split(".")
        if source and parts[0] == "megatron_ross" and len(parts) > 1 and parts[1] in packages - {source}:
            edges.append((source, parts[1], found))
    return edges


def upward(imports: list[Import]) -> list[str]:
    return [str(where) for source, target, where in internal_edges(imports) if layer_of(target) > layer_of(source)]


def misplaced_heavy(imports: list[Import]) -> list[str]:
    bad = []
    for found in imports:
        for package, allowed in HEAVY.items():
            if is_under(found.module, package) and not any(fnmatch(found.path, pattern) for pattern in allowed):
                bad.append(str(found))
    return bad


def cycle(edges: set[tuple[str, str]]) -> list[str]:
    """Packages left after taking away, again and again, those that no longer import or are imported."""
    while True:
        sources, targets = {source for source, _ in edges}, {target for _, target in edges}
        inner = {(source, target) for source, target in edges if source in targets and target in sources}
        if inner == edges:
            return sorted(sources)
        edges = inner


def test_every_package_has_a_layer() -> None:
    for path in project_files(".py"):
        if package_of(path):
            layer_of(package_of(path))


def test_layers_import_downwards() -> None:
    bad = upward(product_imports())
    assert not bad


def test_packages_have_no_cycle() -> None:
    packages = cycle({(source, target) for source, target, _ in internal_edges(product_imports())})
    assert not packages, "these packages import one another in a circle"


def test_nothing_imports_the_programs() -> None:
    programs = {"tools", "pretrain_ross", "tests", "examples"}
    bad = [str(i) for i in product_imports() if i.module.split(".")[0] in programs]
    assert not bad


def test_kernels_know_nothing_of_the_model() -> None:
    assert not [
        str(i) for i in product_imports() if i.path.startswith("kernels/") and is_under(i.module, "megatron_ross")
    ]


def test_heavy_packages_stay_where_they_belong() -> None:
    bad = misplaced_heavy(product_imports())
    assert not bad


def test_data_and_kernels_do_not_need_the_engine() -> None:
    engine = [i for i in product_imports() if is_under(i.module, "megatron.core")]
    bad = [str(i) for i in engine if any(fnmatch(i.path, pattern) for pattern in NO_ENGINE)]
    assert not bad


@pytest.mark.parametrize("pattern", STANDARD_LIBRARY_ONLY)
def test_standard_library_only(pattern: str) -> None:
    bad = []
    for found in product_imports():
        root = found.module.split(".")[0]
        allowed = root in sys.stdlib_module_names or root in EXCEPTIONS.get(found.path, set()) | {"megatron_ross"}
        if fnmatch(found.path, pattern) and not allowed:
            bad.append(str(found))
    assert not bad


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("megatron_ross/data/loader.py", "from megatron_ross.models import vision"),
        ("megatron_ross/data/loader.py", "def f():\n    from ..training.step import train_step"),
        ("megatron_ross/losses.py", "import megatron_ross.checkpoint.reader"),
    ],
)
def test_the_check_sees_upward_imports(path: str, source: str) -> None:
    assert upward(imports_of(path, ast.parse(source)))


def test_the_check_sees_heavy_imports_and_cycles() -> None:
    tree = ast.parse("from megatron import training\nfrom nvidia import dali\nimport torch")
    assert len(misplaced_heavy(imports_of("megatron_ross/models/vision.py", tree))) == 2
    assert cycle({("a", "b"), ("b", "c"), ("c", "b")}) == ["b", "c"]
    assert cycle({("a", "b"), ("b", "c"), ("a", "c")}) == []
