"""Chat formats: role -> token ids; the only place that knows a template.

Everything the harness adds is encoded here, once, as ids; what the policy wrote is never encoded
again.  Special tokens inside a question or an observation are encoded as plain text, so a tool
that prints `<start_of_turn>` adds data and no structure.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mdpo_jax.types import Role


class ChatError(ValueError):
    """The tokenizer lacks what a chat format needs, or a conversation has no legal shape."""


@dataclasses.dataclass(frozen=True)
class Template:
    """The fixed strings of a family, with the special tokens they are made of.

        {prompt_head} question {prompt_tail} ACTION {end} {close} {observe_head} output
        {observe_tail} {reopen} ACTION {end}

    `end` is the token with which the policy ends its turn; `close` and `reopen` are the harness's.
    """

    prompt_head: str
    prompt_tail: str
    end: str
    close: str
    observe_head: str
    observe_tail: str
    reopen: str
    stops: tuple[str, ...]
    stop_strings: tuple[str, ...]


TEMPLATES: Mapping[str, Template] = {
    # arXiv 2409.02392's zero-shot tool setting: no system prompt, the question bare.
    "gemma": Template(
        prompt_head="<bos><start_of_turn>user\n",
        prompt_tail="<end_of_turn>\n<start_of_turn>model\n",
        end="<end_of_turn>",
        close="\n",
        observe_head="<start_of_turn>user\n",
        observe_tail="<end_of_turn>\n",
        reopen="<start_of_turn>model\n",
        stops=("<end_of_turn>", "<eos>", "<start_of_turn>"),
        stop_strings=("```output",),
    ),
}


class Chat:
    """One family's format over one tokenizer."""

    def __init__(self, tokenizer: Any, family: str):
        if family not in TEMPLATES:
            raise ChatError(f"chat format: {family!r} is unknown; known: {', '.join(TEMPLATES)}")
        self.tokenizer, self.family, self.template = tokenizer, family, TEMPLATES[family]
        self.stop_ids = tuple(self._special(token) for token in self.template.stops)
        self.stop_strings = self.template.stop_strings
        self.end_id = self._special(self.template.end)
        t = self.template
        self._fixed = {
            name: self._encode(getattr(t, name), special=True)
            for name in (
                "prompt_head", "prompt_tail", "close", "observe_head", "observe_tail", "reopen"
            )
        }  # fmt: skip

    def prompt(self, question: str) -> list[int]:
        """Ids of the prompt, up to where the policy starts; all of role PROMPT."""
        return self._fixed["prompt_head"] + self._encode(question) + self._fixed["prompt_tail"]

    def observation(
        self, text: str, *, ended: bool = True, limit: int | None = None
    ) -> tuple[list[int], list[int]]:
        """Ids and roles that follow an action whose tool printed `text`.

        `ended`: the policy emitted its end-of-turn token; where a stop string cut the turn, the
        harness ends it, with role TEMPLATE.  `limit`: of a longer output only the first and the
        last limit / 2 tokens stay, around ` ... `.
        """
        ids = self._encode(text)
        if limit is not None and len(ids) > limit:
            half = max(1, limit // 2)
            text = f"{self.decode(ids[:half])} ... {self.decode(ids[-half:])}"
        return self._splice(f"```output\n{text}\n```", ended)

    def messages(self, messages: Sequence[Mapping[str, str]]) -> tuple[np.ndarray, np.ndarray]:
        """Ids and roles of a demonstration in the recipe's schema: user, assistant, user, ...

        Later user turns are observations.  Raises ChatError when the roles do not alternate or the
        assistant does not have the last word.
        """
        roles = [m.get("role") for m in messages]
        wanted = [("user", "assistant")[i % 2] for i in range(len(roles))]
        if roles != wanted or len(roles) % 2 or not roles:
            raise ChatError(f"messages: roles are {roles}; expected user, assistant, user, ...")
        ids = self.prompt(messages[0]["content"])
        tags = [int(Role.PROMPT)] * len(ids)
        for index, message in enumerate(messages[1:]):
            if index % 2:
                new_ids, new_tags = self._splice(message["content"], ended=True)
            else:
                new_ids = [*self._encode(message["content"]), self.end_id]
                new_tags = [int(Role.ACTION)] * len(new_ids)
            ids, tags = ids + new_ids, tags + new_tags
        return np.asarray(ids, np.int32), np.asarray(tags, np.uint8)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of ids without special tokens: for the tool, the grader and people."""
        return self.tokenizer.decode(list(map(int, ids)), skip_special_tokens=True)

    def _splice(self, content: str, ended: bool) -> tuple[list[int], list[int]]:
        fixed = self._fixed
        close = ([] if ended else [self.end_id]) + fixed["close"]
        turn = fixed["observe_head"] + self._encode(content) + fixed["observe_tail"]
        tags = [Role.TEMPLATE] * len(close) + [Role.OBSERVATION] * len(turn)
        tags += [Role.TEMPLATE] * len(fixed["reopen"])
        return close + turn + fixed["reopen"], [int(t) for t in tags]

    def _encode(self, text: str, *, special: bool = False) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=not special)[
            "input_ids"
        ]

    def _special(self, token: str) -> int:
        index = self.tokenizer.convert_tokens_to_ids(token)
        if index is None or index == self.tokenizer.unk_token_id:
            raise ChatError(
                f"tokenizer: {token!r} is not in its vocabulary; the {self.family} chat format "
                "needs it as one token"
            )
        return int(index)
