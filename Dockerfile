# syntax=docker/dockerfile:1
#
# Megatron-Ross for NVIDIA GPUs: CUDA 13, Python 3.12, Megatron Core 0.19, TransformerEngine, DALI, Triton.
#
#   docker build -t megatron-ross .
#   docker run --gpus all --ipc=host --ulimit memlock=-1 -v "$PWD:/data" megatron-ross \
#       torchrun --nproc-per-node 8 pretrain_ross.py --config examples/shared/stage2.yaml ...
#
# Not built by the project's own CI, which has no Docker engine: the file is linted, and its versions are held to setup.py
# by tests/guard/test_dockerfile.py.

ARG CUDA=13.0.1
ARG UBUNTU=24.04

# --- build: compiles TransformerEngine's PyTorch extension, which is published as source only ---------------------------
FROM nvidia/cuda:${CUDA}-devel-ubuntu${UBUNTU} AS build

SHELL ["/bin/bash", "-o", "pipefail", "-c"]
ENV DEBIAN_FRONTEND=noninteractive PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ git python3.12 python3.12-dev python3.12-venv \
    && rm -rf /var/lib/apt/lists/*

RUN python3.12 -m venv /venv
ENV PATH=/venv/bin:${PATH}

# Each on its own layer: torch is the largest and changes least.
ARG TORCH=2.11.0
RUN pip install "torch==${TORCH}" "setuptools==80.9.0" "wheel==0.45.1" "ninja==1.13.0" "packaging==25.0"

# The headers of cuSPARSE, cuDNN and NCCL come with torch's own dependencies. NVTE_WITH_NCCL_EP needs an NCCL newer than
# torch's.
ARG TRANSFORMER_ENGINE=2.20.2
ARG MAX_JOBS=8
RUN SITE="$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" \
    && export CUDA_HOME=/usr/local/cuda NVTE_FRAMEWORK=pytorch NVTE_PYTORCH_FORCE_BUILD=TRUE NVTE_WITH_NCCL_EP=0 \
        CPATH="${SITE}/nvidia/cu13/include:${SITE}/nvidia/cudnn/include:${SITE}/nvidia/nccl/include" \
    && pip install --no-build-isolation "transformer-engine[core_cu13,pytorch]==${TRANSFORMER_ENGINE}"

ARG MEGATRON_CORE=0.19.2
ARG DALI=2.4.0
RUN pip install "torch==${TORCH}" "megatron-core==${MEGATRON_CORE}" "nvidia-dali-cuda130==${DALI}"

WORKDIR /app
COPY setup.py pyproject.toml README.md LICENSE ./
COPY megatron_ross megatron_ross
COPY kernels kernels
COPY examples examples
# hadolint ignore=DL3013
RUN pip install "torch==${TORCH}" ".[gpu,dali]"

# --- run: no CUDA toolkit, only what Triton needs to compile a kernel at first use ---------------------------------------
FROM nvidia/cuda:${CUDA}-base-ubuntu${UBUNTU} AS run

# hadolint ignore=DL3008
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        gcc libc6-dev python3.12 python3.12-dev \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 ross

COPY --from=build /venv /venv
COPY --chown=ross:ross examples /app/examples
COPY --chown=ross:ross tools /app/tools
COPY --chown=ross:ross pretrain_ross.py /app/

# TransformerEngine compiles some kernels at first use, against the headers that came with torch; video: DALI's decoders.
ENV PATH=/venv/bin:${PATH} \
    NVTE_CUDA_INCLUDE_DIR=/venv/lib/python3.12/site-packages/nvidia/cu13/include \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility,video

USER 10001
WORKDIR /app
CMD ["python", "pretrain_ross.py", "--help"]
