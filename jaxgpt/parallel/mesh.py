"""Building the mesh that every program runs under; its axes are `MeshConfig`'s."""

import math

import jax
import numpy as np
from jax.experimental.mesh_utils import create_device_mesh, create_hybrid_device_mesh
from jax.sharding import AxisType, Mesh

from jaxgpt.config import Config
from jaxgpt.config.schema import MESH_AXES
from jaxgpt.config.validate import check_divisible
from jaxgpt.parallel.rules import AxisRules
from jaxgpt.parallel.torus import torus_of
from jaxgpt.system.errors import BadInput

AXES = tuple(MESH_AXES)


def mesh_shape(config: Config, num_devices: int) -> tuple[int, ...]:
    """Returns the size of each of `AXES` with -1 filled in. Raises `BadInput` if the axes do not
    multiply to `num_devices`, or do not divide the model or batch."""
    wanted = [getattr(config.mesh, axis) for axis in AXES]
    fixed = math.prod(size for size in wanted if size != -1)
    shape = tuple(num_devices // fixed if size == -1 else size for size in wanted)
    if math.prod(shape) != num_devices:
        text = ", ".join(f"mesh.{axis}={size}" for axis, size in zip(AXES, wanted, strict=True))
        raise BadInput(
            f"{text} needs {'a multiple of ' if -1 in wanted else ''}{fixed} devices,"
            f" but there are {num_devices}; set one axis to -1 to use whatever is there"
        )
    check_divisible(config, dict(zip(AXES, shape, strict=True)))
    return shape


def make_mesh(config: Config, devices: list | None = None) -> Mesh:
    """Returns the mesh over `devices` (default: all of them), every axis of type Explicit.

    `fsdp` alone goes over a torus row by row, for sums in phases (see `parallel.torus`), where JAX
    would lay small slices out as one ring. Where the devices are several slices of TPUs, joined by
    the slower data-centre network, `data` goes over the slices and everything else stays inside
    one.

    Raises:
      BadInput: see `mesh_shape`; if `data` cannot go over the slices.
    """
    devices = jax.devices() if devices is None else devices
    shape = mesh_shape(config, len(devices))
    explicit = (AxisType.Explicit,) * len(AXES)
    slices = slices_of(devices)
    fsdp, data = shape[AXES.index("fsdp")], shape[AXES.index("data")]
    if slices == 1 and fsdp == len(devices) and (ordered := _by_coordinates(devices)):
        return Mesh(np.array(ordered).reshape(shape), AXES, axis_types=explicit)
    if slices == 1:
        grid = create_device_mesh(shape, devices, allow_split_physical_axes=True)
        return Mesh(grid, AXES, axis_types=explicit)
    if data % slices:
        raise BadInput(
            f"mesh.data={data} cannot go over {slices} slices of devices; make it a multiple of"
            f" {slices}"
        )
    outside = [slices if axis == "data" else 1 for axis in AXES]
    inside = [size // slices for size, slices in zip(shape, outside, strict=True)]
    grid = create_hybrid_device_mesh(inside, outside, devices)
    return Mesh(grid, AXES, axis_types=explicit)


def slices_of(devices) -> int:
    """Returns over how many slices of TPUs the devices, a list or an array, are spread."""
    return len({getattr(device, "slice_index", 0) for device in np.ravel(devices)})


def rules_of(mesh: Mesh, split_residual: bool = False) -> AxisRules:
    """Returns how arrays are split over a mesh."""
    axes = tuple(axis for axis, size in mesh.shape.items() if size > 1)
    torus = torus_of(devices_along(mesh, "fsdp"))
    return AxisRules(axes, split_residual=split_residual, torus=torus)


def devices_along(mesh: Mesh, axis: str) -> np.ndarray:
    """Returns the devices along one axis of the mesh, where all other axes are at 0."""
    return mesh.devices[tuple(slice(None) if name == axis else 0 for name in mesh.axis_names)]


def _by_coordinates(devices: list) -> list:
    """Returns a torus's devices in the order of their coordinates; [] where they have none."""
    by_coords = {tuple(getattr(device, "coords", None) or ()): device for device in devices}
    whole = len(by_coords) == len(devices) > 1
    return [by_coords[coords] for coords in sorted(by_coords)] if whole else []
