"""Other meshes, remat policies and batch sizes: the cheapest that fits, or all of them ranked."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from jaxgpt.config import Config
from jaxgpt.config.schema import MESH_AXES
from jaxgpt.config.validate import changed
from jaxgpt.parallel.mesh import mesh_shape
from jaxgpt.system.console import say
from jaxgpt.system.errors import BadInput

POLICIES = ("none", "dots", "full", "offload")  # by the memory they need, the most first
ONE_DEVICE = {f"mesh.{axis}": 1 for axis in MESH_AXES}
Change = dict[str, Any]
Plan = dict[str, Any]


def accumulations(config: Config) -> list[int]:
    """Returns the doublings of `grad_accum` that divide the batch."""
    doublings = [config.grad_accum * 2**n for n in range(1, 16)]
    return [n for n in doublings if n <= config.batch_size and config.batch_size % n == 0]


def smaller(config: Config) -> Iterator[Change]:
    """Yields changes that need less memory, roughly the fastest first: shard the parameters before
    recomputing matrix products."""
    # without "offload", which only the user can choose
    policies = POLICIES[POLICIES.index(config.compute.remat) + 1 : -1]
    accums = accumulations(config)
    spread = {"mesh.data": 1, "mesh.fsdp": -1}
    meshes = [{}] if config.mesh.data == 1 else [{}, spread]
    for mesh in meshes:
        if mesh:
            yield mesh
        yield from (mesh | {"compute.remat": p} for p in policies[:1])
        yield from (mesh | {"grad_accum": n} for n in accums[:1])
        yield from (mesh | {"compute.remat": p} for p in policies[1:])
        last = {"compute.remat": config.compute.remat if not policies else "full"}
        yield from (mesh | last | {"grad_accum": n} for n in accums)


def cheapest_that_fits(
    config: Config, plan_of: Callable[[Config], Plan], tries: int = 12
) -> tuple[Change, Plan] | None:
    """Returns the first of `smaller` changes that fits, and its plan; None after `tries`."""
    for change, _ in zip(smaller(config), range(tries)):
        try:
            plan = plan_of(changed(config, change))
        except BadInput:
            continue  # the devices do not divide this mesh or batch
        if plan["fits"]:
            return change, plan
    return None


def candidates(config: Config, devices: int) -> Iterator[tuple[Change, list[int]]]:
    """Yields each mesh and remat policy to try, and the `grad_accum`s for it, ascending."""
    tensors = [t for t in (1, 2, 4, 8) if devices % t == 0]
    meshes = [ONE_DEVICE | {"mesh.data": devices}]
    meshes += [ONE_DEVICE | {"mesh.fsdp": devices // t, "mesh.tensor": t} for t in tensors]
    shapes = {mesh_shape(config, devices), *(tuple(sizes.values()) for sizes in meshes)}
    for mesh in sorted(shapes, reverse=True):
        sizes = dict(zip(ONE_DEVICE, mesh, strict=True))
        start = dataclasses.replace(config, grad_accum=1)
        for policy in POLICIES[:-1]:
            yield sizes | {"compute.remat": policy}, [1, *accumulations(start)]


def search(config: Config, devices: int, plan_of: Callable[[Config], Plan]) -> list[dict]:
    """Returns what fits, by the roofline's tokens per second, the most first.

    These are every mesh and policy with the fewest microbatches that fit, and the best of them with
    the batch doubled as long as it fits. A larger batch may need another learning rate.
    """
    rows = []
    for change, accums in candidates(config, devices):
        plans = (_plan_if_fits(config, change | {"grad_accum": n}, plan_of) for n in accums)
        if row := next(filter(None, plans), None):
            rows.append(row)
    rows.sort(key=lambda row: row["seconds"])
    for doublings in range(1, 5 if rows else 1):
        batch = {"batch_size": config.batch_size * 2**doublings}
        row = _plan_if_fits(config, rows[0]["change"] | batch, plan_of)
        if row is None:
            break
        rows.append(row)
    size = config.batch_size
    return sorted(rows, key=lambda row: row["seconds"] / row["change"].get("batch_size", size))


def _plan_if_fits(config: Config, change: Change, plan_of: Callable[[Config], Plan]) -> dict | None:
    """Returns the plan of a change that fits, with `change` and `seconds`; None if it does not."""
    name = " ".join(f"{field.split('.')[-1]}={value}" for field, value in change.items())
    try:
        plan = plan_of(changed(config, change))
    except BadInput:
        return None  # the devices do not divide this mesh or batch
    if not plan["fits"]:
        say(f"search    {name}: does not fit")
        return None
    seconds = max(plan["roofline_seconds"].values())
    say(f"search    {name}: {seconds:.3f} s, bound by {plan['bound_by']}")
    return {"change": change, "seconds": seconds, **plan}
