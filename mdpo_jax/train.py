"""`python -m mdpo_jax.train --config=NAME [--smoke] [--config.FIELD=VALUE ...]`: run the whole loop.

`--smoke` makes any recipe small: every stage on a CPU in about a minute, without a download.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence

from mdpo_jax.config import Config
from mdpo_jax.doors import EXIT_FAILED, EXIT_OK, interrupts_held, run_door
from mdpo_jax.host_memory import keep_freed
from mdpo_jax.smoke import NOTE, is_smoke


def main(arguments: Sequence[str]) -> int:
    """Parse, run, print; 0 done, 2 wrong input, 75 interrupted and resumable."""
    try:
        code = run_door(arguments, __doc__ or "", _train)
    except Exception:
        if not _several():
            raise
        traceback.print_exc()
        code = EXIT_FAILED
    if code == EXIT_OK or not _several():
        return code
    from mdpo_jax import hosts

    return hosts.leave(code)


def _several() -> bool:
    """Whether other processes wait for this one; nobody does before jax is there."""
    if "jax" not in sys.modules:
        return False
    from mdpo_jax import hosts

    return hosts.several()


def _train(config: Config) -> None:
    keep_freed()  # before jax is there
    with interrupts_held():
        from rich.console import Console

        from mdpo_jax import hosts
    hosts.connect(config.mesh.hosts)  # before anything below looks for devices
    with interrupts_held():
        from mdpo_jax.pipeline import exporting, loop, stages, summary
        from mdpo_jax.reporting.console import results_table

    console = Console()
    if is_smoke(config):
        console.print(f"[bold]{NOTE}[/bold]")
    results = loop.run(config)
    folder = exporting.export_chosen(config, results)
    if not hosts.first():
        return
    page = summary.write_report(config)
    console.print(results_table(results["rows"]))
    for c in results["comparisons"]:
        console.print(
            f"test, {c['decoding']}: iteration {c['iteration']} minus SFT "
            f"{100 * c['difference']:+.1f} points, 95 % [{100 * c['low']:+.1f}, "
            f"{100 * c['high']:+.1f}]"
        )
    chosen = results["chosen_iteration"]
    if is_smoke(config):
        console.print(f"[bold]{NOTE}[/bold]")
    for folder_name in ("sft", "iteration-*/train"):
        for trace in sorted(config.directory.glob(f"{folder_name}/{stages.PROFILE}")):
            console.print(f"profile {trace}")
    console.print(f"results {config.directory / 'results.json'}")
    console.print(f"export  {folder} (iteration {chosen}, the best on dev)\nreport  {page}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
