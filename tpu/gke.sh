#!/usr/bin/env bash
# Train an experiment on TPUs of a GKE cluster, as a JobSet that is restarted after a preemption and resumes.
#
#   tpu/gke.sh run --name pod --accelerator tpu-v5-lite-podslice --topology 4x4 --image REPOSITORY/gptjax \
#       --bucket gs://mine -- gpt2_124m
#
#   render    print the manifest
#   run       start or resume the experiment; a running one is stopped first, and saves
#   log       follow the log of the first host of the first slice
#   status    the JobSet and its pods
#   delete    stop the experiment (it saves) and free the TPUs
#
#   --name NAME          JOB_NAME     name of the JobSet
#   --accelerator NAME   ACCELERATOR  such as tpu-v5-lite-podslice, tpu-v5p-slice, tpu-v6e-slice
#   --topology SHAPE     TOPOLOGY     such as 4x4, 4x4x8
#   --image IMAGE        IMAGE        container with gptjax, see docs/cloud.md
#   --bucket URL         BUCKET       gs://NAME, mounted as /runs: holds the run folder RUN
#   --run NAME           RUN          default: the name of the experiment
#   --spot               SPOT=1       preemptible nodes
#   --env NAME=VALUE                  set a variable for the trainer (repeatable)
#   --dry-run            DRY_RUN=1    print the commands without running them
#   CHIPS=4 SLICES=1 RESTARTS=100     chips per host, slices, maximum number of restarts
#   SERVICE_ACCOUNT=default           Kubernetes service account with access to the bucket
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "$0")/common.sh"

main() {
  JOB_NAME=${JOB_NAME:-} ACCELERATOR=${ACCELERATOR:-} TOPOLOGY=${TOPOLOGY:-} IMAGE=${IMAGE:-} SPOT=${SPOT:-}
  CHIPS=${CHIPS:-4} SLICES=${SLICES:-1} RESTARTS=${RESTARTS:-100} SERVICE_ACCOUNT=${SERVICE_ACCOUNT:-default}
  [[ $# -gt 0 ]] || set -- --help
  local command=$1 file value label=jobset.sigs.k8s.io/jobset-name
  shift
  EXPERIMENT=() VARIABLES=()
  while (($#)); do
    case $1 in
      --name) option JOB_NAME "$@" && shift ;;
      --accelerator) option ACCELERATOR "$@" && shift ;;
      --topology) option TOPOLOGY "$@" && shift ;;
      --image) option IMAGE "$@" && shift ;;
      --bucket) option BUCKET "$@" && shift ;;
      --run) option RUN "$@" && shift ;;
      --env) option value "$@" && VARIABLES+=("$value") && shift ;;
      --spot) SPOT=1 ;;
      --dry-run) DRY_RUN=1 ;;
      --) shift && EXPERIMENT=("$@") && break ;;
      *) fail "$1: no such option; see tpu/gke.sh --help, and give the experiment after --" ;;
    esac
    shift
  done
  case $command in
    -h | --help) usage "$0" && return ;;
    render | run | log | status | delete) need JOB_NAME --name pod ;;
    *) fail "$command: no such command; must be render, run, log, status or delete" ;;
  esac
  case $command in
    render) manifest ;;
    run)
      file=${TMPDIR:-/tmp}/gptjax-$JOB_NAME.yaml
      manifest >"$file"
      # Applying does not restart a JobSet that has ended, and cannot change one that runs.
      delete
      retry kubectl apply "--filename=$file"
      ;;
    log)
      retry kubectl logs --follow --tail=-1 --container=train \
        "--selector=$label=$JOB_NAME,jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0"
      ;;
    status) retry kubectl get jobsets,pods "--selector=$label=$JOB_NAME" ;;
    delete) delete ;;
  esac
}

# Foreground deletion waits until the pods, which save, are gone too.
delete() { retry kubectl delete jobset "$JOB_NAME" --ignore-not-found --cascade=foreground --wait; }

# The trainer's exit codes 2 (user error) and 3 (diverged) end the JobSet; after any other it is restarted.
manifest() {
  need ACCELERATOR --accelerator tpu-v5-lite-podslice
  need TOPOLOGY --topology 4x4
  need IMAGE --image us-docker.pkg.dev/PROJECT/images/gptjax
  need BUCKET --bucket gs://mine
  [[ $BUCKET =~ ^gs://[^/]+$ ]] || fail "BUCKET: got $BUCKET, must be gs://NAME"
  [[ $TOPOLOGY =~ ^[0-9]+(x[0-9]+)+$ ]] || fail "TOPOLOGY: got $TOPOLOGY, must be like 4x4 or 4x4x8"
  check_experiment elsewhere
  local spot='' hosts chips=$((${TOPOLOGY//x/*}))
  [[ -z $SPOT ]] || spot='                cloud.google.com/gke-spot: "true"
              tolerations:
                - {key: cloud.google.com/gke-spot, operator: Equal, value: "true", effect: NoSchedule}'
  ((CHIPS <= chips)) || CHIPS=$chips
  hosts=$((chips / CHIPS))
  cat <<YAML
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $JOB_NAME
  labels:
    jobset.sigs.k8s.io/jobset-name: $JOB_NAME
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    maxRestarts: $RESTARTS
    rules:
      - action: FailJobSet
        onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
    - name: slice
      replicas: $SLICES
      template:
        spec:
          parallelism: $hosts
          completions: $hosts
          completionMode: Indexed
          backoffLimit: 0
          podFailurePolicy:
            rules:
              - action: FailJob
                onExitCodes: {containerName: train, operator: In, values: [2, 3]}
          template:
            metadata:
              annotations:
                gke-gcsfuse/volumes: "true"
            spec:
              restartPolicy: Never
              terminationGracePeriodSeconds: 120
              serviceAccountName: $SERVICE_ACCOUNT
              nodeSelector:
                cloud.google.com/gke-tpu-accelerator: $ACCELERATOR
                cloud.google.com/gke-tpu-topology: $TOPOLOGY
$spot
              containers:
                - name: train
                  image: $IMAGE
                  command:
$(items python -m experiments "${EXPERIMENT[@]}" --out "/runs/$RUN")
                  env:
$(variables ${VARIABLES[@]+"${VARIABLES[@]}"})
                  resources:
                    requests: {google.com/tpu: $CHIPS}
                    limits: {google.com/tpu: $CHIPS}
                  volumeMounts:
                    - {name: runs, mountPath: /runs}
              volumes:
                - name: runs
                  csi:
                    driver: gcsfuse.csi.storage.gke.io
                    volumeAttributes:
                      bucketName: ${BUCKET#gs://}
                      mountOptions: implicit-dirs,rename-dir-limit=200000,metadata-cache:ttl-secs:0
YAML
}

# items WORD...: a YAML list of strings.
items() {
  local word
  for word in "$@"; do
    printf '                    - %s\n' "$(text "$word")"
  done
}

# variables NAME=VALUE...: a YAML list of a container's environment variables.
variables() {
  local variable
  (($#)) || printf '                    []\n'
  for variable in "$@"; do
    printf '                    - {name: %s, value: %s}\n' "${variable%%=*}" "$(text "${variable#*=}")"
  done
}

# text WORD: a YAML string. A single quote is doubled.
text() { printf "'%s'" "$(printf %s "$1" | sed "s/'/''/g")"; }

main "$@"
