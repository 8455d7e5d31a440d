"""What every door does the same way: parse, tell errors in one line, and give an exit code."""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from mdpo_jax import recipes
from mdpo_jax.checks import HostsGone
from mdpo_jax.config import Config, StepZeroError
from mdpo_jax.rows import ROW_FILES

# A path that was given and cannot be used.
_INPUT_ERRNOS = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG,
    errno.ELOOP, errno.ENOTEMPTY,
)  # fmt: skip
EXIT_OK, EXIT_FAILED, EXIT_INPUT, EXIT_RESUMABLE = 0, 1, 2, 75


def run_door(arguments: Sequence[str], usage: str, work: Callable[[Config], None]) -> int:
    """0 done, 2 wrong input, 75 interrupted and resumable; `work` imports jax, parsing does not."""
    asked = [a for a in arguments if a not in ("--help", "-h")]
    if len(asked) < len(arguments):
        named = any(a.startswith("--config=") for a in asked)
        return guarded(lambda: _help(usage, asked if named else ["--config=tiny", *asked]))
    return guarded(lambda: work(recipes.parse(arguments)))


def _help(usage: str, arguments: Sequence[str]) -> None:
    """Every field with its type and the value that these arguments give it."""
    print(usage)
    for flag, kind, value in recipes.describe(recipes.parse(arguments)):
        print(f"  {flag}={value}  ({kind})")


def guarded(work: Callable[[], None], then: str = "the same command resumes") -> int:
    """Run `work`; what the user can mend ends in one line and 2, what passes in one line and 75.

    then: what a user who was interrupted is told.
    """
    from mdpo_jax.isolation.forkserver import ForkServerError
    from mdpo_jax.rollout.servers import ServersGone

    try:
        work()
        sys.stdout.flush()
    except BrokenPipeError:  # `--help | head`: the reader has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, FileNotFoundError, FileExistsError) as error:
        return _said("error", error, EXIT_INPUT)
    except (ForkServerError, ServersGone, HostsGone) as error:
        return _said("interrupted", error, EXIT_RESUMABLE, f"; {then}")
    except OSError as error:
        if error.errno in _INPUT_ERRNOS:
            return _said("error", error, EXIT_INPUT)
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        return _said("interrupted", error, EXIT_RESUMABLE, f"; with room, {then}")
    except (FloatingPointError, StepZeroError) as error:
        return _said("stopped", error, EXIT_FAILED)
    except KeyboardInterrupt:
        print(f"interrupted; {then}", file=sys.stderr)
        return EXIT_RESUMABLE
    return EXIT_OK


def row_files(options: argparse.Namespace, source: str, positive: Sequence[str]) -> None:
    """ValueError unless the file of rows is there, `out` can be written, and numbers are over 0."""
    path, out = getattr(options, source), options.out
    for name in positive:
        if not getattr(options, name) > 0:
            raise ValueError(f"--{name}={getattr(options, name)}; expected more than 0")
    if not path.is_file():
        raise ValueError(f"--{source}={path}: no such file; expected JSON lines")
    if not out.parent.is_dir() or (out.exists() and not out.is_file()) or out.is_symlink():
        raise ValueError(f"--out={out}: expected a file, or a new one, in a folder that exists")
    for written in map(Path, (out, *(f"{out}{end}" for end in ROW_FILES))):
        if written.exists() and written.samefile(path):
            raise ValueError(f"--out={out}: would replace {source} {path}; expected another")


@contextlib.contextmanager
def interrupts_held() -> Iterator[None]:
    """Ctrl-C waits until the block ends: raised inside an import it may be swallowed or torn."""
    came: list[int] = []
    before = signal.getsignal(signal.SIGINT)
    # Not where nobody's Ctrl-C arrives: another thread, or a job that a shell put in the background.
    held = threading.current_thread() is threading.main_thread() and before is not signal.SIG_IGN
    if held:
        signal.signal(signal.SIGINT, lambda *_: came.append(1))
    try:
        yield
    finally:
        if held:
            signal.signal(signal.SIGINT, before)
    if came:
        raise KeyboardInterrupt


def _said(word: str, error: BaseException, code: int, then: str = "") -> int:
    print(f"{word}: {_line(error)}{then}", file=sys.stderr)
    return code


def _line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
