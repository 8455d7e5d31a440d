"""The run directory: stages that are done or not, and files that are whole or absent.

Of several processes (hosts.py) the first one holds it and writes into it; the others write only the
files that are dealt to them, and all wait for each other before and after every stage.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mdpo_jax import hosts
from mdpo_jax.config import Config, ConfigError
from mdpo_jax.data import store
from mdpo_jax.recipes import differences, from_dict

DONE, RESULTS = "done.json", "results.json"


def write_json(path: Path, value: Any) -> None:
    """Write through `*.partial`, fsync and rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with open(partial, "w", encoding="utf-8") as out:
        json.dump(value, out, indent=1, allow_nan=False)
        out.flush()
        os.fsync(out.fileno())
    partial.rename(path)


def read_json(path: Path) -> Any:
    """The value of `write_json`; ConfigError names a file that is not whole."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(
            f"{path}: not whole ({error}); delete it, and a stage's folder with it, and run again"
        ) from None


def read_config(directory: Path) -> Config:
    """The configuration of the run in `directory`; ConfigError if there is none."""
    path = directory / "config.json"
    if not path.is_file():
        raise ConfigError(f"{directory}: not a run directory; expected config.json in it")
    return dataclasses.replace(from_dict(read_json(path)), workdir=str(directory))


@contextlib.contextmanager
def open_run(config: Config) -> Iterator[Path]:
    """The run directory, with its config, held against other processes.

    Refuses one that belongs to another configuration.
    """
    directory = config.directory
    with contextlib.ExitStack() as stack:

        def take() -> None:
            stack.enter_context(held(directory, f"config.workdir={str(directory)!r}"))
            _claim(config, directory)

        hosts.by_first(take)
        yield directory


@contextlib.contextmanager
def held(directory: Path, named: str) -> Iterator[Path]:
    """A folder, made if it is not there, held against other processes; `named` is for errors."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / ".writable").touch()
        (directory / ".writable").unlink()
    except OSError as error:
        raise ConfigError(f"{named}: {error.strerror}; expected a writable folder") from None
    with open(directory / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # let go when the process ends
        except OSError:
            raise ConfigError(
                f"{named}: another process works in it; expected one process a folder"
            ) from None
        yield directory


def _claim(config: Config, directory: Path) -> None:
    """Write the configuration, or compare; until a stage is done there is nothing to protect."""
    known = directory / "config.json"
    fields = config.as_dict() | {"workdir": ""}
    begun = any(directory.glob(f"*/{DONE}"))
    if known.exists() and begun:
        # By way of Config: fields that have come since have the value they had before they came.
        changed = differences(from_dict(read_json(known)).deciding(), config.deciding())
        if changed:
            raise ConfigError(
                f"config.workdir={str(directory)!r}: holds a run with another configuration "
                f"({'; '.join(changed[:3])}); expected the same, or another folder"
            )
    else:
        write_json(known, fields)


def stage(
    folder: Path, work: Callable[[Path], dict[str, Any] | None], *, alone: bool = False
) -> dict[str, Any]:
    """Run `work(folder)` unless it is done; its summary is kept in the folder's done.json.

    The summary is written last, so a folder without one is of a stage that was interrupted; the
    work then starts anew and may reuse whole files that it finds there.
    alone: of several processes only the first one works, the others wait; else all do, and the
    summary is the first one's.
    """
    done = folder / DONE

    def begun() -> dict[str, Any] | None:
        if done.exists():
            return read_json(done)
        folder.mkdir(parents=True, exist_ok=True)
        return None

    def ended(summary: dict[str, Any] | None) -> dict[str, Any]:
        write_json(done, summary or {})
        return read_json(done)

    found = hosts.by_first(begun)
    if found is not None:
        return found
    if alone:
        return hosts.by_first(lambda: ended(work(folder)))
    summary = work(folder)
    hosts.wait()  # until every file is there
    return hosts.by_first(lambda: ended(summary))


def write_rows(path: Path, rows: Iterable[dict]) -> None:
    """`store.write_lines` of what every process has: the first one writes."""
    if hosts.first():
        store.write_lines(path, rows)


def missing(paths: Sequence[Path]) -> list[Path]:
    """Those that are not there, as the first process sees it: all must deal the same ones."""
    gone = hosts.by_first(lambda: [i for i, path in enumerate(paths) if not path.exists()])
    return [paths[i] for i in gone]
