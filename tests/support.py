"""Small real parts that several tests share: a tokenizer, a chat, a model, demonstrations."""

import functools

import jax
import numpy as np

from mdpo_jax.chat import Chat
from mdpo_jax.data import synthetic, vocabulary
from mdpo_jax.model import transformer
from mdpo_jax.model.families import ModelConfig
from mdpo_jax.types import Trajectory

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
