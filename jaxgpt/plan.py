"""Predict the memory and the time of a run on TPUs or GPUs, on any machine:

    python -m jaxgpt.plan --config=FILE [--topology=v5e:2x4] [--config.FIELD=VALUE ...]

Compiles the real train step, on any machine, for a TPU slice (`pip install -e '.[plan]'`) or for
GPUs (--topology=h200, h100:8, a100:2x8; `'.[plan-gpu]'`); without --topology, for this machine's
devices. --slices=N plans for N such slices joined by the data-centre network, over which a chip
sends --slice_bandwidth GB/s (default: what Google publishes). Prints what a step needs and the
shortest time it can take: a table on stderr, JSON as the last line of stdout. If it does not fit,
it says by how much, and suggests the cheapest change that does; if nothing that was tried fits, it
names the nearest and exits with 1.
--search tries meshes, remat policies, accumulation and larger batches, and ranks what fits.
--price=DOLLARS is the cost of one device per hour.
"""

import dataclasses
import json
from collections.abc import Iterator

from absl import flags

from jaxgpt.cli.flags import config_of, define_config_flag, parse
from jaxgpt.cli.run import run
from jaxgpt.config import Config
from jaxgpt.config.schema import differing
from jaxgpt.planning.topology import check_slices, check_topology
from jaxgpt.system.console import say
from jaxgpt.system.errors import BadInput
from jaxgpt.system.programs import keep_no_programs
from jaxgpt.tokenizer.load import vocabulary_size

GIB = 2**30


def main(argv: list[str]) -> int:
    values = flags.FlagValues()
    define_config_flag(values, argv)
    flags.DEFINE_string(
        "topology", "", "v5e:2x4, h200, h200:8...; default: here", flag_values=values
    )
    flags.DEFINE_integer("slices", 1, "so many slices of that topology", flag_values=values)
    flags.DEFINE_float(
        "slice_bandwidth",
        0.0,
        "GB/s that a chip sends to other slices; 0: v5e 3.125, v5p 6.25, v6e 12.5",
        flag_values=values,
    )
    flags.DEFINE_bool("search", False, "try other meshes and policies", flag_values=values)
    flags.DEFINE_float("price", 0.0, "dollars per device and hour", flag_values=values)
    config = config_of(parse(values, argv, __doc__))
    if not 0 <= values.price < float("inf"):
        raise BadInput(f"--price={values.price} must be a number of dollars, at least 0")
    check_topology(values.topology)
    check_slices(values.topology, values.slices, values.slice_bandwidth)
    # JAX is imported only now, so that wrong flags are reported at once
    from jaxgpt.parallel.mesh import slices_of
    from jaxgpt.planning.estimate import make_plan
    from jaxgpt.planning.hardware import devices_of, use_compilers_alone
    from jaxgpt.planning.search import cheapest_that_fits, search
    from jaxgpt.training.setup import resolve_vocab

    size = config.model.vocab_size or vocabulary_size(
        config.data.tokenizer, config.data.special_tokens
    )
    config = resolve_vocab(config, size)
    keep_no_programs()  # what is compiled is timed
    if values.topology:
        use_compilers_alone()
    devices, chip = devices_of(values.topology, values.slices)
    if values.slice_bandwidth:
        chip = dataclasses.replace(chip, between=values.slice_bandwidth * 1e9)
    if values.search and chip is None:
        raise BadInput(
            "--search ranks by the devices' speed, which is unknown here: give --topology"
        )
    tried = []  # (config, plan)

    def plan_of(config: Config) -> dict:
        tried.append((config, make_plan(config, devices, chip)))
        return tried[-1][1]

    say(f"compile   the train step for {values.topology or 'the devices here'}")
    plan = {"topology": values.topology or devices[0].device_kind} | plan_of(config)
    if not plan["fits"] and not values.search:
        say("search    the cheapest change that fits")
        cheapest = cheapest_that_fits(config, plan_of)
        plan["suggestion"] = cheapest and {"change": cheapest[0], **cheapest[1]}
    if values.search:
        plan["search"] = search(config, len(devices), plan_of, slices_of(devices))
    if not (fits := any(plan["fits"] for _, plan in tried)):
        plan["nearest"] = nearest(config, tried)
    if values.price:
        plan |= _cost(plan, values.price)
    for line in table(plan):
        say(line)
    print(json.dumps(plan))
    return 0 if fits else 1


def nearest(config: Config, tried: list[tuple[Config, dict]]) -> dict:
    """Returns the plan that needs the least memory and, as `change`, its config's changes."""
    needs_least, plan = min(tried, key=lambda pair: pair[1]["bytes_per_device"]["total"])
    return {"change": differing(needs_least, config), **plan}


def _cost(plan: dict, price: float) -> dict:
    """Returns the dollars per billion tokens at the speed that the roofline allows."""
    if not plan["roofline_seconds"]:
        return {"dollars_per_billion_tokens": None}
    seconds = max(plan["roofline_seconds"].values()) / plan["tokens_per_step"] * 1e9
    return {"dollars_per_billion_tokens": seconds / 3600 * price * plan["devices"]}


def table(plan: dict) -> Iterator[str]:
    """Yields the lines of a plan as people read it."""
    memory, mesh = plan["bytes_per_device"], plan["mesh"]
    shape = " x ".join(f"{axis} {size}" for axis, size in mesh.items())
    limit = f" of {memory['limit'] / GIB:.2f} GiB" if memory["limit"] else " GiB"
    slices = f"{plan['slices']} x " if plan["slices"] > 1 else ""
    yield (
        f"devices   {plan['devices']} ({slices}{plan['topology']}), mesh {shape},"
        f" {plan['attention']} attention"
    )
    active = plan["active_parameters"]
    of_a_token = f", of which a token goes through {active:,}" * (active < plan["parameters"])
    yield f"model     {plan['parameters']:,} parameters{of_a_token}"
    if bubble := plan.get("pipeline_bubble"):
        yield f"pipeline  stages wait {bubble:.1%} of the time (the bubble)"
    yield (
        f"memory    {memory['total'] / GIB:.2f}{limit} a device:"
        f" {memory['arguments'] / GIB:.2f} state and batch,"
        f" {memory['temporaries'] / GIB:.2f} temporaries"
    )
    for array in plan["largest"]:
        shape = "x".join(map(str, array["shape"]))
        yield (
            f"          {array['bytes'] / GIB:6.2f} GiB  {array['dtype']:<9} {shape:<24}"
            f" {array['sharding']:<34} {array['name'][-60:]}"
        )
    if not plan["fits"]:
        yield f"fits      NO, by {plan['over_by'] / GIB:.2f} GiB a device"
        if suggestion := plan.get("suggestion"):
            change = _shown(suggestion["change"], "--config.")
            yield f"try       {change} ({suggestion['bytes_per_device']['total'] / GIB:.2f} GiB)"
    if least := plan.get("nearest"):
        total, over = least["bytes_per_device"]["total"] / GIB, least["over_by"] / GIB
        change = _shown(least["change"], "--config.") or "this config"
        yield f"nothing   that was tried fits; the nearest is {change} ({total:.2f} GiB,"
        yield f"          {over:.2f} too many): take more devices, a smaller model or max_seq_len"
    if plan["compiled_flops_per_step"]:
        model = plan["flops_per_step"]
        ratio = plan["compiled_flops_per_step"] / model
        yield f"compute   {model:.3e} model FLOPs a step, {ratio:.2f} of them compiled"
    for row in plan["collectives"]:
        yield (
            f"network   {row['kind']:<18} over {row['axis']:<12} {row['count']:5d} a step,"
            f" {row['bytes'] / GIB:8.3f} GiB"
        )
    if roofline := plan["roofline_seconds"]:
        parts = ", ".join(f"{name} {seconds:.4f}" for name, seconds in roofline.items())
        longest = max(roofline.values())
        yield (
            f"at least  {longest:.4f} s a step, {plan['tokens_per_step'] / longest:,.0f} tokens/s"
            f" ({parts}): bound by {plan['bound_by']}"
        )
    if cost := plan.get("dollars_per_billion_tokens"):
        yield f"price     at least {cost:,.2f} dollars for a billion tokens"
    yield f"compiled  in {plan['compile_seconds']:.1f} s"
    for rank, row in enumerate(plan.get("search", [])[:10], start=1):
        total = row["bytes_per_device"]["total"] / GIB
        speed = row["tokens_per_step"] / row["seconds"]
        change = _shown(row["change"])
        yield f"rank {rank:<4} {speed:12,.0f} tokens/s  {total:6.2f} GiB  {change}"


def _shown(change: dict, prefix: str = "") -> str:
    return " ".join(f"{prefix}{field}={value}" for field, value in change.items())


if __name__ == "__main__":
    run(main)
