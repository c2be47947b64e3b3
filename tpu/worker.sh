#!/usr/bin/env bash
# What tpu/launch does on each host of a TPU, in the checkout that it has put there.
#
#   worker.sh setup                            Python and gptjax
#   worker.sh start RUN BUCKET EXPERIMENT...   train in the background, in runs/RUN; BUCKET: gs://... or ''
#   worker.sh follow                           show the log until the run ends; exit code: that of the run
#   worker.sh stop                             let the run save and end
#
# Where the run folder is: a TPU with one host writes to its own disk and copies the folder to the bucket every minute
# and at the end. The hosts of a larger one write one checkpoint together, so they need one folder: the bucket, mounted.
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

# train RUN BUCKET EXPERIMENT...: the background process. SIGTERM, which a preemption sends too, goes to the trainer.
train() {
  local run=$1 bucket=$2 trainer copier='' code
  .venv/bin/python -m experiments "${@:3}" --out "runs/$run" &
  trainer=$!
  trap 'kill -TERM $trainer 2>/dev/null || true' TERM INT
  if [[ -n $bucket ]] && ! several; then
    {
      trap 'exit 0' TERM # but not in the middle of a copy
      while sleep "${SYNC:-60}" & wait $!; do upload "$run" "$bucket" || true; done
    } &
    copier=$!
  fi
  while true; do # a signal ends the wait, not the trainer, which is saving
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
  [[ -f run.pid ]] || { echo "error: nothing was started here" >&2 && exit 2; }
  tail -n 100 -f --pid="$(cat run.pid)" run.log
  exit "$(cat run.exit 2>/dev/null || echo 137)" # none: it was killed
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

# prepare RUN BUCKET: makes runs/RUN what the bucket has.
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

# Only what is known to be absent is begun anew: the next upload would delete a run that just could not be read.
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

# Whether the TPU has several hosts.
several() {
  local address=http://metadata.google.internal/computeMetadata/v1/instance/attributes/worker-network-endpoints
  [[ $(curl -fsS --retry 5 -H 'Metadata-Flavor: Google' $address) == *,* ]]
}

"$@"
