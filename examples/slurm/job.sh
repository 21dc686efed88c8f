# shellcheck shell=bash
# What the training scripts share; they source this file and then call `run_stage` with the arguments of tools/$PROGRAM.
#
# Run on a login node (`bash examples/train_stage1.sh`), run_stage checks the whole request and submits the script.
# Run as a job (`sbatch examples/train_stage1.sh`), it checks again and starts one launcher per node.
#
# Exit codes of a job: 0 trained to the end, 2 the run as asked for cannot work, 3 too many non-finite steps. After 85
# (checkpoint written on a signal), and after a crash (4: no progress, 137: killed, ...) if this attempt had written a
# checkpoint or had been told to stop, the job requeues itself and continues from the newest complete checkpoint. A crash
# without any progress ends the job: it would only repeat itself.

OVERRIDES=("$@")                # what the caller added: dotted fields such as optimizer.lr=1e-5
PROGRAM="${PROGRAM:-train.py}"   # in tools/: what the job runs, and asks to check a request
PYTHON="${PYTHON:-python3}"     # interpreter of the environment, or of the container
CONTAINER="${CONTAINER:-}"      # "": bare metal; a .sif file: Apptainer; anything else: an image for enroot/pyxis
# Folders the container sees, comma-separated. Of $SAVE the folder above: it is written beside itself, then renamed.
ABOVE_SAVE="${SAVE:+$(realpath -m -- "$SAVE/..")}"
MOUNTS="${MOUNTS:-$REPO${ABOVE_SAVE:+,$ABOVE_SAVE}}"
# A container cannot be asked to see what does not exist yet.
[ -z "$CONTAINER" ] || [ -z "$ABOVE_SAVE" ] || mkdir -p -- "$ABOVE_SAVE"

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-8}"
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}" # communication and GEMMs start in program order

stop() {
    echo "$2" >&2
    exit "$1"
}

# The value of one #SBATCH line of the script that is submitted: sbatch_value nodes -> 1
sbatch_value() { sed -n "s/^#SBATCH --$1=//p" "$SCRIPT" | head -n 1; }

# a,b -> a:a,b:b
pyxis_mounts() { tr ',' '\n' <<<"$MOUNTS" | sed 's/.*/&:&/' | paste -sd ','; }

# Run one process: in the container if there is one.
single() {
    case "$CONTAINER" in
        "") "$@" ;;
        *.sif) apptainer exec --bind "$MOUNTS" "$CONTAINER" "$@" ;;
        *) srun --nodes=1 --ntasks=1 --container-image="$CONTAINER" --container-mounts="$(pyxis_mounts)" "$@" ;;
    esac
}

# Config, files, checkpoint and world size, checked by one CPU: validate NODES GPUS_PER_NODE [arguments of $PROGRAM]
validate() {
    local gpus="${2##*:}" # h100:8 -> 8
    # An arithmetic expression would run what a variable holds, hence numbers only.
    [[ "$1" =~ ^[0-9]+$ && "$gpus" =~ ^[0-9]+$ ]] || stop 2 "NODES=$1 and GPUS_PER_NODE=$2 must be numbers (h100:8 is fine)."
    WORLD_SIZE=$(($1 * gpus)) single "$PYTHON" "$REPO/tools/$PROGRAM" --validate-only "${@:3}" || exit 2
}

# On the login node: check, and submit unless VALIDATE_ONLY is set.
submit() {
    local nodes="${NODES:-$(sbatch_value nodes)}" gpus="${GPUS_PER_NODE:-$(sbatch_value gpus-per-node)}"
    # A pyxis image needs an allocation to run in; there the check is the first step of the job.
    case "$CONTAINER" in "" | *.sif) validate "$nodes" "$gpus" "$@" ;; esac
    [ -z "${VALIDATE_ONLY:-}" ] || return 0
    local request=(--nodes="$nodes" --gpus-per-node="$gpus" "$SCRIPT" "${OVERRIDES[@]}")
    sbatch --test-only "${request[@]}" || stop 2 "The cluster cannot run this request (see above)."
    sbatch "${request[@]}"
}

# One launcher per node; the first node hosts the rendezvous. Leaves the step's process id in STEP.
start() {
    local head port command=()
    head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    port=$((20000 + SLURM_JOB_ID % 20000))
    # Nodes end together; one that still hangs a minute after the first has ended is killed.
    command=(srun --nodes="$SLURM_NNODES" --ntasks-per-node=1 --kill-on-bad-exit=0 --wait=60)
    case "$CONTAINER" in
        "") ;;
        *.sif) command+=(apptainer exec --nv --bind "$MOUNTS" "$CONTAINER") ;;
        *) command+=(--container-image="$CONTAINER" --container-mounts="$(pyxis_mounts)") ;;
    esac
    # tools/launch.py is torchrun with signals and exit codes that pass through.
    command+=("$PYTHON" "$REPO/tools/launch.py" --nnodes="$SLURM_NNODES" --nproc-per-node="$SLURM_GPUS_ON_NODE"
        --rdzv-backend=c10d --rdzv-endpoint="$head:$port" --rdzv-id="$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}"
        "$REPO/tools/$PROGRAM" "$@")
    "${command[@]}" &
    STEP=$!
}

# SLURM sends USR1 to this shell (#SBATCH --signal=B:...), before the time limit and, if the cluster is set to do so
# (docs/how-to/cluster.md), before a preemption; the training processes must hear of it.
forward_signal() {
    TOLD_TO_STOP=1
    [ -n "$STEP" ] || return 0 # the run is still being checked
    echo "Told to stop soon: asking for a checkpoint"
    scancel --signal=USR1 "$SLURM_JOB_ID"
}

# Exit code of the step. `wait` returns early whenever a trap has run, hence the loop.
wait_for_step() {
    local code=0
    while :; do
        wait "$STEP" && code=0 || code=$?
        kill -0 "$STEP" 2>/dev/null || return "$code"
    done
}

newest_checkpoint() { cat "$SAVE/latest_checkpointed_iteration.txt" 2>/dev/null || echo none; }

# SLURM requeues a job by itself when it notices that a node has died. Requeued before that, the job comes back without
# GPUs (seen with 22.05).
leave_dead_nodes_to_slurm() {
    timeout 120 srun --nodes="$SLURM_NNODES" --ntasks-per-node=1 true && return
    echo "A node does not answer; waiting for SLURM to give it up and to requeue the job"
    sleep 900
}

# After a crash: is another attempt worth it? crashed EXIT_CODE NEWEST_CHECKPOINT_AT_THE_START
crashed() {
    if [ -n "$TOLD_TO_STOP" ]; then
        echo "Ended with exit code $1 after being told to stop; requeueing"
        return
    fi
    [ "$(newest_checkpoint)" != "$2" ] || stop "$1" "Crashed with exit code $1 and no new checkpoint."
    leave_dead_nodes_to_slurm
    echo "Crashed with exit code $1; requeueing to continue from step $(newest_checkpoint)"
}

# requeue_or_exit EXIT_CODE NEWEST_CHECKPOINT_AT_THE_START
requeue_or_exit() {
    case "$1" in
        0 | 2 | 3) exit "$1" ;;
        85) echo "Checkpoint written; requeueing" ;;
        *) crashed "$1" "$2" ;;
    esac
    scontrol requeue "$SLURM_JOB_ID" || exit "$1"
}

run_stage() {
    if [ -z "${SLURM_JOB_ID:-}" ]; then
        submit "$@"
        return
    fi
    [ -n "${SLURM_GPUS_ON_NODE:-}" ] || stop 2 "The job has no GPUs; ask for some: sbatch --gpus-per-node=8 ..."
    TOLD_TO_STOP="" STEP=""
    trap forward_signal USR1
    validate "$SLURM_NNODES" "$SLURM_GPUS_ON_NODE" "$@"
    local before code=0
    before=$(newest_checkpoint)
    if [ -n "$TOLD_TO_STOP" ]; then
        echo "Told to stop before the start; requeueing"
        scontrol requeue "$SLURM_JOB_ID"
        exit 85
    fi
    echo "Job $SLURM_JOB_ID, attempt $((${SLURM_RESTART_COUNT:-0} + 1)): $SLURM_NNODES nodes ($SLURM_JOB_NODELIST)" \
        "x $SLURM_GPUS_ON_NODE processes, newest checkpoint: $before"
    start "$@"
    [ -z "$TOLD_TO_STOP" ] || forward_signal # it came in between
    wait_for_step || code=$?
    requeue_or_exit "$code" "$before"
}
