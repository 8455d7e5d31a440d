"""The multi-turn loop: slots that decode while the tools of others run.

One cycle:  begin and extend slots (new prompts, observations) -> decode a block -> read turns that
ended, start their tools -> collect observations.  Two ways to collect them:

    fixed     those of the tools started one cycle earlier.  A tool has a block of decoding to run in,
              and then it is waited for.  Which slot is extended when depends on the texts alone,
              never on timing: the same problems give the same calls of the same shapes, so a rerun
              repeats every trajectory to the bit.
    arrival   those that are there.  A slot is parked for as long as its tool takes and the others go
              on.  Which rows are extended together then depends on timing, and the last bits of a
              log-prob on that; what is drawn is keyed by trajectory and position as ever.

At most one call a slot is in flight, and none is waited for beyond `patience`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from mdpo_jax.chat import Chat
from mdpo_jax.environment.replay import Replayed
from mdpo_jax.environment.tool import Observation, Tool, wants_tool
from mdpo_jax.rollout.activity import Activity
from mdpo_jax.rollout.admission import Queue
from mdpo_jax.rollout.calls import Call, Guarded, wait_for_one
from mdpo_jax.rollout.sampler import DecodeState, Sampler
from mdpo_jax.rollout.sampling import Sampling
from mdpo_jax.rollout.shapes import LONGEST_STOP
from mdpo_jax.types import Finish, Problem, Role, Trajectory

Collect = Literal["fixed", "arrival"]

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
    """A state to go on from: ids and roles up to an observation, and the texts of its actions.

    session: key of the tool's session that the actions ran in, whose randomness goes on; None for
    one of the request's own.
    """

    ids: tuple[int, ...]
    roles: tuple[int, ...]
    actions: tuple[str, ...]
    session: str | None = None


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
    place: int  # of the request
    session: Guarded | None
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

    def close(self) -> None:
        if self.session is not None:
            self.session.close()

    def cut(self, length: int) -> None:
        self.generated -= len(self.ids) - length
        del self.ids[length:], self.roles[length:], self.log_probs[length:]
        self.cached = length


@dataclasses.dataclass
class _Run:
    """One stream's queue and slots.  starts: ids and roles that each request begins with."""

    requests: list[Request]
    starts: list[tuple[list[int], list[int]]]
    queue: Queue
    sampling: Sampling
    slots: dict[int, _Slot] = dataclasses.field(default_factory=dict)
    running: set[int] = dataclasses.field(default_factory=set)
    grown: list[int] = dataclasses.field(default_factory=list)  # whose ids are ahead of the cache
    waiting: list[tuple[int, Call]] = dataclasses.field(default_factory=list)


class Engine:
    """Samples trajectories of one policy with one tool.  Raises ValueError for a prompt too long.

    tool: None for reasoning alone: then no turn runs code, and the first one is the last.
    patience: seconds after which a call of the tool counts as timed out; None waits for ever.
    """

    def __init__(
        self, sampler: Sampler, chat: Chat, tool: Tool | None, limits: Limits, *,
        patience: float | None = None, collect: Collect = "fixed",
    ):  # fmt: skip
        self._sampler, self._chat, self._tool, self._limits = sampler, chat, tool, limits
        self._patience, self._collect = patience, collect
        for text in chat.stop_strings:
            if len(text.encode()) > LONGEST_STOP:
                raise ValueError(f"stop string {text!r}: expected at most {LONGEST_STOP} bytes")
        self._state: DecodeState | None = None
        self._busy = (0, 0)
        self._longest = 1
        self.activity = Activity()

    def run(
        self, requests: Iterable[Request], *, policy: str, sampling: Sampling,
        advance: Callable[[int], None] = lambda done: None,
    ) -> list[Trajectory]:  # fmt: skip
        """The trajectories, in the order of the requests; `advance` is told of each finished one."""
        done: dict[int, Trajectory] = {}
        for place, trajectory in self.stream(requests, policy=policy, sampling=sampling):
            done[place] = trajectory
            advance(1)
        return [done[place] for place in range(len(done))]

    def expect(self, longest: int) -> None:
        """Let the next warm-up compile for beginnings of up to so many tokens, whatever it is given."""
        self._longest = max(self._longest, min(longest, self._limits.context))

    def rest(self) -> None:
        """Give up the slots' memory between two runs; the next one has it anew."""
        self._state = None

    def live(self) -> str:
        """What is busy now, for people: `slots 61/64, tools 3`."""
        slots, tools = self._busy
        return f"slots {slots}/{self._sampler.shapes.slots}, tools {tools}"

    def stream(
        self, requests: Iterable[Request], *, policy: str, sampling: Sampling
    ) -> Iterator[tuple[int, Trajectory]]:
        """Each trajectory as soon as it is finished, with its request's place; none is kept here."""
        run = self._begun(list(requests), sampling)
        state, self._state = self._state, None  # its buffers are given away from here on
        state = self._warm(state if state is not None else self._sampler.start(), run)
        try:
            while run.queue or run.slots:
                begun = time.monotonic()
                tokens = self._tokens()
                state = self._fill(state, run)
                state, started = self._block(state, run)
                self._gather(run, started)
                done = [run.slots.pop(i) for i, slot in [*run.slots.items()] if slot.finish]
                self._count(tokens, len(done), time.monotonic() - begun)
                for slot in done:
                    yield slot.place, _trajectory(slot, policy)
            self._state = state
        finally:
            for slot in run.slots.values():
                slot.close()

    def _warm(self, state: DecodeState, run: _Run) -> DecodeState:
        longest = max([self._longest, *(len(ids) for ids, _ in run.starts)])
        # What the template puts around an observation is a few tokens.
        observation = self._limits.observation_tokens + _AROUND
        return self._sampler.warm_up(state, longest, observation if self._tool else 1)

    def _begun(self, requests: list[Request], sampling: Sampling) -> _Run:
        """Raises ValueError for a request that leaves no room."""
        known: dict[Any, tuple[list[int], list[int]]] = {}
        starts, kinds = [], []
        for request in requests:
            state = None if request.prefix is None else request.prefix[:2]
            name = request.problem.id, request.problem.question, state
            if name not in known:
                known[name] = self._start(request)
            starts.append(known[name])
            kinds.append((name, len(known[name][0])))
        return _Run(requests, starts, Queue(kinds, self._sampler.remembered), sampling)

    def _start(self, request: Request) -> tuple[list[int], list[int]]:
        """Ids and roles that are there before the policy writes."""
        if request.prefix is not None:
            if self._tool is None:
                raise ValueError(f"{request.key}: a prefix has tool output; expected a tool")
            ids, roles = list(request.prefix.ids), list(request.prefix.roles)
        else:
            ids = self._chat.prompt(request.problem.question)
            roles = [int(Role.PROMPT)] * len(ids)
        if self._limits.context - len(ids) < 2:
            raise ValueError(
                f"problem {request.problem.id!r}: {len(ids)} tokens to begin with; "
                f"rollout.context={self._limits.context} must hold it and an answer"
            )
        return ids, roles

    def _admit(self, request: Request, place: int, start: tuple[list[int], list[int]]) -> _Slot:
        ids, roles = start
        slot = _Slot(request, place, None, [*ids], [*roles], [0.0] * len(ids), len(ids))
        if self._tool is not None:
            of = None if request.prefix is None else request.prefix.session
            session = self._tool.start(of or request.key)
            if request.prefix is not None:
                session = Replayed(session, request.prefix.actions)
                slot.turns = len(request.prefix.actions)
                slot.generated = roles.count(int(Role.ACTION))
            slot.session = Guarded(session, self._patience)
        return slot

    def _fill(self, state: DecodeState, run: _Run) -> DecodeState:
        """Admit requests to free slots, and bring the cache up to every slot's ids."""
        admitted: dict[int, int] = {}
        for index in range(self._sampler.shapes.slots):
            if index not in run.slots and run.queue:
                place = admitted[index] = run.queue.next()
                run.slots[index] = self._admit(run.requests[place], place, run.starts[place])
        plan = run.queue.begin(admitted)
        state = self._copy(state, run, plan.copied)
        grown = {i: run.slots[i] for i in (*run.grown, *plan.read)}
        if grown:
            state = self._extend(state, grown)
        state = self._copy(state, run, plan.copied_after)
        for index, slot in grown.items():
            run.queue.wrote(index, len(slot.ids))
        run.running |= {*grown, *admitted}
        run.grown = []
        return state

    def _copy(self, state: DecodeState, run: _Run, pairs: list[tuple[int, int]]) -> DecodeState:
        """Slots that begin as others began."""
        if not pairs:
            return state
        slots = [run.slots[to] for _, to in pairs]
        for slot in slots:
            slot.cached = len(slot.ids)
        seeds = [_seed(slot.request.key) for slot in slots]
        return self._sampler.copy(state, pairs, [slot.cached for slot in slots], seeds)

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
        self, state: DecodeState, run: _Run
    ) -> tuple[DecodeState, list[tuple[int, Call]]]:  # fmt: skip
        """Decode a block; returns the calls that turns which have ended start, in order of slots."""
        lengths, limits = np.zeros((2, self._sampler.shapes.slots), np.int32)
        order = sorted(run.running)
        for index in order:
            lengths[index], limits[index] = run.slots[index].cached, self._room(run.slots[index])
        calls = [call for _, call in run.waiting]
        self._busy = len(order), sum(call.ended is None for call in calls)
        begun = time.monotonic()
        if order:
            state, block = self._sampler.decode(state, lengths, limits, run.sampling)
            self.activity.block(begun, len(order), calls)
        started = []
        for index in order:
            slot, count = run.slots[index], int(block.counts[index])
            slot.act(block.ids[index, :count].tolist(), block.log_probs[index, :count].tolist())
            run.queue.wrote(index, len(slot.ids))
            # First the stop strings: one may stand before a stop token of the same block.
            cut = self._stop_string(slot)
            stopped = slot.ids[-1] in self._chat.stop_ids
            if cut or stopped or self._room(slot) < 1:
                run.running.discard(index)
                call = self._end_turn(slot)
                started += [] if call is None else [(index, call)]
        return state, started

    def _gather(self, run: _Run, started: list[tuple[int, Call]]) -> None:
        """Append observations to their slots, which then grow or are finished."""
        if self._collect == "fixed":
            # With nothing to overlap with, those that were just started.
            idle = not run.running and not run.waiting
            ready, run.waiting = (started, []) if idle else (run.waiting, started)
        else:
            calls = run.waiting + started
            idle = not run.running and not any(s.finish for s in run.slots.values())
            if calls and idle:
                wait_for_one([call for _, call in calls])
            there = [call.ready for _, call in calls]
            ready = [c for c, is_there in zip(calls, there, strict=True) if is_there]
            run.waiting = [c for c, is_there in zip(calls, there, strict=True) if not is_there]
        for index, call in ready:
            observation = call.result()
            self.activity.answered(call)
            if self._observe(run.slots[index], observation):
                run.grown.append(index)

    def _tokens(self) -> tuple[int, int, int]:
        s = self._sampler
        return s.tokens_prefilled, s.tokens_copied, s.tokens_decoded

    def _count(self, before: tuple[int, int, int], done: int, seconds: float) -> None:
        prefilled, copied, decoded = (b - a for a, b in zip(before, self._tokens(), strict=True))
        self.activity.prefilled += prefilled
        self.activity.copied += copied
        self.activity.decoded += decoded
        self.activity.trajectories += done
        self.activity.seconds += seconds

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

    def _end_turn(self, slot: _Slot) -> Call | None:
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
