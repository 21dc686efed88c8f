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
#
#   sbatch examples/ablations.sh
#   BACKBONE=qwen-1.8b sbatch --array=0,4 examples/ablations.sh training.train_steps=1000
set -euo pipefail
REPO="${REPO:-${SLURM_SUBMIT_DIR:-$(cd "$(dirname "$0")/.." && pwd)}}"
BACKBONE="${BACKBONE:-phi-2}"
RUNS="${RUNS:-$REPO/runs/$BACKBONE}"
STAGE2="${STAGE2:-$RUNS/stage2}"
#   name            experts  top-k  placement
ABLATIONS=(
    "interval       4        2      sparse" # the released models
    "first-half     4        2      first_half"
    "second-half    4        2      second_half"
    "all-layers     4        2      dense"
    "top-1          4        1      sparse"
    "two-experts    2        1      sparse"
    "one-expert     1        1      sparse"
)

[ -n "${SLURM_ARRAY_TASK_ID:-}" ] || { echo "an array job: submit it with sbatch $0" >&2 && exit 2; }
read -r name experts topk placement <<<"${ABLATIONS[SLURM_ARRAY_TASK_ID]}"
echo "Ablation $SLURM_ARRAY_TASK_ID: $name ($experts experts, top-$topk, $placement)"
SAVE="$RUNS/ablations/$name/stage3"
LOAD="$RUNS/ablations/$name/upcycled"
# The settings in the recipe would win over those in the checkpoint.
set -- "moe.num_experts=$experts" "moe.moe_router_topk=$topk" "moe.placement=$placement" "$@"

bash "$REPO/examples/convert.sh" upcycle "$STAGE2" --save "$LOAD" \
    --num-experts "$experts" --topk "$topk" --placement "$placement"
# shellcheck source=examples/train_stage3.sh
source "$REPO/examples/train_stage3.sh"
