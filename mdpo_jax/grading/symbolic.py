"""Inside a worker: math-verify on one pair of answers.  Imported by the fork server alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import math_verify

_DIGITS = 12  # its default of 6 takes 1.414214 for the square root of 2


def serve(argument: Any) -> Callable[[dict[str, str]], dict[str, str]]:
    """A handler of {"gold", "answer"}; answers {"label", "rule"}.

    Its own time limits are off: they need SIGALRM and the main thread; the worker is killed
    instead.
    """
    del argument

    def parse(text: str) -> list:
        return math_verify.parse(f"\\boxed{{{text}}}", parsing_timeout=None)  # pyright: ignore[reportArgumentType]

    def handle(request: dict[str, str]) -> dict[str, str]:
        try:
            gold = parse(request["gold"])
            answer = parse(request["answer"])
            if not gold:
                return {"label": "unknown", "rule": "unparsable_gold"}
            same = math_verify.verify(gold, answer, float_rounding=_DIGITS, timeout_seconds=None)
        except Exception as error:
            # any expression may break sympy in any way; the verdict says so
            return {"label": "unknown", "rule": f"math_verify_{type(error).__name__}"}
        return {"label": "correct" if same else "wrong", "rule": "math_verify"}

    return handle
