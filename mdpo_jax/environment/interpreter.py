"""The Python tool: one live process a trajectory, in which state persists over its turns."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.util import find_spec
from typing import Any, Literal

from mdpo_jax.environment.cells import NOTHING
from mdpo_jax.environment.determinism import Checks, Rechecks, chosen
from mdpo_jax.environment.tool import Observation, Status, code_blocks
from mdpo_jax.isolation.forkserver import ForkServer, Interrupted, Worker, WorkerDied
from mdpo_jax.isolation.sandbox import MIB, Level, Limits

Semantics = Literal["live", "replay", "last_only"]
SEMANTICS: tuple[Semantics, ...] = ("live", "replay", "last_only")

_DEATH_TEXT = {
    "timeout": "Timeout Error",
    "killed": "The process was killed",
    "output_limit": "The process was killed: it filled its folder",
}
_CLOSED = "The session is closed"
_OUTPUT_CHARS = 20_000
_GRACE = 0.5  # seconds in which a cell may answer to the interrupt at its deadline
_CHEAP = 0.5  # seconds of cells that may be run again in another process to have warm modules
_WORD = re.compile(r"[A-Za-z_]\w*")
# Whether warm or not, they are not Python's own, or bring in what is not.
_HEAVY = (
    "numpy", "sympy", "mpmath", "scipy", "pandas", "matplotlib", "networkx", "statsmodels", "sklearn",
)  # fmt: skip
log = logging.getLogger(__name__)


class PythonInterpreter:
    """A tool that runs the ```python blocks of an action as notebook cells.

    timeout: seconds of wall clock for the blocks of one action.  workers: actions that run at one
    time (0: twice the cores); idle live processes do not count.  preload: modules that are warm; a
    trajectory that names none of them has a process without those that are not Python's own.
    cache: run equal histories of blocks once; only for code whose output depends on nothing else,
    as every trajectory then shares one seed.
    sandbox: what confines the code (isolation/sandbox.py); SandboxError if it cannot be had.
    semantics: `live`, one process a trajectory; `replay`, the paper's: all earlier blocks again in a
    fresh process each time; `last_only`, the last block of an action alone in a fresh process.
    check_determinism: share of calls that are run again in a fresh process and compared.
    """

    def __init__(
        self, *, timeout: float = 20.0, memory_mb: int = 2048, workers: int = 0,
        preload: Sequence[str] = ("math", "numpy", "sympy"), cache: bool = False,
        sandbox: Level = "hardened", semantics: Semantics = "live",
        check_determinism: float = 0.0,
    ):  # fmt: skip
        if semantics not in SEMANTICS:
            raise ValueError(f"semantics: {semantics!r}; expected one of {', '.join(SEMANTICS)}")
        cpu_seconds = max(Limits.cpu_seconds, int(min(16 * timeout, 2**31)))
        limits = Limits(address_space_bytes=memory_mb * MIB, cpu_seconds=cpu_seconds)
        self.servers = _Servers(preload, limits, sandbox)
        self.workers = workers or 2 * (os.cpu_count() or 1)
        self.pool = ThreadPoolExecutor(self.workers, "tool")
        self.timeout, self.semantics = timeout, semantics
        self.cache: dict[tuple[str, ...], Observation] | None = {} if cache else None
        self.checks = Checks(check_determinism)
        self.executed, self.closed = 0, False
        protection = self.servers.warm.protection
        weak = protection.level == "hardened" and not (protection.seccomp and protection.landlock)
        log.log(logging.WARNING if weak else logging.INFO, "tool: sandbox %s", protection)

    def start(self, key: str) -> _Session:
        """A session whose `random` and `numpy` seeds derive from `key`; its process starts late."""
        return _Session(self, "shared" if self.cache is not None else key)

    @property
    def protection(self) -> str:
        """What confines the code on this machine, for people and result files."""
        return str(self.servers.warm.protection)

    def rechecks(self) -> Rechecks:
        """How often calls that were run again agreed; waits for those under way."""
        return self.checks.result()

    def fork(self, key: str, heavy: bool) -> Worker:
        """A fresh process for the trajectory `key`."""
        seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big")
        server = self.servers.warm if heavy else self.servers.light
        return server.fork({"seed": seed, "output_chars": _OUTPUT_CHARS})

    def close(self) -> None:
        """End all sessions and their processes; calls that are running end as killed."""
        self.closed = True
        self.servers.kill()
        self.checks.close()
        self.pool.shutdown(wait=True, cancel_futures=True)
        self.servers.close()

    def __enter__(self) -> PythonInterpreter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Servers:
    """The fork server with all that is warm, and one with Python's own modules alone.

    A fork copies the page tables of what is loaded: with SymPy it costs ten times as much.
    """

    def __init__(self, preload: Sequence[str], limits: Limits, sandbox: Level):
        target = "mdpo_jax.environment.cells:serve"
        for name in preload:
            if isinstance(preload, str) or find_spec(name.partition(".")[0]) is None:
                raise ValueError(f"preload: {preload!r}; expected names of modules that are there")
        own = [m for m in preload if m.partition(".")[0] in sys.stdlib_module_names]
        others = {m.partition(".")[0] for m in preload} - {m.partition(".")[0] for m in own}
        if "numpy" in others:
            # numpy loads it at first use, which would be in every single worker: 25 ms each
            preload = (*preload, "numpy.random")
        if "sympy" in others:
            preload = (*preload, "mdpo_jax.environment.warm")
        self.warm = ForkServer(target, preload, limits, sandbox)
        self.light = ForkServer(target, own, limits, sandbox) if others else self.warm
        self._names = others.union(_HEAVY) if others else set()

    def heavy(self, blocks: Sequence[str]) -> bool:
        """Whether the code names a module that is not Python's own; it is never parsed here."""
        return any(not self._names.isdisjoint(_WORD.findall(block)) for block in blocks)

    def kill(self) -> None:
        self.warm.kill()
        self.light.kill()

    def close(self) -> None:
        self.warm.close()
        self.light.close()


class _Session:
    """One trajectory's process: started at its first block, rebuilt by replay when it died.

    One call at a time: a second waits until the first has ended.
    """

    def __init__(self, tool: PythonInterpreter, key: str):
        self._tool, self._key = tool, key
        self._worker: Worker | None = None
        self._heavy = self._closed = False
        self._history: tuple[str, ...] = ()  # all blocks so far: what the cache goes by
        self._alive: list[str] = []  # blocks that ended by themselves: what a new process replays
        self._whole = True  # they are all blocks so far
        self._spent = 0.0  # seconds that they took
        self._lock = threading.Lock()

    def run(self, action: str) -> Future[Observation]:
        """Run the action's blocks in order; the last one's output is the observation."""
        return self._tool.pool.submit(self._run, code_blocks(action))

    def run_cell(self, code: str) -> Future[Observation]:
        """Run code that stands in no action, as one cell."""
        return self._tool.pool.submit(self._run, [code])

    def close(self) -> None:
        """End the process, if there is one; a call that is running ends as killed."""
        self._closed, worker = True, self._worker
        if worker is not None:
            worker.kill()
        with self._lock:
            self._drop()

    def _run(self, blocks: list[str]) -> Observation:
        if not blocks:
            return Observation(NOTHING, "refused", 0.0)
        cache, alone = self._tool.cache, self._tool.semantics == "last_only"
        with self._lock:
            if self._over:
                return Observation(_CLOSED, "refused", 0.0)
            self._history = tuple(blocks[-1:]) if alone else (*self._history, *blocks)
            known = None if cache is None else cache.get(self._history)
            if known is not None:
                # The process, if any, has not run these blocks: the next miss starts anew.
                self._drop()
                self._alive += blocks
                return known
            observation = self._execute(blocks)
            # How long a block may run depends on the machine's load, so that is not shared; nor is
            # a death, which a replay would repeat.
            if cache is not None and observation.status in ("ok", "error", "memory"):
                cache[self._history] = observation
            self._check(observation)
            return observation

    @property
    def _over(self) -> bool:
        return self._closed or self._tool.closed

    def _execute(self, blocks: list[str]) -> Observation:
        start = time.monotonic()
        # A worker may be killed by somebody else (the kernel short of memory, an operator), and the
        # observation must not depend on it: what dies twice died of its own code.
        for attempt in range(2):
            try:
                text, status = self._call(blocks)
            except Interrupted:
                text, status, self._whole = _DEATH_TEXT["timeout"], "timeout", False
            except WorkerDied as death:
                self._worker = None
                if death.reason == "killed" and attempt == 0 and not self._over:
                    continue
                text, status, self._whole = _DEATH_TEXT[death.reason], death.reason, False
            else:
                self._alive += blocks
            return Observation(text, status, time.monotonic() - start)  # pyright: ignore
        raise AssertionError("unreachable: the second attempt returns")

    def _call(self, blocks: list[str]) -> tuple[str, Status]:
        if self._tool.semantics != "live":
            return self._afresh([self._history])
        if self._worker is not None and not self._worker.alive:  # it died while nobody called it
            self._drop()
        self._make_warm(blocks)
        if self._worker is None:
            self._worker = self._begun(self._alive)
        self._tool.executed += 1
        start = time.monotonic()
        answer = self._worker.call({"blocks": blocks}, timeout=self._tool.timeout, grace=_GRACE)
        self._spent += time.monotonic() - start
        return self._checked(answer)

    def _make_warm(self, blocks: Sequence[str]) -> None:
        """Move to a process with warm modules, if the code names one and a replay is the cheaper way.

        Else the light process imports them itself, which gives the same and takes longer.
        """
        if self._worker is None:
            self._heavy = self._heavy or self._tool.servers.heavy((*self._alive, *blocks))
            return
        cheap = self._whole and self._spent < _CHEAP
        if not self._heavy and cheap and self._tool.servers.heavy(blocks):
            self._drop()
            self._heavy = True

    def _begun(self, blocks: Sequence[str]) -> Worker:
        """A fresh process in which these blocks have run, each within its own time."""
        worker = self._tool.fork(self._key, self._heavy)
        for block in blocks:
            try:
                worker.call({"blocks": [block]}, timeout=self._tool.timeout, grace=_GRACE)
            except Interrupted:  # it did not need so long before; what it has done stays
                continue
        return worker

    def _afresh(self, actions: Sequence[Sequence[str]]) -> tuple[str, Status]:
        """The last block's output after all actions, in order, in a process of their own."""
        heavy = any(map(self._tool.servers.heavy, actions))
        worker = self._tool.fork(self._key, heavy)
        try:
            self._tool.executed += 1
            answer = None
            for blocks in actions:
                answer = worker.call({"blocks": list(blocks)}, timeout=self._tool.timeout)
            return self._checked(answer)
        finally:
            worker.close()

    def _check(self, seen: Observation) -> None:
        """Now and then, run all blocks so far again; only calls that ended by themselves compare."""
        checks, blocks = self._tool.checks, self._history
        if not checks.share or seen.status not in ("ok", "error") or not self._whole:
            return
        digest = hashlib.sha256("\0".join(blocks).encode("utf-8", "replace")).hexdigest()
        call = f"{self._key}/{len(blocks)}/{digest[:12]}"
        if not chosen(call, checks.share):
            return

        def again() -> tuple[str, str] | None:
            try:
                apart = [blocks] if self._tool.semantics == "replay" else [(b,) for b in blocks]
                return self._afresh(apart)
            except WorkerDied as death:
                if death.reason == "timeout":  # of a busy machine: it says nothing of the code
                    return None
                return _DEATH_TEXT[death.reason], death.reason

        checks.submit(call, seen, again)

    def _checked(self, answer: Any) -> tuple[str, Status]:
        """Text and status of an answer.  Raises WorkerDied if it is not one that `cells` gives."""
        if isinstance(answer, dict):
            text, status = answer.get("text"), answer.get("status")
            if isinstance(text, str) and status in ("ok", "error", "memory", "output_limit"):
                # an answer may carry "\\ud800", which JSON allows and UTF-8 does not
                return text.encode("utf-8", "replace").decode()[: 2 * _OUTPUT_CHARS], status
        self._drop()
        raise WorkerDied("killed")

    def _drop(self) -> None:
        if self._worker is not None:
            self._worker.close()
            self._worker = None
