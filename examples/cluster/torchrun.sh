#!/bin/bash
# Train on several machines without a scheduler. Run on all, with NODE_RANK 0 on MASTER_ADDR and 1, 2, .. elsewhere:
#
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 examples/cluster/torchrun.sh --config examples/shared/stage1.yaml \
#       --config examples/ross/pretrain_siglip_qwen2.yaml --config examples/layouts/8xh100-stage1.yaml
#
# Run it from the repository's root with its environment active. All arguments go to pretrain_ross.py; the recipe must
# set `load` to the same folder as `save` (all recipes here do), on storage that all machines share.
#
# Loss of a machine or of a rank: the others wait JOIN_TIMEOUT seconds for it. Start this script there again, or on
# another machine with that NODE_RANK, and all go on from the last checkpoint. A machine takes part in MAX_RESTARTS
# such restarts; a mistake in the recipe is tried that often, too. Machine 0 holds the rendezvous: when it is lost, the
# script ends on all machines with an error, and is to be started on all of them again.
#
# TERM or USR1 to this script on any machine saves a checkpoint and ends the run on all of them with exit code 0; start
# it again to go on. While it waits for other machines there is nothing to save: it just ends, with another code.

set -u

: "${NNODES:?number of machines}" "${NODE_RANK:?0 on the machine MASTER_ADDR, 1, 2, .. on the others}"
: "${MASTER_ADDR:?address of the machine with NODE_RANK 0}"
MASTER_PORT=${MASTER_PORT:-29500}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1} # lets tensor-parallel communication overlap
# Ranks meet in a new store after every restart: torchrun's own would give them the addresses of the last attempt.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

case $NNODES in *[!0-9]*)
    echo "error: NNODES=$NNODES: give one number; a run does not change its size while it goes on" >&2
    exit 2
    ;;
esac
[ "$NODE_RANK" = 0 ] && is_host=true || is_host=false
rendezvous=is_host=$is_host,join_timeout=${JOIN_TIMEOUT:-1800} # seconds to wait for a lost machine, and at the start
rendezvous+=,read_timeout=${STORE_TIMEOUT:-300}                # seconds to wait for an answer of machine 0

stopping=false asked=" "
trap stopping=true TERM USR1

torchrun --nnodes "$NNODES" --nproc-per-node "${GPUS_PER_NODE:-8}" --max-restarts "${MAX_RESTARTS:-5}" \
    --rdzv-backend c10d --rdzv-endpoint "$MASTER_ADDR:$MASTER_PORT" --rdzv-id "${RUN_ID:-megatron-ross}" \
    --rdzv-conf "$rendezvous" --local-addr "${LOCAL_ADDR:-}" pretrain_ross.py "$@" &
launcher=$!

# Each rank gets the signal once, as soon as it catches it (bit 10 of SigCgt): before that it would die of it and be
# restarted. torchrun does not get it: it would kill the ranks before they have saved.
ask_ranks_to_save() {
    local rank="" caught
    for rank in $(pgrep -P "$launcher"); do
        caught=$(sed -n 's/^SigCgt:[[:space:]]*//p' "/proc/$rank/status" 2>/dev/null)
        if [[ $asked != *" $rank "* ]] && ((0x0$caught >> 9 & 1)); then
            kill -USR1 "$rank" && asked+="$rank "
        fi
    done
    if [ -z "$rank" ] && [ "$asked" = " " ]; then
        kill -TERM "$launcher" # it waits for other machines
    fi
}

[ "$stopping" = true ] || wait "$launcher" # a trapped signal ends this wait early
while kill -0 "$launcher" 2>/dev/null; do
    ask_ranks_to_save
    sleep 0.5
done
wait "$launcher"
code=$?

# shellcheck disable=SC2016  # the parameters are those of the inner shell
if [ "$code" -ne 0 ] && [ "$is_host" = false ] &&
    ! timeout 5 bash -c ': <"/dev/tcp/$1/$2"' connect "$MASTER_ADDR" "$MASTER_PORT" 2>/dev/null; then
    echo "error: machine 0 ($MASTER_ADDR:$MASTER_PORT) has ended or cannot be reached; start this script again on all" \
        "machines, and the run goes on from its last checkpoint" >&2
fi
exit "$code"
