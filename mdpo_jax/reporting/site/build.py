"""The static report of a run: one index.html and its plots, readable from a file:// address.

Everything the model wrote is hostile.  The template escapes by default, and control characters,
which survive escaping and can reorder or hide text, are made visible before it.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mdpo_jax.reporting import plots
from mdpo_jax.reporting.results import Row, decimals, gather, number
from mdpo_jax.reporting.sheets import Sheet
from mdpo_jax.reporting.text import one_line, visible

_MARK = '<meta name="generator" content="mdpo_jax.reporting.site">'  # also in template.html
_ROLES = ("prompt", "action", "observation", "template")


class ReportError(ValueError):
    """A report that cannot be written; the message names the place and what would be accepted."""


@dataclasses.dataclass(frozen=True)
class SampleTrajectory:
    """One trajectory to read: (role name, text, mean log-prob of its tokens or None) a segment."""

    problem: str
    gold: str
    verdict: str
    rule: str
    stage: str
    segments: Sequence[tuple[str, str, float | None]]


@dataclasses.dataclass(frozen=True)
class Report:
    """All that the page shows.

    rows: those of results.json.  curves: name of an iteration -> its metrics by step.  pass_at_k:
    name of a policy -> k -> share in [0, 1], with its (low, high) in `bands`.  sheets: more tables.
    An empty field leaves its section out.
    """

    title: str
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    rows: Sequence[Row] = ()
    curves: Mapping[str, Sequence[Mapping[str, Any]]] = dataclasses.field(default_factory=dict)
    pass_at_k: Mapping[str, Mapping[int, float]] = dataclasses.field(default_factory=dict)
    bands: Mapping[str, Mapping[int, tuple[float, float]]] = dataclasses.field(default_factory=dict)
    sheets: Sequence[Sheet] = ()
    samples: Sequence[SampleTrajectory] = ()
    notes: Sequence[str] = ()
    environment: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def build_report(out_dir: str | os.PathLike[str], report: Report) -> Path:
    """Write the report into `out_dir` and return the path of its index.html.

    It is built in `out_dir.partial` and swapped in whole.  An earlier report is replaced; any other
    folder that holds something, and a file, raise `ReportError`.
    """
    out = Path(os.path.abspath(out_dir))
    _check_replaceable(out)
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    figures = _draw(report, partial)
    (partial / "index.html").write_text(_page(report, figures), encoding="utf-8")
    _sync(partial)
    _swap(partial, out)
    return out / "index.html"


def _draw(report: Report, folder: Path) -> list[tuple[str, str, str]]:
    """Write the plots that have data; (file name, title, description) of each."""
    figures = []
    if report.rows:
        plots.accuracy_plot(report.rows, folder / "accuracy.svg")
        figures.append(
            (
                "accuracy.svg",
                "Accuracy by iteration",
                "Greedy and T = 1 accuracy on each split; the bars are 95 % intervals.",
            )
        )
    if any(report.pass_at_k.values()):
        plots.pass_at_k_plot(report.pass_at_k, folder / "pass_at_k.svg", report.bands)
        text = "Share of problems with a right answer among k samples, unbiased estimate."
        if report.bands:
            text += (
                " Dashed: the majority's answer is right. Bands are 95 % intervals over problems."
            )
        figures.append(("pass_at_k.svg", "pass@k", text))
    if any(report.curves.values()):
        plots.training_plot(report.curves, folder / "training.svg")
        figures.append(
            (
                "training.svg",
                "Training",
                "By step; where points are pale, the line is their running mean.",
            )
        )
    return figures


def _page(report: Report, figures: list[tuple[str, str, str]]) -> str:
    import jinja2
    import markupsafe

    def shown(value: Any) -> Any:
        # Every value that the template prints passes here: none can be forgotten.
        return value if isinstance(value, markupsafe.Markup) else visible(str(value))

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("template.html").render(
        report=report,
        lines=gather(report.rows),
        figures=figures,
        config=_sections(report.config),
        environment=list(_flat(report.environment)),
        samples=[_sample(sample) for sample in report.samples],
        roles=_ROLES,
    )


def _sample(sample: SampleTrajectory) -> dict[str, Any]:
    segments = []
    for role, text, log_prob in sample.segments:
        value = number(log_prob)
        # An unknown role keeps its name but never becomes a class of the page.
        css = role if role in _ROLES else "other"
        text = text if text.strip() else repr(text)[1:-1]  # a bare newline would look like nothing
        segments.append((role, css, text, None if value is None else decimals(value, 2)))
    css = sample.verdict if sample.verdict in ("correct", "wrong") else "unknown"
    sign = {"correct": "\u2713", "wrong": "\u2717"}.get(css, "?")
    return {
        "sample": sample,
        "css": css,
        "sign": sign,
        "heading": one_line(sample.problem),
        "segments": segments,
    }


def _sections(config: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Top-level sections with their fields under dotted names; bare fields come first."""
    bare = {key: value for key, value in config.items() if not isinstance(value, Mapping)}
    nested = [(str(k), list(_flat(v))) for k, v in config.items() if isinstance(v, Mapping)]
    return [("", list(_flat(bare))), *nested] if bare else nested


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{name}.")
        else:
            yield name, value if isinstance(value, str) else repr(value)


def _check_replaceable(out: Path) -> None:
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise ReportError(f"out_dir: {out} is a file or a link; expected a folder or a new path")
    if out.is_dir() and any(out.iterdir()):
        index = out / "index.html"
        if not index.is_file() or _MARK not in index.read_text("utf-8", errors="replace")[:2000]:
            raise ReportError(
                f"out_dir: {out} holds other things than a report; expected an earlier report, "
                "an empty folder or a new path"
            )


def _sync(folder: Path) -> None:
    for path in [*folder.iterdir(), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _swap(partial: Path, out: Path) -> None:
    # rename(2) does not replace a folder that holds files, so the old one steps aside first.
    aside = out.with_name(f".{out.name}.replaced")
    shutil.rmtree(aside, ignore_errors=True)
    if out.exists():
        os.rename(out, aside)
    os.rename(partial, out)
    shutil.rmtree(aside, ignore_errors=True)
