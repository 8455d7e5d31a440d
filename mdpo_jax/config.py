"""Typed run configuration: frozen dataclasses, validated as a whole before a device is touched.

`python -m mdpo_jax.train --config=tiny --config.train.eta=0.3`: a recipe by name from `configs/`
(or a path to such a file), then any field by its dotted path.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import importlib.util
import json
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal


class ConfigError(ValueError):
    """A wrong configuration; the message names the field, the value and what is accepted."""


def _require(ok: bool, field: str, value: object, accepted: str) -> None:
    if not ok:
        raise ConfigError(f"config.{field}={value!r}: expected {accepted}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """The policy.  With `path` a Hugging Face folder; without, a fresh model of this shape.

    dtype is the compute type, param_dtype that of the trained weights.
    """

    path: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    vocab_size: int = 448
    hidden_size: int = 64
    intermediate_size: int = 192
    num_layers: int = 2
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 32
    remat: Literal["none", "full", "dots"] = "none"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problems:
    """Where problems come from.  With `path`s real files; without, the synthetic suite.

    path: training problems (one file, or comma-separated files), shuffled and cut into `iterations`
    disjoint sets of `per_iteration` (0: all there are).  dev_path, test_path: files for these
    splits; without them, `dev` and `test` problems are held out of `path` first.
    steps, largest_start, largest_value, noise, mental_scale: the suite's difficulty.
    """

    path: str | None = None
    dev_path: str | None = None
    test_path: str | None = None
    per_iteration: int = 512
    dev: int = 256
    test: int = 1024
    steps: tuple[float, ...] = (0.35, 0.65)
    largest_start: int = 99
    largest_value: int = 999
    noise: float = 0.3
    mental_scale: float = 1.0

    def __post_init__(self) -> None:
        _require(self.per_iteration >= 0, "problems.per_iteration", self.per_iteration, ">= 0")
        _require(self.dev > 0, "problems.dev", self.dev, "a positive count")
        _require(self.test > 0, "problems.test", self.test, "a positive count")
        _require(0 <= self.noise <= 1, "problems.noise", self.noise, "a probability")
        _require(bool(self.steps), "problems.steps", self.steps, "at least one share")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SFT:
    """The warm-up: likelihood on demonstrations.  steps=0 starts from `model.path` as it is.

    path: demonstrations as JSONL of chat `messages`; without it, the synthetic suite's.
    easy_steps, skill_steps: first parts of the steps (a curriculum), on one-operation problems and
    then on all, with `skill_mental_scale` in place of problems.mental_scale: the skill of using the
    tool comes first, the habit of not using it last.
    previous_fraction: share of the steps after which the checkpoint is kept that plays the
    "previous" policy of iteration 1 (the paper: epoch 1 of 3).
    """

    path: str | None = None
    steps: int = 0
    easy_steps: int = 0
    skill_steps: int = 0
    skill_mental_scale: float = 0.4
    demonstrations: int = 6000
    batch: int = 32
    learning_rate: float = 5e-6
    warmup_steps: int = 50
    final_lr_fraction: float = 0.0
    beta2: float = 0.999
    weight_decay: float = 0.0
    observation_weight: float = 0.0
    previous_fraction: float = 0.34


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rollout:
    """Sampling with the tool.

    samples from the current policy and previous_samples from the one before (the paper: 20 + 10).
    max_turns is H; turn_tokens and trajectory_tokens bound what the policy may generate.
    slots: rows decoded together.  chunk_problems: problems sampled and stored as one unit, the
    most that a kill can lose.  context: cache length, prompt and observations included.
    """

    samples: int = 20
    previous_samples: int = 10
    temperature: float = 1.0
    max_turns: int = 6
    turn_tokens: int = 512
    trajectory_tokens: int = 2048
    observation_tokens: int = 256
    context: int = 4096
    slots: int = 64
    chunk_problems: int = 32
    block: int = 16
    decode_dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        _require(self.samples > 0, "rollout.samples", self.samples, "a positive count")
        _require(self.temperature >= 0, "rollout.temperature", self.temperature, ">= 0")
        for name in ("max_turns", "turn_tokens", "trajectory_tokens", "slots", "chunk_problems"):
            _require(getattr(self, name) > 0, f"rollout.{name}", getattr(self, name), "> 0")
        _require(
            self.context >= self.trajectory_tokens,
            "rollout.context",
            self.context,
            f"at least rollout.trajectory_tokens={self.trajectory_tokens}",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tool:
    """The Python interpreter: limits of one block, and whether equal histories are run once."""

    timeout: float = 20.0
    memory_mb: int = 2048
    workers: int = 0
    preload: tuple[str, ...] = ("math", "numpy", "sympy")
    cache: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pairs:
    """Which right and wrong trajectories of a problem become pairs.

    keep_limit: keep trajectories that ran into a turn or token limit, as rejected.
    require_tool: drop trajectories without a tool call (the recipe's filter for both sides).
    """

    per_problem: int = 1
    max_tokens: int = 2048
    keep_limit: bool = False
    require_tool: bool = True
    drop_error_before_answer: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train:
    """The preference step.  eta is the KL coefficient (beta of DPO).

    reference: `updated` is the policy at the start of the iteration, `fixed` the SFT policy.
    start: where an iteration's policy starts.  data: pairs of this iteration, or of all so far.
    rows x row_length tokens form a micro-batch; a step takes as many as its pairs need.
    """

    eta: float = 0.1
    nll_weight: float = 0.0
    mask: Literal["sampled", "template", "paper"] = "sampled"
    reference: Literal["updated", "fixed"] = "updated"
    start: Literal["previous", "sft"] = "previous"
    data: Literal["current", "all"] = "current"
    learning_rate: float = 4e-7
    batch_pairs: int = 32
    epochs: int = 1
    max_steps: int = 0
    warmup_steps: int = 40
    final_lr_fraction: float = 0.0
    beta2: float = 0.999
    weight_decay: float = 0.0
    clip: float = 1.0
    rows: int = 8
    row_length: int = 4096
    logprob_chunk: int = 2048

    def __post_init__(self) -> None:
        _require(self.eta > 0, "train.eta", self.eta, "a positive number")
        _require(self.learning_rate > 0, "train.learning_rate", self.learning_rate, "> 0")
        _require(self.batch_pairs > 0, "train.batch_pairs", self.batch_pairs, "> 0")
        _require(self.rows > 0, "train.rows", self.rows, "> 0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Raft:
    """Rejection-sampling fine-tuning: likelihood on at most per_problem right trajectories."""

    per_problem: int = 1
    learning_rate: float = 5e-6
    epochs: int = 2
    batch: int = 32
    max_steps: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Greedy and sampled accuracy; pass@k from `pass_samples` samples of the first problems."""

    temperature: float = 1.0
    pass_samples: int = 8
    pass_problems: int = 128
    shown: int = 12


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mesh:
    """Devices along each axis; 0 for `fsdp` takes what the others leave."""

    data: int = 1
    fsdp: int = 0
    tensor: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """One run: SFT, then `iterations` of rollout, grading, pairs and a preference step."""

    name: str
    workdir: str = ""
    seed: int = 0
    method: Literal["mdpo", "dpo", "raft"] = "mdpo"
    iterations: int = 3
    model: Model = Model()
    problems: Problems = Problems()
    sft: SFT = SFT()
    rollout: Rollout = Rollout()
    tool: Tool = Tool()
    pairs: Pairs = Pairs()
    train: Train = Train()
    raft: Raft = Raft()
    evaluate: Evaluate = Evaluate()
    mesh: Mesh = Mesh()

    def __post_init__(self) -> None:
        _require(self.iterations >= 1, "iterations", self.iterations, "at least 1")
        _require(
            self.model.path is not None or self.sft.steps > 0,
            "model.path",
            self.model.path,
            "a Hugging Face folder, or sft.steps > 0 to train a fresh model",
        )
        _require(
            self.problems.path is None or self.problems.path != "",
            "problems.path",
            self.problems.path,
            "a JSONL file of problems",
        )

    @property
    def directory(self) -> Path:
        """The run directory: `workdir`, or runs/NAME-METHOD-SEED."""
        return Path(self.workdir or f"runs/{self.name}-{self.method}-{self.seed}")

    def as_dict(self) -> dict[str, Any]:
        """Plain nested dict, as written beside the run."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def fingerprint(self) -> str:
        """Hash of everything that decides the run's results; the run's place is not part of it."""
        fields = {k: v for k, v in self.as_dict().items() if k != "workdir"}
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]


def from_dict(fields: dict[str, Any], kind: Any = Config) -> Any:
    """The inverse of `Config.as_dict`; raises ConfigError for a field that `kind` has not got."""
    hints = typing.get_type_hints(kind)
    values = {}
    for name, value in fields.items():
        if name not in hints:
            raise ConfigError(f"config.{name}: unknown field of {kind.__name__}")
        if dataclasses.is_dataclass(hints[name]):
            value = from_dict(value, hints[name])
        values[name] = tuple(value) if isinstance(value, list) else value
    return kind(**values)


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted names of the fields in which two configurations (as dicts) differ."""
    out = []
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            out += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            out.append(f"{prefix}{key}: {a!r} -> {b!r}")
    return out


# --- recipes and overrides -------------------------------------------------------------------


def recipe_folder() -> Path:
    """Where recipes lie: `configs/` of the checkout, or inside an installed wheel."""
    packaged = Path(__file__).parent / "configs"
    return packaged if packaged.is_dir() else Path(__file__).parent.parent / "configs"


def load_recipe(name: str) -> Config:
    """The `Config` of `configs/NAME.py` (or of a path to such a file)."""
    known = sorted(p.stem for p in recipe_folder().glob("*.py") if not p.stem.startswith("_"))
    path = Path(name) if name.endswith(".py") else recipe_folder() / f"{name}.py"
    if not path.is_file():
        raise ConfigError(
            f"--config={name}: unknown recipe{_closest(name, known)}; known: {', '.join(known)}"
        )
    spec = importlib.util.spec_from_file_location(f"recipe_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"--config={name}: {path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def smoke(config: Config) -> Config:
    """The recipe with a stand-in model and counts that a CPU runs in minutes.

    Model shape, problems and counts shrink, those of tokens included; objective, types, turns,
    samples, reference and mixture stay.
    The stand-in is the synthetic suite with a short warm-up, so that there are pairs to learn from.
    """
    replace = dataclasses.replace
    shape = {"path": None, "vocab_size": 448, "hidden_size": 64, "num_layers": 2, "num_heads": 4}
    shape |= {"num_kv_heads": 2, "head_dim": 32, "intermediate_size": 192}
    files = {"path": None, "dev_path": None, "test_path": None, "steps": (1.0,)}
    warm_up = {"path": None, "steps": 150, "learning_rate": 4e-3, "beta2": 0.98, "batch": 16}
    tokens = {"turn_tokens": 64, "trajectory_tokens": 192, "context": 256}
    counts = {"demonstrations": 1500, "observation_weight": 0.25, "final_lr_fraction": 0.05}
    return replace(
        config,
        name=f"{config.name}-smoke",
        model=replace(config.model, **shape),
        problems=replace(
            config.problems, **files, per_iteration=8, dev=8, test=8, mental_scale=0.3
        ),
        sft=replace(config.sft, **warm_up, **counts),
        rollout=replace(config.rollout, slots=64, chunk_problems=8, **tokens),
        train=replace(config.train, batch_pairs=4, rows=4, row_length=256),
        evaluate=replace(config.evaluate, pass_problems=4),
    )


def parse(arguments: Sequence[str]) -> Config:
    """A recipe and its overrides from `--config=NAME [--smoke] --config.a.b=V ...`.

    Overrides come after `--smoke` has shrunk the recipe.  Raises ConfigError.
    """
    names = [a.removeprefix("--config=") for a in arguments if a.startswith("--config=")]
    if len(names) != 1:
        raise ConfigError(f"--config: given {len(names)} times; expected --config=NAME once")
    config = load_recipe(names[0])
    if "--smoke" in arguments:
        config = smoke(config)
    for argument in arguments:
        if argument.startswith("--config=") or argument == "--smoke":
            continue
        path, equals, value = argument.removeprefix("--config.").partition("=")
        if not argument.startswith("--config.") or not equals:
            raise ConfigError(f"{argument}: unknown argument; expected --config.FIELD=VALUE")
        config = override(config, path, value)
    return config


def override(config: Any, path: str, value: str, whole: str | None = None) -> Any:
    """`config` with the field at the dotted `path` replaced by the parsed `value`."""
    whole = whole or path
    head, _, rest = path.partition(".")
    hints = typing.get_type_hints(type(config))
    if head not in hints:
        raise ConfigError(
            f"--config.{whole}: unknown field {head!r} of {type(config).__name__}"
            f"{_closest(head, list(hints))}"
        )
    current = getattr(config, head)
    if dataclasses.is_dataclass(current):
        if not rest:
            known = ", ".join(f.name for f in dataclasses.fields(current))
            raise ConfigError(f"--config.{whole}={value}: {head} is a section; fields: {known}")
        return dataclasses.replace(config, **{head: override(current, rest, value, whole)})
    if rest:
        raise ConfigError(f"--config.{whole}: {head} has no field {rest!r}; it is a single value")
    try:
        parsed = _convert(hints[head], value)
    except ValueError as error:
        raise ConfigError(f"--config.{whole}={value}: expected {error}") from None
    return dataclasses.replace(config, **{head: parsed})


def describe(config: Any, prefix: str = "--config.") -> list[tuple[str, str, str]]:
    """(flag, type, value) of every field, for `--help`."""
    rows = []
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            rows += describe(value, f"{prefix}{field.name}.")
        else:
            rows.append((f"{prefix}{field.name}", _expected(hints[field.name]), repr(value)))
    return rows


def _closest(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _expected(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(hint)))
    if typing.get_origin(hint) is tuple:
        return f"comma-separated {_expected(typing.get_args(hint)[0])}s"
    if isinstance(hint, types.UnionType):
        return " or ".join(_expected(a) for a in typing.get_args(hint))
    return {bool: "true or false", types.NoneType: "none"}.get(hint) or hint.__name__


def _convert(hint: Any, text: str) -> Any:
    """`text` as a value of type `hint`; ValueError carries what was expected."""
    expected = ValueError(_expected(hint))
    if isinstance(hint, types.UnionType):
        if text.lower() == "none" and types.NoneType in typing.get_args(hint):
            return None
        return _convert(next(a for a in typing.get_args(hint) if a is not types.NoneType), text)
    if typing.get_origin(hint) is Literal:
        if text not in typing.get_args(hint):
            raise expected
        return text
    if typing.get_origin(hint) is tuple:
        inner = typing.get_args(hint)[0]
        try:
            return tuple(_convert(inner, part) for part in text.split(",") if part)
        except ValueError:
            raise expected from None
    if hint is bool:
        if text.lower() not in ("true", "false"):
            raise expected
        return text.lower() == "true"
    if hint in (int, float):
        try:
            number = hint(text)
        except ValueError:
            raise expected from None
        if number != number or number in (float("inf"), float("-inf")):
            raise ValueError("a finite number")
        return number
    return text
