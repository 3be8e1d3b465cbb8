"""Building the (data, fsdp, tensor) mesh that every program runs under."""

import math

import jax
from jax.sharding import AxisType, Mesh

from jaxgpt.config import BadInput, Config
from jaxgpt.config.validate import check_divisible

AXES = ("data", "fsdp", "tensor")


def mesh_shape(config: Config, num_devices: int) -> tuple[int, int, int]:
    """Returns the size of each of `AXES` with -1 filled in.

    Raises:
      BadInput: if the axes do not multiply to `num_devices`, or do not divide the model or batch.
    """
    wanted = [config.mesh.data, config.mesh.fsdp, config.mesh.tensor]
    fixed = math.prod(size for size in wanted if size != -1)
    shape = tuple(num_devices // fixed if size == -1 else size for size in wanted)
    if math.prod(shape) != num_devices:
        text = ", ".join(f"mesh.{axis}={size}" for axis, size in zip(AXES, wanted, strict=True))
        raise BadInput(
            f"{text} needs {'a multiple of ' if -1 in wanted else ''}{fixed} devices,"
            f" but there are {num_devices}; set one axis to -1 to use whatever is there"
        )
    check_divisible(config, *shape)
    return shape


def make_mesh(config: Config, devices: list | None = None) -> Mesh:
    """Returns the mesh over `devices` (default: all of them), every axis of type Explicit.

    Raises:
      BadInput: see `mesh_shape`.
    """
    devices = jax.devices() if devices is None else devices
    shape = mesh_shape(config, len(devices))
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Explicit,) * 3, devices=devices)
