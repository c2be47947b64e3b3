# shellcheck shell=bash
# Shared by the launch scripts, which source it: messages, dry runs, retries. Works with bash 3.2 of macOS.

say() { printf '%s\n' "$*" >&2; }

fail() {
  say "error: $*"
  exit 2
}

# usage FILE: print the comment at the top of a script.
usage() { awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$1"; }

# quote WORD...: print the words as a line to paste into a shell.
quote() {
  local word line=
  for word in "$@"; do
    case $word in
      *\'*) word=$(printf %q "$word") ;;
      '' | *[!A-Za-z0-9_./:=,@%+-]*) word="'$word'" ;;
    esac
    line+="$word "
  done
  printf '%s\n' "${line% }"
}

# run COMMAND...: run it; a dry run prints it.
run() {
  if [[ -n $DRY_RUN ]]; then quote "$@"; else "$@"; fi
}

# retry COMMAND...: run it up to TRIES times, with pauses of PAUSE seconds, doubled every time. Exit code 2: it cannot
# succeed, whenever it is run.
retry() {
  local attempt code pause=$PAUSE errors
  for ((attempt = 1; ; attempt++)); do
    code=0
    { errors=$(run "$@" 2>&1 >&3 3>&- | copy) || code=$?; } 3>&1 4>&2
    ((code)) || return 0
    if hopeless "$code" "$errors"; then
      say "error: exit code $code, and another attempt would fail too: $(quote "$@")"
      return 2
    fi
    ((attempt < TRIES)) || break
    say "exit code $code, attempt $attempt of $TRIES; retrying in $pause s"
    sleep "$pause"
    pause=$((2 * pause))
  done
  say "error: exit code $code after $TRIES attempts: $(quote "$@")"
  return "$code"
}

# copy: standard input to standard output and, line by line, to the errors that the user sees.
copy() {
  local line
  while IFS= read -r line || [[ -n $line ]]; do
    printf '%s\n' "$line" >&4
    printf '%s\n' "$line"
  done
}

# hopeless CODE ERRORS: true if a command that failed so would fail again: it was not found, nobody is logged in, the
# project or a permission is missing, an option is wrong. Not listed: "Permission denied" of ssh, which a new machine
# says too.
hopeless() {
  (($1 != 126 && $1 != 127)) || return 0
  case $2 in
    *"required property [project]"* | *"do not currently have an active account"* | *Reauthentication*) ;;
    *PERMISSION_DENIED* | *UNAUTHENTICATED* | *INVALID_ARGUMENT* | *"does not have permission"*) ;;
    *"has not been used in project"* | *"unrecognized arguments"* | *"Invalid choice"* | *"Must be specified"*) ;;
    *"(Forbidden)"* | *"(Unauthorized)"* | *"be logged in to the server"* | *"no matches for kind"* | *"current-context"*) ;;
    *"nvalid partition"* | *"nvalid account"* | *"nvalid qos"* | *"unrecognized option"* | *"not permitted"*) ;;
    *) return 1 ;;
  esac
}

# need VARIABLE OPTION EXAMPLE
need() { [[ -n ${!1:-} ]] || fail "$1: is not set; pass $2 or set the variable $1, such as $3"; }

# option VARIABLE "$@": set the variable to the value of the option.
option() {
  [[ $# -ge 3 ]] || fail "$2: needs a value"
  printf -v "$1" %s "$3"
}

# check_experiment [elsewhere]: check EXPERIMENT, the name or path and the overrides; RUN, the run folder, defaults to
# the name. elsewhere: a path is one of another machine.
check_experiment() {
  ((${#EXPERIMENT[@]})) || fail "no experiment; give it after --, such as -- gpt2_124m"
  local word
  for word in "${EXPERIMENT[@]}"; do
    case $word in --out | --out=*) fail "$word: the folder is runs/RUN; pass --run before the --" ;; esac
  done
  local name=${EXPERIMENT[0]} folder
  folder=$(dirname "${BASH_SOURCE[0]}")/..
  case $name in
    *.py) [[ ${1:-} == elsewhere || -f $name || -f $folder/$name ]] || fail "$name: no such file" ;;
    _* | */* | *' '*) fail "$name: no such experiment" ;;
    *) [[ -f $folder/experiments/$name.py ]] || fail "$name: no such experiment; there are: $(experiments "$folder")" ;;
  esac
  if [[ -z $RUN ]]; then
    RUN=$(basename "$name" .py)
  fi
}

# experiments FOLDER: the names of the experiments in a checkout.
experiments() {
  local file names=
  for file in "$1"/experiments/[!_]*.py; do names+=", $(basename "$file" .py)"; done
  printf '%s\n' "${names#, }"
}

DRY_RUN=${DRY_RUN:-}
RUN=${RUN:-}
BUCKET=${BUCKET:-}
TRIES=${TRIES:-5}
PAUSE=${PAUSE:-10}
