#!/bin/sh
# Train a published recipe on a known cluster, from the repository's root with its environment active:
#
#   examples/run.sh ross/finetune_siglip_qwen2 8xh100
#   examples/run.sh ross/finetune_siglip_qwen2 8xh100 --config examples/shared/stage2_packed.yaml --lr 1e-5
#   NNODES=8 NODE_RANK=0 MASTER_ADDR=10.0.0.1 examples/run.sh ross/finetune_siglip_qwen2 64xh100
#
# RECIPE is a file of examples/ross, examples/llava or examples/images, CLUSTER one of examples/layouts. What follows goes to
# pretrain_ross.py and overrides both. With NNODES set, examples/cluster/torchrun.sh starts the run (its variables hold).
set -eu

fail() {
    echo "error: $*" >&2
    exit 2
}

[ $# -ge 2 ] || fail "usage: examples/run.sh RECIPE CLUSTER [OPTION...], e.g. ross/finetune_siglip_qwen2 8xh100"
recipe=examples/$1.yaml
cluster=$2
case $1 in
*/pretrain_*) stage=stage1 shared=stage1 ;;
*/finetune_*) stage=stage2 shared=stage2 ;;
images/tune_*) stage=stage1 shared=images ;; # nothing of the frozen language model is kept, as in stage 1
*) fail "recipe $1: name a file of examples/ross or examples/llava, or of examples/images, e.g. ross/finetune_siglip_qwen2" ;;
esac
layout=examples/layouts/$cluster-$stage.yaml
[ -f "$recipe" ] || fail "no recipe $recipe (run this from the repository's root)"
[ -f "$layout" ] || fail "no layout $layout; examples/layouts has 8xa100-80g, 8xh100 and 64xh100"
shift 2

set -- --config "examples/shared/$shared.yaml" --config "$recipe" --config "$layout" "$@"
if [ -n "${NNODES:-}" ]; then
    exec examples/cluster/torchrun.sh "$@"
fi
[ "${cluster#8x}" != "$cluster" ] || fail "$cluster has several machines: set NNODES, NODE_RANK and MASTER_ADDR"
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}" # lets tensor-parallel communication overlap
exec torchrun --standalone --nproc-per-node "${GPUS_PER_NODE:-8}" pretrain_ross.py "$@"
