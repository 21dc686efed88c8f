#!/bin/bash
#SBATCH --job-name=moellava-ablation
#SBATCH --array=0-6
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --output=slurm-%x-%A_%a.out
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
#SBATCH --requeue

# The paper's ablations of stage 3 (tables 5 to 7), one array task each: upcycle the stage-2 checkpoint, then train.
# The variants are the cells of a grid file; `python tools/ablate.py examples/ablations/cluster/stage3.yaml --list` numbers them.
#
#   sbatch examples/ablations.sh
#   BACKBONE=qwen-1.8b sbatch --array=0,4 examples/ablations.sh training.train_steps=1000
#   GRID=my_grid.yaml sbatch --array=0-11 examples/ablations.sh
set -euo pipefail
REPO="${REPO:-${SLURM_SUBMIT_DIR:-$(cd "$(dirname "$0")/.." && pwd)}}"
BACKBONE="${BACKBONE:-phi-2}"
RUNS="${RUNS:-$REPO/runs/$BACKBONE}"
STAGE2="${STAGE2:-$RUNS/stage2}"
GRID="${GRID:-$REPO/examples/ablations/cluster/stage3.yaml}"

[ -n "${SLURM_ARRAY_TASK_ID:-}" ] || { echo "an array job: submit it with sbatch $0" >&2 && exit 2; }
cell=$("${PYTHON:-python3}" "$REPO/tools/ablate.py" "$GRID" --shell "$SLURM_ARRAY_TASK_ID")
eval "$cell" # NAME, and the arrays UPCYCLE and SETTINGS
echo "Ablation $SLURM_ARRAY_TASK_ID: $NAME (${UPCYCLE[*]})"
SAVE="$RUNS/ablations/$NAME/stage3"
LOAD="$RUNS/ablations/$NAME/upcycled"
# The settings in the recipe would win over those in the checkpoint.
set -- "${SETTINGS[@]}" "$@"

bash "$REPO/examples/convert.sh" upcycle "$STAGE2" --save "$LOAD" "${UPCYCLE[@]}"
# shellcheck source=examples/train_stage3.sh
source "$REPO/examples/train_stage3.sh"
