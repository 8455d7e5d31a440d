"""The synthetic suite: chain problems in words, with demonstrations that mix tool and mental steps.

A problem is a start number and a chain of operations.  A demonstration does each step either with
the tool (one turn a step; the next block copies the number from the observation) or "in the head".
Every demonstration is right, but a small model cannot do mental arithmetic: imitating the mixture
is a habit that preference learning has to replace by tool use.  That is the mixture of
chain-of-thought and tool steps of real corpora, made small enough to be learnt on one core.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import random
from collections.abc import Callable, Iterator
from typing import Literal

from mdpo_jax.environment.noisy import warning_line
from mdpo_jax.types import Problem

Split = Literal["sft", "train", "dev", "test"]
# Share of all chains, by a hash of their content: the splits are disjoint by construction.
_SPLITS: tuple[tuple[Split, int], ...] = (("sft", 55), ("train", 75), ("dev", 85), ("test", 100))

_NAMES = ("Sam", "Ana", "Lee", "Mia")
_THINGS = ("coins", "cards", "beads", "shells")
_FRUITLESS = 50_000
NO_MATH = "NameError: name 'math' is not defined"


@dataclasses.dataclass(frozen=True)
class Operation:
    """One step: how it is said, coded and computed, and how often demonstrations skip the tool."""

    name: str
    phrases: tuple[str, ...]
    code: str
    apply: Callable[[int, int], int]
    operands: tuple[int, int] | None
    mental: float

    @property
    def needs_math(self) -> bool:
        return "math." in self.code


OPERATIONS: tuple[Operation, ...] = (
    Operation(
        "add", ("add {b}", "put in {b} more"), "{a} + {b}", lambda a, b: a + b, (2, 99), 0.85
    ),
    Operation(
        "sub", ("take away {b}", "remove {b}"), "{a} - {b}", lambda a, b: a - b, (2, 99), 0.85
    ),
    Operation("mul", ("multiply by {b}",), "{a} * {b}", lambda a, b: a * b, (2, 12), 0.75),
    Operation(
        "distance",
        ("find the distance to {b}",),
        "abs({a} - {b})",
        lambda a, b: abs(a - b),
        (2, 99),
        0.75,
    ),
    Operation("mod", ("reduce modulo {b}",), "{a} % {b}", lambda a, b: a % b, (3, 30), 0.68),
    Operation(
        "div",
        ("divide by {b} and drop the rest", "split into {b} whole parts"),
        "{a} // {b}",
        lambda a, b: a // b,
        (2, 12),
        0.68,
    ),
    Operation("square", ("square it",), "{a} ** 2", lambda a, b: a * a, None, 0.68),
    Operation(
        "gcd",
        ("find the greatest common divisor with {b}",),
        "math.gcd({a}, {b})",
        lambda a, b: math.gcd(a, b),
        (4, 60),
        0.62,
    ),
    Operation(
        "lcm",
        ("find the least common multiple with {b}",),
        "math.lcm({a}, {b})",
        lambda a, b: math.lcm(a, b),
        (2, 20),
        0.55,
    ),
    Operation(
        "root",
        ("take the whole square root",),
        "math.isqrt({a})",
        lambda a, b: math.isqrt(a),
        None,
        0.62,
    ),
)
_BY_NAME = {operation.name: operation for operation in OPERATIONS}


@dataclasses.dataclass(frozen=True)
class Chain:
    """A start number and its operations with operands: the content of a problem, without words."""

    start: int
    steps: tuple[tuple[str, int], ...]

    @property
    def values(self) -> list[int]:
        """The number after each step."""
        values = [self.start]
        for name, operand in self.steps:
            values.append(_BY_NAME[name].apply(values[-1], operand))
        return values[1:]

    @property
    def key(self) -> str:
        return f"{self.start}:" + ",".join(f"{name}{operand}" for name, operand in self.steps)

    @property
    def split(self) -> Split:
        """The only split that this chain may appear in."""
        bucket = int.from_bytes(hashlib.sha256(self.key.encode()).digest()[:4], "big") % 100
        return next(name for name, below in _SPLITS if bucket < below)


@dataclasses.dataclass(frozen=True)
class Suite:
    """How hard the chains are.

    steps: share of problems with 1, 2, ... steps.  largest_start, largest_value: bounds on the
    numbers.  noise: probability that an observation starts with a warning line.  missing_import:
    probability that a demonstration forgets `import math`, reads the error and retries.
    mental_scale scales every operation's probability of a step without the tool.
    """

    steps: tuple[float, ...] = (0.35, 0.65)
    largest_start: int = 99
    largest_value: int = 999
    noise: float = 0.3
    missing_import: float = 0.15
    mental_scale: float = 1.0

    def chains(self, split: Split, seed: int) -> Iterator[Chain]:
        """Distinct chains of one split; the same for the same (suite, split, seed).

        Endless while there are any; ValueError after so many draws without a new one that the suite
        has hardly more.
        """
        rng = random.Random(f"{split}/{seed}")
        seen: set[str] = set()
        fruitless = 0
        while fruitless < _FRUITLESS:
            fruitless += 1
            count = rng.choices(range(1, len(self.steps) + 1), self.steps)[0]
            chain = self._draw(rng, count)
            if chain is not None and chain.split == split and chain.key not in seen:
                seen.add(chain.key)
                fruitless = 0
                yield chain
        raise ValueError(
            f"config.problems: the suite with steps={self.steps}, largest_start="
            f"{self.largest_start} and largest_value={self.largest_value} has about {len(seen)} "
            f"distinct {split} problems; expected as many as are asked for"
        )

    def _draw(self, rng: random.Random, count: int) -> Chain | None:
        start = value = rng.randint(2, self.largest_start)
        steps = []
        for _ in range(count):
            operation = rng.choice(OPERATIONS)
            operand = rng.randint(*operation.operands) if operation.operands else 0
            if operation.name == "sub" and operand > value:
                return None
            value = operation.apply(value, operand)
            if value > self.largest_value:
                return None
            steps.append((operation.name, operand))
        return Chain(start, tuple(steps))


def question(chain: Chain, rng: random.Random) -> str:
    """The chain in words, with paraphrases drawn from `rng`."""
    name, thing = rng.choice(_NAMES), rng.choice(_THINGS)
    said = [rng.choice(_BY_NAME[op].phrases).format(b=operand) for op, operand in chain.steps]
    todo = "First " + ", then ".join(said) if len(said) > 1 else said[0].capitalize()
    return f"{name} has {chain.start} {thing}. {todo}. How many now?"


def problems(suite: Suite, split: Split, count: int, seed: int, skip: int = 0) -> list[Problem]:
    """`count` distinct problems of a split, the first `skip` chains of its stream left out."""
    rng = random.Random(f"words/{split}/{seed}")
    out = []
    for index, chain in zip(range(skip + count), suite.chains(split, seed), strict=False):
        words = question(chain, rng)
        if index >= skip:
            out.append(
                Problem(
                    id=f"{split}/{index}",
                    question=words,
                    answer=str(chain.values[-1]),
                    source="synthetic",
                    tags={"steps": len(chain.steps), "chain": chain.key},
                )
            )
    return out


def demonstrations(suite: Suite, count: int, seed: int) -> list[list[dict[str, str]]]:
    """`count` right solutions of chains of the `sft` split, as chat messages (recipe 1.2)."""
    rng = random.Random(f"demonstrations/{seed}")
    chains = suite.chains("sft", seed)
    return [_demonstrate(suite, next(chains), rng) for _ in range(count)]


def _demonstrate(suite: Suite, chain: Chain, rng: random.Random) -> list[dict[str, str]]:
    messages = [{"role": "user", "content": question(chain, rng)}]
    pending = ""  # what the assistant has said in this turn so far

    def run(code: str, printed: str) -> None:
        nonlocal pending
        noisy = printed
        if rng.random() < suite.noise:
            noisy = f"{warning_line(rng.randrange(10**8), rng.randrange(10**4))}\n{printed}"
        messages.append({"role": "assistant", "content": f"{pending}```python\n{code}\n```"})
        messages.append({"role": "user", "content": f"```output\n{noisy}\n```"})
        pending = ""

    before = chain.start
    for (name, operand), value in zip(chain.steps, chain.values, strict=True):
        operation = _BY_NAME[name]
        if rng.random() < operation.mental * suite.mental_scale:
            pending += f"So we get {value}.\n"
        else:
            code = f"print({operation.code.format(a=before, b=operand)})"
            if operation.needs_math:
                if rng.random() < suite.missing_import:
                    run(code, NO_MATH)
                code = f"import math\n{code}"
            run(code, str(value))
        before = value
    messages.append({"role": "assistant", "content": f"{pending}The answer is \\boxed{{{before}}}"})
    return messages
