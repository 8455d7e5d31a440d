"""Inside a worker: run cells as a notebook does, and say in one line what went wrong."""

from __future__ import annotations

import ast
import contextlib
import io
import random
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any

from mdpo_jax.environment.display import shown

NOTHING = "Result is not defined"
_SEEDED = ("numpy.random", "sympy.core.random")
# Held here: a cell shares the builtins, and may have put something else in their place.
_parse, _compile, _exec, _eval = ast.parse, compile, exec, eval


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


class _Cells:
    """One namespace over the cells of a trajectory; its modules' randomness is seeded."""

    def __init__(self, seed: int, output_chars: int):
        self._seed, self._most = seed, output_chars
        self._namespace: dict[str, Any] = {"__name__": "__main__", "__builtins__": __builtins__}
        self._seeded: set[str] = set()
        self._running = False
        random.seed(seed)

    def handle(self, request: dict[str, Any]) -> dict[str, str]:
        """Run {"blocks": [...]} in order; the last one's {"text", "status"}."""
        answer = {"text": NOTHING, "status": "error"}
        for block in request["blocks"]:
            answer = self._cell(block)
        return answer

    def _cell(self, code: str) -> dict[str, str]:
        """Run one cell; an error's line replaces what the cell printed before it (recipe 2)."""
        out = _Capped(self._most)
        try:
            signal.signal(signal.SIGINT, self._interrupt)
            self._seed_modules()
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
                self._running = True
                _execute(code, self._namespace, out)
                self._running = False
        except _OutputLimit:
            return _answer(out.getvalue(), "output_limit")
        except MemoryError:
            return _answer("MemoryError", "memory")
        except BaseException as error:
            # SystemExit and KeyboardInterrupt too: a cell must not end the worker
            self._running = False
            return _answer(_one_line(error), "error")
        finally:
            self._running = False
        return _answer(out.getvalue().rstrip("\n") or NOTHING, "ok")

    def _interrupt(self, *_: object) -> None:
        """The supervisor's soft interrupt; between cells it comes too late and means nothing."""
        if self._running:
            raise KeyboardInterrupt

    def _seed_modules(self) -> None:
        """Seed what was loaded before the fork, or by an earlier cell."""
        for name in _SEEDED:
            if name in sys.modules and name not in self._seeded:
                sys.modules[name].seed(self._seed)
                self._seeded.add(name)


def serve(argument: dict[str, Any]) -> Callable[[dict[str, Any]], dict[str, str]]:
    """A handler with one namespace, from {"seed", "output_chars"}."""
    return _Cells(argument["seed"], argument["output_chars"]).handle


def _execute(code: str, namespace: dict[str, Any], out: io.StringIO) -> None:
    """As a notebook cell: the value of a last expression is shown unless it is None."""
    tree = _parse(code, "<cell>")
    last = None
    if tree.body and isinstance(tree.body[-1], ast.Expr):
        last = ast.Expression(tree.body.pop().value)  # pyright: ignore[reportAttributeAccessIssue]
    _exec(_compile(tree, "<cell>", "exec"), namespace)
    if last is not None:
        value = _eval(_compile(last, "<cell>", "eval"), namespace)
        if value is not None:
            out.write(shown(value) + "\n")


def _answer(text: str, status: str) -> dict[str, str]:
    return {"text": text.encode("utf-8", "replace").decode("utf-8"), "status": status}


def _one_line(error: BaseException) -> str:
    """`Name: message` as IPython ends its report: no module before the name, no blank lines."""
    try:
        if isinstance(error, SyntaxError):
            return traceback.format_exception_only(type(error), error)[-1].strip()
        message = " ".join(line.strip() for line in str(error).splitlines() if line.strip())
    except BaseException:  # the cell's own class may do anything when it is asked for its text
        message = "<exception str() failed>"  # what Python itself prints then
    name = str(type.__getattribute__(type(error), "__name__"))
    return f"{name}: {message}" if message else name
