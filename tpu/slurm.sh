#!/usr/bin/env bash
#SBATCH --job-name=gptjax
#SBATCH --output=runs/%x-%j.log
#SBATCH --open-mode=append
#SBATCH --signal=TERM@180
#SBATCH --requeue
# Trains an experiment under SLURM, a task for each GPU; after a preemption, or at the end of the time, it goes on.
#
#   tpu/slurm.sh --nodes=4 --ntasks-per-node=8 --gpus-per-node=8 --cpus-per-task=12 --time=24:00:00 -- gpt2_124m
#
# What stands before -- goes to sbatch, which gives the job this same file. The run folder is runs/RUN on the file system
# that the nodes share; RUN is the name of the experiment if it is not set. jax finds the other tasks by itself.
#
#   --dry-run   DRY_RUN=1   print the command and run none
#   VENV=.venv              the virtual environment; '' for the Python that is there
#   RUN                     name of the run folder
#   RESTARTS=100            how often it goes on
#   FAILURES=3              after exit code 1, of a disk or chip perhaps, a job goes on if it was begun anew fewer times
set -euo pipefail
if [[ ${1:-} == job ]]; then
  cd "$SLURM_SUBMIT_DIR" # as this file is a copy elsewhere
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

# In the job. The time limit and a preemption send SIGTERM to the tasks, which save and exit with 130. This script must
# wait for them where it gets the signal too; ignored altogether, it would be so in them.
job() {
  local code=0
  trap : TERM
  # srun does not take this over from sbatch.
  [[ -z ${SLURM_CPUS_PER_TASK:-} ]] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
  # shellcheck disable=SC1091
  [[ -z $VENV ]] || . "$VENV/bin/activate"
  srun --kill-on-bad-exit=1 python -m experiments "$@" --out "runs/$RUN" || code=$?
  if (((code >= 128 && ${SLURM_RESTART_COUNT:-0} < RESTARTS) || (code == 1 && ${SLURM_RESTART_COUNT:-0} < ${FAILURES:-3}))); then
    say "interrupted (exit code $code): back to the queue"
    scontrol requeue "$SLURM_JOB_ID"
  fi
  exit "$code"
}

if [[ ${1:-} == job ]]; then job "${@:2}"; else submit "$@"; fi
