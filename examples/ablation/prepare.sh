#!/usr/bin/env bash
# Everything that the runs of ablation.yaml have in common: data, toy components, cached VAE latents.
#
#   PYTHON=.venv/bin/python bash examples/ablation/prepare.sh
set -euo pipefail
cd "$(dirname "$0")/../.."

python="${PYTHON:-python}"
run=runs/ablation
parts="$run/components"

"$python" examples/quickstart/make_data.py --output "$run/pretraining"
"$python" examples/ablation/make_details.py --output "$run/data" --subset '[1000]'

# Each takes one core for minutes; `wait` passes on the failure of any.
"$python" examples/quickstart/toy_llm.py --output "$parts/llm" & llm=$!
"$python" examples/quickstart/toy_vae.py --data "$run/pretraining" --output "$parts/vae" & vae=$!
"$python" examples/quickstart/toy_tower.py --data "$run/data" --output "$parts/vision_tower" & tower=$!
wait "$llm"
wait "$vae"
wait "$tower"

# The cache is for one VAE and one image size; any checkpoint that has them will do.
"$python" tools/convert_hf_to_megatron.py --llm "$parts/llm" --vision-tower "$parts/vision_tower" --vae "$parts/vae" \
    --denoiser-type denoiser_vit3x --denoiser-width 96 --output "$run/megatron"
"$python" tools/cache_latents.py --config examples/ablation/train.yaml --init-from "$run/megatron" \
    --latent-cache "$run/latents" --processes 2
