"""What the warm-up learns from: a file, the synthetic suite, or a problem file's worked solutions."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from mdpo_jax import hosts
from mdpo_jax.chat import ChatError, check_roles
from mdpo_jax.config import ConfigError
from mdpo_jax.data import packing, synthetic
from mdpo_jax.data.packing import Item
from mdpo_jax.data.problems import worked_solutions
from mdpo_jax.pipeline.context import Context, suite
from mdpo_jax.types import Trajectory

Messages = list[dict[str, str]]
_AT_ONCE = 64  # tool calls in flight
_KEPT_TEXT = 2000
_log = logging.getLogger(__name__)


def demonstrations(
    context: Context, held_out: set[str], folder: Path
) -> list[tuple[int, list[Item]]]:
    """(steps, demonstrations) of each part of the curriculum; the last part's steps do not count.

    From `sft.path`, else the suite, else those worked solutions of `problems.path` whose question is
    not in `held_out`; empty if the file has none.
    """
    config, settings = context.config, context.config.sft
    if settings.path is not None:
        return [(0, _items(context, _read(Path(settings.path), folder / "quarantine.jsonl")))]
    if config.problems.path is not None:
        # By one process: what a tool says in time differs between hosts.
        found = hosts.by_first(
            lambda: list(islice(_worked(context, held_out), settings.demonstrations))
        )
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


def _read(path: Path, quarantine: Path) -> list[Messages]:
    """The good rows of a demonstrations file; the others go to `quarantine` with their reason."""
    named = f"config.sft.path={str(path)!r}"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{named}: {getattr(error, 'strerror', None) or error}") from None
    good: list[Messages] = []
    bad: list[dict[str, str | int]] = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                good.append(_messages(line))
            except ChatError as error:
                bad.append({"line": number, "reason": str(error), "text": line[:_KEPT_TEXT]})
    if hosts.first():
        quarantine.write_text("".join(json.dumps(row) + "\n" for row in bad), encoding="utf-8")
    if not good:
        first = f"; line {bad[0]['line']}: {bad[0]['reason']}" if bad else "; it is empty"
        raise ConfigError(f"{named}: no usable row{first}")
    if bad:
        _log.warning("%s: %d bad rows set aside in %s", named, len(bad), quarantine)
    return good


def _messages(line: str) -> Messages:
    """One row's conversation; ChatError for one that `Chat.messages` could not take."""
    try:
        messages = json.loads(line)["messages"]
    except (ValueError, KeyError, TypeError):
        raise ChatError('not JSON with a "messages" list') from None
    whole = isinstance(messages, list) and all(
        isinstance(m, dict) and isinstance(m.get("content"), str) for m in messages
    )
    if not whole:
        raise ChatError("messages: expected a list of {role, content}, both text")
    check_roles(messages)
    return messages


def _items(context: Context, conversations: Sequence[Messages]) -> list[Item]:
    out = []
    length = context.config.train.row_length
    for index, messages in enumerate(conversations):
        ids, roles = context.chat.messages(messages)
        if len(ids) <= length:
            zeros = np.zeros(len(ids), np.float32)
            trajectory = Trajectory(f"demonstration/{index}", 0, "demonstration", ids, roles, zeros)
            weight = context.config.sft.observation_weight
            out.append(packing.item(trajectory, "sampled", observation_weight=weight))
    if len(out) < len(conversations):
        _log.warning(
            "SFT: %d of %d demonstrations are longer than train.row_length=%d and left out",
            len(conversations) - len(out), len(conversations), length,
        )  # fmt: skip
    if conversations and not out:
        raise ConfigError(f"config.train.row_length={length}: no demonstration fits; expected more")
    return out
