#!/bin/bash
#SBATCH --job-name=moellava-preferences
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --output=slurm-%x-%j.out
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
#SBATCH --requeue

# Stage 4: train a model on pairs of answers, one of them preferred (RLHF-V, LLaVA-RLHF, MMPR, or rows of make-preferences).
#
#   bash examples/train_preferences.sh                              check everything, then submit
#   sbatch --nodes=2 examples/train_preferences.sh                submit as it is; the job checks before it starts
#   BACKBONE=llama-2-7b bash examples/train_preferences.sh preference.beta=0.2
#
# Every setting below can come from the environment; the recipe's hyperparameters are in examples/recipes/preferences.yaml.
set -euo pipefail
REPO="${REPO:-${SLURM_SUBMIT_DIR:-$(cd "$(dirname "$0")/.." && pwd)}}"
SCRIPT="$REPO/examples/train_preferences.sh"

BACKBONE="${BACKBONE:-phi-2}"
TOWER="${TOWER:-clip-vit-large-patch14-336}"
RUNS="${RUNS:-$REPO/runs/$BACKBONE}"
LOAD="${LOAD-$RUNS/stage3}"                            # the model that it starts from, and its reference
SAVE="${SAVE:-$RUNS/preferences}"                       # holds a checkpoint already? Then the run continues from it
TOKENIZER="${TOKENIZER:-$REPO/models/$BACKBONE}"        # folder with the Hugging Face tokenizer
DATA="${DATA:-$REPO/data/RLHF-V-Dataset.parquet}"       # rows of preferences, separated by colons
IMAGES="${IMAGES:-$REPO/data}"                          # image paths in them are relative to this
CONFIG="${CONFIG:-$REPO/examples/recipes/preferences.yaml}"
export REPO

# shellcheck source=examples/slurm/job.sh
source "$REPO/examples/slurm/job.sh"
IFS=: read -ra data <<<"$DATA"
run_stage --stage 4 --backbone "$BACKBONE" --tower "$TOWER" --data "${data[@]}" --image-folder "$IMAGES" \
    --load "$LOAD" --save "$SAVE" --config "$CONFIG" data.tokenizer="$TOKENIZER" "${OVERRIDES[@]}"
