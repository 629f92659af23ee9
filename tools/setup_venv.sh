#!/bin/sh
# Create or complete the virtual environment VENV with interpreter PYTHON; the Makefile calls this.
#
#   tools/setup_venv.sh PYTHON VENV
#
# Environment: TORCH            what to install as torch, e.g. "torch==2.11.0" (default: see install_torch)
#              TORCH_INDEX_URL  extra package index that offers CPU builds of torch
#              EXTRAS           extras of setup.py to install (default: dev; dev,gpu on a host with a CUDA GPU);
#                               with eval, lmms-eval is installed, too
#              CONSTRAINTS      pip constraints file
#              PIP_*            are honoured by pip itself
set -eu

CPU_TORCH=2.13.0
LMMS_EVAL=0.7.3
python=$1
venv=$2

fail() { echo "error: $*" >&2; exit 1; }
note() { echo "note: $*" >&2; }

check_python() {
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) ||
        fail "cannot run PYTHON=$python: install Python 3.11 or newer, or name it, e.g. make test PYTHON=python3.12"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        fail "Python 3.11 or newer is needed, but PYTHON=$python is $version: name a newer one, e.g. make test PYTHON=python3.12"
    "$python" -c 'import venv, ensurepip' 2>/dev/null ||
        fail "PYTHON=$python cannot create virtual environments: install its venv module (Debian, Ubuntu: python$version-venv)"
}

has_gpu() { nvidia-smi -L 2>/dev/null | grep -q '^GPU '; }

# Errors only: with several indexes configured pip warns about each package that one of them lacks.
pip_install() { "$venv/bin/python" -m pip install --disable-pip-version-check -qq "$@"; }

# torch comes first and alone, so that nothing else can choose a build. Without a GPU it is one pinned version, as the
# CPU build ("+cpu") if any configured index or folder offers it, else as the registry's default build, which also runs.
install_torch() {
    if [ -n "${TORCH_INDEX_URL:-}" ]; then set -- --extra-index-url "$TORCH_INDEX_URL"; else set --; fi
    if [ -n "${TORCH:-}" ]; then
        pip_install "$@" "$TORCH"
    elif has_gpu; then
        pip_install "$@" "torch>=2.11,<3"
    elif ! pip_install "$@" "torch==$CPU_TORCH+cpu" 2>/dev/null; then
        note "no CPU build of torch $CPU_TORCH found, installing the default build (gigabytes);" \
            "TORCH_INDEX_URL can name an index with CPU builds"
        pip_install "$@" "torch==$CPU_TORCH"
    fi
}

# Everything else, with torch held at the build just installed.
install_project() {
    if has_gpu; then extras=${EXTRAS:-dev,gpu}; else extras=${EXTRAS:-dev}; fi
    held="$venv/torch-constraint.txt"
    "$venv/bin/python" -m pip freeze --disable-pip-version-check | grep '^torch==' >"$held"
    set -- --constraint "$held"
    if [ -n "${CONSTRAINTS:-}" ]; then set -- "$@" --constraint "$CONSTRAINTS"; fi
    pip_install "$@" --editable ".[$extras]"
    # Without its dependencies: they hold torchvision builds that need CUDA, and video libraries no task here uses.
    case ",$extras," in *,eval,*) pip_install --no-deps "lmms_eval==$LMMS_EVAL" ;; esac
    if has_gpu && ! pip_install "$@" --no-build-isolation --editable ".[te]"; then
        note "TransformerEngine could not be installed; training will use Megatron's local layers"
    fi
}

report() {
    "$venv/bin/python" - <<'PY'
from importlib.metadata import version
import torch

kind = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"
device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "no GPU"
print(f"installed: torch {torch.__version__} ({kind} build, {device}), megatron-core {version('megatron-core')}")
PY
}

check_python
echo "preparing $venv with Python $version; this takes a few minutes, once"
# An environment without a working pip is one whose creation was interrupted.
"$venv/bin/python" -m pip --version >/dev/null 2>&1 || "$python" -m venv --clear "$venv" ||
    fail "could not create $venv with $python"
pip_install --upgrade pip "setuptools>=77" wheel
echo "  1/2 torch"
install_torch
echo "  2/2 megatron-ross and its dependencies"
install_project
report
