#!/usr/bin/env bash
# Trains on all GPUs of this host, again after a fault: launch/gpu_host.sh CONFIG [FLAG...]
#
#   launch/gpu_host.sh configs/small.py --workdir=runs/small --config.batch_size=512
set -euo pipefail

[ $# -gt 0 ] || { sed -n 's/^# \{0,1\}//; 2,4p' "$0" >&2; exit 2; }
config=$1
shift
export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}"
exec "$(dirname "$0")/restart.sh" "${PYTHON:-python3}" -m jaxgpt.train --config="$config" "$@"
