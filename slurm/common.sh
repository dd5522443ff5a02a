# What the job scripts share. Sourced by them, from the project's folder, under `set -euo pipefail`.

OPD_PYTHON=${OPD_PYTHON:-$([ -x .venv/bin/python ] && echo "$PWD/.venv/bin/python" || echo python)}
# Of a job that is preempted or runs into its time limit; a crash is never run again.
OPD_MAX_RESTARTS=${OPD_MAX_RESTARTS:-20}

mistake() {
    echo "error: $*" >&2
    exit 2
}

# Set RUN_DIR from the arguments of recipes.run.
find_run_dir() {
    RUN_DIR=
    local previous=
    for word in "$@"; do
        case $word in --run-dir=*) RUN_DIR=${word#--run-dir=} ;; esac
        if [ "$previous" = --run-dir ]; then RUN_DIR=$word; fi
        previous=$word
    done
    [ -n "$RUN_DIR" ] || mistake "--run-dir is missing: it names the folder of the run, which every node can write"
    if ! mkdir -p "$RUN_DIR" 2>/dev/null || [ ! -w "$RUN_DIR" ]; then mistake "$RUN_DIR cannot be written; choose another --run-dir"; fi
    [[ $OPD_MAX_RESTARTS =~ ^[0-9]+$ ]] || mistake "OPD_MAX_RESTARTS=$OPD_MAX_RESTARTS is not a number"
}

# Set CONTAINER, srun's options for the image that OPD_IMAGE names; without it there are none. The project's folder, the folders given here and OPD_MOUNTS are seen inside.
use_container() {
    CONTAINER=()
    [ -n "${OPD_IMAGE:-}" ] || return 0
    case $OPD_IMAGE in
        /* | ./* | ../*) [ -e "$OPD_IMAGE" ] || mistake "OPD_IMAGE=$OPD_IMAGE does not exist" ;;
    esac
    srun --help | grep -q -- --container-image || mistake "OPD_IMAGE needs Pyxis, and this srun has no --container-image; unset it, or load a site's module"
    local mounts="$PWD:$PWD${OPD_MOUNTS:+,$OPD_MOUNTS}" folder
    for folder in "$@"; do mounts+=",$folder:$folder"; done
    CONTAINER=(--container-image="$OPD_IMAGE" --container-workdir="$PWD" --no-container-mount-home --container-mounts="$mounts")
}

# Resolve the recipe for this many ranks before they are started: a mistake ends with 2, and its reason last.
check_recipe() {
    local code=0
    srun --nodes=1 --ntasks=1 "${CONTAINER[@]}" env RANK=0 WORLD_SIZE="$SLURM_NTASKS" "$OPD_PYTHON" -m recipes.run "$@" --check >/dev/null || code=$?
    [ "$code" -eq 0 ] || exit "$code"
}

# Set ATTEMPT and LOG_DIR, a folder of this attempt's own; `logs/latest` leads to it.
open_attempt() {
    ATTEMPT=0
    while ! mkdir -p "$RUN_DIR/logs" || ! mkdir "$RUN_DIR/logs/attempt_$ATTEMPT" 2>/dev/null; do
        [ -d "$RUN_DIR/logs/attempt_$ATTEMPT" ] || mistake "$RUN_DIR/logs cannot be written; choose another --run-dir"
        ATTEMPT=$((ATTEMPT + 1))
    done
    LOG_DIR=$RUN_DIR/logs/attempt_$ATTEMPT
    ln -sfn "attempt_$ATTEMPT" "$RUN_DIR/logs/latest"
}

# Outside of a container, which has no scontrol. The port is the job's own: several jobs may share a node.
export_rendezvous() {
    MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    # A node may be called by a name that only Slurm knows.
    MASTER_ADDR=$(scontrol show node "$MASTER_ADDR" | grep -o 'NodeAddr=[^ ]*' | cut -d= -f2)
    export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
    export PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-8}"
}

# Run Python as every task of a step: run_step [srun options] -- arguments. Set STEP_CODE. Python itself is the task, so Slurm's signals reach it.
run_step() {
    local options=()
    while [ "$1" != -- ]; do
        options+=("$1")
        shift
    done
    shift
    # This script goes on after a TERM, which the tasks have as well: they save, and it decides what comes next.
    trap 'echo "TERM: waiting for the ranks to save"' TERM USR1
    srun --kill-on-bad-exit=1 --wait=60 "${options[@]}" "${CONTAINER[@]}" "$OPD_PYTHON" "$@" &
    local step=$!
    STEP_CODE=128
    # A trap ends `wait` early, with a code above 128, and the step goes on.
    while [ "$STEP_CODE" -ge 128 ]; do
        STEP_CODE=0
        wait "$step" || STEP_CODE=$?
        kill -0 "$step" 2>/dev/null || break
    done
    if [ "$STEP_CODE" -gt 128 ]; then
        STEP_CODE=0
        wait "$step" || STEP_CODE=$?
    fi
}

# Decide by the word that the run itself left: only a run that stopped on request, and saved, is queued again.
end_attempt() {
    local code=$1 word=crashed
    # A word from before this attempt says nothing about it.
    [ "$RUN_DIR/status" -nt "$LOG_DIR" ] && word=$(cat "$RUN_DIR/status")
    if [ "$word" = running ]; then
        word=crashed
        echo crashed >"$RUN_DIR/status"
    fi
    echo "attempt $ATTEMPT ended: $word (exit code $code)"
    case $word in
        finished) exit 0 ;;
        interrupted)
            if [ "${SLURM_RESTART_COUNT:-0}" -ge "$OPD_MAX_RESTARTS" ]; then
                echo "not queued again: OPD_MAX_RESTARTS=$OPD_MAX_RESTARTS is reached; sbatch the same line to go on" >&2
            elif scontrol requeue "$SLURM_JOB_ID"; then
                # Slurm ends this script; were it to end by itself, the job might be over before it is queued.
                sleep 60
            fi
            exit 75
            ;;
    esac
    tail -n 3 "$LOG_DIR"/rank_0.log 2>/dev/null >&2 || true
    exit $((code == 0 ? 1 : code))
}
