#!/bin/bash
#SBATCH --job-name=moellava-stage3
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --output=slurm-%x-%j.out
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
#SBATCH --requeue

# Stage 3: train experts, router, dense FFNs and projector on LLaVA-FT (mix 665k).
#
#   bash examples/train_stage3.sh                            check everything, then submit
#   sbatch --nodes=2 examples/train_stage3.sh                submit as it is; the job checks before it starts
#   BACKBONE=llama-2-7b bash examples/train_stage3.sh parallel.expert_model_parallel_size=4
#
# Every setting below can come from the environment; the recipe's hyperparameters are in examples/recipes/stage3.yaml.
set -euo pipefail
REPO="${REPO:-${SLURM_SUBMIT_DIR:-$(cd "$(dirname "$0")/.." && pwd)}}"
SCRIPT="$REPO/examples/train_stage3.sh"

BACKBONE="${BACKBONE:-phi-2}"
TOWER="${TOWER:-clip-vit-large-patch14-336}"
RUNS="${RUNS:-$REPO/runs/$BACKBONE}"
LOAD="${LOAD-$RUNS/upcycled}"                          # stage 2 with experts: tools/convert.py upcycle
SAVE="${SAVE:-$RUNS/stage3}"                            # holds a checkpoint already? Then the run continues from it
TOKENIZER="${TOKENIZER:-$REPO/models/$BACKBONE}"        # folder with the Hugging Face tokenizer
DATA="${DATA:-$REPO/data/llava_image_tune_.json:$REPO/data/nlp_tune.json}" # LLaVA JSON files, separated by colons
IMAGES="${IMAGES:-$REPO/data}"                          # image paths in them are relative to this
CONFIG="${CONFIG:-$REPO/examples/recipes/stage3.yaml}"
export REPO

# shellcheck source=examples/slurm/job.sh
source "$REPO/examples/slurm/job.sh"
IFS=: read -ra data <<<"$DATA"
run_stage --stage 3 --backbone "$BACKBONE" --tower "$TOWER" --data "${data[@]}" --image-folder "$IMAGES" \
    --load "$LOAD" --save "$SAVE" --config "$CONFIG" data.tokenizer="$TOKENIZER" "${OVERRIDES[@]}"
