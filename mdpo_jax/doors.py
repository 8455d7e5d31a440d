"""What every door does the same way: parse, tell errors in one line, and give an exit code."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from mdpo_jax import recipes
from mdpo_jax.config import Config

EXIT_OK, EXIT_INPUT, EXIT_RESUMABLE = 0, 2, 75


def run_door(arguments: Sequence[str], usage: str, work: Callable[[Config], None]) -> int:
    """0 done, 2 wrong input, 75 interrupted and resumable; `work` imports jax, parsing does not."""
    if "--help" in arguments or "-h" in arguments:
        named = [a for a in arguments if a.startswith("--config=")] or ["--config=tiny"]
        print(usage)
        for flag, kind, value in recipes.describe(recipes.parse(named)):
            print(f"  {flag}={value}  ({kind})")
        return EXIT_OK
    return guarded(lambda: work(recipes.parse(arguments)))


def guarded(work: Callable[[], None]) -> int:
    """Run `work`; what the user can mend ends in one line and 2, a lost tool in one line and 75."""
    from mdpo_jax.isolation.forkserver import ForkServerError

    try:
        work()
    except (ValueError, FileNotFoundError, FileExistsError) as error:
        print(f"error: {_line(error)}", file=sys.stderr)
        return EXIT_INPUT
    except ForkServerError as error:
        print(f"interrupted: {_line(error)}; the same command resumes", file=sys.stderr)
        return EXIT_RESUMABLE
    except KeyboardInterrupt:
        print("interrupted; the same command resumes", file=sys.stderr)
        return EXIT_RESUMABLE
    return EXIT_OK


def _line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
