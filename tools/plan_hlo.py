"""Collectives of a compiled program: how often each kind runs on a device, and what it sends.

The text names every instruction once, in a computation that loops call many times:

    ENTRY              x 1
      while (micros)   x what the caller says: its bound is data
        while (layers) x 28, from the loop's known count or from `index < constant` in its condition

Bytes are those that one device sends on a ring of n, the fewest that there are for what it gets:
all-gather and reduce-scatter (n - 1) / n of the whole, all-reduce twice that, all-to-all (n - 1) / n
of what it holds, a permutation all of it.  Every branch of a conditional is counted.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
SIZES = {
    "pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "s32": 4, "u32": 4,
    "f32": 4, "s64": 8, "u64": 8, "f64": 8,
}  # fmt: skip

_COMPUTATION = re.compile(r"(?:ENTRY )?%?([\w.\-]+) .*\{\s*$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*?)\s([a-z][\w\-]*)\((.*)$")
_ARRAY = re.compile(r"\b(pred|[suf]\d+|bf16)\[([\d,]*)\]")
_CALLS = re.compile(r"(?:body|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


class Instruction(NamedTuple):
    """name = shape opcode(rest"""

    name: str
    shape: str
    opcode: str
    rest: str


class Traffic(NamedTuple):
    """Of one kind on one device: how often it runs, and the bytes that are sent.

    across: bytes of groups whose devices are on several slices, which go over the data centre's
    network and are part of `sent`.
    """

    count: int
    sent: float
    across: float = 0.0

    def plus(self, other: Traffic) -> Traffic:
        """Both together."""
        return Traffic(self.count + other.count, self.sent + other.sent, self.across + other.across)


def computations(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """The computations of an HLO module's text by name, and the name of its entry."""
    found: dict[str, list[Instruction]] = {}
    entry = here = ""
    for line in text.splitlines():
        if not line[:1].isspace():
            match = _COMPUTATION.match(line)
            if match and "->" in line:
                here = match[1]
                found[here] = []
                entry = here if line.startswith("ENTRY") else entry
            continue
        match = _INSTRUCTION.match(line)
        if match and here:
            found[here].append(Instruction(*match.groups()))
    if not entry:
        raise ValueError("HLO text: no ENTRY computation; expected Compiled.as_text()")
    return found, entry


def multiplicities(found: dict[str, list[Instruction]], entry: str, unknown: int) -> dict[str, int]:
    """How often each computation runs.  unknown: the trips of a loop whose bound is data."""
    times: dict[str, int] = dict.fromkeys(found, 0)

    def visit(name: str, count: int) -> None:
        times[name] += count
        for instruction in found[name]:
            trips = 1
            if instruction.opcode == "while":
                trips = _trips(found, instruction, unknown)
            for callee in _callees(instruction):
                if callee in found:
                    visit(callee, count * trips)

    visit(entry, 1)
    return times


def _callees(instruction: Instruction) -> Iterator[str]:
    yield from _CALLS.findall(instruction.rest)
    for names in _BRANCHES.findall(instruction.rest):
        yield from (name.strip().lstrip("%") for name in names.split(","))


def _trips(found: dict[str, list[Instruction]], loop: Instruction, unknown: int) -> int:
    """As the compiler says, or from `index < constant` and the step that the body adds to it."""
    known = re.search(r'known_trip_count"?:?=?\s*\{"?n"?:"?(\d+)', loop.rest)
    if known:
        return int(known[1])
    condition, body = (
        {i.name: i for i in found.get(_called(loop, part), [])} for part in ("condition", "body")
    )
    compares = [i for i in condition.values() if "direction=LT" in i.rest]
    if len(compares) != 1:
        return unknown
    left, right = (condition.get(name) for name in _operands(compares[0])[:2])
    place = re.search(r"index=(\d+)", left.rest) if left else None
    bound = _constant(right)
    if place is None or bound is None:
        return unknown
    *_, root = body.values()
    moved = body.get(_operands(root)[int(place[1])])
    steps = [_constant(body.get(name)) for name in _operands(moved)] if moved else []
    return -(-bound // max([step for step in steps if step] or [1]))


def _called(instruction: Instruction, part: str) -> str:
    name = re.search(rf"{part}=%?([\w.\-]+)", instruction.rest)
    return name[1] if name else ""


def _operands(instruction: Instruction) -> list[str]:
    return re.findall(r"%([\w.\-]+)", instruction.rest.split(")")[0])


def _constant(instruction: Instruction | None) -> int | None:
    if instruction is None or instruction.opcode != "constant":
        return None
    value = re.match(r"(\d+)\)", instruction.rest)
    return int(value[1]) if value else None


def collectives(
    text: str, unknown: int = 1, devices: int = 1, slices: int = 1
) -> dict[str, Traffic]:
    """Traffic of one device by kind, over a whole run of the program.

    unknown: trips of loops whose bound is data.  devices, slices: of the program, in the order of
    its partitions, slice after slice.  An asynchronous collective that TPUs keep in several fused
    parts is one by its channel.
    """
    found, entry = computations(text)
    times = multiplicities(found, entry, unknown)
    seen: dict[tuple[str, str], Traffic] = {}
    for name, body in found.items():
        for i in body:
            kind = i.opcode.removesuffix("-start")
            if i.opcode == "send" and "megascale" in i.rest and times[name]:
                # TPU slices: a program of one slice each, with what leaves it as host transfers.
                sent = (slices - 1) * _sent("collective-permute", i, 2) * times[name]
                seen["send", f"{name}/{i.name}"] = Traffic(times[name], sent, sent)
            if kind not in KINDS or not times[name]:
                continue
            groups = _groups(i.rest, devices)
            size = max(map(len, groups))
            sent = _sent(kind, i, size) * times[name]
            far = any(len({d * slices // devices for d in group}) > 1 for group in groups)
            traffic = Traffic(times[name], sent, sent if far else 0.0)
            channel = re.search(r"channel_id=(\d+)", i.rest)
            key = (kind, channel[1] if channel else f"{name}/{i.name}")
            seen[key] = max(seen.get(key, traffic), traffic)
    total: dict[str, Traffic] = {}
    for (kind, _), traffic in seen.items():
        total[kind] = total.get(kind, Traffic(0, 0.0)).plus(traffic)
    return total


def _sent(kind: str, i: Instruction, size: int) -> float:
    """By one device in one run, from the shape of the result."""
    arrays = [
        math.prod(map(int, filter(None, dims.split(",")))) * SIZES.get(name, 1)
        for name, dims in _ARRAY.findall(i.shape)
        if dims or not i.opcode.endswith(("-start", "send"))  # their scalars are their own
    ]
    total, share = sum(arrays), (size - 1) / size
    if i.opcode == "collective-permute-start":  # (input, output)
        return total / 2
    if i.opcode == "all-gather-start":  # (input, output), the input 1 / size of the output
        return total / (size + 1) * size * share
    if i.opcode == "reduce-scatter-start":
        return total / (size + 1) * size * share
    if kind == "reduce-scatter":  # the result is one part
        return total * (size - 1)
    if kind == "all-reduce":
        return 2 * total * share
    return total if kind == "collective-permute" else total * share


def _groups(rest: str, devices: int) -> list[list[int]]:
    """The devices of each group, as partition numbers.

    Three spellings: {{0,1},{2,3}}, [2,2]<=[4] with an optional T(...) of a transposed iota, and
    mesh['a'=2,'b'=2] {'b'}; a permutation has pairs.
    """
    pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", rest)
    if pairs:
        return [[int(a), int(b)] for a, b in re.findall(r"\{(\d+),(\d+)", pairs[1] + "}")]
    listed = re.search(r"replica_groups=\{(\{.*?\})\}", rest)
    if listed:
        return [
            [int(d) for d in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", listed[1])
        ]
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest)
    if iota:
        shape = [int(d) for d in iota[3].split(",")]
        order = [int(d) for d in iota[4].split(",")] if iota[4] else list(range(len(shape)))
        return _cut(_transposed(shape, order), int(iota[2]))
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", rest)
    if mesh:
        axes = [(n, int(size)) for n, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])]
        over = re.findall(r"'(\w+)'", mesh[2])
        names = [name for name, _ in axes]
        order = [names.index(n) for n in names if n not in over] + [names.index(n) for n in over]
        sizes = dict(axes)
        return _cut(_transposed([s for _, s in axes], order), math.prod(sizes[n] for n in over))
    return [list(range(max(1, devices)))]


def _transposed(shape: list[int], order: list[int]) -> list[int]:
    """0, 1, 2, ... in `shape`, read with its axes in `order`."""
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    out = [0]
    for axis in order:
        out = [base + step * strides[axis] for base in out for step in range(shape[axis])]
    return out


def _cut(devices: list[int], size: int) -> list[list[int]]:
    return [devices[i : i + size] for i in range(0, len(devices), size)]
