#!/bin/bash
#SBATCH --job-name=moellava-distil
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --output=slurm-%x-%j.out
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
#SBATCH --requeue

# Train stage 3 (or 2) from a teacher's logits, which examples/make_teacher.sh writes before.
#
#   bash examples/train_distil.sh                              check everything, then submit
#   sbatch --nodes=2 examples/train_distil.sh                submit as it is; the job checks before it starts
#   BACKBONE=llama-2-7b bash examples/train_distil.sh training.distillation.weight=0.9
#
# Every setting below can come from the environment; the recipe's hyperparameters are in examples/recipes/distil.yaml.
set -euo pipefail
REPO="${REPO:-${SLURM_SUBMIT_DIR:-$(cd "$(dirname "$0")/.." && pwd)}}"
SCRIPT="$REPO/examples/train_distil.sh"

BACKBONE="${BACKBONE:-phi-2}"
TOWER="${TOWER:-clip-vit-large-patch14-336}"
RUNS="${RUNS:-$REPO/runs/$BACKBONE}"
LOAD="${LOAD-$RUNS/upcycled}"                          # what the stage starts from: with experts for stage 3
SAVE="${SAVE:-$RUNS/distilled}"                         # holds a checkpoint already? Then the run continues from it
LOGITS="${LOGITS:-$RUNS/teacher_logits}"                # what make_teacher.sh has written of DATA
STAGE="${STAGE:-3}"                                     # 2 for a dense student
TOKENIZER="${TOKENIZER:-$REPO/models/$BACKBONE}"        # folder with the Hugging Face tokenizer
DATA="${DATA:-$REPO/data/llava_image_tune_.json:$REPO/data/nlp_tune.json}" # LLaVA JSON files, separated by colons
IMAGES="${IMAGES:-$REPO/data}"                          # image paths in them are relative to this
CONFIG="${CONFIG:-$REPO/examples/recipes/distil.yaml}"
export REPO

# shellcheck source=examples/slurm/job.sh
source "$REPO/examples/slurm/job.sh"
IFS=: read -ra data <<<"$DATA"
run_stage --stage "$STAGE" --backbone "$BACKBONE" --tower "$TOWER" --data "${data[@]}" --image-folder "$IMAGES" \
    --load "$LOAD" --save "$SAVE" --config "$CONFIG" data.tokenizer="$TOKENIZER" \
    training.distillation.teacher_logits="$LOGITS" "${OVERRIDES[@]}"
