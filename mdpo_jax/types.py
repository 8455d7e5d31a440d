"""The nouns that pass between rooms: frozen values over token ids and numpy; no jax, no I/O.

    Problem -> Trajectory -> Verdict -> Pair -> PackedBatch -> TrainState (training/state.py)

A trajectory is token ids with a role per token.  Text is derived from ids for the tool, the grader
and people; ids are never derived from text that the policy wrote, and the loss mask is read off the
roles (two masks, never one: attention sees everything, the loss counts what the policy emitted).
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping
from typing import Literal

import numpy as np


class Role(enum.IntEnum):
    """Who put a token into a trajectory."""

    PROMPT = 0  # the question, with its template tokens
    ACTION = 1  # sampled by the policy: its text and its end-of-turn token, in every turn
    OBSERVATION = (
        2  # the whole turn that carries the tool's output, its own header and end included
    )
    TEMPLATE = 3  # what the harness puts around the policy's turns: closing newline, model header


class Part(enum.IntEnum):
    """What a token is to the metrics: actions by their content, the rest by their role."""

    PROMPT = 0
    TEXT = 1  # of an action, as are the next two
    CODE = 2  # a closed ```python block, its fences included
    ANSWER = 3  # from \boxed on, in the last action
    OBSERVATION = 4
    TEMPLATE = 5


ACTION_PARTS = (Part.TEXT, Part.CODE, Part.ANSWER)
# Role -> Part of a token where nobody has looked into the actions.
PART_OF_ROLE = np.array([Part.PROMPT, Part.TEXT, Part.OBSERVATION, Part.TEMPLATE], np.int32)

MaskName = Literal["sampled", "template", "paper"]
Label = Literal["correct", "wrong", "unknown"]
Finish = Literal["answered", "no_code", "turn_limit", "token_limit"]


class EmptyActionError(ValueError):
    """A trajectory without a single token that the policy emitted can carry no loss."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """A question with its gold answer.

    `id` is unique within a run (`gsm8k-train/17`); randomness is keyed by it.
    """

    id: str
    question: str
    answer: str
    source: str = ""
    tags: Mapping[str, str | int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Trajectory:
    """One sampled solution of one problem, exactly as the policy saw and wrote it.

    ids: [length] int32.  roles: [length] uint8 of `Role`.  log_probs: [length] float32, the log
    probability under the sampling policy, untempered, at ACTION tokens and 0 elsewhere.
    tool_statuses: one per tool call, in order (`ok`, `error`, `timeout`, ...).
    parent, branch: the sample of the same problem whose first `branch` turns this one took over, with
    their observations and log-probs; None and 0 where it began at the prompt.
    """

    problem_id: str
    sample: int
    policy: str
    ids: np.ndarray
    roles: np.ndarray
    log_probs: np.ndarray
    tool_statuses: tuple[str, ...] = ()
    finish: Finish = "answered"
    parent: int | None = None
    branch: int = 0

    def __post_init__(self) -> None:
        if not len(self.ids) == len(self.roles) == len(self.log_probs):
            raise ValueError(
                f"trajectory {self.key}: {len(self.ids)} ids, {len(self.roles)} roles and "
                f"{len(self.log_probs)} log_probs; the three must have one length"
            )
        if not np.any(self.roles == Role.ACTION):
            raise EmptyActionError(
                f"trajectory {self.key}: no action token among {len(self.ids)}; "
                "at least one token must have been emitted by the policy"
            )

    @property
    def key(self) -> str:
        return f"{self.problem_id}#{self.sample}"

    @property
    def turns(self) -> int:
        """Number of runs of action tokens, i.e. how often the policy spoke."""
        return len(self.actions)

    @property
    def actions(self) -> list[slice]:
        """The span of each action, in order."""
        return [s for role, s in self.segments if role == Role.ACTION]

    @property
    def sampled_tokens(self) -> int:
        """Action tokens that were sampled for it, those of the turns that it took over left out."""
        return sum(span.stop - span.start for span in self.actions[self.branch :])

    @property
    def segments(self) -> list[tuple[Role, slice]]:
        """Maximal runs of one role, in order."""
        edges = np.flatnonzero(np.diff(self.roles)) + 1
        starts, ends = [0, *edges.tolist()], [*edges.tolist(), len(self.roles)]
        return [(Role(int(self.roles[a])), slice(a, b)) for a, b in zip(starts, ends, strict=True)]

    @property
    def turn_numbers(self) -> np.ndarray:
        """[length] int32: how many actions have begun at each token, itself included; prompt 0."""
        action = self.roles == Role.ACTION
        begins = action & ~np.concatenate([[False], action[:-1]])
        return np.cumsum(begins).astype(np.int32)

    def loss_mask(self, name: MaskName = "sampled") -> np.ndarray:
        """[length] bool: which tokens count in the loss, as *targets*.

        See the module's `loss_mask` for the three conventions.
        """
        return loss_mask(self.roles, name)


def loss_mask(
    roles: np.ndarray, name: MaskName = "sampled", *, observations: bool = False
) -> np.ndarray:
    """[length] bool mask of the tokens that count in the loss, read off the roles.

        action + <end_of_turn> | \\n | user turn with observation | <start_of_turn>model\\n | action
        sampled ^^^^^^^^^^^^^^^                                                             ^^^^^^
        template ^^^^^^^^^^^^^^^^^^                                                         ^^^^^^
        paper   ^^^^^^^^^^^^^^^^^^^                                ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^

    `sampled` is exactly what the policy emitted; `template` adds what closes its turns; `paper` is
    the span that the official code of arXiv 2409.02392 intends: headers and newlines too.
    `observations` counts everything after the prompt whatever the convention: single-turn DPO and
    KTO, where the whole completion is one action.
    """
    if observations:
        return roles != Role.PROMPT
    action, template = roles == Role.ACTION, roles == Role.TEMPLATE
    if name == "sampled":
        return action
    if name == "paper":
        return action | template
    if name == "template":
        closes = template.copy()
        for i in np.flatnonzero(template):
            closes[i] = i > 0 and (action[i - 1] or closes[i - 1])
        return action | closes
    raise ValueError(f"mask: {name!r} is not a mask; expected one of sampled, template, paper")


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What the grader says of one trajectory: three states and the rule that fired."""

    label: Label
    rule: str
    answer: str | None = None

    @property
    def correct(self) -> bool:
        return self.label == "correct"


@dataclasses.dataclass(frozen=True)
class Pair:
    """A right and a wrong trajectory of one problem.

    chosen_reference, rejected_reference: [length] float32 log-probs of each token under the
    reference policy (0 at position 0), None until scored.
    """

    chosen: Trajectory
    rejected: Trajectory
    chosen_reference: np.ndarray | None = None
    rejected_reference: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.chosen.problem_id != self.rejected.problem_id:
            raise ValueError(
                f"pair: chosen is of problem {self.chosen.problem_id!r}, rejected of "
                f"{self.rejected.problem_id!r}; both must answer one problem"
            )


@dataclasses.dataclass(frozen=True)
class PackedBatch:
    """One optimiser step's sequences in fixed rows, as numpy; leading axis = micro-batches.

    With M micro-batches, R rows of L tokens, S sequence slots and P pair slots a micro-batch:

    tokens     [M R L] int32    token ids, 0 at padding
    segments   [M R L] int32    1 + sequence slot of each token, 0 at padding (unique in M); above S
                                in a prompt that two sequences share
    positions  [M R L] int32    position within the sequence
    prefixes   [M R L 2] int32  first place in the row of the shared prompt that the token's sequence
                                goes on from, and the place after its last; 0, 0 for none
    weights    [M R L] float32  loss weight of the token *as a target*
    reference  [M R L] float32  log-prob of the token under the reference
    turns      [M R L] int32    turn of the token, from 1; 0 in the prompt
    parts      [M R L] int32    `Part` of the token
    chosen     [M P]   int32    sequence slot of the right side of each pair
    rejected   [M P]   int32    sequence slot of the wrong side
    pair_mask  [M P]   float32  1 for a pair, 0 for padding
    margin     [M P]   float32  what is subtracted from a pair's logit
    correct    [M S]   float32  1 for a right sequence, 0 for a wrong one and padding
    sequence_mask [M S] float32 1 for a sequence, 0 for padding
    """

    tokens: np.ndarray
    segments: np.ndarray
    positions: np.ndarray
    prefixes: np.ndarray
    weights: np.ndarray
    reference: np.ndarray
    turns: np.ndarray
    parts: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray
    pair_mask: np.ndarray
    margin: np.ndarray
    correct: np.ndarray
    sequence_mask: np.ndarray

    @property
    def fill(self) -> float:
        """Share of row positions that hold a token, over the micro-batches that hold any."""
        used = self.segments[self.sequence_mask.any(axis=1)]
        return float((used > 0).mean()) if used.size else 0.0

    @property
    def action_share(self) -> float:
        """Share of all tokens that count in the loss with any weight."""
        tokens = int((self.segments > 0).sum())
        return float((self.weights > 0).sum() / tokens) if tokens else 0.0
