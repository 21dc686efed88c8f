#!/bin/bash
#SBATCH --job-name=moellava-stage2
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --output=slurm-%x-%j.out
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
#SBATCH --requeue

# Stage 2: train projector and language model on multi-modal instructions (Hybrid-FT, 964k).
#
#   bash examples/train_stage2.sh                            check everything, then submit
#   sbatch --nodes=2 examples/train_stage2.sh                submit as it is; the job checks before it starts
#   BACKBONE=llama-2-7b bash examples/train_stage2.sh optimizer.lr=1e-5
#
# Every setting below can come from the environment; the recipe's hyperparameters are in examples/recipes/stage2.yaml.
set -euo pipefail
REPO="${REPO:-${SLURM_SUBMIT_DIR:-$(cd "$(dirname "$0")/.." && pwd)}}"
SCRIPT="$REPO/examples/train_stage2.sh"

BACKBONE="${BACKBONE:-phi-2}"
TOWER="${TOWER:-clip-vit-large-patch14-336}"
RUNS="${RUNS:-$REPO/runs/$BACKBONE}"
LOAD="${LOAD-$RUNS/stage1}"
SAVE="${SAVE:-$RUNS/stage2}"                            # holds a checkpoint already? Then the run continues from it
TOKENIZER="${TOKENIZER:-$REPO/models/$BACKBONE}"        # folder with the Hugging Face tokenizer
IMAGES="${IMAGES:-$REPO/data}"                          # image paths in the JSON files are relative to this
CONFIG="${CONFIG:-$REPO/examples/recipes/stage2.yaml}"
# LLaVA JSON files, separated by colons
HYBRID_FT="$REPO/data/la_tune_256k.json:$REPO/data/lrv_tune_331k.json:$REPO/data/lvis_tune_220k_.json"
HYBRID_FT="$HYBRID_FT:$REPO/data/svit_tune_157k.json:$REPO/data/nlp_tune.json"
DATA="${DATA:-$HYBRID_FT}"
export REPO

# shellcheck source=examples/slurm/job.sh
source "$REPO/examples/slurm/job.sh"
IFS=: read -ra data <<<"$DATA"
run_stage --stage 2 --backbone "$BACKBONE" --tower "$TOWER" --data "${data[@]}" --image-folder "$IMAGES" \
    --load "$LOAD" --save "$SAVE" --config "$CONFIG" data.tokenizer="$TOKENIZER" "${OVERRIDES[@]}"
