"""The grader: extraction, a cheap stage, then math-verify in processes that can be killed."""

from __future__ import annotations

from typing import Any, Literal

from mdpo_jax.grading import rules
from mdpo_jax.grading.extract import ALTERNATIVE, extract_answer, extract_display
from mdpo_jax.grading.pool import Pool
from mdpo_jax.grading.rules import POLICIES, Policy
from mdpo_jax.types import Label, Verdict

Form = Literal["answer", "text", "solution"]
FORMS: tuple[Form, ...] = ("answer", "text", "solution")
_LABELS: dict[str, Label] = {"correct": "correct", "wrong": "wrong", "unknown": "unknown"}
_CACHED = 1 << 18
_LONGEST_TEXT = 20_000
# A loaded machine may be why: the same pair may fare better another time.
_PASSING = ("timeout", "killed")


class Grader:
    """Verdicts on answers under one policy.  Callable from any thread, and after a fork.

    policy: `strict` (rewards: no percent leniency, no rounded decimal for an exact gold, no list for
    a scalar, nothing for an unfinished solution) or `lenient` (figures to compare with published
    ones).  A pair that takes a worker more than `timeout` seconds or `memory_mb` is `unknown`; the
    workers start when the first is needed.
    """

    def __init__(
        self, timeout: float = 2.0, *, policy: Policy = "strict", workers: int = 8,
        memory_mb: int = 2048,
    ):  # fmt: skip
        if policy not in POLICIES:
            raise ValueError(f"policy: {policy!r}; expected one of {', '.join(POLICIES)}")
        self.policy: Policy = policy
        self._arguments = {"policy": policy, "workers": workers, "memory_mb": memory_mb}
        self._timeout = timeout
        self._pool = Pool(timeout, workers, memory_mb)
        self._cache: dict[tuple[str, str, str], Verdict] = {}

    @property
    def settings(self) -> dict[str, Any]:
        """What a result must state of its grader."""
        return {"timeout": self._timeout, **self._arguments}

    def start(self) -> None:
        """Start the first worker now, so that no pair waits for math-verify's import."""
        self._pool.start()

    def grade(self, gold: str, text: str, *, finished: bool = True) -> Verdict:
        """Verdict on a solution's final text: its last box against the gold answer.

        finished: whether the policy ended it itself; one that was cut is never correct in `strict`.
        """
        strict = self.policy == "strict"
        answer = extract_answer(text, lenient=not strict)
        if answer is None:
            return Verdict("wrong", "no_answer")
        if strict and not finished:
            return Verdict("wrong", "unfinished", answer)
        return self.grade_answer(gold, answer)

    def grade_answer(self, gold: str, answer: str) -> Verdict:
        """Verdict on a bare answer; the best that it gets from a gold's alternatives."""
        return self._best(gold, answer, "answer")

    def grade_text(self, gold: str, text: str) -> Verdict:
        """Verdict on free text against a gold that is free text too, as data sets have them.

        Boxes and lone formulas are taken out here; in other texts math-verify looks for the answer.
        """
        answer, display = extract_display(text), extract_display(gold)
        if display is None and not any(mark in gold for mark in ("$", "\\(", "\\[")):
            display = gold
        if answer is not None and display is not None:
            return self._best(display, answer, "answer")
        return self._best(gold, text, "text")

    def judge(self, gold: str, prediction: str, form: Form) -> Verdict:
        """One of the above: `grade_answer`, `grade_text`, or `grade` for a `solution`."""
        methods = {"answer": self.grade_answer, "text": self.grade_text, "solution": self.grade}
        return methods[form](gold, prediction)

    def close(self) -> None:
        """End the workers."""
        self._pool.close()

    def __enter__(self) -> Grader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> tuple:
        return _rebuilt, (self._timeout, self._arguments)

    def _best(self, gold: str, answer: str, form: Form) -> Verdict:
        verdicts = []
        for alternative in gold.split(ALTERNATIVE):
            verdicts.append(self._cached(alternative, answer, form))
            if verdicts[-1].correct:
                return verdicts[-1]
        unknown = [v for v in verdicts if v.label == "unknown"]
        return (unknown or verdicts)[0]

    def _cached(self, gold: str, answer: str, form: Form) -> Verdict:
        key = gold, answer, form  # a grader has one policy
        verdict = self._cache.get(key)
        if verdict is None:
            verdict = self._verdict(gold, answer, form)
            if verdict.rule not in _PASSING:
                if len(self._cache) >= _CACHED:
                    self._cache.clear()
                self._cache[key] = verdict
        return verdict

    def _verdict(self, gold: str, answer: str, form: Form) -> Verdict:
        if form == "answer":
            found = rules.settle(gold, answer, self.policy)
            if found is not None:
                return found
            gold, sent = rules.for_worker(gold, answer)
        else:
            sent = answer[-_LONGEST_TEXT:]  # an answer stands at the end
        request = {"gold": gold, "answer": sent, "form": form, "policy": self.policy}
        result = self._pool.call(request)
        return Verdict(_LABELS.get(result["label"], "unknown"), result["rule"], answer)


def _rebuilt(timeout: float, arguments: dict) -> Grader:
    return Grader(timeout, **arguments)
