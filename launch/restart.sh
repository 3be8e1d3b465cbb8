#!/usr/bin/env bash
# Runs a command again until it is done: launch/restart.sh COMMAND [ARGUMENT...]
#
# jaxgpt resumes by itself, so this only decides whether to go on: not after 0 (done), 2 (bad input),
# 3 (diverged) or Ctrl-C, and not when this script itself is told to stop; it hands that on, so that
# the run saves first. After five failures without half an hour of running between them it gives up:
# longer than a run that fails at its start may wait (300 s for other hosts).
set -uo pipefail

[ $# -gt 0 ] || { sed -n 's/^# \{0,1\}//; 2,7p' "$0" >&2; exit 2; }
stopping=0 failures=0 code=0
trap 'stopping=1; kill -TERM "$child" 2>/dev/null' TERM
trap 'stopping=1; kill -INT "$child" 2>/dev/null' INT

while true; do
  began=$SECONDS
  "$@" &
  child=$!
  wait "$child"; code=$?
  while kill -0 "$child" 2>/dev/null; do wait "$child"; code=$?; done # a signal ends `wait` early
  case $code in 0 | 2 | 3 | 130) exit "$code" ;; esac
  [ "$stopping" = 1 ] && exit "$code"
  [ $((SECONDS - began)) -ge "${RESTART_HEALTHY:-1800}" ] && failures=0
  failures=$((failures + 1))
  if [ "$failures" -ge 5 ]; then
    echo "launch    ended with code $code, $failures times in a row: giving up" >&2
    exit "$code"
  fi
  pause=${RESTART_PAUSE:-$((10 * failures))}
  echo "launch    ended with code $code; again in $pause s" >&2
  sleep "$pause"
done
