#!/bin/bash
#SBATCH --job-name=moellava-teacher
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --output=slurm-%x-%j.out
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
#SBATCH --requeue

# Write a teacher's logits for examples/train_distil.sh: one pass of a trained model over the student's rows, which goes on
# where it stopped.
#
#   LOAD=runs/vicuna-7b/stage3 bash examples/make_teacher.sh        check everything, then submit
#   LOAD=runs/vicuna-7b/stage3 bash examples/make_teacher.sh parallel.tensor_model_parallel_size=2
#
# Every setting below can come from the environment. CONFIG is the student's: rows, template and limits must be the same.
set -euo pipefail
REPO="${REPO:-${SLURM_SUBMIT_DIR:-$(cd "$(dirname "$0")/.." && pwd)}}"
SCRIPT="$REPO/examples/make_teacher.sh"
PROGRAM=make_teacher.py

BACKBONE="${BACKBONE:-phi-2}"                           # of the student
RUNS="${RUNS:-$REPO/runs/$BACKBONE}"
LOAD="${LOAD-$RUNS/teacher}"                           # the teacher's checkpoint; its tokenizer must be the student's
SAVE="${SAVE:-$RUNS/teacher_logits}"                    # holds some already? Then the rest is written
TOP_K="${TOP_K:-32}"                                    # tokens at each label; all others are one number
TOKENIZER="${TOKENIZER:-$REPO/models/$BACKBONE}"        # folder with the Hugging Face tokenizer
DATA="${DATA:-$REPO/data/llava_image_tune_.json:$REPO/data/nlp_tune.json}" # LLaVA JSON files, separated by colons
IMAGES="${IMAGES:-$REPO/data}"                          # image paths in them are relative to this
CONFIG="${CONFIG:-$REPO/examples/recipes/distil.yaml}"
export REPO

# shellcheck source=examples/slurm/job.sh
source "$REPO/examples/slurm/job.sh"
newest_checkpoint() { find "$SAVE" -name 'rows-*.safetensors' 2>/dev/null | wc -l; } # what another attempt would go on from
IFS=: read -ra data <<<"$DATA"
run_stage --load "$LOAD" --save "$SAVE" --top-k "$TOP_K" --data "${data[@]}" --image-folder "$IMAGES" --config "$CONFIG" \
    data.tokenizer="$TOKENIZER" "${OVERRIDES[@]}"
