#!/usr/bin/env bash
#SBATCH --job-name=gptjax
#SBATCH --output=runs/%x-%j.log
#SBATCH --open-mode=append
#SBATCH --signal=TERM@180
#SBATCH --requeue
# Train an experiment under SLURM, one task per GPU; it resumes after a preemption or the time limit.
#
#   tpu/slurm.sh --nodes=4 --ntasks-per-node=8 --gpus-per-node=8 --cpus-per-task=12 --time=24:00:00 -- gpt2_124m
#
# Options before -- are passed to sbatch, which runs this file as the job. The run folder is runs/RUN on the nodes' shared
# file system; RUN defaults to the name of the experiment. jax finds the other tasks by itself.
#
#   --dry-run   DRY_RUN=1   print the command without running it
#   VENV=.venv              virtual environment; '': the current Python
#   RUN                     name of the run folder
#   RESTARTS=100            maximum number of restarts
#   FAILURES=3              after exit code 1 (maybe a disk or chip), requeue a job restarted fewer times than this
set -euo pipefail
if [[ ${1:-} == job ]]; then
  cd "$SLURM_SUBMIT_DIR" # SLURM runs a copy of this file elsewhere
else
  cd "$(dirname "$0")/.."
fi
# shellcheck source-path=SCRIPTDIR source=common.sh
. tpu/common.sh
VENV=${VENV-.venv} RESTARTS=${RESTARTS:-100}

submit() {
  local options=()
  while (($#)); do
    case $1 in
      -h | --help) awk 'NR > 1 { if (!/^#/) exit; if (!/^#SBATCH/) { sub(/^# ?/, ""); print } }' tpu/slurm.sh && return ;;
      --dry-run) DRY_RUN=1 ;;
      --) break ;;
      *) options+=("$1") ;;
    esac
    shift
  done
  EXPERIMENT=("${@:2}")
  check_experiment
  mkdir -p runs
  retry sbatch ${options[@]+"${options[@]}"} "--export=ALL,RUN=$RUN,VENV=$VENV,RESTARTS=$RESTARTS" \
    tpu/slurm.sh job "${EXPERIMENT[@]}"
}

# The job. The time limit and a preemption send SIGTERM to the tasks, which save and exit with 130. If this script gets the
# signal too, it must wait for them. It cannot ignore the signal, because the tasks would inherit that.
job() {
  local code=0
  trap : TERM
  # srun does not inherit this from sbatch.
  [[ -z ${SLURM_CPUS_PER_TASK:-} ]] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
  # shellcheck disable=SC1091
  [[ -z $VENV ]] || . "$VENV/bin/activate"
  srun --kill-on-bad-exit=1 python -m experiments "$@" --out "runs/$RUN" || code=$?
  if (((code >= 128 && ${SLURM_RESTART_COUNT:-0} < RESTARTS) || (code == 1 && ${SLURM_RESTART_COUNT:-0} < ${FAILURES:-3}))); then
    say "interrupted (exit code $code): requeued"
    scontrol requeue "$SLURM_JOB_ID"
  fi
  exit "$code"
}

if [[ ${1:-} == job ]]; then job "${@:2}"; else submit "$@"; fi
