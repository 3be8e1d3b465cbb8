"""GPUs described to XLA's compiler, which then compiles for them where there is none."""

import dataclasses

import jax
from jax.experimental import topologies

from jaxgpt.system.errors import BadInput
from jaxgpt.system.extras import require

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Gpu:
    """An SXM GPU, by NVIDIA's data sheets, architecture papers and CUDA's device queries."""

    kind: str  # JAX's `device_kind`
    capability: int  # CUDA's compute capability, major
    cores: int  # streaming multiprocessors
    lanes: int  # float32 lanes of a core
    clock: float  # GHz
    cache: int  # second level, MiB
    shared: int  # KiB of a core's shared memory; a block may take all but 1 KiB
    memory: int  # GiB
    bandwidth: int  # GB/s of that memory
    links: int  # NVLinks
    card: int  # GB/s of a network card; each GPU has one, as in a DGX


H100 = Gpu("NVIDIA H100 80GB HBM3", 9, 132, 128, 1.98, 50, 228, 79, 3_352, 18, 50)
GPUS = {
    "a100": Gpu("NVIDIA A100-SXM4-80GB", 8, 108, 64, 1.41, 40, 164, 79, 2_039, 12, 25),
    "h100": H100,
    "h200": dataclasses.replace(H100, kind="NVIDIA H200", memory=139, bandwidth=4_800),
}


def describe_gpus(name: str, hosts: int, each: int) -> list[jax.Device]:
    """Returns devices to compile for: `each` GPUs `GPUS[name]` on each of `hosts` hosts. Raises
    `BadInput` if JAX's plugin for CUDA is not installed, or its version is not JAX's."""
    require("jax_plugins.xla_cuda13", "plan-gpu", f"--topology={name}")
    try:
        return list(
            topologies.get_topology_desc(
                "", platform="cuda", topology=f"1x{hosts}x{each}", target_config=target(GPUS[name])
            ).devices
        )
    except RuntimeError as e:
        raise BadInput(
            f"--topology={name}: JAX's plugin for CUDA refuses the description"
            f" ({str(e).splitlines()[0][:200]}); install the plugin of JAX's own version:"
            " pip install -e '.[plan-gpu]'"
        ) from e


def target(gpu: Gpu) -> str:
    """Returns XLA's `GpuTargetConfigProto` of a GPU, as text. Versions are those of CUDA 13."""
    extension = "ACCELERATED_FEATURES" if gpu.capability >= 9 else "NONE"
    return f"""
        platform_name: "CUDA" device_description_str: "{gpu.kind}"
        gpu_device_info {{
          name: "{gpu.kind}" device_vendor: "NVIDIA Corporation" device_address_bits: 64
          cuda_compute_capability {{ major: {gpu.capability} feature_extension: {extension} }}
          core_count: {gpu.cores} fpus_per_core: {gpu.lanes} clock_rate_ghz: {gpu.clock}
          l2_cache_size: {gpu.cache * 2**20} device_memory_size: {gpu.memory * GIB}
          memory_bandwidth: {gpu.bandwidth * 10**9} pcie_bandwidth: {32 * GIB}
          shared_memory_per_core: {gpu.shared * 2**10} shared_memory_per_block: {48 * 2**10}
          shared_memory_per_block_optin: {(gpu.shared - 1) * 2**10}
          registers_per_core_limit: 65536 registers_per_block_limit: 65536
          threads_per_warp: 32 threads_per_core_limit: 2048 threads_per_block_limit: 1024
          thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
          block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
          driver_version: "13.0.0" runtime_version: "13.0.0"
          compile_time_toolkit_version: "13.0.0" dnn_version: "9.12.0"
          device_interconnect_info {{ active_links: {gpu.links} }}
        }}"""
