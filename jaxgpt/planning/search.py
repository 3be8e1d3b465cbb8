"""Other meshes, remat policies and batch sizes: the cheapest that fits, or all of them ranked."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from jaxgpt.config import Config
from jaxgpt.config.schema import MESH_AXES
from jaxgpt.config.validate import changed
from jaxgpt.parallel.mesh import mesh_shape
from jaxgpt.system.console import say
from jaxgpt.system.errors import BadInput

POLICIES = ("none", "dots", "full", "offload")  # by the memory they need, the most first
OTHERS = [axis for axis in MESH_AXES if axis not in ("data", "fsdp")]
LONG = 16_384  # tokens from which on attention's activations outgrow the weights of a layer
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


def meshes(config: Config, devices: int, slices: int = 1) -> list[Change]:
    """Returns the meshes to try, those that `check_divisible` admits.

    The config's own, `data` alone, and `fsdp` with one other axis of 2, 4, 8 or 16 devices (tensor:
    at most 8, inside a host), `data` going over the slices alone. `context` only where sequences
    are long or fewer than devices, as it only then beats `fsdp`.
    """
    own = dict(zip(ONE_DEVICE, mesh_shape(config, devices), strict=True))
    each, sizes = devices // slices, (2, 4, 8, 16)
    others = {"tensor": sizes[:3], "expert": sizes, "pipeline": sizes}
    if config.model.max_seq_len >= LONG or config.batch_size < devices:
        others["context"] = sizes
    spread = ONE_DEVICE | {"mesh.data": slices}
    found = [own, ONE_DEVICE | {"mesh.data": devices}, spread | {"mesh.fsdp": each}]
    found += [
        spread | {"mesh.fsdp": each // size, f"mesh.{axis}": size}
        for axis, sizes in others.items()
        for size in sizes
        if each % size == 0
    ]
    return _admitted(config, found)


def products(config: Config, rows: list[dict]) -> list[Change]:
    """Returns the products of two other axes than `data` and `fsdp`, each of the size with which it
    was fastest, of the two or three fastest axes; `rows` are of `meshes`, the fastest first."""
    best = {}
    for mesh in (row["change"] for row in rows):
        axes = [f"mesh.{axis}" for axis in OTHERS if mesh[f"mesh.{axis}"] > 1]
        if len(axes) == 1:
            best.setdefault(axes[0], mesh)
    found = []
    for one, two in itertools.combinations(list(best)[:3], 2):
        size, fsdp = best[two][two], best[one]["mesh.fsdp"]
        if fsdp % size == 0:
            mesh = {field: best[one][field] for field in ONE_DEVICE}
            found.append(mesh | {two: size, "mesh.fsdp": fsdp // size})
    return _admitted(config, found)


def _admitted(config: Config, found: list[Change]) -> list[Change]:
    kept = []
    for mesh in found:
        try:
            changed(config, mesh | {"grad_accum": 1})
        except BadInput:
            continue  # the devices do not divide the model or the batch
        if mesh not in kept:
            kept.append(mesh)
    return kept


def search(
    config: Config, devices: int, plan_of: Callable[[Config], Plan], slices: int = 1
) -> list[dict]:
    """Returns what fits, by the roofline's tokens per second, the most first.

    First every one of `meshes`, and `products` of what is fastest among them, each with the
    config's remat policy, or "full" where that does not fit, and the fewest microbatches that fit.
    Then the fastest two with the other policies, and the best with the batch doubled as long as it
    fits. A larger batch may need another learning rate.
    """
    accums = [1, *accumulations(dataclasses.replace(config, grad_accum=1))]

    def fitting(change: Change, policies: Iterable[str]) -> list[dict]:
        rows = []
        for policy in policies:
            tried = (change | {"compute.remat": policy, "grad_accum": n} for n in accums)
            rows.append(
                next(filter(None, (_plan_if_fits(config, c, plan_of) for c in tried)), None)
            )
        return [row for row in rows if row]

    def of_mesh(mesh: Change) -> list[dict]:
        own = config.compute.remat
        return fitting(mesh, [own]) or (fitting(mesh, ["full"]) if own != "full" else [])

    def fastest_first(rows: list[dict]) -> list[dict]:
        return sorted(rows, key=lambda row: row["seconds"])

    rows = fastest_first([row for m in meshes(config, devices, slices) for row in of_mesh(m)])
    rows += [row for mesh in products(config, rows) for row in of_mesh(mesh)]
    for row in fastest_first(rows)[:2]:
        mesh = {field: row["change"][field] for field in ONE_DEVICE}
        others = [p for p in POLICIES[:-1] if p != row["change"]["compute.remat"]]
        rows += fitting(mesh, others)
    best = fastest_first(rows)[:1]
    for doublings in range(1, 5 if rows else 1):
        batch = {"batch_size": config.batch_size * 2**doublings}
        row = _plan_if_fits(config, best[0]["change"] | batch, plan_of)
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
