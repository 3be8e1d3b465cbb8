"""Where a compiled program's time goes, from a profile of it."""

import re
from collections import Counter
from pathlib import Path

from jax.profiler import ProfileData

from jaxgpt.planning.program import Instruction, Program

PARTS = ("attention", "loss", "optimizer")  # `jax.named_scope`s of the model and the step
LOOPS = ("while", "conditional")  # last as long as what they run, which is counted by itself


def seconds_by_part(folder: Path, program: Program) -> Counter:
    """Returns the seconds of `program`'s instructions in the profile under `folder`, by `part_of`.

    Seconds of all threads and devices are added up.

    Raises:
      FileNotFoundError: if there is no profile.
    """
    instructions = {i.name: (i, where) for i, where, _ in program}
    parts = {name: part_of(i, program) for name, (i, _) in instructions.items()}
    files = sorted(folder.rglob("*.xplane.pb"), key=lambda file: file.stat().st_mtime)
    if not files:
        raise FileNotFoundError(f"no profile in {folder}")
    seconds = Counter()
    for plane in ProfileData.from_file(str(files[-1])).planes:
        for line in plane.lines:
            events = []
            for event in line.events:
                name = event.name
                if name not in parts:
                    name = str(dict(event.stats).get("hlo_op", ""))
                if name in parts and instructions[name][0].opcode not in LOOPS:
                    events.append((event.start_ns, event.start_ns + event.duration_ns, name))
            for name, duration in _own_durations(events):
                seconds[parts[name]] += duration / 1e9
    return seconds


def _own_durations(events: list[tuple[float, float, str]]) -> list[tuple[str, float]]:
    """Returns each event's name and duration, without that of the events inside it."""
    own, open_events = [], []
    for start, end, name in sorted(events, key=lambda e: (e[0], -e[1])):
        while open_events and open_events[-1][0] <= start:
            open_events.pop()
        if open_events:
            own[open_events[-1][1]][1] -= min(end, open_events[-1][0]) - start
        own.append([name, end - start])
        open_events.append((end, len(own) - 1))
    return [(name, max(0.0, duration)) for name, duration in own]


def part_of(instruction: Instruction, program: Program) -> str:
    """Returns the part of the step that an instruction belongs to: one of `PARTS`, else "matmul" or
    "other" (norms, activations, embeddings, copies)."""
    for part in PARTS:
        if re.search(rf"\b{part}\b", instruction.source):
            return part
    fused = program.computations.get(instruction.called("calls") or "", {})
    is_product = any(i.opcode in ("dot", "convolution") for i in (instruction, *fused.values()))
    return "matmul" if is_product or "dot_general" in instruction.source else "other"
