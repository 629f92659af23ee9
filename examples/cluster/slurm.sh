#!/bin/bash
# Train on a Slurm cluster, one task per GPU; continues by itself after preemption and at the end of its time.
#
#   sbatch --nodes 8 examples/cluster/slurm.sh --config examples/shared/stage2.yaml \
#       --config examples/ross/finetune_siglip_qwen2.yaml --config examples/layouts/64xh100-stage2.yaml
#
# Submit from the repository's root with its environment active. All arguments go to pretrain_ross.py; the recipe must
# set `load` to the same folder as `save`. Five minutes before the time is up Slurm sends USR1 here: it is passed on, the
# trainer saves and exits 0, and the job is queued again. Preemption sends TERM to the ranks, with the same effect, and
# Slurm requeues the job itself; give the partition a GraceTime longer than a checkpoint takes.
#
# Slurm also requeues the job itself when a node fails. When a rank dies on a node that lives, all ranks are ended, and
# the job is queued again from its last checkpoint, MAX_RETRIES times in its life (counted in RETRIES_FILE): but only if
# it had run RETRY_AFTER_S seconds, because what fails sooner is a mistake that would fail again.

#SBATCH --job-name=megatron-ross
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
#SBATCH --signal=B:USR1@300

set -u

export MASTER_ADDR MASTER_PORT
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((10000 + SLURM_JOB_ID % 50000))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1} # lets tensor-parallel communication overlap

out_of_time=false
trap 'out_of_time=true; kill -USR1 "$ranks"' USR1

# shellcheck disable=SC2016  # the variables are those of the tasks
srun --kill-on-bad-exit=1 bash -c \
    'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS exec python pretrain_ross.py "$@"' ranks "$@" &
ranks=$!

wait "$ranks" # a trapped signal ends this wait early
code=$?
while kill -0 "$ranks" 2>/dev/null; do
    wait "$ranks"
    code=$?
done

retries=${RETRIES_FILE:-slurm-$SLURM_JOB_ID.retries} # a line for each
if [ "$code" -eq 0 ]; then
    if [ "$out_of_time" = true ]; then
        scontrol requeue "$SLURM_JOB_ID"
    fi
elif [ "$SECONDS" -ge "${RETRY_AFTER_S:-600}" ]; then
    touch "$retries"
    if [ "$(wc -l <"$retries")" -lt "${MAX_RETRIES:-3}" ]; then
        echo "$(date): ended with code $code after $SECONDS s; queued again" | tee -a "$retries" >&2
        scontrol requeue "$SLURM_JOB_ID"
    else
        echo "error: ended with code $code, and $retries counts ${MAX_RETRIES:-3} retries already; find the cause in" \
            "the log and submit again" >&2
    fi
fi
exit "$code"
