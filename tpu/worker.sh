#!/usr/bin/env bash
# Commands of tpu/launch on each host of a TPU, in the checkout that it installed there.
#
#   worker.sh setup                            install Python and gptjax
#   worker.sh start RUN BUCKET EXPERIMENT...   train in the background, in runs/RUN; BUCKET: gs://... or ''
#   worker.sh follow                           follow the log until the run ends; exits with the run's exit code
#   worker.sh stop                             stop the run, which saves first
#
# Location of the run folder: a TPU with one host writes to its own disk and copies the folder to the bucket every minute
# and at the end. The hosts of a larger one save each checkpoint together, so they mount the bucket as one shared folder.
set -euo pipefail
cd "$(dirname "$0")/.."

setup() {
  [[ -x ~/.local/bin/uv ]] || python3 -m pip install --quiet --user uv
  [[ -d .venv ]] || ~/.local/bin/uv venv --quiet --python 3.12
  ~/.local/bin/uv pip install --quiet -e '.[tpu,hf,gcs]'
}

start() {
  stop
  prepare "$1" "$2"
  rm -f run.exit
  setsid nohup bash tpu/worker.sh train "$@" >>run.log 2>&1 </dev/null &
  echo $! >run.pid
}

# train RUN BUCKET EXPERIMENT...: the background process. SIGTERM, also that of a preemption, is passed to the trainer.
train() {
  local run=$1 bucket=$2 trainer copier='' code
  .venv/bin/python -m experiments "${@:3}" --out "runs/$run" &
  trainer=$!
  trap 'kill -TERM $trainer 2>/dev/null || true' TERM INT
  if [[ -n $bucket ]] && ! several; then
    {
      trap 'exit 0' TERM # takes effect after a copy, not during one
      while sleep "${SYNC:-60}" & wait $!; do upload "$run" "$bucket" || true; done
    } &
    copier=$!
  fi
  while true; do # a signal interrupts the wait while the trainer is still saving
    code=0
    wait $trainer || code=$?
    kill -0 $trainer 2>/dev/null || break
  done
  if [[ -n $copier ]]; then
    kill $copier
    wait $copier || true
    upload "$run" "$bucket" || upload "$run" "$bucket" || {
      echo "error: runs/$run could not be copied to $bucket; it is on this host only" >&2
      ((code)) || code=1
    }
  fi
  echo $code >run.exit
}

follow() {
  [[ -f run.pid ]] || { echo "error: no run was started on this host" >&2 && exit 2; }
  tail -n 100 -f --pid="$(cat run.pid)" run.log
  exit "$(cat run.exit 2>/dev/null || echo 137)" # no file: the run was killed
}

stop() {
  local pid
  pid=$(cat run.pid 2>/dev/null) && kill -TERM "$pid" 2>/dev/null || return 0
  for _ in {1..300}; do
    kill -0 "$pid" 2>/dev/null || return 0
    sleep 1
  done
  kill -KILL -- "-$pid"
}

# prepare RUN BUCKET: make runs/RUN a copy of the bucket's folder.
prepare() {
  mkdir -p "runs/$1"
  if several; then
    [[ -n $2 ]] || { echo "error: BUCKET: is not set; several hosts need one folder: --bucket gs://..." >&2 && exit 2; }
    mountpoint -q runs || mount_bucket "$2"
    mkdir -p "runs/$1"
  elif [[ -n $2 ]]; then
    download "$1" "$2"
  fi
}

# A run is started anew only if it is known to be absent: the next upload would delete one that could not be read.
download() {
  local answer
  if answer=$(gcloud storage ls "$2/$1/" 2>&1); then
    gcloud storage rsync --recursive "$2/$1" "runs/$1"
  elif [[ $answer != *"matched no objects"* ]]; then
    echo "error: BUCKET: cannot read $2/$1: $answer" >&2
    exit 1
  fi
}

upload() { gcloud storage rsync --recursive --delete-unmatched-destination-objects "runs/$1" "$2/$1"; }

mount_bucket() {
  local path=${1#gs://} list=/etc/apt/sources.list.d/gcsfuse.list key=/usr/share/keyrings/cloud.google.asc
  if ! command -v gcsfuse >/dev/null; then
    curl -fsSL https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee $key >/dev/null
    echo "deb [signed-by=$key] https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -cs) main" |
      sudo tee $list >/dev/null
    sudo apt-get update -q && sudo apt-get -o DPkg::Lock::Timeout=300 install -qy gcsfuse
  fi
  set -- --implicit-dirs --rename-dir-limit 200000 --metadata-cache-ttl-secs 0
  [[ $path != */* ]] || set -- "$@" --only-dir "${path#*/}"
  gcsfuse "$@" "${path%%/*}" runs
}

# several: true if the TPU has several hosts.
several() {
  local address=http://metadata.google.internal/computeMetadata/v1/instance/attributes/worker-network-endpoints
  [[ $(curl -fsS --retry 5 -H 'Metadata-Flavor: Google' $address) == *,* ]]
}

"$@"
