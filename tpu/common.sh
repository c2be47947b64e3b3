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

# retry COMMAND...: run it up to TRIES times, with pauses of PAUSE seconds, doubled every time.
retry() {
  local attempt code pause=$PAUSE
  for ((attempt = 1; ; attempt++)); do
    code=0
    run "$@" || code=$?
    ((code)) || return 0
    ((attempt < TRIES)) || break
    say "exit code $code, attempt $attempt of $TRIES; retrying in $pause s"
    sleep "$pause"
    pause=$((2 * pause))
  done
  say "error: exit code $code after $TRIES attempts: $(quote "$@")"
  return "$code"
}

# need VARIABLE OPTION EXAMPLE
need() { [[ -n ${!1:-} ]] || fail "$1: is not set; pass $2 or set the variable $1, such as $3"; }

# option VARIABLE "$@": set the variable to the value of the option.
option() {
  [[ $# -ge 3 ]] || fail "$2: needs a value"
  printf -v "$1" %s "$3"
}

# check_experiment: check EXPERIMENT, the name and the overrides; RUN, the run folder, defaults to the name.
check_experiment() {
  ((${#EXPERIMENT[@]})) || fail "no experiment; give it after --, such as -- gpt2_124m"
  local word
  for word in "${EXPERIMENT[@]}"; do
    case $word in --out | --out=*) fail "$word: the folder is runs/RUN; pass --run before the --" ;; esac
  done
  if [[ -z $RUN ]]; then
    RUN=$(basename "${EXPERIMENT[0]}" .py)
  fi
}

DRY_RUN=${DRY_RUN:-}
RUN=${RUN:-}
BUCKET=${BUCKET:-}
TRIES=${TRIES:-5}
PAUSE=${PAUSE:-10}
