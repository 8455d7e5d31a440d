"""What the stages of one run share: model shape, tokenizer, chat, tool, grader, compiled programs."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from mdpo_jax import hosts
from mdpo_jax.chat import Chat
from mdpo_jax.config import Config, ConfigError
from mdpo_jax.data import synthetic
from mdpo_jax.data.batches import Batches
from mdpo_jax.data.fitting import fitted
from mdpo_jax.data.packing import Layout
from mdpo_jax.environment.interpreter import PythonInterpreter
from mdpo_jax.environment.noisy import NoisyTool, with_wrong_number
from mdpo_jax.environment.tool import Tool
from mdpo_jax.grading.rules import Policy as GradingPolicy
from mdpo_jax.grading.verdict import Grader
from mdpo_jax.isolation.sandbox import probe
from mdpo_jax.model import lora, sharding, transformer
from mdpo_jax.model.families import ModelConfig, param_shapes
from mdpo_jax.model.hf_config import small_config
from mdpo_jax.model.lora import Lora
from mdpo_jax.model.policy import Policy, describe_policy, with_params
from mdpo_jax.pipeline import settings
from mdpo_jax.pipeline.files import stage
from mdpo_jax.pipeline.parameters import Adapters, Parameters
from mdpo_jax.rollout.engine import Engine, Limits
from mdpo_jax.rollout.layout import Placement, decode_mesh
from mdpo_jax.rollout.remote import RemoteEngine, RemoteSampler
from mdpo_jax.rollout.sampler import Sampler
from mdpo_jax.rollout.sampling import Sampling
from mdpo_jax.rollout.shapes import Shapes
from mdpo_jax.training.losses import Forward
from mdpo_jax.training.trainer import Trainer

PARAMS, EARLIER = "params", "params-earlier"


def suite(config: Config) -> synthetic.Suite:
    """The synthetic suite at the configured difficulty."""
    p = config.problems
    return synthetic.Suite(
        steps=p.steps,
        largest_start=p.largest_start,
        largest_value=p.largest_value,
        noise=p.noise,
        mental_scale=p.mental_scale,
    )


class Context:
    """One run's shared parts, made when first needed; `close` ends the processes.

    grading: the grader's policy; rewards are given in `strict`.
    """

    def __init__(self, config: Config, directory: Path, grading: GradingPolicy = "strict"):
        self.config, self.directory = config, directory
        probe(config.tool.sandbox)  # one that is required and not to be had stops the run here
        self._grading: GradingPolicy = grading
        self._closers: list[Any] = []

    def close(self) -> None:
        """End the tool's and the grader's processes."""
        while self._closers:
            self._closers.pop().close()

    @functools.cached_property
    def mesh(self) -> jax.sharding.Mesh | None:
        """The configured mesh; None for one device."""
        m, devices = self.config.mesh, len(jax.devices())
        fsdp = m.fsdp or max(1, devices // (m.data * m.tensor))
        size = m.data * fsdp * m.tensor
        if hosts.several() and size != devices:
            raise ConfigError(
                f"config.mesh: data {m.data} x fsdp {fsdp} x tensor {m.tensor} = {size} of the "
                f"{devices} devices of {jax.process_count()} processes; expected all of them"
            )
        return None if m.data * fsdp * m.tensor == 1 else sharding.make_mesh(m.data, fsdp, m.tensor)

    @functools.cached_property
    def start(self) -> Policy:
        """The policy before any training, without its parameters (`begin` reads them): that of
        `model.path`, or a fresh one with a trained tokenizer."""
        m = self.config.model
        folder = self.directory / "start" / "model"
        if not m.path:
            # A folder there is whole, for `save` renames it into place.
            def make(_: Path) -> dict[str, str] | None:
                there = hosts.by_first(folder.exists)
                return None if there else {"model": self._fresh().save(folder).name}

            stage(folder.parent, make)
        return describe_policy(m.path or folder)

    def begin(self) -> Any:
        """Parameters before any training, read anew."""
        return with_params(self.start, self.config.model.param_dtype, self.mesh).params

    def _fresh(self) -> Policy:
        from mdpo_jax.data.spellings import family_tokenizer

        m, seed = self.config.model, self.config.seed
        demos = synthetic.demonstrations(suite(self.config), 2000, seed)
        assistant = "model" if m.family.startswith("gemma") else "assistant"
        headers = {"user": "user\n", "assistant": f"{assistant}\n"}
        texts = (headers[t["role"]] + t["content"] for demo in demos for t in demo)
        tokenizer = family_tokenizer(m.family, texts, m.vocab_size)
        shape = small_config(
            m.family, len(tokenizer), m.hidden_size, m.intermediate_size, m.num_layers,
            m.num_heads, m.num_kv_heads, m.head_dim,
        )  # fmt: skip
        params = transformer.init_params(shape, jax.random.key(seed), jnp.dtype(m.param_dtype))
        ends = dict.fromkeys([tokenizer.eos_token_id, Chat(tokenizer, m.family).end_id])
        ids = {
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": list(ends),
            "pad_token_id": tokenizer.pad_token_id,
        }
        ids = {name: value for name, value in ids.items() if value is not None}
        return Policy(shape, params, tokenizer, dict(ids), dict(ids))

    @functools.cached_property
    def shape(self) -> ModelConfig:
        """The model's configuration."""
        return self.start.config

    @functools.cached_property
    def chat(self) -> Chat:
        """The configured chat format over the run's tokenizer."""
        m, start = self.config.model, self.start
        name = self.shape.family if m.chat == "auto" else m.chat
        return Chat(start.tokenizer, name, start.generation_config, m.system)

    @functools.cached_property
    def interpreter(self) -> PythonInterpreter:
        """What runs the policy's code."""
        interpreter = PythonInterpreter(**dataclasses.asdict(self.config.tool))
        self._closers.append(interpreter)
        return interpreter

    @functools.cached_property
    def tool(self) -> Tool:
        """The interpreter, with the synthetic suite's noise where that is the problem source."""
        tool: Tool = self.interpreter
        suite, seed = self.config.problems, self.config.seed
        if suite.path is not None:
            return tool
        if suite.fault:
            tool = NoisyTool(tool, suite.fault, f"{seed}/fault", with_wrong_number)
        return NoisyTool(tool, suite.noise, seed) if suite.noise else tool

    @functools.cached_property
    def grader(self) -> Grader:
        """The grader, in the context's policy."""
        grader = Grader(policy=self._grading)
        self._closers.append(grader)
        return grader

    @functools.cached_property
    def placement(self) -> Placement:
        """Where slots are decoded.  Raises ValueError for a layout that cannot be."""
        r = self.config.rollout
        if r.backend == "http" and hosts.several():
            raise ConfigError(
                f"config.rollout.backend=http: {jax.process_count()} processes would each load "
                "the servers; expected config.mesh.hosts=1, or rollout.backend=local"
            )
        return Placement(decode_mesh(self.mesh, r.tensor))

    @functools.cached_property
    def sampler(self) -> Sampler | RemoteSampler:
        """One sampler for all policies of the run: it compiles once, or has its servers."""
        r = self.config.rollout
        if r.backend == "http":
            return RemoteSampler(r, self.chat, self.policy, self.directory / "served")
        layout, fine = self.placement, jax.default_backend() == "cpu"
        slots = -(-r.slots // layout.ways) * layout.ways
        shapes = Shapes.make(slots, r.context, r.block, fine=fine)
        return Sampler(self.shape, shapes, self.chat.stop_ids, r.decode_dtype, layout)

    @property
    def limits(self) -> Limits:
        """Of a trajectory."""
        r = self.config.rollout
        return Limits(
            r.max_turns, r.turn_tokens, r.trajectory_tokens, r.observation_tokens, r.context
        )

    @functools.cached_property
    def engine(self) -> Engine:
        """The multi-turn loop over the sampler and the tool."""
        return self.engine_with(self.tool)

    def engine_with(self, tool: Tool | None) -> Engine:
        """The loop with another tool, or with none."""
        sampler, r = self.sampler, self.config.rollout
        patience = None if tool is None else self.patience
        if isinstance(sampler, RemoteSampler):
            return RemoteEngine(sampler, self.chat, tool, self.limits, r.slots, patience)
        return Engine(sampler, self.chat, tool, self.limits, patience=patience, collect=r.collect)

    @property
    def patience(self) -> float:
        """Seconds after which a tool call is given up, far beyond what one in order takes.

        2 * tool.timeout for each call of another slot that may be served first, and for each action
        of the trajectory that may have to run again; and half a minute.
        """
        before = -(-self.config.rollout.slots // self.interpreter.workers)
        return 2 * (before + self.limits.max_turns) * self.config.tool.timeout + 30

    def sampling(self, temperature: float) -> Sampling:
        """At a temperature, cut as the rollouts are."""
        return Sampling(temperature, self.config.rollout.top_k, self.config.rollout.top_p)

    @functools.cached_property
    def forward(self) -> Forward:
        """How the trainer runs the model; ConfigError for what these devices cannot."""
        return settings.forward(self.config, jax.default_backend())

    def trainer(self, *, sft: bool = False) -> Trainer:
        """The trainer with the preference step's, or the warm-up's, optimiser."""
        c = self.config
        forward = self.forward
        slots = settings.slots(c)
        return Trainer(
            self.shape,
            forward,
            settings.optimiser(c, sft=sft),
            Layout(self._rows, c.train.row_length, slots, forward.shared_prompts),
            self.mesh,
            # A fresh model knows nothing that an adapter could build on.
            self.adapter if c.model.path or not sft else None,
        )

    def fitted(self, trainer: Trainer, batches: Batches, steps: int, longest: int) -> Trainer:
        """With the layout of a stage's data, whose longest sequence has so many tokens."""
        if self.config.train.layout == "fixed":
            return trainer
        layout = fitted(batches, steps, trainer.layout, self._ways, longest)
        return dataclasses.replace(trainer, layout=layout)

    @property
    def _ways(self) -> int:
        """What the mesh divides rows by."""
        shape = self.mesh.shape if self.mesh is not None else {}
        return shape.get("data", 1) * shape.get("fsdp", 1)

    @property
    def _rows(self) -> int:
        """train.rows, rounded up to what the mesh divides."""
        return -(-self.config.train.rows // self._ways) * self._ways

    @functools.cached_property
    def adapter(self) -> Lora | None:
        """Rank, alpha and targets of a LoRA run; None where every weight is trained."""
        return settings.adapter(self.config)

    @functools.cached_property
    def parameters(self) -> Parameters:
        """What the run trains and keeps on disk."""
        if self.adapter is None:
            return Parameters(self._like, self.begin)
        return Adapters(
            self._like, self.begin, self.shape, self.adapter, self.config.model.path,
            self.directory / "sft" / PARAMS, self.mesh, self.config.seed,
        )  # fmt: skip

    @property
    def _like(self) -> Any:
        """The form of the model's parameters: shapes with shardings."""
        shapes = param_shapes(self.shape, jnp.dtype(self.config.model.param_dtype))
        if self.mesh is None:
            one = SingleDeviceSharding(jax.devices()[0])
            places = jax.tree.map(lambda _: one, shapes)
        else:
            places = sharding.param_shardings(self.shape, self.mesh)
        return jax.tree.map(
            lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, places
        )

    def rest(self) -> None:
        """Free the devices' memory that sampling took, but for its programs, before a training."""
        if "engine" in self.__dict__:
            self.engine.rest()
        if "sampler" in self.__dict__:
            self.sampler.rest()

    def load(self, path: Path) -> Any:
        """Parameters of a stage of this run, as the model takes them."""
        return self.parameters.load(path)

    def policy(self, params: Any) -> Policy:
        """Parameters as a policy that can be exported, an adapter merged."""
        return dataclasses.replace(self.start, params=lora.fold(params))
