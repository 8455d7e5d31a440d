"""The grader: extraction, a cheap stage, then math-verify in a process that can be killed."""

from __future__ import annotations

import threading

from mdpo_jax.grading.extract import extract_boxed
from mdpo_jax.grading.normalise import brackets, clean, exact_number, is_mixed
from mdpo_jax.isolation.forkserver import ForkServer, Worker, WorkerDied
from mdpo_jax.isolation.sandbox import MIB, Limits
from mdpo_jax.types import Verdict

_LONGEST_ANSWER = 1000


class Grader:
    """Verdicts under the strict policy: no percent leniency, no decimal for an exact gold.

    Callable from any thread.  The worker with math-verify starts when it is first needed; a pair of
    answers that takes it more than `timeout` seconds is `unknown`, and it is replaced.
    """

    def __init__(self, timeout: float = 2.0):
        self._timeout = timeout
        self._server = ForkServer(
            "mdpo_jax.grading.symbolic:serve",
            limits=Limits(address_space_bytes=2048 * MIB, cpu_seconds=24 * 3600),
        )
        self._worker: Worker | None = None
        self._lock = threading.Lock()
        self._cache: dict[tuple[str, str], Verdict] = {}

    def grade(self, gold: str, text: str) -> Verdict:
        """Verdict on a solution's final text: its last box against the gold answer."""
        answer = extract_boxed(text)
        if answer is None:
            return Verdict("wrong", "no_answer")
        return self.grade_answer(gold, answer)

    def grade_answer(self, gold: str, answer: str) -> Verdict:
        """Verdict on a bare answer."""
        key = (gold, answer)
        if key in self._cache:
            return self._cache[key]
        verdict = self._cheap(gold, answer) or self._symbolic(gold, answer)
        if verdict.rule not in ("timeout", "killed"):  # a loaded machine may be why
            self._cache[key] = verdict
        return verdict

    def close(self) -> None:
        """End the worker."""
        self._server.close()

    def __enter__(self) -> Grader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _cheap(self, gold: str, answer: str) -> Verdict | None:
        """What strings and exact numbers settle; None if they do not."""
        if gold.strip() == answer.strip():
            return Verdict("correct", "exact", answer)
        if len(answer) > _LONGEST_ANSWER:
            return Verdict("wrong", "too_long", answer)
        a, b = exact_number(gold), exact_number(answer)
        if a is not None and b is not None:
            return Verdict("correct" if a == b else "wrong", "numeric", answer)
        if clean(gold) == clean(answer) and not is_mixed(gold) and not is_mixed(answer):
            return Verdict("correct", "normalised", answer)
        kinds = brackets(gold), brackets(answer)
        if None not in kinds and kinds[0] != kinds[1]:
            return Verdict("wrong", "brackets", answer)
        return None

    def _symbolic(self, gold: str, answer: str) -> Verdict:
        with self._lock:
            for attempt in range(2):
                try:
                    if self._worker is None:
                        self._worker = self._server.fork()
                    result = self._worker.call(
                        {"gold": gold, "answer": answer}, timeout=self._timeout
                    )
                    return Verdict(result["label"], result["rule"], answer)
                except WorkerDied as death:
                    # Somebody else may have killed it; what dies twice died of this answer.
                    self._worker = None
                    if death.reason == "timeout" or attempt:
                        return Verdict("unknown", death.reason, answer)
        raise AssertionError("unreachable: the second attempt returns")
