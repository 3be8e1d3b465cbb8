"""What a compiled program does, read from its HLO text: FLOPs, bytes, collectives.

XLA's own cost analysis counts the body of a loop once; here each instruction counts as often as it
runs. All numbers are per device.
"""

import dataclasses
import functools
import itertools
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{")
INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
ARRAY = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\](\{[^}]*\})?")
BITS = {"pred": 8, "token": 0}
COLLECTIVES = (
    *("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute"),
    "ragged-all-to-all",
)
NO_TRAFFIC = (  # instructions that read and write no memory themselves
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call"),
    *("conditional", "after-all", "partition-id", "replica-id", "iota", "opt-barrier"),
)
SLICES = ("dynamic-slice", "slice", "gather")
KERNEL = re.compile(r'custom_call_target="(tpu_custom_call|__cudnn\$fmha)')
RAGGED = re.compile(r"ragged-dot-(?!metadata)")  # a TPU's kernels of `jax.lax.ragged_dot`
FUSIONS = ("fusion", "fusion-start")  # a GPU starts those that run beside others
BETWEEN_SLICES = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
VMEM = "S(1)"  # in a TPU's layouts: memory on the chip


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of HLO."""

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    rest: str  # the text of operands and attributes
    root: bool

    def called(self, attribute: str) -> str | None:
        """The first computation that an attribute names: `body`, `calls`, ..."""
        match = re.search(rf"\b{attribute}={{?%?([\w.\-]+)", self.rest)
        return match and match[1]

    @property
    def branches(self) -> list[str]:
        """The computations of a conditional, of which one runs; of another instruction none."""
        if self.opcode != "conditional":
            return []
        listed = re.search(r"\bbranch_computations={([^}]*)}", self.rest)
        pair = (self.called("true_computation"), self.called("false_computation"))
        return re.findall(r"[\w.\-]+", listed[1]) if listed else list(pair)

    @functools.cached_property
    def shapes(self) -> list[tuple[int, ...]]:
        """The shapes of its results."""
        return [_dims(match) for match in ARRAY.finditer(self.type)]

    @functools.cached_property
    def bytes(self) -> int:
        """The bytes of its results."""
        return sum(map(_bytes, ARRAY.finditer(self.type)))

    @functools.cached_property
    def hbm_bytes(self) -> int:
        """The bytes of its results, without those in a TPU's memory on the chip."""
        return sum(_bytes(m) for m in ARRAY.finditer(self.type) if VMEM not in (m[3] or ""))

    @property
    def source(self) -> str:
        """The JAX operation it came from."""
        match = re.search(r'op_name="([^"]*)"', self.rest)
        return match[1] if match else ""


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of the program."""

    kind: str
    axis: str  # the mesh axes it runs over, joined by "+"
    group: tuple[int, ...]  # one of its groups: numbers of devices in the mesh's order
    count: int  # how often it runs
    bytes: int  # each time: the larger of a device's input and output


class Program:
    """A compiled program's computations, and how often each of them runs."""

    def __init__(self, text: str):
        self.computations, self.entry = _parse(text)
        self.runs = Counter()
        self._count(self.entry, 1)

    def _count(self, name: str, times: int) -> None:
        self.runs[name] += times
        for instruction in self.computations[name].values():
            if instruction.opcode in ("async-update", "async-done"):
                continue  # counted with async-start
            if instruction.opcode == "while":
                trips = self.trips(instruction)
                self._count(instruction.called("body"), times * trips)
            else:
                # Of the branches the longest: another does equal work, or leaves all as it was
                branches = sorted(instruction.branches, key=lambda b: len(self.computations[b]))
                calls = (instruction.called(name) for name in ("calls", "to_apply"))
                for called in (*calls, *branches[-1:]):
                    if called in self.computations and not _is_reduction(instruction.opcode):
                        self._count(called, times)

    def trips(self, loop: Instruction) -> int:
        """How often a `while` runs its body: the constant that its condition compares with."""
        if known := re.search(r'known_trip_count[\\":{n]+(\d+)', loop.rest):
            return int(known[1])
        condition = self.computations[loop.called("condition")].values()
        limits = [
            int(i.rest.split(")")[0])
            for i in condition
            if i.opcode == "constant" and i.type.startswith(("s32[]", "s64[]", "u32[]"))
        ]
        return max(limits, default=1)

    def __iter__(self) -> Iterator[tuple[Instruction, dict[str, Instruction], int]]:
        """Yields each instruction, its computation, and how often it runs."""
        for name, computation in self.computations.items():
            if times := self.runs[name]:
                for instruction in computation.values():
                    yield instruction, computation, times

    def flops(self) -> int:
        """The FLOPs of all matrix products that are not in kernels."""
        return sum(times * _flops(i, where) for i, where, times in self)

    def kernels(self) -> Counter:
        """How often each Pallas kernel and cuDNN attention runs, by name without its number."""
        counts = Counter()
        for instruction, _, times in self:
            if instruction.opcode == "custom-call" and KERNEL.search(instruction.rest):
                counts[instruction.name.split(".")[0]] += times
        return counts

    def hbm_bytes(self) -> int:
        """The bytes that instructions read from and write to the device's memory.

        Of a sliced array only the slice counts, also in a fusion; of an update in place the update.
        """
        return sum(times * self.moved(i, where) for i, where, times in self.unfused())

    def unfused(self) -> Iterator[tuple[Instruction, dict[str, Instruction], int]]:
        """Yields what iteration does, without the instructions inside fusions."""
        fused = {i.called("calls") for i, _, _ in self if i.opcode in FUSIONS}
        inside = [id(self.computations[name]) for name in fused]
        return (row for row in self if id(row[1]) not in inside)

    def moved(self, i: Instruction, where: dict[str, Instruction]) -> int:
        """The bytes that an instruction of the computation `where` moves each time it runs."""
        if i.opcode in NO_TRAFFIC or i.opcode.endswith("-done") or _is_collective(i.opcode):
            return 0
        operands = [where[name] for name in i.operands if name in where]
        if i.opcode in SLICES:
            return 2 * i.hbm_bytes
        if i.opcode == "dynamic-update-slice":
            return 2 * operands[1].hbm_bytes
        if i.opcode == "copy-start":
            return sum(o.hbm_bytes for o in operands)
        if i.opcode not in FUSIONS:
            return i.hbm_bytes + sum(o.hbm_bytes for o in operands)
        return self._moved_by_fusion(i, operands)

    def _moved_by_fusion(self, i: Instruction, operands: list[Instruction]) -> int:
        body = self.computations[i.called("calls")]
        users, numbers = {}, {}
        for inner in body.values():
            for name in inner.operands:
                users.setdefault(name, []).append(inner)
            if inner.opcode == "parameter":
                numbers[inner.name] = int(inner.rest.split(")")[0])
        root = next(inner for inner in body.values() if inner.root)
        written, total = root.hbm_bytes if i.opcode == "fusion-start" else i.hbm_bytes, 0
        for name, number in numbers.items():
            if number >= len(operands) or not operands[number].hbm_bytes:
                continue
            using = users.get(name, [])
            as_first_operand = [u for u in using if u.operands[0] == name]
            sliced = len(as_first_operand) == len(using) and all(u.opcode in SLICES for u in using)
            updated = [u for u in as_first_operand if u.opcode == "dynamic-update-slice"]
            if using and sliced:
                total += sum(u.bytes for u in using)
            elif updated:
                written -= min(operands[number].hbm_bytes, written)
                total += sum(2 * body[u.operands[1]].bytes for u in updated)
            else:
                total += operands[number].hbm_bytes
        return total + written

    def collectives(
        self, axes: Sequence[str], sizes: Sequence[int], slices: int = 1
    ) -> list[Collective]:
        """Every collective once, by its channel; `axes` and `sizes` are those of the mesh, whose
        first axis goes over the slices. The program is that of one slice: its groups are of its
        devices, and what goes to other slices is sent and received through the host."""
        collectives, seen = [], set()
        whole, sizes = sizes, (sizes[0] // slices, *sizes[1:])
        for i, where, times in self:
            if between := _between_slices(i):
                group = tuple(range(0, math.prod(whole), math.prod(sizes)))
                sent = where[i.operands[0]].bytes * (slices if between == "all-gather" else 1)
                axis = axis_of(group, axes, whole)
                collectives.append(Collective(between, axis, group, times, sent))
            if not _is_collective(i.opcode) or i.opcode.endswith("-done"):
                continue
            channel = re.search(r"channel_id=(\d+)", i.rest)
            if channel and channel[1] in seen:
                continue
            if channel and channel[1] != "1":
                seen.add(channel[1])
            elif _is_continued(where):  # those of `shard_map` all have channel 1
                continue
            group = _group(i.rest, math.prod(sizes))
            if len(group) == 1:
                continue  # it sends nothing
            kind = i.opcode.removesuffix("-start")
            # A ragged one also names the array that it writes to, and offsets and sizes
            sent = i.operands[:1] if kind.startswith("ragged") else i.operands
            given = sum(where[name].bytes for name in sent if name in where)
            moved = given * (len(group) if kind == "all-gather" else 1)
            if kind == "all-reduce" and _is_scattered(i, where):
                kind = "reduce-scatter"
            axis = axis_of(group, axes, sizes)
            collectives.append(Collective(kind, axis, tuple(group), times, moved))
        return collectives


def axis_of(group: Iterable[int], axes: Sequence[str], sizes: Sequence[int]) -> str:
    """Returns the mesh axes ("data", "data+fsdp", ...) along which the devices of `group`, given by
    their numbers in the mesh's order, differ."""
    indices = np.unravel_index(sorted(group), tuple(sizes))
    varying = [axis for axis, along in zip(axes, indices, strict=True) if len(set(along)) > 1]
    return "+".join(varying) or "none"


def _between_slices(i: Instruction) -> str:
    """Returns the kind of a collective between slices that an instruction sends for, or ""."""
    sent = BETWEEN_SLICES.search(i.rest) if i.opcode == "send" else None
    kind = sent[1].lower().replace("_", "-") if sent else ""
    return "collective-permute" if kind == "one-to-one" else kind


def _group(rest: str, devices: int) -> list[int]:
    """Returns the first replica group, or the first pair of a permutation that sends anything."""
    if pairs := re.search(r"source_target_pairs=\{([{}\d,]*)\}", rest):
        sent = [m for m in re.finditer(r"(\d+),(\d+)", pairs[1]) if m[1] != m[2]]
        return [int(n) for n in sent[0].groups()] if sent else [0]
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\]([^{]*)\{([^}]*)\}", rest):
        sizes = {m[1]: int(m[2]) for m in re.finditer(r"'([\w.:]+)'=(\d+)", mesh[1])}
        ids = _iota(mesh[2], math.prod(sizes.values())).reshape(tuple(sizes.values()))
        along = re.findall(r"'([\w.:]+)'", mesh[3])
        return ids[tuple(slice(None) if name in along else 0 for name in sizes)].ravel().tolist()
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\](<=\[[\d,]*\](?:T\([\d,]*\))?)", rest):
        return _iota(iota[3], devices).reshape(int(iota[1]), int(iota[2]))[0].tolist()
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", rest)
    return [int(n) for n in listed[1].split(",")] if listed else list(range(devices))


def _iota(text: str, count: int) -> np.ndarray:
    """Returns the device numbers that `[4,2]T(1,0)` means; 0, 1, 2, ... if `text` has none."""
    match = re.search(r"\[([\d,]+)\](?:T\(([\d,]*)\))?", text)
    if not match:
        return np.arange(count)
    ids = np.arange(count).reshape([int(n) for n in match[1].split(",")])
    return ids.transpose([int(n) for n in match[2].split(",")]).ravel() if match[2] else ids.ravel()


def _is_continued(where: dict[str, Instruction]) -> bool:
    """Says whether a fusion continues a collective that another fusion started, as it receives its
    semaphores: a TPU's compiler overlaps a collective with several computations this way."""
    return any(i.opcode == "parameter" and i.type.startswith("u32[]") for i in where.values())


def _is_scattered(i: Instruction, where: dict[str, Instruction]) -> bool:
    """Says whether an all-reduce is in a fusion that keeps only a slice of it, which is how a TPU's
    compiler writes a reduce-scatter."""
    return any(
        o.root and o.opcode == "dynamic-slice" and i.name in o.operands for o in where.values()
    )


def _is_collective(opcode: str) -> bool:
    return opcode.removesuffix("-start").removesuffix("-done") in COLLECTIVES


def _is_reduction(opcode: str) -> bool:
    return _is_collective(opcode) or opcode in ("reduce", "scatter", "reduce-window", "sort", "map")


def _flops(i: Instruction, where: dict[str, Instruction]) -> int:
    if i.opcode == "dot":
        lhs = where[i.operands[0]].shapes[0]
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", i.rest)[1]
        depth = math.prod(lhs[int(d)] for d in contracted.split(",") if d)
        return 2 * math.prod(i.shapes[0]) * depth
    if i.opcode == "convolution":
        return _convolution_flops(i, where[i.operands[0]].shapes[0], where[i.operands[1]].shapes[0])
    if i.opcode == "custom-call" and RAGGED.match(i.name):
        return _ragged_flops(i, where)
    return 0


def _ragged_flops(i: Instruction, where: dict[str, Instruction]) -> int:
    """Of a product of rows with a matrix of each one's group, [P, I] by [E, I, O], or of the sums
    of outer products of rows, [P, I] by [P, O]; each row counts once."""
    rows, width = next(
        shape for name in i.operands for shape in where[name].shapes if len(shape) > 1
    )
    return 2 * rows * width * i.shapes[0][-1]


def _convolution_flops(i: Instruction, lhs: tuple[int, ...], rhs: tuple[int, ...]) -> int:
    """TPU programs express matrix products as convolutions; products with padding do not count."""
    ins, kernel, out = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.rest).groups()
    window = (re.search(r"window=\{([^}]*)\}", i.rest) or ["", ""])[1]
    window = dict(re.findall(r"\b(\w+)=([\w\-]+)", window))
    flops = 2 * i.shapes[0][out.index("b")] * i.shapes[0][out.index("f")] * rhs[kernel.index("i")]
    spatial = sorted(set(ins) - {"b", "f"})
    for axis, d in enumerate(spatial):
        sizes = {name: text.split("x")[axis] for name, text in window.items()}
        pad = int(sizes.get("pad", "0").split("_")[0])
        starts = np.arange(i.shapes[0][out.index(d)]) * int(sizes.get("stride", 1)) - pad
        offsets = np.arange(rhs[kernel.index(d)]) * int(sizes.get("rhs_dilate", 1))
        positions, dilation = starts[:, None] + offsets, int(sizes.get("lhs_dilate", 1))
        inside = (positions >= 0) & (positions < (lhs[ins.index(d)] - 1) * dilation + 1)
        flops *= int(np.sum(inside & (positions % dilation == 0)))
    groups = re.search(r"batch_group_count=(\d+)", i.rest)
    return flops // (int(groups[1]) if groups else 1)


def _parse(text: str) -> tuple[dict[str, dict[str, Instruction]], str]:
    computations, entry, here = {}, "", {}
    for line in text.splitlines():
        if header := HEADER.match(line):
            here = computations[header[2]] = {}
            entry = header[2] if header[1] else entry
        elif match := INSTRUCTION.match(line):
            root, name, type_, opcode, rest = match.groups()
            operands = _operands(rest)
            for operand in operands:
                _add_element(operand, here)
            here[name] = Instruction(name, type_, opcode, operands, rest, bool(root))
    return computations, entry


def _add_element(name: str, here: dict[str, Instruction]) -> None:
    """Adds the get-tuple-element that newer HLO writes as an operand: `%state#2` is element 2 of
    the tuple `%state`, `%state#2#0` is element 0 of that."""
    whole, _, index = name.rpartition("#")
    if not whole or name in here:
        return
    _add_element(whole, here)
    rest = f"%{whole}), index={index}"
    type_ = _elements(here[whole].type)[int(index)]
    here[name] = Instruction(name, type_, "get-tuple-element", (whole,), rest, False)


def _elements(type_: str) -> list[str]:
    """Returns the types of a tuple's elements: `(s32[], bf16[8,64]{1,0:T(8,128)})` has two."""
    inside = type_[1:-1]
    depth = itertools.accumulate((c in "([{") - (c in ")]}") for c in inside)
    commas = [
        at
        for at, (c, level) in enumerate(zip(inside, depth, strict=True))
        if c == "," and not level
    ]
    pairs = itertools.pairwise([-1, *commas, len(inside)])
    return [re.sub(r"/\*.*?\*/", "", inside[start + 1 : end]).strip() for start, end in pairs]


def _operands(rest: str) -> tuple[str, ...]:
    """Returns the names up to the bracket that closes the operands."""
    depth = itertools.accumulate((c == "(") - (c == ")") for c in rest)
    end = next((at for at, level in enumerate(depth) if level < 0), len(rest))
    return tuple(re.findall(r"%([\w.\-]+(?:#\d+)*)", rest[:end]))


def _dims(match: re.Match) -> tuple[int, ...]:
    return tuple(int(n) for n in match[2].split(",") if n)


def _bytes(match: re.Match) -> int:
    bits = BITS.get(match[1]) or int(re.search(r"\d+", match[1])[0])
    return math.prod(_dims(match)) * bits // 8
