"""What a run says on the terminal: the table of results, and progress that a log file can hold too."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

from rich import box
from rich.console import Console, Group
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from mdpo_jax.reporting.results import Row, gather
from mdpo_jax.reporting.sheets import Sheet
from mdpo_jax.reporting.text import one_line

_COLUMNS = {
    "greedy": "greedy",
    "sampled": "T=1",
    "pass_at_8": "pass\n@8",
    "mean_turns": "turns",
    "tool_error_rate": "tool\nerr %",
    "kl": "KL",
}


class Report(Protocol):
    """Tells how far a piece of work is: `report(advance=1)`, or `report(completed=40)`."""

    def __call__(
        self, advance: float = 0, *, completed: float | None = None, text: str | None = None
    ) -> None: ...


def results_table(rows: Iterable[Row]) -> Table:
    """One row a (split, stage, iteration) from the rows of results.json, for 80 columns.

    Greedy and T=1 accuracy stand side by side in percent with their 95 % intervals.
    """
    table = Table(
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        collapse_padding=True,
        caption="accuracy % [95 % interval]; turns and tool errors of the greedy run",
        caption_justify="left",
        header_style="bold",
    )
    table.add_column("split", vertical="bottom")
    table.add_column("policy", vertical="bottom", no_wrap=True)
    for title in _COLUMNS.values():
        table.add_column(title, justify="right", vertical="bottom")
    lines = gather(rows)
    for before, line in zip([None, *lines], lines, strict=False):
        if before is not None and before.split != line.split:
            table.add_section()
        cells = (Text(line.cells[column]) for column in _COLUMNS)
        table.add_row(Text(one_line(line.split)), Text(one_line(line.policy)), *cells)
    return table


def sheet_table(sheet: Sheet) -> Group:
    """A table of an evaluation, for 100 columns; leading cells are not repeated line by line."""
    table = Table(
        box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True,
        header_style="",
    )  # fmt: skip
    for i, column in enumerate(sheet.columns):
        table.add_column(Text(column), justify="left" if i < sheet.texts else "right")
    before: list[str] = []
    for row in sheet.rows:
        if before and row[0] != before[0]:
            table.add_section()
        shown = [
            "" if before[: i + 1] == list(row[: i + 1]) else cell for i, cell in enumerate(row)
        ]
        table.add_row(
            *(Text(one_line(cell)) for cell in shown[: sheet.texts]),
            *(Text(one_line(cell)) for cell in row[sheet.texts :]),
        )
        before = list(row[: sheet.texts])
    # Not the table's own title and caption, which wrap at its width.
    return Group(Text(sheet.title, "bold"), table, Text(sheet.caption, "dim"))


@contextlib.contextmanager
def progress(
    description: str,
    total: float | None = None,
    *,
    console: Console | None = None,
    every: float = 30.0,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Report]:
    """Show how far a piece of work is: completed of total, rate, time left and one free text.

    On a terminal a live bar; elsewhere a plain line when `every` seconds have passed, and one at the
    end, so that a log stays short.
    """
    console = console or Console(stderr=True)
    if console.is_terminal:
        with _bar(console) as bar:
            task = bar.add_task(description, total=total, text="")
            yield lambda advance=0, *, completed=None, text=None: _move(
                bar, task, advance, completed, text
            )
        return
    lines = _PlainLines(description, total, console, every, clock)
    try:
        yield lines
    finally:
        lines.close()


class _RateColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{_rate(speed)}", style="progress.data.speed")


def _bar(console: Console) -> Progress:
    # markup=False: the free text may quote the model, and [brackets] are no style there.
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        _RateColumn(),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[text]}", style="dim", markup=False),
        console=console,
    )


def _move(
    bar: Progress, task: TaskID, advance: float, completed: float | None, text: str | None
) -> None:
    bar.update(task, advance=advance if completed is None else None, completed=completed)
    if text is not None:
        bar.update(task, text=one_line(text))


class _PlainLines:
    """The same report as lines: `rollout: 40/100, 2.1/s, 0:00:28 left, 3 timeouts`."""

    def __init__(
        self,
        description: str,
        total: float | None,
        console: Console,
        every: float,
        clock: Callable[[], float],
    ) -> None:
        self._description, self._total, self._console = description, total, console
        self._every, self._clock = every, clock
        self._begun = self._said = clock()
        self._completed, self._text = 0.0, ""
        self._first: tuple[float, float] | None = None  # when something was done, and how much
        self._news = True

    def __call__(
        self, advance: float = 0, *, completed: float | None = None, text: str | None = None
    ) -> None:
        self._completed = self._completed + advance if completed is None else completed
        self._text = self._text if text is None else one_line(text)
        self._news = True
        if self._first is None and self._completed:
            self._first = self._clock(), self._completed
        if self._clock() - self._said >= self._every:
            self.say()

    def close(self) -> None:
        if self._news:
            self.say()

    def say(self) -> None:
        self._said, self._news = self._clock(), False
        elapsed = self._said - self._begun
        done, total = self._completed, self._total
        parts = [f"{done:g}" if total is None else f"{done:g}/{total:g}"]
        if done and elapsed > 0:
            parts.append(_rate(done / elapsed))
            speed = self._speed()
            if total is not None and done < total and speed:
                parts.append(f"{_duration((total - done) / speed)} left")
        if total is None or done >= total:
            parts.append(f"{_duration(elapsed)} elapsed")
        if self._text:
            parts.append(self._text)
        line = f"{self._description}: {', '.join(parts)}"
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _speed(self) -> float | None:
        """Units a second since the first were done, if more are: before them, programs are compiled."""
        begun, before = self._first or (self._begun, 0.0)
        if self._completed == before or self._said == begun:
            return None
        return (self._completed - before) / (self._said - begun)


def _rate(per_second: float) -> str:
    if per_second and per_second < 0.1:
        return f"{60 * per_second:.2g}/min"
    return f"{per_second:,.1f}/s" if per_second < 100 else f"{per_second:,.0f}/s"


def _duration(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}"
