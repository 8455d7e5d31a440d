"""An evaluation's results as tables of text: for the terminal and for the report alike."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mdpo_jax.reporting.results import MISSING, decimals, percent
from mdpo_jax.reporting.scores import TOO_LONG
from mdpo_jax.reporting.text import one_line

_CAPTION = "percent [95 % interval over problems]"


@dataclasses.dataclass(frozen=True)
class Sheet:
    """A table: `texts` leading columns are aligned left, the others right."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    texts: int = 1


def sheets(results: Mapping[str, Any]) -> Iterator[Sheet]:
    """All tables of an evaluation's results.json, the most asked for first."""
    suites, sampling = results["suites"], results["harness"]["sampling"]
    yield _accuracy(suites, sampling)
    if sampling["samples"]:
        yield _curves(suites, sampling)
    for tag in dict.fromkeys(tag for suite in suites for tag in suite["groups"]):
        yield _group(suites, tag, bool(sampling["samples"]))
    yield _slices(suites)
    yield _shares(suites)
    if results.get("versus"):
        yield _versus(results["versus"])


def figure(value: Mapping[str, Any] | None) -> str:
    """`83.1 [81.0, 85.2]`, in percent."""
    if value is None or value["value"] is None:
        return MISSING
    return f"{percent(value['value'])} [{percent(value['low'])}, {percent(value['high'])}]"


def _accuracy(suites: Sequence[Mapping[str, Any]], sampling: Mapping[str, Any]) -> Sheet:
    largest = max((int(k) for s in suites for k in s.get("pass_at_k", ())), default=0)
    more = [("pass_at_k", "1")] if largest else []
    more += [("maj_at_k", str(largest)), ("pass_at_k", str(largest))] if largest > 1 else []
    rows = []
    for suite in suites:
        cells = [_name(suite), str(suite["problems"]), figure(suite["greedy"])]
        rows.append([*cells, *(figure(suite[field][k]) for field, k in more)])
    titles = [f"{field[:4].strip('_')}@{k}" for field, k in more]
    caption = _CAPTION
    if more:
        n, t = sampling["samples"], sampling["temperature"]
        caption += f"; pass@k and maj@k from {n} samples a problem at T = {t:g}"
    notes = [f"{_name(s)}: {note}" for s in suites for note in _notes(s)]
    caption = "\n".join([caption, *notes])
    return Sheet("Accuracy", ["suite", "problems", "greedy", *titles], rows, caption)


def _notes(suite: Mapping[str, Any]) -> Iterator[str]:
    """What a reader of the accuracy must know."""
    unknown = sum(suite["slices"]["greedy"]["unknown"].values())
    if unknown:
        yield f"{unknown} greedy verdicts are unknown and count as wrong"
    if suite["slices"]["greedy"][TOO_LONG]:
        yield f"{suite['slices']['greedy'][TOO_LONG]} prompts do not fit and count as wrong"
    if suite["quarantined"]:
        yield f"{suite['quarantined']} bad rows of the file are left out"


def _curves(suites: Sequence[Mapping[str, Any]], sampling: Mapping[str, Any]) -> Sheet:
    rows = [
        [_name(s), k, figure(s["pass_at_k"][k]), figure(s["maj_at_k"][k])]
        for s in suites
        for k in s["pass_at_k"]
    ]
    caption = (
        f"of {sampling['samples']} samples; maj@k: ties count as the mean of the answers that tie"
    )
    return Sheet("pass@k and maj@k", ["suite", "k", "pass@k", "maj@k"], rows, caption)


def _group(suites: Sequence[Mapping[str, Any]], tag: str, sampled: bool) -> Sheet:
    rows = []
    for suite in suites:
        for name, of in suite["groups"].get(tag, {}).items():
            cells = [_name(suite), one_line(name, 30), str(of["n"]), figure(of["greedy"])]
            rows.append(cells + ([figure(of["sampled"])] if sampled else []))
    columns = ["suite", tag, "problems", "greedy", *(["pass@1"] if sampled else [])]
    return Sheet(f"By {tag}", columns, rows, _CAPTION, texts=2)


def _decodings(suites: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    for suite in suites:
        for decoding, slices in suite["slices"].items():
            yield _name(suite), decoding, slices


def _slices(suites: Sequence[Mapping[str, Any]]) -> Sheet:
    rows = []
    for suite, decoding, slices in _decodings(suites):
        turns = [(f"{t} turn{'s' if t != '1' else ''}", of) for t, of in slices["turns"].items()]
        named = [(name, of) for name, of in slices["calls"].items() if of["n"]]
        for name, of in [*turns, *named]:
            rows.append([suite, decoding, name, str(of["n"]), figure(of)])
    columns = ["suite", "decoding", "trajectories", "n", "accuracy"]
    caption = f"{_CAPTION}; with and without: of the trajectories that called the tool"
    return Sheet("Accuracy by tool use", columns, rows, caption, texts=3)


def _shares(suites: Sequence[Mapping[str, Any]]) -> Sheet:
    rows = []
    for suite, decoding, slices in _decodings(suites):
        calls = decimals(slices["calls_per_trajectory"], 2)
        rows.append([suite, decoding, "calls a trajectory", str(slices["calls_total"]), calls])
        for status, of in slices["status"].items():
            if slices["calls_total"]:
                rows.append(
                    [suite, decoding, f"calls: {status}", str(of["n"]), percent(of["value"])]
                )
        finishes = slices["finish"] | {"unfinished (both limits)": slices["unfinished"]}
        for name, of in finishes.items():
            count = str(round((of["value"] or 0) * of["n"]))
            rows.append([suite, decoding, f"ended: {name}", count, percent(of["value"])])
        for rule, count in slices["unknown"].items():
            rows.append([suite, decoding, f"unknown verdict: {one_line(rule, 30)}", str(count), ""])
    columns = ["suite", "decoding", "what", "count", "mean or %"]
    caption = "calls by status in % of all calls, ends in % of all trajectories"
    return Sheet("Tool calls and how trajectories end", columns, rows, caption, texts=3)


def _versus(versus: Mapping[str, Any]) -> Sheet:
    rows = []
    for suite, comparisons in versus["suites"].items():
        for row in comparisons:
            low, high = (f"{100 * row[side]:+.1f}" for side in ("low", "high"))
            rows.append(
                [
                    one_line(suite, 16), row["figure"], percent(row["ours"]),
                    percent(row["theirs"]), f"{100 * row['difference']:+.1f} [{low}, {high}]",
                    f"{row['better']} / {row['worse']}",
                ]
            )  # fmt: skip
    lines = [f"against {one_line(versus['directory'], 80)}, paired by problem"]
    if versus["differences"]:
        lines.append(f"NOT COMPARABLE: the harness differs in {len(versus['differences'])} places:")
        lines += [f"  {one_line(line, 94)}" for line in versus["differences"]]
    columns = ["suite", "figure", "here", "there", "difference", "better / worse"]
    return Sheet("Compared", columns, rows, "\n".join(lines), texts=2)


def _name(suite: Mapping[str, Any]) -> str:
    return one_line(suite["name"], 16)
