"""Packaging of Megatron-Ross: the packages `megatron_ross` and `ross_kernels`, and nothing else.

The folder `kernels/` has no `__init__.py` on purpose: Hugging Face publishes a package called `kernels` that
transformers imports, and a package of that name here would hide it.

Lower bounds are the oldest versions the tests pass with (`make test-lowest` installs exactly those); upper bounds
stand where a newer version is known, or by its own rules allowed, to break us.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def read_version() -> str:
    """Version from `megatron_ross/__init__.py`, read as text so that building needs no torch."""
    text = (ROOT / "megatron_ross" / "__init__.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE).group(1)


INSTALL_REQUIRES = [
    "torch>=2.11,<3",
    # Python 3.11 resolves 0.16.1; 0.17 and newer need Python 3.12. Each minor release moves internal interfaces.
    "megatron-core>=0.16.1,<0.20",
    "transformers>=5.17,<6",
    "huggingface-hub>=1.31,<3",
    "diffusers>=0.40,<1",
    "safetensors>=0.8",
    "fsspec>=2025.3",
    "tokenizers>=0.23.1",
    "sentencepiece>=0.2.1",
    "jinja2>=3.1.6",
    "jsonargparse[signatures]>=4.41,<5",
    "pyyaml>=6.0.2",
    "numpy>=2.1,<3",
    "pyarrow>=18",
    "pillow>=12",
    "matplotlib>=3.10",
    "tensorboard>=2.20",
    "tqdm>=4.67",
    "rich>=14",
    "psutil>=7",
    "packaging>=24.2",
]

EXTRAS_REQUIRE = {
    # Triton kernels; CUDA builds of torch bring the Triton they were built for.
    "gpu": ["triton>=3.6"],
    "flash-attn": ["flash-attn>=2.8"],
    "dali": ["nvidia-dali-cuda130>=2.4,<3"],
    "te": ["transformer-engine[core_cu13,pytorch]>=2.9,<3"],
    # From aiohttp on: what lmms-eval needs for pictures and text. It declares torchvision and video libraries, too, so
    # tools/setup_venv.sh adds it without its dependencies.
    "eval": [
        "accelerate>=1.15",
        "datasets>=5.2",
        "scikit-image>=0.25",
        "scipy>=1.15",
        "aiohttp>=3.11",
        "evaluate>=0.4.3",
        "filelock>=3.20,<4",  # lmms-eval 0.7.3 replaces parts of it that 4 has moved
        "loguru>=0.7",
        "pandas>=2.2",
        "pydantic>=2.10",
        "pytablewriter>=1.2",
        "pytz>=2024.2",
        "requests>=2.32",
        "sacrebleu>=2.4.3",
        "tenacity>=9",
    ],
    # Tests of other programs that load and serve exports: tools/setup_clients.sh adds vLLM and transformers 4.
    "clients": ["accelerate>=1.15", "pytest>=8.4", "transformers[serving]>=5.17,<6"],
    "wandb": ["wandb>=0.22"],
    # scikit-image and scipy: photographs and pictures. DALI decodes on CPU too.
    "quickstart": ["nvidia-dali-cuda130>=2.4,<3", "scikit-image>=0.25", "scipy>=1.15"],
    "dev": [
        "megatron-ross[quickstart]",
        "triton>=3.6; platform_system == 'Linux'",  # its interpreter runs the kernels on CPU
        "hypothesis>=6.140",
        "webdataset>=1.0",
        "mypy>=1.18",
        "pre-commit>=4.3",
        "pytest>=8.4",
        "pytest-xdist>=3.8",
        "ruff>=0.14",
        "setuptools>=77",
        "wheel>=0.45",
    ],
}

setup(
    name="megatron-ross",
    version=read_version(),
    description="Training for reconstructive visual instruction tuning (Ross) on Megatron Core",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8") if (ROOT / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    author="The Megatron-Ross authors",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=[
        *find_packages(include=["megatron_ross", "megatron_ross.*"]),
        *find_packages(where="kernels", include=["ross_kernels", "ross_kernels.*"]),
        "megatron_ross.recipes",
    ],
    # Recipes stay where people look for them, and are installed where `--config recipe:NAME` does (config/recipes.py).
    package_dir={"ross_kernels": "kernels/ross_kernels", "megatron_ross.recipes": "examples"},
    package_data={
        "megatron_ross": ["py.typed", "**/*.jinja", "**/*.json", "**/*.yaml"],
        "megatron_ross.recipes": [f"{folder}/*.yaml" for folder in ("ross", "llava", "images", "shared", "layouts")],
        "ross_kernels": ["py.typed"],
    },
    install_requires=INSTALL_REQUIRES,
    entry_points={
        "console_scripts": ["megatron-ross = megatron_ross.cli.main:main"],
        "lmms_eval.models": ["megatron_ross = megatron_ross.evaluation.lmms_eval.manifest:manifest"],
    },
    extras_require=EXTRAS_REQUIRE,
    classifiers=[
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
