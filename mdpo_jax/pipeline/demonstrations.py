"""What the warm-up learns from: a file, the synthetic suite, or a problem file's worked solutions."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from mdpo_jax.config import ConfigError
from mdpo_jax.data import packing, synthetic
from mdpo_jax.data.packing import Item
from mdpo_jax.data.problems import worked_solutions
from mdpo_jax.pipeline.context import Context, suite
from mdpo_jax.types import Trajectory

Messages = list[dict[str, str]]
_AT_ONCE = 64  # tool calls in flight


def demonstrations(context: Context, held_out: set[str]) -> list[tuple[int, list[Item]]]:
    """(steps, demonstrations) of each part of the curriculum; the last part's steps do not count.

    From `sft.path`, else the suite, else those worked solutions of `problems.path` whose question is
    not in `held_out`; empty if the file has none.
    """
    config, settings = context.config, context.config.sft
    if settings.path is not None:
        return [(0, _items(context, _read(Path(settings.path))))]
    if config.problems.path is not None:
        found = list(islice(_worked(context, held_out), settings.demonstrations))
        items = _items(context, found)
        return [(0, items)] if items else []
    last = suite(config)
    skill = dataclasses.replace(last, mental_scale=settings.skill_mental_scale)
    easy = dataclasses.replace(skill, steps=(1.0,))
    parts = [(settings.easy_steps, easy), (settings.skill_steps, skill), (0, last)]
    return [
        (steps, _items(context, synthetic.demonstrations(s, settings.demonstrations, config.seed)))
        for steps, s in parts
        if steps or s is last
    ]


def _worked(context: Context, held_out: set[str]) -> Iterator[Messages]:
    """Question, code, what the tool really printed, answer; solutions whose code fails are left out."""
    paths = (context.config.problems.path or "").split(",")
    rows = (
        row for path in paths for row in worked_solutions(path) if row[0].question not in held_out
    )
    while batch := list(islice(rows, _AT_ONCE)):
        sessions = [context.tool.start(f"worked/{problem.id}") for problem, _ in batch]
        texts = [f"```python\n{code}\n```" for _, code in batch]
        calls = [session.run(text) for session, text in zip(sessions, texts, strict=True)]
        for (problem, _), text, call, session in zip(batch, texts, calls, sessions, strict=True):
            observation = call.result()
            session.close()
            if observation.status == "ok":
                yield [
                    {"role": "user", "content": problem.question},
                    {"role": "assistant", "content": text},
                    {"role": "user", "content": f"```output\n{observation.text}\n```"},
                    {"role": "assistant", "content": f"The answer is \\boxed{{{problem.answer}}}"},
                ]


def _read(path: Path) -> list[Messages]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        return [json.loads(line)["messages"] for line in lines if line.strip()]
    except OSError as error:
        raise ConfigError(f"config.sft.path={str(path)!r}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise ConfigError(
            f'config.sft.path={str(path)!r}: expected JSON lines with a "messages" list'
        ) from None


def _items(context: Context, conversations: Sequence[Messages]) -> list[Item]:
    out = []
    for index, messages in enumerate(conversations):
        ids, roles = context.chat.messages(messages)
        if len(ids) <= context.config.train.row_length:
            zeros = np.zeros(len(ids), np.float32)
            trajectory = Trajectory(f"demonstration/{index}", 0, "demonstration", ids, roles, zeros)
            weight = context.config.sft.observation_weight
            out.append(packing.item(trajectory, "sampled", observation_weight=weight))
    return out
