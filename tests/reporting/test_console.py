import contextlib
import io

import pytest
from rich.console import Console

from mdpo_jax.reporting.console import progress, results_table


def _text(table, width):
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(table)
    return console.export_text()


@pytest.mark.parametrize("width", [80, 120])
def test_a_line_of_the_table_is_one_line_of_the_terminal(rows, width):
    lines = [line.rstrip() for line in _text(results_table(rows), width).splitlines()]
    assert max(map(len, lines)) <= width
    first = "dev SFT 70.0 [67.9, 72.1] 60.0 [57.9, 62.1] 93.1 2.31 9.3 -"
    assert " ".join(lines[3].split()) == first
    policies = [(line[:5], line[7:14]) for line in lines[3:] if line.startswith(("dev", "test"))]
    assert [[cell.strip() for cell in cells] for cells in policies] == [
        [split, policy] for split in ("dev", "test") for policy in ("SFT", "M-DPO 1", "M-DPO 2")
    ]


def test_missing_fields_and_the_widest_numbers_keep_to_80_columns():
    alike = {"stage": "sft", "split": "dev"}
    rows = [
        alike | {"decoding": "greedy", "accuracy": 1.0, "low": 0.995, "high": 1},
        alike | {"decoding": "sampled", "accuracy": float("nan")},
        {"stage": "[red]own", "iteration": 1, "split": "dev", "decoding": "greedy", "kl": None},
    ]
    text = _text(results_table(rows), 80)
    assert "100 [99.5, 100]" in text
    assert "[red]own 1" in text
    assert "nan" not in text
    assert _text(results_table([]), 80)


class _Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_progress_without_a_terminal_says_a_line_now_and_then():
    out, clock = io.StringIO(), _Clock()
    with progress("rollout", 100, console=Console(file=out, width=20), clock=clock) as report:
        for _ in range(100):
            clock.now += 1
            report(1, text="3 timeouts [red]\x1b[31m\n")
    assert out.getvalue().splitlines() == [
        "rollout: 30/100, 1.0/s, 0:01:10 left, 3 timeouts [red]\\x1b[31m",
        "rollout: 60/100, 1.0/s, 0:00:40 left, 3 timeouts [red]\\x1b[31m",
        "rollout: 90/100, 1.0/s, 0:00:10 left, 3 timeouts [red]\\x1b[31m",
        "rollout: 100/100, 1.0/s, 0:01:40 elapsed, 3 timeouts [red]\\x1b[31m",
    ]


def test_the_time_left_does_not_count_what_came_before_the_first():
    out, clock = io.StringIO(), _Clock()
    with progress("evaluate", 50, console=Console(file=out, width=80), clock=clock) as report:
        clock.now = 60.0  # programs are compiled
        report(10)
        for _ in range(10):
            clock.now += 3
            report(1)
    assert out.getvalue().splitlines() == [
        "evaluate: 10/50, 0.2/s",  # nothing is known yet
        "evaluate: 20/50, 0.2/s, 0:01:30 left",
    ]


def test_progress_without_a_total_or_cut_short_still_ends_with_a_line():
    out, clock = io.StringIO(), _Clock()
    console = Console(file=out, width=80)
    with contextlib.suppress(KeyError), progress("load", console=console, clock=clock) as report:
        clock.now = 100.0
        report(completed=5)
        clock.now = 101.0
        report(1)
        raise KeyError
    assert out.getvalue().splitlines() == [
        "load: 5, 3/min, 0:01:40 elapsed",
        "load: 6, 3.6/min, 0:01:41 elapsed",
    ]


def test_progress_on_a_terminal_is_a_bar():
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=100, _environ={"TERM": "xterm"})
    with progress("rollout", 4, console=console) as report:
        report(1, text="[bold]slow")
        report(completed=4)
    assert "4/4" in out.getvalue()
    assert "[bold]slow" in out.getvalue()
