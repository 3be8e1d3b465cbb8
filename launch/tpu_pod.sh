#!/usr/bin/env bash
# Trains on a Cloud TPU slice, all hosts of it: launch/tpu_pod.sh NAME CONFIG [FLAG...]
#
#   ZONE=us-west4-a TYPE=v5litepod-16 launch/tpu_pod.sh my-tpu configs/medium.py \
#     --workdir=gs://my-bucket/runs/medium --config.data.source='jsonl:gs://my-bucket/text/*.jsonl'
#
# Makes the slice if there is none (SPOT=1: a spot one), puts this checkout on every host (all files
# that git does not ignore), installs it and trains. After a preemption it makes the slice again and
# goes on; the workdir must be on a bucket or a shared disk. The slice stays when training is done:
# delete it.
# VERSION is the TPU software version, PROJECT the project, if not gcloud's own.
set -uo pipefail

[ $# -ge 2 ] || { sed -n 's/^# \{0,1\}//; 2,11p' "$0" >&2; exit 2; }
name=$1 config=$2
shift 2
zone=${ZONE:?set ZONE, as in ZONE=us-west4-a}
type=${TYPE:?set TYPE, as in TYPE=v5litepod-16}
version=${VERSION:-v2-alpha-tpuv5-lite}
where=(--zone="$zone")
[ -n "${PROJECT:-}" ] && where+=(--project="$PROJECT")
root=$(cd "$(dirname "$0")/.." && pwd)
git -C "$root" rev-parse || exit 2 # git knows what to pack

tpu() { gcloud compute tpus tpu-vm "$@" "${where[@]}" --quiet; }
state() { tpu describe "$name" --format='value(state)' 2>/dev/null; }

# Makes the slice unless it is ready; fails while there is no capacity.
make() {
  case $(state) in
  READY) return 0 ;;
  "") ;;
  *) tpu delete "$name" ;; # preempted, or half made
  esac
  local spot=()
  [ -n "${SPOT:-}" ] && spot=(--spot)
  tpu create "$name" --accelerator-type="$type" --version="$version" "${spot[@]}"
}

# Lists the checkout's files, each ended by a NUL: new ones too, but no virtual environment and no runs.
files() {
  git -C "$root" ls-files -z --cached --others --exclude-standard |
    while IFS= read -r -d '' file; do
      if [ -e "$root/$file" ]; then printf '%s\0' "$file"; fi
    done
}

# Puts the checkout on every host and installs it there.
install() {
  local bundle
  bundle=$(mktemp -d)/jaxgpt.tar.gz
  files | tar -C "$root" -czf "$bundle" --null -T - || return
  tpu scp "$bundle" "$name:jaxgpt.tar.gz" --worker=all &&
    tpu ssh "$name" --worker=all --command="mkdir -p jaxgpt && tar -C jaxgpt -xzf jaxgpt.tar.gz &&
      cd jaxgpt && python3 -m venv ~/venv && ~/venv/bin/pip install -q -e '.[tpu]'"
  local code=$?
  rm -r "$(dirname "$bundle")"
  return "$code"
}

printf -v quoted '%q ' --config="$config" "$@"
while true; do
  if make && install; then
    # gcloud does not hand the command's own exit code on, so the first host keeps it
    tpu ssh "$name" --worker=all --command="cd jaxgpt && rm -f exit &&
      ~/venv/bin/python -m jaxgpt.train $quoted; code=\$?; echo \$code >exit; exit \$code"
    code=$(tpu ssh "$name" --worker=0 --command="cat jaxgpt/exit" 2>/dev/null || echo unknown)
    case $code in 0 | 2 | 3 | 130) exit "$code" ;; esac
    echo "launch    training ended with code $code, the slice is $(state)" >&2
  else
    echo "launch    no slice yet" >&2
  fi
  sleep "${RESTART_PAUSE:-60}"
done
