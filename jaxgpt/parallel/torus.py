"""How collectives over `fsdp` run along a torus of TPUs: in phases, one for each of its axes.

A v5e slice of 16 x 16 chips is a torus with two axes. A gather over its 256 chips is first one over
the 16 chips of each column, then one over the 16 chips of each row. Asked for all 256 at once, a
TPU's compiler sums arrays that are zero but for a part (of all shapes on some tori, of some on
others), and takes half a minute to compile one all-to-all.
"""

import math

import numpy as np

Torus = tuple[int, ...]  # devices that `fsdp` has along each axis of a torus; (): there is none
Phase = tuple[int, list[list[int]] | None]  # devices in a group, and the groups; None: all in one


def phases(torus: Torus, size: int) -> list[Phase]:
    """Returns the phases of a scatter over `size` devices; those of a gather are in reverse."""
    if len(torus) == 1 or math.prod(torus) != size:
        return [(size, None)]
    numbers = np.arange(size).reshape(torus)
    rows = (np.moveaxis(numbers, axis, -1).reshape(-1, n) for axis, n in enumerate(torus))
    return [(groups.shape[1], groups.tolist()) for groups in rows]


def torus_of(devices: np.ndarray) -> Torus:
    """Returns the torus that the devices of one mesh axis, in order, cross row by row; one axis of
    all devices where they cross none in order or have no coordinates."""
    ring = (len(devices),)
    if len(devices) < 2 or not hasattr(devices[0], "coords"):
        return ring
    coords = np.array([device.coords for device in devices])
    lengths = [len(set(column)) for column in coords.T]
    slowest_first = np.argsort([_stride(column) for column in coords.T])[::-1]
    order = [axis for axis in slowest_first if lengths[axis] > 1]
    sizes = tuple(lengths[axis] for axis in order)
    if math.prod(sizes) != len(devices):
        return ring
    row_by_row = np.stack(np.unravel_index(np.arange(len(devices)), sizes), axis=1)
    for axis, size in enumerate(sizes):
        pairs = set(zip(row_by_row[:, axis].tolist(), coords[:, order[axis]].tolist(), strict=True))
        if len(pairs) != size:
            return ring
    return sizes


def _stride(column: np.ndarray) -> int:
    """Returns how many consecutive devices share a coordinate."""
    changes = np.flatnonzero(np.diff(column))
    return int(changes[0]) + 1 if len(changes) else len(column) + 1
