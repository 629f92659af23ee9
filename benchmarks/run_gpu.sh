#!/bin/sh
# All GPU tests and benchmarks on one offline host with one GPU, in under nine minutes; one folder of results.
#
#   benchmarks/run_gpu.sh                       # results in runs/gpu
#   benchmarks/run_gpu.sh results-h100          # results there
#   benchmarks/run_gpu.sh --dry-run results     # on a CPU: tiny sizes, to see that every part starts
#
# Every part has a budget in seconds and is ended when it is spent; a part that fails does not stop the others. Each
# leaves NAME.log, and a benchmark its JSON. summary.txt says how every part went. Exit code: 0, or 1 if a part failed.
#
# PYTHON is the interpreter (default python3). WHEELS names a folder of wheels that the host lacks, from `pip download`;
# they are put before its packages, for this run only. PARTS replaces the table below: lines of "name budget command",
# which see OUT and PYTHON. TOTAL is the budget of all of them (default 530 s): what is left bounds every part.
set -u

dry_run=
if [ "${1:-}" = --dry-run ]; then
    dry_run=yes
    shift
fi
cd "$(dirname "$0")/.." || exit 2
OUT=${1:-runs/gpu}
PYTHON=${PYTHON:-python3}
TOTAL=${TOTAL:-530}
PYTHONPATH=$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
if [ -n "${WHEELS:-}" ]; then PYTHONPATH=$site:$PYTHONPATH; fi
# TransformerEngine compiles some kernels when it first needs them, and does not always find CUDA's headers itself.
export NVTE_FRAMEWORK="${NVTE_FRAMEWORK:-pytorch}"
if [ -z "${NVTE_CUDA_INCLUDE_DIR:-}" ] && [ -d "${CUDA_HOME:-/usr/local/cuda}/include" ]; then
    export NVTE_CUDA_INCLUDE_DIR="${CUDA_HOME:-/usr/local/cuda}/include"
fi
export OUT PYTHON PYTHONPATH PYTHONWARNINGS=ignore HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

if [ -z "${PARTS:-}" ]; then
    step="$PYTHON benchmarks/bench_step.py"
    tests="tests/kernels tests/distributed/test_gpu_features.py tests/distributed/test_gpu_runs.py tests/unit/data/test_dali_images.py"
    if [ -n "$dry_run" ]; then
        size="--size tiny --rounds 1 --memory false"
        PARTS="
environment 20 $PYTHON -c 'import sys; sys.path.insert(0, \"benchmarks\"); from environment import environment; print(environment())'
kernels 120 $PYTHON benchmarks/bench_kernels.py --dry-run --dtypes [fp32] --json $OUT/kernels.json
step-1 60 $step $size --stages [1] --json $OUT/step-1.json
step-2 60 $step $size --stages [2] --json $OUT/step-2.json"
    else
        size="--size gpu --dtype bf16 --tf32 true --rounds 3 --max_seconds 30"
        deep="$step $size --stages [2] --num_layers 8 --rows [ours]"
        PARTS="
environment 10 nvidia-smi && $PYTHON -m pip list
step-1 75 $step $size --stages [1] --rows [ours,peer] --micro_batch_size 4 --json $OUT/step-1.json
step-2 60 $step $size --stages [2] --num_layers 2 --rows [ours,peer] --micro_batch_size 4 --json $OUT/step-2.json
step-2-deep 55 $deep --json $OUT/step-2-deep.json
step-2-fp8 55 $deep --settings '{fp8: hybrid}' --json $OUT/step-2-fp8.json
kernels 60 $PYTHON benchmarks/bench_kernels.py --json $OUT/kernels.json
tests 120 $PYTHON -m pytest -q -n 6 -m gpu -p no:cacheprovider $tests
data 45 $PYTHON benchmarks/bench_data.py --num_workers 8 --rounds 2 --json $OUT/data.json"
    fi
    if [ -n "${WHEELS:-}" ]; then
        # All in one command: a second one would replace folders that several wheels share.
        PARTS="install 40 $PYTHON -m pip install -q --no-index --no-deps --no-compile --target $site '$WHEELS'/*.whl
$PARTS"
    fi
    PARTS="$PARTS
tables 10 $PYTHON benchmarks/results_table.py $OUT"
fi

mkdir -p "$OUT"
: >"$OUT/summary.txt"
begin=$(date +%s)
failed=0

say() {
    echo "$1" | tee -a "$OUT/summary.txt"
}

# run NAME BUDGET COMMAND: at most BUDGET seconds, and no more than what is left of TOTAL.
run() {
    left=$((TOTAL - $(date +%s) + begin))
    limit=$(($2 < left ? $2 : left))
    if [ "$limit" -le 0 ]; then
        say "$1: not started, the total of $TOTAL s is spent"
        failed=1
        return
    fi
    started=$(date +%s)
    # A part that ignores the request to end is killed.
    timeout --kill-after=5 "$limit" sh -c "$3" >"$OUT/$1.log" 2>&1 </dev/null
    code=$?
    took=$(($(date +%s) - started))
    case $code in
        0) say "$1: ok, $took s" ;;
        124 | 137) say "$1: ended after its $limit s" && failed=1 ;;
        *) say "$1: failed with exit code $code after $took s, see $1.log" && failed=1 ;;
    esac
}

parts=$site.parts
trap 'rm -rf "$site" "$parts"' EXIT
printf '%s\n' "$PARTS" | grep -v '^ *$' >"$parts"
while read -r name budget command; do
    run "$name" "$budget" "$command"
done <"$parts"
say "total: $(($(date +%s) - begin)) s, exit code $failed"
exit "$failed"
