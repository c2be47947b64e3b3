# shellcheck shell=bash
# What the launch scripts share: messages, dry runs, retries. It is sourced. Works with the bash 3.2 of macOS.

say() { printf '%s\n' "$*" >&2; }

fail() {
  say "error: $*"
  exit 2
}

# usage FILE: the comment at the top of a script.
usage() { awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$1"; }

# quote WORD...: one line to paste into a shell.
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

# run COMMAND...: runs it; a dry run prints it.
run() {
  if [[ -n $DRY_RUN ]]; then quote "$@"; else "$@"; fi
}

# retry COMMAND...: run, up to TRIES times, with pauses that double from PAUSE seconds.
retry() {
  local attempt code pause=$PAUSE
  for ((attempt = 1; ; attempt++)); do
    code=0
    run "$@" || code=$?
    ((code)) || return 0
    ((attempt < TRIES)) || break
    say "exit code $code, attempt $attempt of $TRIES; again in $pause s"
    sleep "$pause"
    pause=$((2 * pause))
  done
  say "error: exit code $code after $TRIES attempts: $(quote "$@")"
  return "$code"
}

# need VARIABLE OPTION EXAMPLE
need() { [[ -n ${!1:-} ]] || fail "$1: is not set; say $2 or set the variable $1, such as $3"; }

# option VARIABLE "$@": takes the value of the option that is the next argument.
option() {
  [[ $# -ge 3 ]] || fail "$2: lacks its value"
  printf -v "$1" %s "$3"
}

# check_experiment: EXPERIMENT is the name and the overrides; RUN, the folder of the run, comes from its name.
check_experiment() {
  ((${#EXPERIMENT[@]})) || fail "no experiment; say it after --, such as -- gpt2_124m"
  local word
  for word in "${EXPERIMENT[@]}"; do
    case $word in --out | --out=*) fail "$word: the folder is runs/RUN; say --run before the --" ;; esac
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
