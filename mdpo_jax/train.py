"""`python -m mdpo_jax.train --config=NAME [--config.FIELD=VALUE ...]`: run the whole loop."""

from __future__ import annotations

import sys
from collections.abc import Sequence

EXIT_OK, EXIT_INPUT, EXIT_RESUMABLE = 0, 2, 75


def main(arguments: Sequence[str]) -> int:
    """Parse, run, print; 0 done, 2 wrong input, 75 interrupted and resumable."""
    from mdpo_jax import config as configuration

    try:
        config = configuration.parse(arguments)
    except configuration.ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_INPUT
    # Only now: these import jax, and a misspelt field should be told at once.
    from rich.console import Console

    from mdpo_jax.isolation.forkserver import ForkServerError
    from mdpo_jax.pipeline import loop
    from mdpo_jax.reporting.console import results_table

    try:
        results = loop.run(config)
        folder = loop.export_chosen(config, results)
    except (ValueError, FileNotFoundError, FileExistsError) as error:
        print(f"error: {_line(error)}", file=sys.stderr)
        return EXIT_INPUT
    except (KeyboardInterrupt, ForkServerError) as error:
        print(f"interrupted: {_line(error)}; the same command resumes", file=sys.stderr)
        return EXIT_RESUMABLE
    console = Console()
    console.print(results_table(results["rows"]))
    for c in results["comparisons"]:
        console.print(
            f"test, {c['decoding']}: iteration {c['iteration']} minus SFT "
            f"{100 * c['difference']:+.1f} points, 95 % [{100 * c['low']:+.1f}, "
            f"{100 * c['high']:+.1f}]"
        )
    console.print(f"results {config.directory / 'results.json'}\nexport  {folder}")
    return EXIT_OK


def _line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
