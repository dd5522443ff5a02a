#!/usr/bin/env bash
# Submits a whole distillation as jobs that wait for one another: convert the student, train, export, evaluate.
#
#   slurm/pipeline.sh NAME --student HF_DIR --data FILE --run-dir DIR [--train "sbatch options"] [--small "sbatch options"] [-- KEY=VALUE ...]
#
# --train has what training asks of Slurm (--nodes=4 --ntasks-per-node=8 --gpus-per-node=8 ...), --small what the other three do. They run only if the one before ended
# well; one that cannot run any more is cancelled. Prints the numbers of the jobs.
set -euo pipefail
cd "$(dirname "$0")/.."

# shellcheck source=slurm/common.sh
source slurm/common.sh

# Print the number of ranks that sbatch options ask for, or nothing where they do not say.
num_ranks() {
    local nodes=1 tasks='' per_node=''
    while [ $# -gt 0 ]; do
        case $1 in
            --nodes=* | --ntasks=* | --ntasks-per-node=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
            -[Nn]?*) set -- "${1:0:2}" "${1:2}" "${@:2}" ;;
        esac
        case $1 in
            --nodes | -N) nodes=${2:-} ;;
            --ntasks | -n) tasks=${2:-} ;;
            --ntasks-per-node) per_node=${2:-} ;;
        esac
        shift
    done
    if [[ $tasks =~ ^[0-9]+$ ]]; then
        echo "$tasks"
    elif [[ $nodes =~ ^[0-9]+$ && $per_node =~ ^[0-9]+$ ]]; then
        echo $((nodes * per_node))
    fi
}

recipe=${1:-}
if [ "$recipe" = --help ]; then
    sed -n '2,/^set/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit 0
fi
case $recipe in "" | -*) mistake "name a recipe first: slurm/pipeline.sh NAME --student HF_DIR --data FILE --run-dir DIR" ;; esac
shift
student='' data='' run='' train=() small=()
while [ $# -gt 0 ]; do
    [ "$1" = -- ] && shift && break
    [ $# -ge 2 ] || mistake "$1 needs a value"
    case $1 in
        --student) student=$2 ;;
        --data) data=$2 ;;
        --run-dir) run=$2 ;;
        --train) read -ra train <<<"$2" ;;
        --small) read -ra small <<<"$2" ;;
        *) mistake "unknown option $1; KEY=VALUE words come after --" ;;
    esac
    shift 2
done
[ -n "$student" ] || mistake "--student is missing: the Hugging Face folder that training begins with"
[ -f "$student/config.json" ] || mistake "--student '$student' is no Hugging Face folder: no config.json in it"
[ -n "$data" ] || mistake "--data is missing: the prompts, with answers, that the student is measured on"
case $data in
    /* | ./* | ../* | *.jsonl | *.parquet) [ -f "$data" ] || mistake "--data $data is no file" ;;
esac
[ -n "$run" ] || mistake "--run-dir is missing"
[ ! -e "$run" ] || mistake "$run exists; a pipeline begins with a new folder, and slurm/train.sbatch goes on with one that is there"
for word in "$@"; do
    case $word in student.hf=* | student.checkpoint=*) mistake "$word: --student names the student" ;; esac
done
# Without its container, a recipe can be checked here: the checkpoint that is still to be made is of the same architecture.
if [ -z "${OPD_IMAGE:-}" ]; then
    ranks=$(num_ranks "${train[@]}")
    [ -n "$ranks" ] || mistake "--train does not say how many ranks train; put --nodes=N --ntasks-per-node=G into it"
    RANK=0 WORLD_SIZE=$ranks "$OPD_PYTHON" -m recipes.run "$recipe" --check student.hf="$student" student.checkpoint=null "$@" >/dev/null || exit
fi
mkdir -p "$run" 2>/dev/null || mistake "$run cannot be written; choose another --run-dir"
run=$(readlink -f "$run")
mkdir -p "$run/logs"

# The first job that is refused takes back the others: nothing runs without its end.
jobs=()
take_back() {
    [ ${#jobs[@]} -eq 0 ] || scancel "${jobs[@]}"
    # Made by this script a moment ago; the first job may have begun its log.
    rm -rf "$run" || true
}
trap 'take_back; exit 130' INT TERM HUP
submit() {
    local name=$1 after='' job
    shift
    [ ${#jobs[@]} -eq 0 ] || after=${jobs[-1]}
    local options=(--parsable --job-name="opd-$name" --output="$run/logs/$name.log" --open-mode=append)
    [ -z "$after" ] || options+=(--dependency="afterok:$after" --kill-on-invalid-dep=yes)
    if ! job=$(sbatch "${options[@]}" "$@"); then
        take_back
        mistake "sbatch refused the job '$name'; nothing was submitted"
    fi
    jobs+=("${job%%;*}")
    echo "$name ${job%%;*}"
}

submit convert "${small[@]}" slurm/convert.sbatch to-megatron --hf "$student" --out "$run/start"
submit train "${train[@]}" slurm/train.sbatch "$recipe" --run-dir "$run/run" student.hf=null student.checkpoint="$run/start" "$@"
submit export "${small[@]}" slurm/convert.sbatch to-hf --run-dir "$run/run" --out "$run/hf"
submit evaluate "${small[@]}" slurm/evaluate.sbatch --hf "$run/hf" --data "$data"
echo "logs: $run/logs; the student will be in $run/hf"
