"""The multi-turn loop: slots that decode while the tools of others run.

One cycle:  extend (new prompts, observations) -> decode a block -> read turns that ended, start
their tools -> collect the tools started one cycle earlier.  A tool has a whole block of decoding to
run in, and which slot is extended when depends on the texts alone, never on timing: the same
problems give the same calls of the same shapes, so a rerun repeats every trajectory to the bit.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from typing import NamedTuple

import numpy as np

from mdpo_jax.chat import Chat
from mdpo_jax.environment.replay import Replayed
from mdpo_jax.environment.tool import Observation, Session, Tool, wants_tool
from mdpo_jax.rollout.sampler import LONGEST_STOP, DecodeState, Sampler
from mdpo_jax.types import Finish, Problem, Role, Trajectory

_AROUND = 32  # tokens, at most, that a template puts around an observation


@dataclasses.dataclass(frozen=True)
class Limits:
    """H turns, tokens a turn and a trajectory may generate, tokens of one observation."""

    max_turns: int
    turn_tokens: int
    trajectory_tokens: int
    observation_tokens: int
    context: int


class Prefix(NamedTuple):
    """A state to go on from: ids and roles up to an observation, and the texts of its actions."""

    ids: tuple[int, ...]
    roles: tuple[int, ...]
    actions: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Request:
    """One trajectory to sample; `stream` names its randomness within (seed, iteration).

    prefix: where it begins; None for the problem's prompt.  Log-probs of its actions are 0.
    """

    problem: Problem
    sample: int
    stream: str
    prefix: Prefix | None = None

    @property
    def key(self) -> str:
        return f"{self.stream}/{self.problem.id}#{self.sample}"


@dataclasses.dataclass
class _Slot:
    """The host's side of one slot."""

    request: Request
    session: Session | None
    ids: list[int]
    roles: list[int]
    log_probs: list[float]
    turn_start: int
    turns: int = 0
    generated: int = 0
    cached: int = 0  # ids at the beginning that the sampler has got
    statuses: list[str] = dataclasses.field(default_factory=list)
    finish: Finish | None = None

    def append(self, ids: Sequence[int], roles: Sequence[int]) -> None:
        self.ids += ids
        self.roles += roles
        self.log_probs += [0.0] * len(ids)
        self.turn_start = len(self.ids)

    def act(self, ids: Sequence[int], log_probs: Sequence[float]) -> None:
        self.ids += ids
        self.roles += [int(Role.ACTION)] * len(ids)
        self.log_probs += log_probs
        self.generated += len(ids)
        self.cached = len(self.ids)

    def cut(self, length: int) -> None:
        self.generated -= len(self.ids) - length
        del self.ids[length:], self.roles[length:], self.log_probs[length:]
        self.cached = length


class Engine:
    """Samples trajectories of one policy with one tool.  Raises ValueError for a prompt too long.

    tool: None for reasoning alone: then no turn runs code, and the first one is the last.
    """

    def __init__(self, sampler: Sampler, chat: Chat, tool: Tool | None, limits: Limits):
        self._sampler, self._chat, self._tool, self._limits = sampler, chat, tool, limits
        for text in chat.stop_strings:
            if len(text.encode()) > LONGEST_STOP:
                raise ValueError(f"stop string {text!r}: expected at most {LONGEST_STOP} bytes")
        self._state: DecodeState | None = None

    def run(
        self, requests: Iterable[Request], *, policy: str, temperature: float,
        advance: Callable[[int], None] = lambda done: None,
    ) -> list[Trajectory]:  # fmt: skip
        """The trajectories, in the order of the requests; `advance` is told of each finished one."""
        done: dict[int, Trajectory] = {}
        for place, trajectory in self.stream(requests, policy=policy, temperature=temperature):
            done[place] = trajectory
            advance(1)
        return [done[place] for place in range(len(done))]

    def stream(
        self, requests: Iterable[Request], *, policy: str, temperature: float
    ) -> Iterator[tuple[int, Trajectory]]:
        """Each trajectory as soon as it is finished, with its request's place; none is kept here."""
        order = list(requests)
        queue = deque(range(len(order)))
        slots: dict[int, tuple[int, _Slot]] = {}  # slot -> (place in order, its content)
        running: set[int] = set()
        grown: list[int] = []  # slots whose ids are ahead of the cache
        waiting: list[tuple[int, Future[Observation]]] = []
        state = self._state if self._state is not None else self._sampler.start()
        starts = {(r.problem.id, r.prefix): r for r in order}.values()
        prompts = [len(self._start(request)[0]) for request in starts]
        # What the template puts around an observation is a few tokens.
        longest = max([self._limits.observation_tokens + _AROUND, *prompts])
        state = self._sampler.warm_up(state, longest)
        while queue or slots:
            for index in range(self._sampler.shapes.slots):
                if index not in slots and queue:
                    place = queue.popleft()
                    slots[index] = (place, self._admit(order[place]))
                    grown.append(index)
            if grown:
                state = self._extend(state, {i: slots[i][1] for i in grown})
                running |= set(grown)
            started: list[tuple[int, Future[Observation]]] = []
            state, ended = self._block(state, {i: slots[i][1] for i in running}, temperature)
            for index in ended:
                running.discard(index)
                call = self._end_turn(slots[index][1])
                if call is not None:
                    started.append((index, call))
            if not running and not waiting:  # nothing to overlap with
                waiting, started = started, []
            grown = [i for i, call in waiting if self._observe(slots[i][1], call.result())]
            for index in [i for i, (_, slot) in slots.items() if slot.finish is not None]:
                place, slot = slots.pop(index)
                yield place, _trajectory(slot, policy)
            waiting = started
        self._state = state

    def _admit(self, request: Request) -> _Slot:
        ids, roles = self._start(request)
        room = self._limits.context - len(ids)
        if room < 2:
            raise ValueError(
                f"problem {request.problem.id!r}: {len(ids)} tokens to begin with; "
                f"rollout.context={self._limits.context} must hold it and an answer"
            )
        session = None if self._tool is None else self._tool.start(request.key)
        slot = _Slot(request, session, ids, roles, [0.0] * len(ids), len(ids))
        if request.prefix is not None:
            if session is None:
                raise ValueError(f"{request.key}: a prefix has tool output; expected a tool")
            slot.session = Replayed(session, request.prefix.actions)
            slot.turns = len(request.prefix.actions)
            slot.generated = roles.count(int(Role.ACTION))
        return slot

    def _start(self, request: Request) -> tuple[list[int], list[int]]:
        """Ids and roles that are there before the policy writes."""
        if request.prefix is not None:
            return list(request.prefix.ids), list(request.prefix.roles)
        prompt = self._chat.prompt(request.problem.question)
        return prompt, [int(Role.PROMPT)] * len(prompt)

    def _extend(self, state: DecodeState, grown: dict[int, _Slot]) -> DecodeState:
        """Bring the cache up to each slot's ids: everything since its last action."""
        slots = grown.values()
        state = self._sampler.extend(
            state,
            list(grown),
            [slot.ids[slot.cached :] for slot in slots],
            [slot.cached for slot in slots],
            [_seed(slot.request.key) for slot in slots],
        )
        for slot in slots:
            slot.cached = len(slot.ids)
        return state

    def _block(
        self, state: DecodeState, running: dict[int, _Slot], temperature: float
    ) -> tuple[DecodeState, list[int]]:
        """Decode a block; returns the slots whose turn has ended, in order."""
        limits = np.zeros(self._sampler.shapes.slots, np.int32)
        for index, slot in running.items():
            limits[index] = self._room(slot)
        state, block = self._sampler.decode(state, limits, temperature)
        ended = []
        for index in sorted(running):
            slot, count = running[index], int(block.counts[index])
            slot.act(block.ids[index, :count].tolist(), block.log_probs[index, :count].tolist())
            # First the stop strings: one may stand before a stop token of the same block.
            cut = self._stop_string(slot)
            stopped = slot.ids[-1] in self._chat.stop_ids
            if cut or stopped or self._room(slot) < 1:
                ended.append(index)
        return state, ended

    def _room(self, slot: _Slot) -> int:
        """Tokens the policy may still emit in this turn."""
        limits = self._limits
        return min(
            limits.turn_tokens - (len(slot.ids) - slot.turn_start),
            limits.trajectory_tokens - slot.generated,
            limits.context - len(slot.ids),
        )

    def _stop_string(self, slot: _Slot) -> bool:
        """Cut a turn before a stop string, at a token's edge; never by encoding text again."""
        action = slot.ids[slot.turn_start :]
        text = self._chat.decode(action)
        found = [text.find(s) for s in self._chat.stop_strings if s in text]
        if not found:
            return False
        keep = len(action)
        while keep > 1 and len(self._chat.decode(action[:keep])) > min(found):
            keep -= 1
        slot.cut(slot.turn_start + keep)
        return True

    def _end_turn(self, slot: _Slot) -> Future[Observation] | None:
        """Start the tool if the turn asks for it, or finish the trajectory (recipe 1.4)."""
        slot.turns += 1
        text = self._chat.decode(slot.ids[slot.turn_start :])
        calls = slot.session is not None and wants_tool(text)
        if slot.session is not None:
            if calls and slot.turns < self._limits.max_turns and self._continues(slot):
                return slot.session.run(text)
            slot.session.close()
        if "boxed" in text:
            slot.finish = "answered"
        elif calls:
            slot.finish = "turn_limit" if self._continues(slot) else "token_limit"
        else:
            slot.finish = "no_code" if slot.ids[-1] in self._chat.stop_ids else "token_limit"
        return None

    def _continues(self, slot: _Slot) -> bool:
        limits = self._limits
        return slot.generated < limits.trajectory_tokens and len(slot.ids) < limits.context

    def _observe(self, slot: _Slot, observation: Observation) -> bool:
        """Append what the tool printed; False if there is no room left to go on."""
        slot.statuses.append(observation.status)
        ids, roles = self._chat.observation(
            observation.text,
            ended=slot.ids[-1] in self._chat.stop_ids,
            limit=self._limits.observation_tokens,
        )
        if len(slot.ids) + len(ids) >= self._limits.context:
            if slot.session is not None:
                slot.session.close()
            slot.finish = "token_limit"
            return False
        slot.append(ids, roles)
        return True


def _seed(key: str) -> tuple[int, int]:
    """Two 32-bit words of randomness for a trajectory."""
    digest = hashlib.sha256(key.encode()).digest()
    return int.from_bytes(digest[:4], "big"), int.from_bytes(digest[4:8], "big")


def _trajectory(slot: _Slot, policy: str) -> Trajectory:
    return Trajectory(
        problem_id=slot.request.problem.id,
        sample=slot.request.sample,
        policy=policy,
        ids=np.asarray(slot.ids, np.int32),
        roles=np.asarray(slot.roles, np.uint8),
        log_probs=np.asarray(slot.log_probs, np.float32),
        tool_statuses=tuple(slot.statuses),
        finish=slot.finish or "answered",
    )
