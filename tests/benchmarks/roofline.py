"""The train step of each config against the roofline of each TPU, by compiling alone:

    python tests/benchmarks/roofline.py [--config=small,...] [--chip=v5e,...]     (extra [plan])

Compiles each config for a slice of each chip (one to three minutes each on two cores), keeps a row
of figures in roofline.json beside this file, in place of an older one, and prints all rows as a
table. Of one chip and step:

  TFLOP     FLOPs of the model (`parameters.flops`)
  executed  FLOPs in the program over those: what is recomputed
  GB        bytes that instructions read from and write to HBM
  ms        the least time of the products, of HBM and of the network, each alone
  MFU       the most that is left of the peak: the longest of the three, and after it what the
            network takes while nothing else runs
  compiler  ms by the compiler's own estimate of each instruction, without kernels and collectives
  copies    ms of those in copies and transposes of a MiB and more, which only change a layout
  async     collectives that run while something else does, of all
  optimizer bytes that the optimizer's instructions move over 28 a parameter: parameter, two moments
            and gradient read, three of them written, in float32; 1 or less is one pass
"""

import argparse
import json
import re
from pathlib import Path

import jax

from jaxgpt.cli.flags import load_file
from jaxgpt.config.validate import changed, validate
from jaxgpt.planning.estimate import make_plan
from jaxgpt.planning.hardware import devices_of, use_compilers_alone
from jaxgpt.planning.program import ARRAY, COLLECTIVES, FUSIONS, Instruction, Program, _bytes
from jaxgpt.system.programs import keep_no_programs

ROOT = Path(__file__).parent.parent.parent
FILE = Path(__file__).with_suffix(".json")
EIGHT = {"v5e": "v5e:2x4", "v5p": "v5p:2x2x2", "v6e": "v6e:2x4"}
MANY = {"v5e": "v5e:16x16", "v5p": "v5p:4x4x4", "v6e": "v6e:16x16"}
GPT2 = {"model.vocab_size": 50257, "grad_accum": 1}
CASES = {  # config: slices, sequences a chip, what is set besides; remat is the config's
    "small": (EIGHT, 8, GPT2),
    "medium": (EIGHT, 8, GPT2),
    "large": (EIGHT, 8, GPT2),
    "xl": (EIGHT, 8, GPT2),
    "modern_1b": (EIGHT, 2, {"model.vocab_size": 128_256, "grad_accum": 1}),
    "modern_8b": (MANY, 1, {}),
    "mixtral_8x7b": (MANY, 1, {}),
}
HERTZ = {"v5e": 1.5e9, "v5p": 1.75e9, "v6e": 1.75e9}  # peak / (FLOPs of the matrix units a cycle)
LAYOUT = {"parameter", "copy", "transpose", "bitcast", "reshape", "tuple", "get-tuple-element"}
LARGE = 2**20  # bytes


def row_of(config: str, chip: str) -> dict:
    """Returns the figures of a config on a chip; bytes and FLOPs of one chip and step."""
    slices, each, fields = CASES[config]
    devices, hardware = devices_of(slices[chip])
    fields = fields | {"batch_size": each * len(devices)}
    cfg = validate(changed(load_file(str(ROOT / f"configs/{config}.py")), fields))
    plan = make_plan(cfg, devices, hardware, look)
    row = {"config": config, "chip": chip, "slice": slices[chip], "sequences": each}
    row |= {"remat": cfg.compute.remat, "fits": plan["fits"], "jax": jax.__version__}
    if not plan["roofline_seconds"]:
        return row
    cycles = {name: plan[name] / HERTZ[chip] for name in ("compiler", "copies")}
    products, memory, network = plan["roofline_seconds"].values()
    hidden = network * plan["beside"][1] / max(plan["all"][1], 1)
    least = max(products, memory, hidden) + network - hidden
    return row | {
        "flops": plan["flops_per_step"] / len(devices),
        "executed": plan["compiled_flops_per_step"] / plan["flops_per_step"],
        "bytes": plan["roofline_seconds"]["memory"] * hardware.hbm_bandwidth,
        "seconds": plan["roofline_seconds"],
        "mfu": plan["flops_per_step"] / len(devices) / hardware.flops / least,
        **{f"{name}_seconds": seconds for name, seconds in cycles.items()},
        **{name: plan[name] for name in ("beside", "all")},
        "optimizer": plan["optimizer"] / (28 * plan["parameters"] / plan["mesh"]["fsdp"]),
    }


def look(program: Program, dump: Path | None) -> dict:
    """Returns what the schedule says: cycles by the compiler's estimate, bytes of the optimizer,
    collectives."""
    optimizer = compiler = copies = 0
    for i, where, times in program.unfused():
        body = program.computations.get(i.called("calls") or "", {}).values()
        if any(re.search(r"\boptimizer\b", inner.source) for inner in (i, *body)):
            optimizer += times * program.moved(i, where)
    (file,) = dump.glob("*jit_train_step*after_codegen.txt")
    generated = Program(file.read_text())
    for i, _, times in generated.unfused():
        if found := re.search(r'estimated_cycles":"(\d+)', i.rest):
            compiler += times * int(found[1])
            copies += times * int(found[1]) * changes_layout(i, generated)
    found = dict(compiler=compiler, copies=copies, optimizer=optimizer)
    return found | beside(program)


def changes_layout(i: Instruction, program: Program) -> bool:
    """Says whether an instruction does nothing but copy a large array to another layout."""
    inside = {i.opcode}
    if i.opcode in FUSIONS:
        inside = {inner.opcode for inner in program.computations[i.called("calls")].values()}
    return i.bytes >= LARGE and inside <= LAYOUT and bool(inside & {"copy", "transpose"})


def beside(program: Program) -> dict[str, list[int]]:
    """Returns [count, bytes] of the collectives that run while something else does, and of all.

    A TPU's compiler starts and ends a collective in fusions called `async-collective-start` and
    `-done`; on SparseCores by `async-start`, `-update` and `-done`; permutes by `-start` and
    `-done`.
    """
    found = {"beside": [0, 0], "all": [0, 0]}
    within = {i.called("calls") for i, _, _ in program if i.opcode in (*FUSIONS, "async-start")}
    for name, computation in program.computations.items():
        times, schedule = program.runs[name], list(computation.values())
        places = {i.name: at for at, i in enumerate(schedule)}
        for at, i in enumerate(schedule if times and name not in within else ()):
            ways = collectives_in(i, program)
            if not ways or i.name.startswith("async-collective-done"):
                continue
            begins = places.get(i.name.replace("start", "update"), at)
            ends = places.get(i.name.replace("start", "done"), at)
            size = times * max(largest(j) for j in (*ways, schedule[ends]))
            hides = any(is_work(j) for j in schedule[begins + 1 : ends])
            for row in ("all", *["beside"] * hides):
                found[row] = [found[row][0] + times, found[row][1] + size]
    return found


def collectives_in(i: Instruction, program: Program) -> list[Instruction]:
    """Returns the collectives that an instruction is or starts, not those it only continues."""
    if i.opcode == "async-start":
        return [i] * i.name.startswith(COLLECTIVES)
    body = program.computations.get(i.called("calls") or "", {}) if i.opcode in FUSIONS else {}
    starts = i.name.startswith("async-collective-start")
    if not starts and any(j.type.startswith("u32[]") for j in body.values()):
        return []
    return [j for j in (i, *body.values()) if j.opcode.removesuffix("-start") in COLLECTIVES]


def largest(i: Instruction) -> int:
    """Returns the bytes of an instruction's largest result."""
    return max((_bytes(match) for match in ARRAY.finditer(i.type)), default=0)


def is_work(i: Instruction) -> bool:
    """Says whether an instruction computes for long enough to hide something."""
    return i.opcode in (*FUSIONS, "convolution", "dot", "custom-call", "while") and (
        i.bytes >= LARGE and not i.name.startswith("async-collective")
    )


def table(rows: list[dict]) -> str:
    """Returns the rows as Markdown."""
    lines = [
        "| config | slice, sequences a chip, remat | TFLOP | executed | GB |"
        " ms: products, HBM, network | MFU | ms: compiler, copies |"
        " async, share of bytes | optimizer |",
        "|" + "---|" * 10,
    ]
    for r in rows:
        where = f"{r['slice']}, {r['sequences']}, {r['remat']}"
        if not r["fits"]:
            lines.append(f"| {r['config']} | {where} | does not fit" + " |" * 8)
            continue
        ms = ", ".join(f"{1e3 * seconds:.1f}" for seconds in r["seconds"].values())
        (some, moved), (count, size) = r["beside"], r["all"]
        lines.append(
            f"| {r['config']} | {where} | {r['flops'] / 1e12:.2f} | {r['executed']:.2f} |"
            f" {r['bytes'] / 1e9:.1f} | {ms} | {r['mfu']:.0%} |"
            f" {1e3 * r['compiler_seconds']:.1f}, {1e3 * r['copies_seconds']:.1f} |"
            f" {some} of {count}, {moved / max(size, 1):.0%} | {r['optimizer']:.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default=",".join(CASES))
    parser.add_argument("--chip", default=",".join(HERTZ))
    args = parser.parse_args()
    keep_no_programs()
    use_compilers_alone()
    for config in filter(None, args.config.split(",")):
        for chip in args.chip.split(","):
            row = row_of(config, chip)
            rows = json.loads(FILE.read_text()) if FILE.exists() else []
            rows = [r for r in rows if (r["config"], r["chip"]) != (config, chip)] + [row]
            rows.sort(key=lambda r: (list(CASES).index(r["config"]), r["chip"]))
            FILE.write_text(json.dumps(rows, indent=1) + "\n")
    print(table(json.loads(FILE.read_text())))
