"""Descriptions of NVIDIA GPUs for XLA, which compiles for them where there are none."""

from __future__ import annotations

import dataclasses

ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "-1",  # compile for the description, not for a GPU that happens to be here
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",  # it asks CUDA's libraries for versions, which needs a driver
}
"""Read by jax's CUDA plugin when jax starts."""


@dataclasses.dataclass(frozen=True)
class Gpu:
    """Figures of a GPU that XLA decides by: tiles, fusions, what fits into shared memory."""

    name: str
    """`jax.Device.device_kind`."""
    compute_capability: int
    """Major version; the minor is 0 for all of them."""
    cores: int
    """Streaming multiprocessors."""
    units: int
    """Float32 units per core."""
    clock: float
    """GHz."""
    memory: int
    """Bytes."""
    bandwidth: float
    """Bytes/s."""
    cache: int
    """Bytes of the L2 cache."""
    shared: int
    """Bytes of shared memory per core."""

    @property
    def description(self) -> str:
        """Text of the protocol buffer `stream_executor.GpuTargetConfigProto`."""
        return f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  core_count: {self.cores} fpus_per_core: {self.units} clock_rate_ghz: {self.clock}
  device_memory_size: {self.memory} memory_bandwidth: {self.bandwidth:.0f} l2_cache_size: {self.cache}
  shared_memory_per_core: {self.shared} shared_memory_per_block: 49152
  shared_memory_per_block_optin: {self.shared - 1024}
  cuda_compute_capability {{ major: {self.compute_capability} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
runtime_version {{ major: 13 }}
device_description_str: "{self.name}"
"""


# github.com/openxla/xla, xla/backends/gpu/target_config/specs (read 2026-11): what the cards say of themselves.
GPUS = {
    "a100": Gpu("NVIDIA A100-SXM4-80GB", 8, 108, 64, 1.41, 85100068864, 2.039e12, 41943040, 167936),
    "h100": Gpu("NVIDIA H100 80GB HBM3", 9, 132, 128, 1.98, 84942979072, 3.352e12, 52428800, 233472),
    "h200": Gpu("NVIDIA H200", 9, 132, 128, 1.98, 151397597184, 4.8e12, 52428800, 233472),
    "b200": Gpu("NVIDIA B200", 10, 148, 128, 1.965, 191514411008, 7.672e12, 132644864, 233472),
}
