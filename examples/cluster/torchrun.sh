#!/bin/bash
# Train on several machines without a scheduler. Run on every machine, each with its own NODE_RANK:
#
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 examples/cluster/torchrun.sh --config examples/shared/stage1.yaml \
#       --config examples/ross/pretrain_siglip_qwen2.yaml --config examples/layouts/8xh100-stage1.yaml
#
# Run it from the repository's root with its environment active. All arguments go to pretrain_ross.py. TERM or USR1 to
# this script on any machine saves a checkpoint and ends the run on all of them with exit code 0; start it again with the
# same arguments to go on, if the recipe sets `load` to the same folder as `save` (all recipes here do).

set -u

: "${NNODES:?number of machines}" "${NODE_RANK:?0 .. NNODES-1, different on every machine}"
: "${MASTER_ADDR:?address of the machine with NODE_RANK 0}"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1} # lets tensor-parallel communication overlap

# The ranks get the signal, not torchrun, which would kill them before they have saved.
trap 'pkill -USR1 -P "$launcher"' TERM USR1

torchrun --nnodes "$NNODES" --node-rank "$NODE_RANK" --nproc-per-node "${GPUS_PER_NODE:-8}" \
    --master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-29500}" pretrain_ross.py "$@" &
launcher=$!

wait "$launcher" # a trapped signal ends this wait early
code=$?
while kill -0 "$launcher" 2>/dev/null; do
    wait "$launcher"
    code=$?
done
exit "$code"
