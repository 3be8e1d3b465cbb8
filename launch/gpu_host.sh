#!/usr/bin/env bash
# Trains on all GPUs of this host, again after a fault: launch/gpu_host.sh CONFIG [FLAG...]
#
#   launch/gpu_host.sh configs/small.py --workdir=runs/small --config.batch_size=512
#
# Your own XLA_FLAGS go behind those set here, so they decide.
set -euo pipefail

[ $# -gt 0 ] || { sed -n 's/^# \{0,1\}//; 2,6p' "$0" >&2; exit 2; }
config=$1
shift
# JAX alone takes 75% of the memory; what is left here is for CUDA's context, NCCL and cuBLAS.
export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}"
# A loop over layers gathers the next layer's weights, and sums the last one's gradients, while it
# computes: compiled for h100:8, 95% of the bytes move beside other work instead of 85%, for 6% more
# temporaries. One GPU has no collectives, so there these flags change nothing.
flags="--xla_gpu_enable_pipelined_all_gather=true"
flags+=" --xla_gpu_enable_pipelined_reduce_scatter=true"
flags+=" --xla_gpu_enable_pipelined_all_reduce=true"
# Left as they are: the latency-hiding scheduler, which is on (the compiled schedule is the same with
# the flag), and command buffers, which launch a layer's small kernels as one graph. For a profile
# that names each kernel's operation: XLA_FLAGS=--xla_gpu_enable_command_buffer=
export XLA_FLAGS="$flags ${XLA_FLAGS:-}"
exec "$(dirname "$0")/restart.sh" "${PYTHON:-python3}" -m jaxgpt.train --config="$config" "$@"
