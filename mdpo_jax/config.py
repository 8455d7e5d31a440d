"""Typed run configuration: frozen dataclasses, validated as a whole before a device is touched.

`mdpo_jax/recipes.py` makes one from a recipe's name and the command line.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any, Literal

from mdpo_jax.checks import ConfigError as ConfigError
from mdpo_jax.checks import above_zero as _above_zero
from mdpo_jax.checks import at_least as _at_least
from mdpo_jax.checks import require as _require
from mdpo_jax.checks import share as _share
from mdpo_jax.endpoints import TRANSPORT, Endpoints
from mdpo_jax.exploration import Explore
from mdpo_jax.exploration import inconsistency as _unfit
from mdpo_jax.learning import Train as Train
from mdpo_jax.methods import METHODS, Method, MethodName, inconsistency

# As in chat.py, which is a floor above and has one of these names for each template.
ChatName = Literal[
    "auto", "gemma", "mistral", "mistral-instruct", "llama3", "llama2", "chatml", "plain"
]

# As in model/families.py, two floors above.
FamilyName = Literal["gemma", "gemma2", "gemma3", "llama", "mistral", "qwen2", "qwen3"]


class StepZeroError(RuntimeError):
    """With policy = reference the first log-ratios are not 0: their weights or forwards differ."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """The policy.  With `path` a model's folder or hub id `org/name[@revision]`; without, a fresh one
    of this shape.

    family: of a fresh model (a small one has the family's kinds of layers, caps and special tokens);
    a model that is loaded has its own.
    dtype is the compute type, param_dtype that of the trained weights.
    chat: the chat format; `auto` takes the family's that the tokenizer's vocabulary can spell.
    system: a system prompt, in formats that have one; the paper uses none.
    attention: the training kernel; `auto` takes the platform's (model/kernels.py).
    """

    path: str | None = None
    family: FamilyName = "gemma"
    dtype: Literal["float32", "bfloat16"] = "float32"
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    chat: ChatName = "auto"
    system: str = ""
    vocab_size: int = 448
    hidden_size: int = 64
    intermediate_size: int = 192
    num_layers: int = 2
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 32
    remat: Literal["none", "full", "dots"] = "none"
    attention: Literal["auto", "reference", "skipping", "splash", "cudnn", "pallas_triton"] = "auto"

    def __post_init__(self) -> None:
        _at_least(1, "model", self, "hidden_size", "intermediate_size", "num_layers", "num_heads")
        _at_least(1, "model", self, "num_kv_heads", "head_dim")
        # 256 bytes, the special tokens and a few pieces: a smaller one cannot be trained.
        _at_least(300, "model", self, "vocab_size")
        heads, groups = self.num_heads, self.num_kv_heads
        _require(heads % groups == 0, "model.num_kv_heads", groups, f"a divisor of {heads} heads")
        _require(self.head_dim % 2 == 0, "model.head_dim", self.head_dim, "an even number")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problems:
    """Where problems come from.  With `path`s real files; without, the synthetic suite.

    path: training problems (one file, or comma-separated files), shuffled and cut into `iterations`
    disjoint sets of `per_iteration` (0: all there are).  dev_path, test_path: files for these
    splits; without them, `dev` and `test` problems are held out of `path` first.
    steps, largest_start, largest_value, noise, mental_scale: the suite's difficulty.
    fault: probability that the suite's tool prints a wrong number.
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
    fault: float = 0.0

    def __post_init__(self) -> None:
        _at_least(0 if self.path else 1, "problems", self, "per_iteration")
        _at_least(1, "problems", self, "dev", "test")
        _at_least(9, "problems", self, "largest_start")
        _at_least(2, "problems", self, "largest_value")
        _share("problems", self, "noise", "fault")
        accepted = "0 with problems.path, whose tool is the interpreter as it is"
        _require(self.path is None or self.fault == 0, "problems.fault", self.fault, accepted)
        _require(self.mental_scale >= 0, "problems.mental_scale", self.mental_scale, "at least 0")
        shares = bool(self.steps) and min(self.steps) >= 0 and sum(self.steps) > 0
        _require(shares, "problems.steps", self.steps, "shares of at least 0, not all 0")


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

    def __post_init__(self) -> None:
        _at_least(0, "sft", self, "steps", "easy_steps", "skill_steps", "warmup_steps")
        _at_least(1, "sft", self, "demonstrations", "batch")
        _above_zero("sft", self, "learning_rate")
        _share("sft", self, "final_lr_fraction", "observation_weight", "previous_fraction")
        _require(0 <= self.beta2 < 1, "sft.beta2", self.beta2, "from 0 to below 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rollout(Endpoints):
    """Sampling with the tool.

    samples from the current policy and previous_samples from the one before (the paper: 20 + 10).
    max_turns is H; turn_tokens and trajectory_tokens bound what the policy may generate.
    temperature, top_k (0: all), top_p: what tokens are drawn from (rollout/sampling.py).
    slots: rows decoded together.  chunk_problems: problems sampled and stored as one unit, the
    most that a kill can lose.  context: cache length, prompt and observations included.
    collect: `fixed` waits for a tool after one block of decoding, and a rerun repeats every bit;
    `arrival` decodes on, for slow tools, and the last bits of log-probs depend on timing.
    tensor: devices that share a model's heads while it decodes, rows being dealt to the others of a
    process; 0 takes mesh.tensor, as far as it divides them.  slots, of each process, are rounded up to
    what the rows' devices divide.
    backend, servers and the like: see Endpoints.
    """

    samples: int = 20
    previous_samples: int = 10
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    max_turns: int = 6
    turn_tokens: int = 512
    trajectory_tokens: int = 2048
    observation_tokens: int = 256
    context: int = 4096
    slots: int = 64
    chunk_problems: int = 32
    block: int = 16
    decode_dtype: Literal["float32", "bfloat16"] = "float32"
    collect: Literal["fixed", "arrival"] = "fixed"
    tensor: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least(1, "rollout", self, "samples", "max_turns", "turn_tokens", "trajectory_tokens")
        _at_least(1, "rollout", self, "observation_tokens", "slots", "chunk_problems", "block")
        _at_least(0, "rollout", self, "previous_samples", "temperature", "top_k", "tensor")
        right = 0 < self.top_p <= 1
        _require(right, "rollout.top_p", self.top_p, "a number above 0 and at most 1")
        if self.backend == "http":
            _require(self.top_k == 0, "rollout.top_k", self.top_k, "0 with rollout.backend=http")
            _require(self.top_p == 1, "rollout.top_p", self.top_p, "1 with rollout.backend=http")
        _require(
            self.context >= self.trajectory_tokens,
            "rollout.context",
            self.context,
            f"at least rollout.trajectory_tokens={self.trajectory_tokens}",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tool:
    """The Python interpreter: limits of one block, and whether equal histories are run once.

    sandbox: `none`, `limits` (rlimits, empty environment, no privileges), `hardened` (seccomp and
    Landlock too, where the kernel has them), `required` (both, or the run refuses to start).
    semantics: `live`, one process a trajectory; `replay`, all earlier blocks again in a fresh process
    at each call (the paper's); `last_only`, the last block alone.
    check_determinism: share of calls that are run again in a fresh process; the rate of those that
    then say something else is reported (M-DPO assumes none).
    """

    timeout: float = 20.0
    memory_mb: int = 2048
    workers: int = 0
    preload: tuple[str, ...] = ("math", "numpy", "sympy")
    cache: bool = False
    sandbox: Literal["none", "limits", "hardened", "required"] = "hardened"
    semantics: Literal["live", "replay", "last_only"] = "live"
    check_determinism: float = 0.0

    def __post_init__(self) -> None:
        _above_zero("tool", self, "timeout")
        _share("tool", self, "check_determinism")
        _at_least(32, "tool", self, "memory_mb")
        _at_least(0, "tool", self, "workers")


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

    def __post_init__(self) -> None:
        _at_least(1, "pairs", self, "per_problem", "max_tokens")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TermC:
    """The correction of M-DPO for a random tool: term (C) of equation 13 as a margin.

    kind: none; `monte_carlo` samples continuations of the reference, once before training; `value`
    trains a value head on the policy's trunk beside it.
    utility: of a right answer, in logits of the preference model (wrong: 0).
    Monte Carlo: `observations` calls of the tool for each action, `continuations` of each state.
    Value: `rollouts` unselected trajectories a pair, of which the head learns with weight `weight`
    and learning rate `learning_rate_scale` times the policy's.
    """

    kind: Literal["none", "monte_carlo", "value"] = "none"
    utility: float = 1.0
    observations: int = 4
    continuations: int = 4
    rollouts: int = 2
    weight: float = 0.1
    learning_rate_scale: float = 10.0

    def __post_init__(self) -> None:
        _above_zero("term_c", self, "utility", "weight", "learning_rate_scale")
        _at_least(1, "term_c", self, "observations", "continuations", "rollouts")


# Hugging Face's names of a decoder's projections, in its order.
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lora:
    """Low-rank adapters in place of full fine-tuning (Hu et al. 2021).

    rank: 0 trains every weight; from 1 on, adapters alone are trained and kept, in float32, scaled
    by alpha / rank, over a base that never changes: the model of `model.path`, or a fresh one after
    its warm-up.  targets: names of projections, or all-linear for all of them.
    """

    rank: int = 0
    alpha: float = 16.0
    targets: tuple[str, ...] = ("all-linear",)

    def __post_init__(self) -> None:
        _at_least(0, "lora", self, "rank")
        _above_zero("lora", self, "alpha")
        known = ("all-linear", *PROJECTIONS)
        accepted = f"all-linear, or some of {', '.join(PROJECTIONS)}"
        right = bool(self.targets) and set(self.targets) <= set(known)
        _require(right, "lora.targets", self.targets, accepted)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Raft:
    """Rejection-sampling fine-tuning: likelihood on at most per_problem right trajectories."""

    per_problem: int = 1
    learning_rate: float = 5e-6
    epochs: int = 2
    batch: int = 32
    max_steps: int = 0

    def __post_init__(self) -> None:
        _at_least(1, "raft", self, "per_problem", "epochs", "batch")
        _above_zero("raft", self, "learning_rate")
        _at_least(0, "raft", self, "max_steps")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Greedy and sampled accuracy; pass@k from `pass_samples` samples of the first problems."""

    temperature: float = 1.0
    pass_samples: int = 8
    pass_problems: int = 128
    shown: int = 12

    def __post_init__(self) -> None:
        _at_least(0, "evaluate", self, "temperature", "shown")
        _at_least(1, "evaluate", self, "pass_samples", "pass_problems")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mesh:
    """Devices along each axis; 0 for `fsdp` takes what the others leave.

    hosts: processes that make the run together (hosts.py), 0 for as many as the cluster says; 1 joins
    none.  The axes are over the devices of all.
    """

    data: int = 1
    fsdp: int = 0
    tensor: int = 1
    hosts: int = 1

    def __post_init__(self) -> None:
        _at_least(1, "mesh", self, "data", "tensor")
        _at_least(0, "mesh", self, "fsdp", "hosts")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """One run: SFT, then `iterations` of rollout, grading, pairs and a preference step.

    profile: `steps` has the profiler trace a few steps of every training (training/meter.py), but for
    its first, which compiles.
    """

    name: str
    workdir: str = ""
    seed: int = 0
    method: MethodName = "mdpo"
    iterations: int = 3
    profile: Literal["none", "steps"] = "none"
    model: Model = Model()
    problems: Problems = Problems()
    sft: SFT = SFT()
    rollout: Rollout = Rollout()
    explore: Explore = dataclasses.field(default_factory=Explore)
    tool: Tool = Tool()
    pairs: Pairs = Pairs()
    train: Train = Train()
    term_c: TermC = TermC()
    lora: Lora = Lora()
    raft: Raft = Raft()
    evaluate: Evaluate = Evaluate()
    mesh: Mesh = Mesh()

    def __post_init__(self) -> None:
        _require(self.iterations >= 1, "iterations", self.iterations, "at least 1")
        _require(self.seed >= 0, "seed", self.seed, "at least 0")
        known = self.profile in ("none", "steps")
        _require(known, "profile", self.profile, "none or steps")
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
        wrong = inconsistency(self.method, self.train, self.term_c)
        if wrong:
            raise ConfigError(f"config.method={self.method}: {wrong}")
        wrong = _unfit(self.explore, self)
        if wrong:
            raise ConfigError(f"config.explore.strategy={self.explore.strategy}: {wrong}")

    @property
    def preset(self) -> Method:
        """What the method's name fixes."""
        return METHODS[self.method]

    @property
    def last_iteration(self) -> int:
        """0 for a method that has none."""
        return 0 if self.preset.objective == "none" else self.iterations

    @property
    def reference(self) -> str:
        """updated, fixed or mixture."""
        chosen = self.train.reference
        return self.preset.reference if chosen == "preset" else chosen

    @property
    def nll_weight(self) -> float:
        """Weight of the NLL term on chosen."""
        chosen = self.train.nll_weight
        return self.preset.nll_weight if chosen is None else chosen

    @property
    def directory(self) -> Path:
        """The run directory: `workdir`, or runs/NAME-METHOD-SEED."""
        return Path(self.workdir or f"runs/{self.name}-{self.method}-{self.seed}")

    def as_dict(self) -> dict[str, Any]:
        """Plain nested dict, as written beside the run."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def deciding(self) -> dict[str, Any]:
        """`as_dict` without what does not decide the results: where the run, its processes and its
        servers are, whether it is profiled, and how often its state is written."""
        fields = self.as_dict()
        del fields["workdir"], fields["profile"], fields["mesh"]["hosts"]
        del fields["train"]["save_every"]
        for name in TRANSPORT:
            del fields["rollout"][name]
        return fields

    def fingerprint(self) -> str:
        """Hash of everything that decides the run's results."""
        fields = self.deciding()
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]
