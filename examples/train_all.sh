#!/bin/bash
# Submit the whole training as a chain of jobs; each starts when the one before it has succeeded:
#
#   import -> stage 1 -> stage 2 -> upcycle -> stage 3 -> export
#
#   bash examples/train_all.sh
#   BACKBONE=llama-2-7b NODES=4 bash examples/train_all.sh training.micro_batch_size=4
#
# All three runs are checked before anything is submitted. Overrides go to every stage. Submitting again continues:
# finished parts find their work done. A part that fails cancels those after it.
set -euo pipefail
REPO="${REPO:-$(cd "$(dirname "$0")/.." && pwd)}"
BACKBONE="${BACKBONE:-phi-2}"
TOWER="${TOWER:-clip-vit-large-patch14-336}"
MODELS="${MODELS:-$REPO/models}"            # the published models: $MODELS/$BACKBONE and $MODELS/$TOWER
RUNS="${RUNS:-$REPO/runs/$BACKBONE}"        # base, stage1, stage2, upcycled, stage3, exported
NODES="${NODES:-1}"
GPUS_PER_NODE="${GPUS_PER_NODE:-8}"
UPCYCLE="${UPCYCLE:---num-experts 4 --topk 2 --placement sparse}"
LAYOUT="${LAYOUT:-transformers}"            # of the exported model: see tools/convert.py export --help
TOKENIZER="${TOKENIZER:-$MODELS/$BACKBONE}"
# Data of the stages; unset: the defaults in examples/train_stage?.sh
data=("" "${DATA1:-}" "${DATA2:-}" "${DATA3:-}")
export REPO BACKBONE TOWER RUNS NODES GPUS_PER_NODE TOKENIZER
cd "$REPO"

for folder in "$MODELS/$BACKBONE" "$MODELS/$TOWER"; do
    [ -d "$folder" ] || { echo "$folder does not exist; set MODELS, BACKBONE or TOWER" >&2 && exit 2; }
    [ -f "$folder/config.json" ] || { echo "$folder has no config.json; download the model again" >&2 && exit 2; }
    compgen -G "$folder/*.safetensors" >/dev/null || compgen -G "$folder/*.bin" >/dev/null || {
        echo "$folder holds no weights (*.safetensors or *.bin); download the model again" >&2 && exit 2
    }
done
for stage in 1 2 3; do
    echo "Checking stage $stage"
    # Its checkpoint does not exist yet.
    VALIDATE_ONLY=1 LOAD="" DATA="${data[stage]}" bash "examples/train_stage$stage.sh" "$@"
done

last=
# submit SCRIPT [ARGUMENTS]: queue it behind the job submitted last
submit() {
    local options=(--parsable)
    [ -z "$last" ] || options+=(--dependency="afterok:$last" --kill-on-invalid-dep=yes)
    case "$1" in *train_stage*) options+=(--nodes="$NODES" --gpus-per-node="$GPUS_PER_NODE") ;; esac
    last=$(sbatch "${options[@]}" "$@")
    last=${last%%;*} # a federation adds the name of its cluster
    echo "job $last: $(basename "$1") ${2:-}"
}

submit examples/convert.sh import "$MODELS/$BACKBONE" --tower "$MODELS/$TOWER" --save "$RUNS/base"
DATA="${data[1]}" LOAD="$RUNS/base" submit examples/train_stage1.sh "$@"
DATA="${data[2]}" LOAD="$RUNS/stage1" submit examples/train_stage2.sh "$@"
read -ra upcycle <<<"$UPCYCLE"
submit examples/convert.sh upcycle "$RUNS/stage2" --save "$RUNS/upcycled" "${upcycle[@]}"
DATA="${data[3]}" LOAD="$RUNS/upcycled" submit examples/train_stage3.sh "$@"
submit examples/convert.sh export "$RUNS/stage3" --layout "$LAYOUT" --tokenizer "$TOKENIZER" --save "$RUNS/exported"
