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
from typing import Any, Literal

from mdpo_jax.environment.cells import NOTHING
from mdpo_jax.environment.determinism import Agreement, Checks, chosen
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
_OUTPUT_CHARS = 20_000
_GRACE = 0.5  # seconds in which a cell may answer to the interrupt at its deadline
_WORD = re.compile(r"[A-Za-z_]\w*")
# Not warm themselves, but they bring in those that are.
_HEAVY = ("scipy", "pandas", "matplotlib", "mpmath", "networkx", "statsmodels", "sklearn")
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
        limits = Limits(address_space_bytes=memory_mb * MIB)
        self._servers = _Servers(preload, limits, sandbox)
        self._pool = ThreadPoolExecutor(workers or 2 * (os.cpu_count() or 1), "tool")
        self.timeout, self.semantics = timeout, semantics
        self.cache: dict[tuple[str, ...], Observation] | None = {} if cache else None
        self._checks = Checks(check_determinism)
        self.executed = 0
        protection = self._servers.warm.protection
        weak = protection.level == "hardened" and not (protection.seccomp and protection.landlock)
        log.log(logging.WARNING if weak else logging.INFO, "tool: sandbox %s", protection)

    def start(self, key: str) -> _Session:
        """A session whose `random` and `numpy` seeds derive from `key`; its process starts late."""
        return _Session(self, "shared" if self.cache is not None else key)

    @property
    def protection(self) -> str:
        """What confines the code on this machine, for people and result files."""
        return str(self._servers.warm.protection)

    def agreement(self) -> Agreement:
        """How often calls that were run again agreed; waits for those under way."""
        return self._checks.result()

    def fork(self, key: str, heavy: bool) -> Worker:
        """A fresh process for the trajectory `key`."""
        seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big")
        server = self._servers.warm if heavy else self._servers.light
        return server.fork({"seed": seed, "output_chars": _OUTPUT_CHARS})

    def close(self) -> None:
        """End all sessions and their processes."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._servers.close()

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

    def close(self) -> None:
        self.warm.close()
        self.light.close()


class _Session:
    """One trajectory's process: started at its first block, rebuilt by replay when it died."""

    def __init__(self, tool: PythonInterpreter, key: str):
        self._tool, self._key = tool, key
        self._worker: Worker | None = None
        self._heavy = False
        self._history: tuple[str, ...] = ()  # all blocks so far: what the cache goes by
        self._alive: list[str] = []  # blocks that ended by themselves: what a new process replays
        self._whole = True  # they are all blocks so far
        self._lock = threading.Lock()

    def run(self, action: str) -> Future[Observation]:
        """Run the action's blocks in order; the last one's output is the observation."""
        return self._tool._pool.submit(self._run, code_blocks(action))

    def run_cell(self, code: str) -> Future[Observation]:
        """Run code that stands in no action, as one cell."""
        return self._tool._pool.submit(self._run, [code])

    def close(self) -> None:
        """End the process, if there is one."""
        with self._lock:
            self._drop()

    def _run(self, blocks: list[str]) -> Observation:
        if not blocks:
            return Observation(NOTHING, "refused", 0.0)
        cache, alone = self._tool.cache, self._tool.semantics == "last_only"
        with self._lock:
            self._history = tuple(blocks[-1:]) if alone else (*self._history, *blocks)
            known = None if cache is None else cache.get(self._history)
            if known is not None:
                # The process, if any, has not run these blocks: the next miss starts anew.
                self._drop()
                observation = known
            else:
                observation = self._execute(blocks)
                # How long a block may run depends on the machine's load, so that is not shared.
                if cache is not None and observation.status not in ("timeout", "killed"):
                    cache[self._history] = observation
                self._check(observation)
            if observation.status in ("ok", "error"):
                self._alive += blocks
            else:
                self._whole = False
            return observation

    def _execute(self, blocks: list[str]) -> Observation:
        start = time.monotonic()
        # A worker may be killed by somebody else (the kernel short of memory, an operator), and the
        # observation must not depend on it: what dies twice died of its own code.
        for attempt in range(2):
            try:
                text, status = self._call(blocks)
            except Interrupted:
                text, status = _DEATH_TEXT["timeout"], "timeout"
            except WorkerDied as death:
                self._worker = None
                if death.reason == "killed" and attempt == 0:
                    continue
                text, status = _DEATH_TEXT[death.reason], death.reason
            return Observation(text, status, time.monotonic() - start)  # pyright: ignore
        raise AssertionError("unreachable: the second attempt returns")

    def _call(self, blocks: list[str]) -> tuple[str, Status]:
        if self._tool.semantics != "live":
            return self._afresh(self._history)
        if not self._heavy and self._tool._servers.heavy(blocks):
            self._drop()  # the light process would import in its own time what is warm elsewhere
            self._heavy = True
        if self._worker is None:
            self._worker = self._tool.fork(self._key, self._heavy)
            if self._alive:
                self._worker.call({"blocks": self._alive}, timeout=self._tool.timeout)
        self._tool.executed += 1
        answer = self._worker.call({"blocks": blocks}, timeout=self._tool.timeout, grace=_GRACE)
        text, status = _checked(answer)
        if text is None:
            self._drop()
            raise WorkerDied("killed")
        return text, status

    def _afresh(self, blocks: Sequence[str]) -> tuple[str, Status]:
        """The last block's output after all of them in a process of their own."""
        worker = self._tool.fork(self._key, self._tool._servers.heavy(blocks))
        try:
            self._tool.executed += 1
            text, status = _checked(
                worker.call({"blocks": list(blocks)}, timeout=self._tool.timeout)
            )
        finally:
            worker.close()
        if text is None:
            raise WorkerDied("killed")
        return text, status

    def _check(self, seen: Observation) -> None:
        """Now and then, run all blocks so far again; only calls that ended by themselves compare."""
        call = f"{self._key}/{len(self._history)}"
        checks = self._tool._checks
        if seen.status not in ("ok", "error") or not self._whole or not chosen(call, checks.share):
            return
        blocks = self._history

        def again() -> None:
            try:
                text, status = self._afresh(blocks)
            except WorkerDied as death:
                text, status = _DEATH_TEXT[death.reason], death.reason
            checks.tell(call, seen, text, status)

        checks.expect(self._tool._pool.submit(again))

    def _drop(self) -> None:
        if self._worker is not None:
            self._worker.close()
            self._worker = None


def _checked(answer: Any) -> tuple[str | None, Status]:
    """Text and status of an answer; no text if it is not one that `cells` gives."""
    if not isinstance(answer, dict):
        return None, "killed"
    text, status = answer.get("text"), answer.get("status")
    if not isinstance(text, str) or status not in ("ok", "error", "memory", "output_limit"):
        return None, "killed"
    # an answer may carry "\\ud800", which JSON allows and UTF-8 does not
    return text.encode("utf-8", "replace").decode("utf-8")[: 2 * _OUTPUT_CHARS], status
