#!/bin/bash
#SBATCH --job-name=moellava-convert
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=64G
#SBATCH --time=02:00:00
#SBATCH --output=slurm-%x-%j.out
#SBATCH --requeue

# tools/convert.py as a job without GPUs. A checkpoint that is already there is left alone.
#
#   sbatch examples/convert.sh import models/phi-2 --tower models/clip-vit-large-patch14-336 --save runs/phi-2/base
set -euo pipefail
REPO="${REPO:-${SLURM_SUBMIT_DIR:-$(cd "$(dirname "$0")/.." && pwd)}}"
SAVE=
for ((i = 1; i < $#; i++)); do [ "${!i}" != --save ] || { j=$((i + 1)) && SAVE="${!j}"; }; done

if [ -e "$SAVE/iter_0000000/run.json" ] || [ -e "$SAVE/config.json" ]; then
    echo "$SAVE is already there; remove it to convert again"
    exit 0
fi
# shellcheck source=examples/slurm/job.sh
source "$REPO/examples/slurm/job.sh"
single "$PYTHON" "$REPO/tools/convert.py" "$@"
