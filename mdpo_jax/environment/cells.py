"""Inside a worker: run cells as a notebook does, and say in one line what went wrong."""

from __future__ import annotations

import ast
import contextlib
import io
import random
import sys
import traceback
from collections.abc import Callable
from typing import Any

NOTHING = "Result is not defined"


class _OutputLimit(BaseException):
    """Raised out of a print; not an Exception, so that a cell's own handlers seldom catch it."""


class _Capped(io.StringIO):
    def __init__(self, most: int):
        super().__init__()
        self.most = most

    def write(self, text: str) -> int:
        if self.tell() + len(text) > self.most:
            super().write(text[: max(0, self.most - self.tell())])
            raise _OutputLimit
        return super().write(text)


def serve(argument: dict[str, Any]) -> Callable[[dict[str, Any]], dict[str, str]]:
    """A handler with one namespace, seeded; request {"blocks": [...]}, answer {"text", "status"}."""
    random.seed(argument["seed"])
    for name in ("numpy.random", "sympy.core.random"):
        if name in sys.modules:
            sys.modules[name].seed(argument["seed"])
    namespace: dict[str, Any] = {"__name__": "__main__", "__builtins__": __builtins__}

    def handle(request: dict[str, Any]) -> dict[str, str]:
        answer = {"text": NOTHING, "status": "error"}
        for block in request["blocks"]:
            answer = _run_cell(block, namespace, argument["output_chars"])
        return answer

    return handle


def _run_cell(code: str, namespace: dict[str, Any], most: int) -> dict[str, str]:
    """Run one cell; an error's line replaces what the cell printed before it (recipe 2)."""
    out = _Capped(most)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            _execute(code, namespace)
    except _OutputLimit:
        return _answer(out.getvalue(), "output_limit")
    except MemoryError:
        return _answer("MemoryError", "memory")
    except BaseException as error:
        # SystemExit and KeyboardInterrupt too: a cell must not end the worker
        return _answer(_one_line(error), "error")
    return _answer(out.getvalue().rstrip("\n") or NOTHING, "ok")


def _execute(code: str, namespace: dict[str, Any]) -> None:
    """As a notebook cell: the value of a last expression is shown unless it is None."""
    tree = ast.parse(code, "<cell>")
    last = None
    if tree.body and isinstance(tree.body[-1], ast.Expr):
        last = ast.Expression(tree.body.pop().value)  # pyright: ignore[reportAttributeAccessIssue]
    exec(compile(tree, "<cell>", "exec"), namespace)
    if last is not None:
        value = eval(compile(last, "<cell>", "eval"), namespace)
        if value is not None:
            print(repr(value))


def _answer(text: str, status: str) -> dict[str, str]:
    return {"text": text.encode("utf-8", "replace").decode("utf-8"), "status": status}


def _one_line(error: BaseException) -> str:
    """`Name: message` as IPython ends its report: no module before the name, no blank lines."""
    if isinstance(error, SyntaxError):
        return traceback.format_exception_only(type(error), error)[-1].strip()
    try:
        message = " ".join(line.strip() for line in str(error).splitlines() if line.strip())
    except Exception:
        message = "<exception str() failed>"  # what Python itself prints then
    return f"{type(error).__name__}: {message}" if message else type(error).__name__
