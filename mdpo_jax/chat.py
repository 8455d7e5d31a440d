"""Chat formats: role -> token ids; the only place that knows a template.

Everything the harness adds is encoded here, once, as ids; what the policy wrote is never encoded
again.  Special tokens inside a question or an observation are encoded as plain text, so a tool
that prints `<start_of_turn>` adds data and no structure.

The ids are those that the tokenizer gives for the conversation as one text.  It cuts a text at its
special tokens and encodes what lies between on its own, and so do we: special tokens by their id,
each stretch between two of them, template and content together, in one call.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mdpo_jax.types import Role

# Behind a question that is to be solved without a tool (the paper's, zero-shot).
COT_INSTRUCTION = "\nPlease reason step by step, and put your final answer within \\boxed{}."


class ChatError(ValueError):
    """The tokenizer lacks what a chat format needs, or a conversation has no legal shape."""


@dataclasses.dataclass(frozen=True)
class Template:
    """The fixed strings of a format, with the special tokens they are made of.

        BOS {prompt_head} question {prompt_tail} ACTION END {close} {observe_head} output
        {observe_tail} {reopen} ACTION END

    markers: the special tokens in the strings; a tokenizer without them cannot carry the format.
    END, with which the policy ends its turn, is `end`, or the tokenizer's eos token where that is
    None.  bos: whether BOS, the tokenizer's bos token, opens the conversation, once whatever the
    number of turns; None: if there is one and it is not the eos token too.
    before_action, after_action: what a demonstration has around the assistant's text; the policy
    is to write it, so it is of role ACTION.  system: the turn (or, in Llama 2, the insert) that
    carries a system prompt, put where prompt_head says {system}.
    stops: tokens that end a turn besides END, the eos token and those of the generation config.
    """

    markers: tuple[str, ...]
    prompt_head: str
    prompt_tail: str
    observe_head: str
    observe_tail: str
    end: str | None = None
    close: str = ""
    reopen: str = ""
    bos: bool | None = True
    before_action: str = ""
    after_action: str = ""
    system: str | None = None
    stops: tuple[str, ...] = ()
    stop_strings: tuple[str, ...] = ("```output",)


# The recipe's spelling (arXiv 2409.02392, the official code's zero-shot tool setting): a space on
# either side of each instruction marker.  The space behind [/INST] is the policy's, as the first
# character of its first token (`▁To`), so the prompt ends with [/INST] itself.
_MISTRAL = Template(
    markers=("[INST]", "[/INST]"),
    prompt_head=" [INST] ",
    prompt_tail=" [/INST]",
    close=" ",
    observe_head="[INST] ",
    observe_tail=" [/INST]",
    before_action=" ",
    stops=("<s>", "[INST]"),
)

TEMPLATES: Mapping[str, Template] = {
    # Gemma 1, 1.1, 2, 3 and CodeGemma.
    "gemma": Template(
        markers=("<start_of_turn>", "<end_of_turn>"),
        prompt_head="<start_of_turn>user\n",
        prompt_tail="<end_of_turn>\n<start_of_turn>model\n",
        end="<end_of_turn>",
        close="\n",
        observe_head="<start_of_turn>user\n",
        observe_tail="<end_of_turn>\n",
        reopen="<start_of_turn>model\n",
        stops=("<start_of_turn>",),
    ),
    "mistral": _MISTRAL,
    # What Mistral-7B-Instruct-v0.3 was tuned on: `<s>[INST] q[/INST] a</s>[INST] ...`.
    "mistral-instruct": dataclasses.replace(
        _MISTRAL, prompt_head="[INST] ", prompt_tail="[/INST]", close="", observe_tail="[/INST]"
    ),
    # The observation is a user turn; the role `ipython` of Llama 3.1 is not the recipe's, nor is
    # the system turn with dates that its Hugging Face template adds by itself.
    "llama3": Template(
        markers=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        prompt_head="{system}<|start_header_id|>user<|end_header_id|>\n\n",
        prompt_tail="<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        end="<|eot_id|>",
        observe_head="<|start_header_id|>user<|end_header_id|>\n\n",
        observe_tail="<|eot_id|>",
        reopen="<|start_header_id|>assistant<|end_header_id|>\n\n",
        system="<|start_header_id|>system<|end_header_id|>\n\n{}<|eot_id|>",
        stops=("<|start_header_id|>",),
    ),
    # Llama 2 and CodeLlama: the instruction markers are plain text, so a question can imitate
    # them.  Their template repeats <s> before each user turn; here it comes once.
    "llama2": Template(
        markers=("<s>", "</s>"),
        prompt_head="[INST] {system}",
        prompt_tail=" [/INST]",
        observe_head="[INST] ",
        observe_tail=" [/INST]",
        before_action=" ",
        after_action=" ",
        system="<<SYS>>\n{}\n<</SYS>>\n\n",
        stops=("<s>",),
        stop_strings=("```output", "[INST]"),
    ),
    # Qwen 2, 2.5 and 3.  Qwen's own templates add a default system turn (2 and 2.5) or an empty
    # thought (3); the recipe has neither.  `system` gives the former.
    "chatml": Template(
        markers=("<|im_start|>", "<|im_end|>"),
        prompt_head="{system}<|im_start|>user\n",
        prompt_tail="<|im_end|>\n<|im_start|>assistant\n",
        end="<|im_end|>",
        close="\n",
        observe_head="<|im_start|>user\n",
        observe_tail="<|im_end|>\n",
        reopen="<|im_start|>assistant\n",
        bos=False,
        system="<|im_start|>system\n{}<|im_end|>\n",
        stops=("<|im_start|>",),
    ),
    # For a pretrained model without chat tokens: needs an eos token and nothing else.
    "plain": Template(
        markers=(),
        prompt_head="{system}Question: ",
        prompt_tail="\n\nSolution:\n",
        observe_head="\n",
        observe_tail="\n",
        bos=None,
        system="{}\n\n",
        stop_strings=("```output", "\nQuestion:"),
    ),
}

# A family's formats, in the order in which they are tried on the tokenizer's vocabulary.
FAMILIES: Mapping[str, tuple[str, ...]] = {
    "gemma": ("gemma",),
    "gemma2": ("gemma",),
    "gemma3": ("gemma",),
    "mistral": ("mistral",),
    "llama": ("llama3", "chatml", "llama2"),
    "qwen2": ("chatml",),
    "qwen3": ("chatml",),
}

# Sentencepiece puts a space before a text, but not before a part of one.  Behind this character,
# which is a byte of its own and merges with nothing, a part is encoded as a part.
_ANCHOR = "\x01"


def choose_format(family: str, vocabulary: Mapping[str, int]) -> str:
    """The chat format of a model family, or of a format's own name, over a vocabulary.

    Raises ChatError for an unknown name, or when the vocabulary has the special tokens of none of
    the family's formats.
    """
    if family not in TEMPLATES and family not in FAMILIES:
        known = ", ".join(dict.fromkeys([*FAMILIES, *TEMPLATES]))
        raise ChatError(f"chat format: {family!r} is unknown; known: {known}")
    lacking = []
    for name in FAMILIES.get(family, (family,)):
        absent = [token for token in TEMPLATES[name].markers if token not in vocabulary]
        if not absent:
            return name
        lacking.append(f"{absent[0]!r}, which the {name} chat format needs as one token")
    raise ChatError(f"tokenizer: its vocabulary lacks {'; '.join(lacking)}")


@dataclasses.dataclass(frozen=True)
class _Frame:
    """A turn's fixed ids, and the plain text on either side of its content."""

    before: list[int]
    left: str
    right: str
    after: list[int]


def check_roles(messages: Sequence[Mapping[str, str]]) -> None:
    """ChatError unless the roles are user, assistant, user, ..., assistant."""
    roles = [m.get("role") for m in messages]
    wanted = [("user", "assistant")[i % 2] for i in range(len(roles))]
    if roles != wanted or len(roles) % 2 or not roles:
        raise ChatError(f"messages: roles are {roles}; expected user, assistant, user, ...")


class Chat:
    """One format over one tokenizer.

    family: a model family, whose format is chosen by the vocabulary, or a format's name.
    generation_config: the model's, whose `eos_token_id` (a number or a list) end turns as well.
    system: a system prompt, for formats that have one; the recipe has none.
    Raises ChatError when the tokenizer lacks a token that the format needs, does not keep it apart
    from text, or joins the parts of a conversation in a way that is not understood here.
    """

    def __init__(
        self,
        tokenizer: Any,
        family: str,
        generation_config: Mapping[str, Any] | None = None,
        system: str = "",
    ):
        self.tokenizer, self._vocabulary = tokenizer, tokenizer.get_vocab()
        self.format = choose_format(family, self._vocabulary)
        self.template = t = TEMPLATES[self.format]
        self._end = t.end or self._named("eos_token")
        self._bos = self._opening()
        self._bos_ids = [self._special(token) for token in self._bos]
        self._markers = {token: self._special(token) for token in t.markers}
        self.end_id = self._special(self._end)
        self.stop_ids = self._stops(generation_config or {})
        self.stop_strings = t.stop_strings
        self._space, self._space_each = self._spaces()
        self._anchor = len(self._raw(_ANCHOR))
        if system and t.system is None:
            raise ChatError(f"system: {system!r}; the {self.format} chat format has no system turn")
        insert = (t.system or "").replace("{}", system) if system else ""
        self._prompt = self._frame(t.prompt_head.replace("{system}", insert), t.prompt_tail)
        self._turn = self._frame(t.observe_head, t.observe_tail)
        self._close, self._reopen = self._fixed(t.close), self._fixed(t.reopen)
        self._check(t.prompt_head.replace("{system}", insert))

    def prompt(self, question: str) -> list[int]:
        """Ids of the prompt, up to where the policy starts; all of role PROMPT."""
        return self._bos_ids + self._fill(self._prompt, question)

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
            # Half a character, cut between its bytes, would become three bytes for each of its own.
            first = self.decode(ids[:half]).rstrip("\ufffd")
            last = self.decode(ids[-half:]).lstrip("\ufffd")
            text = f"{first} ... {last}"
        return self._splice(f"```output\n{text}\n```", ended)

    def messages(self, messages: Sequence[Mapping[str, str]]) -> tuple[np.ndarray, np.ndarray]:
        """Ids and roles of a demonstration in the recipe's schema: user, assistant, user, ...

        Later user turns are observations.  Raises ChatError when the roles do not alternate or the
        assistant does not have the last word.
        """
        check_roles(messages)
        ids = self.prompt(messages[0]["content"])
        tags = [int(Role.PROMPT)] * len(ids)
        for index, message in enumerate(messages[1:]):
            if index % 2:
                new_ids, new_tags = self._splice(message["content"], ended=True)
            else:
                new_ids = self._action(message["content"])
                new_tags = [int(Role.ACTION)] * len(new_ids)
            ids, tags = ids + new_ids, tags + new_tags
        return np.asarray(ids, np.int32), np.asarray(tags, np.uint8)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of ids without special tokens: for the tool, the grader and people."""
        # Llama 3's tokenizer asks for a clean-up that drops spaces before punctuation: of code too.
        return self.tokenizer.decode(
            list(map(int, ids)), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def described(self) -> dict[str, Any]:
        """The format as text, special tokens in full: what a result must state to be compared."""

        def text(ids: Sequence[int]) -> str:
            return self.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)

        return {
            "format": self.format,
            "prompt": text(self.prompt("{question}")),
            "observation": text(self.observation("{output}")[0]),
            "stop_tokens": self.tokenizer.convert_ids_to_tokens(list(self.stop_ids)),
            "stop_strings": list(self.stop_strings),
        }

    def _action(self, content: str) -> list[int]:
        """A demonstration's turn as the policy would have written it, its end included."""
        t = self.template
        text = f"{t.before_action}{content}{t.after_action}"
        behind_text = bool(self._cut(t.prompt_tail)[-1])
        return [*self._encode(text, behind_text=behind_text), self.end_id]

    def _splice(self, content: str, ended: bool) -> tuple[list[int], list[int]]:
        close = ([] if ended else [self.end_id]) + self._close
        turn = self._fill(self._turn, content)
        tags = [Role.TEMPLATE] * len(close) + [Role.OBSERVATION] * len(turn)
        tags += [Role.TEMPLATE] * len(self._reopen)
        return close + turn + self._reopen, [int(t) for t in tags]

    def _frame(self, head: str, tail: str) -> _Frame:
        *before, left = self._cut(head)
        right, *after = self._cut(tail)
        return _Frame(self._fixed("".join(before)), left, right, self._fixed("".join(after)))

    def _fill(self, frame: _Frame, content: str) -> list[int]:
        return frame.before + self._encode(f"{frame.left}{content}{frame.right}") + frame.after

    def _fixed(self, text: str) -> list[int]:
        """Ids of a template's string, its markers as special tokens."""
        parts = [
            [self._markers[part]] if part in self._markers else self._encode(part)
            for part in self._cut(text)
        ]
        return [i for part in parts for i in part]

    def _cut(self, text: str) -> list[str]:
        """Plain text at even places, markers at odd ones."""
        pattern = "|".join(map(re.escape, self.template.markers))
        return re.split(f"({pattern})", text) if pattern else [text]

    def _encode(self, text: str, *, behind_text: bool = False) -> list[int]:
        """Ids of plain text that stands behind a special token, or behind other plain text."""
        if not text or not self._space or (self._space_each and not behind_text):
            return self._raw(text)
        return self._raw(_ANCHOR + text)[self._anchor :]

    def _raw(self, text: str, *, special: bool = False) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=not special)[
            "input_ids"
        ]

    def _spaces(self) -> tuple[bool, bool]:
        """Whether the tokenizer puts a space before a text, and whether behind special tokens too."""

        def spaced(ids: list[int]) -> bool:
            pieces = self.tokenizer.convert_ids_to_tokens(ids)
            return bool(pieces) and pieces[0].startswith(("\u2581", "\u0120"))

        return spaced(self._raw("x")), spaced(self._raw(f"{self._end}x", special=True)[1:])

    def _check(self, prompt_head: str) -> None:
        """The parts give what the tokenizer gives for the whole, on a text without surprises."""
        t = self.template
        action = f"{t.before_action}2{t.after_action}{self._end}"
        observation = f"{t.close}{t.observe_head}3{t.observe_tail}{t.reopen}"
        text = f"{''.join(self._bos)}{prompt_head}1{t.prompt_tail}{action}{observation}"
        whole = self._raw(text, special=True)
        parts = self.prompt("1") + self._action("2") + self._splice("3", ended=True)[0]
        if parts != whole:
            raise ChatError(
                f"tokenizer: it encodes {text!r} as {whole}, its parts as {parts}; the "
                f"{self.format} chat format needs a tokenizer for which they agree"
            )

    def _opening(self) -> list[str]:
        if self.template.bos is not None:
            return [self._named("bos_token")] if self.template.bos else []
        token = self.tokenizer.bos_token
        return [] if token in (None, self.tokenizer.eos_token) else [token]

    def _stops(self, generation_config: Mapping[str, Any]) -> tuple[int, ...]:
        """END, the template's stops, then every eos id that names a token; each once."""
        known = set(self._vocabulary.values())
        named: list[Any] = [self.tokenizer.eos_token_id]
        eos = generation_config.get("eos_token_id")
        named += eos if isinstance(eos, list | tuple) else [eos]
        ids = [self.end_id, *map(self._special, self.template.stops)]
        ids += [i for i in named if i in known]
        return tuple(dict.fromkeys(ids))

    def _named(self, name: str) -> str:
        token = getattr(self.tokenizer, name)
        if token is None:
            raise ChatError(f"tokenizer: it has no {name}; the {self.format} chat format needs one")
        return token

    def _special(self, token: str) -> int:
        """The id of a token that text cannot produce."""
        index = self._vocabulary.get(token)
        if index is None:
            raise ChatError(
                f"tokenizer: {token!r} is not in its vocabulary; the {self.format} chat format "
                "needs it as one token"
            )
        if self._raw(token, special=True) != [index] or index in self._raw(token):
            raise ChatError(
                f"tokenizer: {token!r} is a piece of text to it; the {self.format} chat format "
                "needs it as a special token, so that no text can forge it"
            )
        return index
