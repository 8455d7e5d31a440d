"""Inside a worker: run cells as a notebook does, and say in one line what went wrong."""

from __future__ import annotations

import ast
import io
import signal
import sys
import traceback
from collections.abc import Callable
from types import FrameType, ModuleType
from typing import Any

from mdpo_jax.environment import seeding
from mdpo_jax.environment.display import shown

NOTHING = "Result is not defined"
# Held here: a cell shares the builtins, and may have put something else in their place.
_parse, _compile, _exec, _eval = ast.parse, compile, exec, eval


class _OutputLimit(BaseException):
    """Raised out of a print; not an Exception, so that a cell's own handlers seldom catch it."""


class _Output(io.StringIO):
    """What the cells of a process print to, emptied before each; who kept it prints to the next."""

    def __init__(self, most: int):
        super().__init__()
        self.most = most

    def write(self, text: str) -> int:
        if self.tell() + len(text) > self.most:
            super().write(text[: max(0, self.most - self.tell())])
            raise _OutputLimit
        return super().write(text)

    def begin(self) -> None:
        self.seek(0)
        self.truncate()
        sys.stdout = sys.stderr = self

    def close(self) -> None:
        """Nothing: a notebook's stream outlives a cell that closes it."""


class _Cells:
    """One namespace over the cells of a trajectory, as the module `__main__`."""

    def __init__(self, seed: int, output_chars: int):
        seeding.install(seed)
        self._out = _Output(output_chars)
        self._main = ModuleType("__main__")
        self._main.__dict__["__builtins__"] = __builtins__
        self._running = self._interrupted = False

    def handle(self, request: dict[str, Any]) -> dict[str, str]:
        """Run {"blocks": [...]} up to one that is interrupted; the last one's {"text", "status"}."""
        answer, self._interrupted = {"text": NOTHING, "status": "error"}, False
        for block in request["blocks"]:
            answer = self._cell(block)
            if self._interrupted:
                break
        return answer

    def _cell(self, code: str) -> dict[str, str]:
        """Run one cell; an error's line replaces what the cell printed before it (recipe 2)."""
        try:
            signal.signal(signal.SIGINT, self._interrupt)
            sys.modules["__main__"] = self._main
            self._out.begin()
            self._running = True
            _execute(code, self._main.__dict__, self._out)
            self._running = False
            return self._answer(self._out.getvalue().rstrip("\n") or NOTHING, "ok")
        except _OutputLimit:
            self._running = False
            return self._answer(self._out.getvalue(), "output_limit")
        except MemoryError:
            self._running = False
            return self._answer("MemoryError", "memory")
        except BaseException as error:
            # SystemExit and KeyboardInterrupt too: a cell must not end the worker
            self._running = False
            return self._answer(_one_line(error), "error")

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        """The supervisor's soft interrupt, once a cell; between cells it comes too late.

        Within an import it would leave half a module, for good: that process is killed instead.
        """
        if self._running and not _importing(frame):
            self._running, self._interrupted = False, True
            raise KeyboardInterrupt

    def _answer(self, text: str, status: str) -> dict[str, str]:
        text = text[: self._out.most]
        return {"text": text.encode("utf-8", "replace").decode("utf-8"), "status": status}


def serve(argument: dict[str, Any]) -> Callable[[dict[str, Any]], dict[str, str]]:
    """A handler with one namespace, from {"seed", "output_chars"}."""
    return _Cells(argument["seed"], argument["output_chars"]).handle


def _execute(code: str, namespace: dict[str, Any], out: io.StringIO) -> None:
    """As a notebook cell: the value of a last expression is shown unless it is None."""
    tree = _parse(code, "<cell>")
    last = None
    if tree.body and isinstance(tree.body[-1], ast.Expr):
        last = ast.Expression(tree.body.pop().value)  # pyright: ignore[reportAttributeAccessIssue]
    # dont_inherit: this file's __future__ is not the cell's.
    _exec(_compile(tree, "<cell>", "exec", dont_inherit=True), namespace)
    if last is not None:
        value = _eval(_compile(last, "<cell>", "eval", dont_inherit=True), namespace)
        if value is not None:
            out.write(shown(value) + "\n")


def _importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


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
