"""Small real parts that several tests share: a tokenizer, a chat, a model, demonstrations."""

import functools
import gzip
import json
from concurrent.futures import Future

import jax
import numpy as np

from mdpo_jax.chat import Chat
from mdpo_jax.data import synthetic, vocabulary
from mdpo_jax.environment.tool import Observation
from mdpo_jax.model import transformer
from mdpo_jax.model.families import ModelConfig
from mdpo_jax.types import Trajectory

# The whole loop on a model too small to learn, in seconds.
SMALL_RUN = [
    "--config=tiny", "--config.iterations=2", "--config.model.hidden_size=16",
    "--config.model.intermediate_size=16", "--config.model.num_layers=1",
    "--config.model.head_dim=8", "--config.sft.steps=6", "--config.sft.easy_steps=2",
    "--config.sft.skill_steps=2", "--config.sft.demonstrations=40", "--config.sft.batch=4",
    "--config.problems.per_iteration=4", "--config.problems.dev=4", "--config.problems.test=6",
    "--config.rollout.slots=8", "--config.rollout.chunk_problems=2", "--config.rollout.samples=2",
    "--config.rollout.previous_samples=1", "--config.rollout.turn_tokens=8",
    "--config.rollout.trajectory_tokens=12", "--config.train.rows=4",
    "--config.pairs.keep_limit=true", "--config.evaluate.pass_problems=2",
    "--config.mesh.fsdp=1", "--config.train.batch_pairs=2",
]  # fmt: skip

SUITE = synthetic.Suite(mental_scale=0.5)


@functools.cache
def tokenizer():
    demos = synthetic.demonstrations(SUITE, 300, 0)
    headers = {"user": "user\n", "assistant": "model\n"}
    return vocabulary.train_tokenizer(
        (headers[m["role"]] + m["content"] for d in demos for m in d), 420
    )


@functools.cache
def chat():
    return Chat(tokenizer(), "gemma")


@functools.cache
def model_config():
    return ModelConfig("gemma", len(tokenizer()), 16, 32, 2, 2, 1, 8)


@functools.cache
def params():
    return transformer.init_params(model_config(), jax.random.key(0))


@functools.cache
def trajectories(count=12):
    """Demonstrations as trajectories, all with a tool call."""
    out = []
    for messages in synthetic.demonstrations(synthetic.Suite(mental_scale=0.0), count, 3):
        ids, roles = chat().messages(messages)
        out.append(Trajectory("p", len(out), "demo", ids, roles, np.zeros(len(ids), np.float32)))
    return tuple(out)


def learnt(path):
    """Rows of a metrics.jsonl, without how long the steps took and what memory they held."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    measured = ("speed/", "memory/")
    return [{k: v for k, v in row.items() if not k.startswith(measured)} for row in rows]


def write_model(folder, family="gemma", max_shard_bytes=10**9, **fields):
    """A small random model as a Hugging Face folder with a tokenizer; returns its config."""
    import json

    from mdpo_jax.model.hf_config import from_hf, to_hf
    from mdpo_jax.model.weights import write_params

    folder.mkdir(parents=True, exist_ok=True)
    small = ModelConfig(family, len(tokenizer()), 16, 32, 2, 2, 1, 8)
    raw = to_hf(small, {"bos_token_id": 2, "eos_token_id": [1, 107]}) | fields
    config = from_hf(raw)
    weights = transformer.init_params(config, jax.random.key(1), fields.get("dtype", "float32"))
    write_params(folder, weights, config, fields.get("dtype", "float32"), max_shard_bytes)
    (folder / "config.json").write_text(json.dumps(raw))
    tokenizer().save_pretrained(folder)
    return config


def run_rows(door, flag, folder, lines, *more, name="rows.jsonl"):
    """The exit code of a door from a file of rows to `out.jsonl`, and that path; no partial stays."""
    rows, out = folder / name, folder / "out.jsonl"
    text = "\n".join(lines).encode()
    rows.write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    code = door([f"--{flag}={rows}", f"--out={out}", *more])
    assert not list(folder.glob("*.partial"))
    return code, out


def read_rows(path):
    """The rows of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text().splitlines()]


class Printer:
    """A tool that prints so many characters, some a token each, by trajectory and turn."""

    def __init__(self, sizes):
        self.sizes = sizes

    def start(self, key):
        return Printed(self.sizes, sum(key.encode()))

    def close(self):
        pass


class Printed:
    def __init__(self, sizes, turn):
        self.sizes, self.turn = sizes, turn

    def run(self, action):
        del action
        self.turn += 1
        size = self.sizes[self.turn % len(self.sizes)]
        answer = Future()
        answer.set_result(Observation(("Q%Z~" * size)[:size], "ok", 0.0))
        return answer

    def close(self):
        pass
