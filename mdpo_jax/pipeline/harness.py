"""What was measured with: everything beside the policy that an accuracy depends on, as plain data."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import jax

import mdpo_jax
from mdpo_jax.chat import COT_INSTRUCTION
from mdpo_jax.config import ConfigError
from mdpo_jax.grading.rules import POLICIES, Policy
from mdpo_jax.pipeline.context import Context
from mdpo_jax.recipes import differences
from mdpo_jax.types import Problem

Mode = Literal["tool", "cot"]
MODES: tuple[Mode, ...] = ("tool", "cot")
PACKAGES = ("jax", "transformers", "tokenizers", "sympy", "numpy", "math-verify")
MOST_SAMPLES = 512  # the counts of maj@k stay within a float64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
    """An evaluation as the command line asks for it.

    config: `--config...` arguments.  checkpoint: a run, a step of one, a model's folder or hub id;
    None for config.model.path.  iteration: of a run, None for the chosen one.  data: problem files;
    none for the recipe's own `split`.  problems: so many of each file, 0 for all.
    """

    config: tuple[str, ...] = ()
    checkpoint: str | None = None
    iteration: int | None = None
    split: Literal["dev", "test"] = "test"
    data: tuple[str, ...] = ()
    mode: Mode = "tool"
    samples: int = 0
    temperature: float = 1.0
    policy: Policy = "strict"
    problems: int = 0
    out: Path | None = None
    versus: Path | None = None

    def __post_init__(self) -> None:
        _one_of("mode", self.mode, MODES)
        _one_of("policy", self.policy, POLICIES)
        _one_of("split", self.split, ("dev", "test"))
        _within("samples", self.samples, 0, MOST_SAMPLES)
        _within("problems", self.problems, 0, None)
        if not 0 < self.temperature < float("inf"):
            raise ConfigError(f"--temperature={self.temperature}: expected a number above 0")


@dataclasses.dataclass(frozen=True)
class Suite:
    """Problems that are evaluated together, and what says that they are the same another time.

    file: sha256 of the file that they come from, "" for none.  quarantined: its bad rows.
    """

    name: str
    problems: tuple[Problem, ...]
    file: str = ""
    quarantined: int = 0

    def as_dict(self) -> dict[str, Any]:
        return {
            "file_sha256": self.file,
            "problems": len(self.problems),
            "problems_sha256": content(self.problems),
            "quarantined": self.quarantined,
        }


def harness(context: Context, asked: Asked, suites: Sequence[Suite]) -> dict[str, Any]:
    """The whole harness, as JSON holds it.

    Slots and block are in it: in bfloat16 a token now and then depends on what is decoded beside it.
    """
    config, problems = context.config, context.config.problems
    kind = config.rollout.server_kind
    tool: Any = "off"
    if asked.mode == "tool":
        tool = dataclasses.asdict(config.tool) | {"protection": context.interpreter.protection}
        if not problems.path:
            tool |= {"noise": problems.noise, "fault": problems.fault}
    found = {
        "mode": asked.mode,
        "instruction": COT_INSTRUCTION if asked.mode == "cot" else "",
        "chat": {**context.chat.described(), "system": config.model.system},
        "limits": dataclasses.asdict(context.limits),
        "batching": {"slots": config.rollout.slots, "block": config.rollout.block},
        "sampling": {
            "greedy": {"samples": 1, "temperature": 0.0},
            "samples": asked.samples,
            "temperature": asked.temperature if asked.samples else None,
            "top_k": config.rollout.top_k if asked.samples else None,
            "top_p": config.rollout.top_p if asked.samples else None,
            "seed": config.seed,
        },
        "dtype": {"stored": config.model.param_dtype, "decoding": config.rollout.decode_dtype},
        # What a server decodes on, and in which type, it does not say.
        "backend": kind if config.rollout.backend == "http" else jax.default_backend(),
        "tool": tool,
        "grader": context.grader.settings,
        "data": {suite.name: suite.as_dict() for suite in suites},
        "versions": {
            "mdpo_jax": mdpo_jax.__version__,
            "executor": source_digest("environment", "isolation"),
            "grader": source_digest("grading", "isolation"),
            "python": platform.python_version(),
            **{name: version(name) for name in PACKAGES},
        },
    }
    return json.loads(json.dumps(found))


def comparable(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """Differences in harness of two results, `field: a's -> b's`; none: they may be compared.

    No difference are: which policy was evaluated, the seed, how many samples (pass@k and maj@k are
    unbiased for any number), how they are drawn where only one has them, suites that only one has,
    and the file of problems that are the same.
    """
    left, right = (_comparable(of["harness"], other["harness"]) for of, other in ((a, b), (b, a)))
    return differences(left, right)


def source_digest(*rooms: str) -> str:
    """Short sha256 over the source of parts of this package: a version that no one must remember."""
    package, digest = Path(mdpo_jax.__file__).parent, hashlib.sha256()
    for path in sorted(p for room in rooms for p in (package / room).rglob("*.py")):
        digest.update(f"{path.relative_to(package)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def content(problems: Sequence[Problem]) -> str:
    """sha256 over ids, questions and golds, in order."""
    rows = [[p.id, p.question, p.answer] for p in problems]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def _comparable(harness: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    sampling = {k: v for k, v in harness["sampling"].items() if k not in ("samples", "seed")}
    if not harness["sampling"]["samples"] or not other["sampling"]["samples"]:
        for name in ("temperature", "top_k", "top_p"):
            sampling.pop(name, None)
    data = {
        name: {k: v for k, v in suite.items() if k != "file_sha256"}
        for name, suite in harness["data"].items()
        if name in other["data"]
    }
    return {**harness, "sampling": sampling, "data": data}


def _one_of(name: str, value: str, accepted: Sequence[str]) -> None:
    if value not in accepted:
        raise ConfigError(f"--{name}={value}: expected one of {', '.join(accepted)}")


def _within(name: str, value: int, least: int, most: int | None) -> None:
    if value < least or (most is not None and value > most):
        bounds = f"at least {least}" if most is None else f"{least} to {most}"
        raise ConfigError(f"--{name}={value}: expected {bounds}")
