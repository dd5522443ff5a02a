# shellcheck shell=bash
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
    if [ "$code" -eq $((128 + 15)) ]; then
        echo "TERM before the ranks were started: there is nothing to save"
        queue_again
    fi
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
    echo "$SLURM_JOB_ID" >"$LOG_DIR/job"
    refuse_second_job
    ln -sfn "attempt_$ATTEMPT" "$RUN_DIR/logs/latest"
    # Where the ranks leave how it ended.
    export OPD_ATTEMPT_DIR=$LOG_DIR
}

# End with 2 if the job of an earlier attempt runs. Slurm knows, on file systems without locks between nodes as well, and of jobs whose node is gone.
refuse_second_job() {
    local earlier owners=() other
    for ((earlier = 0; earlier < ATTEMPT; earlier++)); do
        other=$(cat "$RUN_DIR/logs/attempt_$earlier/job" 2>/dev/null || true)
        if [[ $other =~ ^[0-9]+$ ]] && [ "$other" != "$SLURM_JOB_ID" ]; then owners+=("$other"); fi
    done
    [ ${#owners[@]} -gt 0 ] || return 0
    other=$(squeue --noheader --jobs="$(IFS=, && echo "${owners[*]}")" --states=RUNNING,COMPLETING,SUSPENDED,STOPPED --format=%A 2>/dev/null | head -n 1 || true)
    [ -n "$other" ] || return 0
    rm -r "$LOG_DIR"
    mistake "job ${other// /} is running in $RUN_DIR; wait for it, scancel it, or use another --run-dir"
}

# Outside of a container, which has no scontrol. The port is the job's own: several jobs may share a node, with others' programs.
export_rendezvous() {
    MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    # A node may be called by a name that only Slurm knows.
    MASTER_ADDR=$(scontrol show node "$MASTER_ADDR" | grep -o 'NodeAddr=[^ ]*' | cut -d= -f2)
    MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
    # This script runs on the first node, as rank 0 does.
    while (: <"/dev/tcp/127.0.0.1/$MASTER_PORT") 2>/dev/null; do MASTER_PORT=$((MASTER_PORT + 1)); done
    export MASTER_ADDR MASTER_PORT
    export PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-8}"
}

# What comes before the ranks of a run; the arguments are those of recipes.run.
begin_attempt() {
    [ -n "${SLURM_NTASKS:-}" ] || mistake "sbatch was given no number of tasks; add --ntasks-per-node=G, one task per GPU"
    [ -n "${OPD_IMAGE:-}" ] || command -v "$OPD_PYTHON" >/dev/null || mistake "OPD_PYTHON=$OPD_PYTHON is no interpreter that is here"
    find_run_dir "$@"
    use_container "$(readlink -f "$RUN_DIR")"
    check_recipe "$@"
    open_attempt
    export_rendezvous
    echo "recipe=$1 run_dir=$RUN_DIR attempt=$ATTEMPT nodes=$SLURM_JOB_NUM_NODES tasks=$SLURM_NTASKS master=$MASTER_ADDR:$MASTER_PORT"
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
    STEP_CODE=0
    wait "$step" || STEP_CODE=$?
    # Signals end `wait` early, with a code above 128 or -1, and the step goes on.
    while kill -0 "$step" 2>/dev/null; do
        STEP_CODE=0
        wait "$step" || STEP_CODE=$?
    done
    if [ "$STEP_CODE" -gt 128 ] || [ "$STEP_CODE" -lt 0 ]; then
        # A signal and the end of the step may have come together; bash keeps the code of a process that is gone.
        STEP_CODE=0
        wait "$step" || STEP_CODE=$?
    fi
}

# End an attempt that stopped on request: have Slurm run this job again, unless nobody wants that any more.
queue_again() {
    local reason state
    if [ "${SLURM_RESTART_COUNT:-0}" -ge "$OPD_MAX_RESTARTS" ]; then
        echo "not queued again: OPD_MAX_RESTARTS=$OPD_MAX_RESTARTS is reached; sbatch the same line to go on" >&2
        exit 75
    fi
    # A controller that is being restarted answers in a while.
    while ! state=$(scontrol show job "$SLURM_JOB_ID" 2>&1); do
        echo "waiting for Slurm's controller: $state" >&2
        sleep 5
    done
    # A job that its user has cancelled is not to come back, and one that Slurm itself runs again, on other nodes, is not to be stopped.
    if [[ $state != *JobState=RUNNING* || $state != *" Restarts=${SLURM_RESTART_COUNT:-0} "* ]]; then
        echo "not queued again: Slurm has ended this job, or has begun it anew" >&2
    elif reason=$(scontrol requeue "$SLURM_JOB_ID" 2>&1); then
        # Slurm ends this script; were it to end by itself, the job might be over before it is queued.
        trap - TERM USR1
        sleep 60
    else
        echo "not queued again: $reason; sbatch the same line to go on" >&2
    fi
    exit 75
}

# Decide by the word that this attempt's first rank left in the attempt's folder: only a run that stopped on request, and saved, is queued again.
end_attempt() {
    local code=$1 word first full
    cat "$LOG_DIR/srun.log" >&2
    # The node that was lost, else the task that failed first, as srun saw it.
    first=$(sed -n 's/^srun: error: \(Node failure on .*\)/\1/p' "$LOG_DIR/srun.log" | head -n 1)
    [ -n "$first" ] || first=$(sed -n 's/^srun: error: \(.*: tasks\? .*\)/\1/p' "$LOG_DIR/srun.log" | head -n 1)
    word=$(cat "$LOG_DIR/status" 2>/dev/null) || word="before it began"
    # Of a mistake that all ranks find, srun tells the code of one that it ended before that could exit by itself.
    [ ! -e "$LOG_DIR/mistake" ] || code=2
    if [ "$word" = running ]; then
        word=crashed
        # Unless Slurm, which lost a node, has begun another attempt already.
        if [ "$(readlink "$RUN_DIR/logs/latest")" = "attempt_$ATTEMPT" ]; then
            echo crashed >"$RUN_DIR/status" || echo "error: $RUN_DIR/status cannot be written and still says running" >&2
        fi
    fi
    echo "attempt $ATTEMPT ended: $word (exit code $code)"
    case $word in
        finished) exit 0 ;;
        interrupted) queue_again ;;
    esac
    case $first in
        *": Terminated")
            # A signal that met Python itself, before the run could remember it.
            [ "$word" != "before it began" ] || [ -e "$LOG_DIR/cause" ] || queue_again
            ;;&
        # Of these, srun knows no more than the exit code.
        "" | *": Exited with exit code"* | *": Terminated") [ ! -s "$LOG_DIR/cause" ] || first=$(cat "$LOG_DIR/cause") ;;
    esac
    # On a full disk nobody can leave anything.
    if [ ! -s "$LOG_DIR/cause" ] && ! full=$(head -c 65536 /dev/zero 2>&1 >"$LOG_DIR/probe"); then
        first="$RUN_DIR cannot be written any more: ${full##*: }; make room and sbatch the same line to go on"
    fi
    rm -f "$LOG_DIR/probe"
    echo "error: ${first:-srun ended with $code, and no rank said why; see $LOG_DIR}" >&2
    exit $((code == 0 ? 1 : code))
}

# For a script that calls srun itself, in the foreground: it outlives a TERM until then, and ends as end_attempt decides.
end_attempt_at_exit() {
    # What srun says is end_attempt's to read.
    exec 3>&2 2>"$LOG_DIR/srun.log"
    trap 'code=$?; exec 2>&3; end_attempt $code' EXIT
    trap 'echo "TERM: the ranks have saved"' TERM USR1
}
