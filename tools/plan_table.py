"""Plans as the tables of docs/scaling.md: `python tools/plan.py --table docs/scaling.jsonl`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from plan_chips import CHIPS, GIB, Chip
from plan_cost import EFFICIENCY

Plan = dict[str, Any]


def read(paths: Sequence[Path]) -> list[Plan]:
    """The plans of files, the newest of those that are alike."""
    found: dict[str, Plan] = {}
    for path in paths:
        for line in path.read_text().splitlines():
            p = json.loads(line)
            names = ("config", "label", "mesh", "rows", "row_length", "pairs", "optimiser", "lora")
            same = [p[name] for name in names] + [p["naive"], p["dtypes"], p["note"]]
            key = json.dumps([*same, p.get("method", "mdpo"), p.get("reference", "stored")])
            found.pop(key, None)
            found[key] = p
    return list(found.values())


def table(paths: Sequence[Path]) -> str:
    """Markdown of all tables."""
    plans = read(paths)
    plain = [p for p in plans if not p["note"]]
    weak = [p for p in plans if p["note"] in ("", "weak") and _grows(p)]
    two = [p for p in plans if p["note"] == "slices"]
    longer = [p for p in plans if p["note"] == "rows"]
    parts = [
        ("Does it fit, and how fast", fits(plain)),
        ("With the recipes' longer rows", fits(longer)),
        ("What each chip sends", sends(plain)),
        ("Growing the mesh", grows(weak)),
        ("Two slices", [*fits(two), "", *sends(two)]),
        ("Against a plain trainer's step", against([p for p in plans if p["note"] == "memory"])),
        ("The sampler beside it", samples(plain)),
        ("Chips", chips()),
    ]  # fmt: skip
    shown = [(title, lines) for title, lines in parts if len(lines) > 2 and lines[2]]
    return "\n".join(f"## {title}\n\n" + "\n".join(lines) + "\n" for title, lines in shown)


def _rows(head: str, rows: Iterable[Sequence[str]]) -> list[str]:
    names = head.split(" | ")
    return [
        f"| {head} |", "|" + "---|" * len(names), *("| " + " | ".join(row) + " |" for row in rows)
    ]  # fmt: skip


def _gib(size: float) -> str:
    return f"{size / GIB:.1f}"


def _recipe(p: Plan) -> str:
    """CodeGemma's shape, and so its plan, is Gemma-7B's."""
    return "gemma7b, codegemma7b" if p["config"] == "gemma7b" else p["config"]


def _trained(p: Plan) -> str:
    return f"LoRA {p['lora']}" if p["lora"] else p["optimiser"]


def _mesh(p: Plan) -> str:
    return " x ".join(map(str, p["mesh"]))


def _order(p: Plan) -> tuple:
    return (p["config"], list(CHIPS).index(p["topology"].split(":")[0]), p["chips"], _trained(p))


def fits(plans: Sequence[Plan]) -> list[str]:
    """Bytes and the prediction, a row a plan."""
    head = (
        "recipe | trained | on | chips | mesh d x f x t | step | arguments | temporaries | peak | "
        "HBM | fits | step, s | bound by | MFU"
    )
    rows = []
    for p in sorted(plans, key=_order):
        b, s = p["bytes"], p["seconds"]
        room = b["hbm"] - b["peak"]
        verdict = f"yes, {_gib(room)} left" if p["fits"] else f"**no**, over by {_gib(-room)}"
        refused = "refused" in b
        parts = ("-", "-") if refused else (_gib(b["arguments"]), _gib(b["temporaries"]))
        speed = (f"{s['step']:.1f}", s["bound"], f"{p['mfu']:.0%}")
        rows.append(
            (_recipe(p), _trained(p), p["label"], str(p["chips"]), _mesh(p),
             f"{p['micros']} x {p['rows']} x {p['row_length']}", *parts, _gib(b["peak"]),
             _gib(b["hbm"]), verdict, *(speed if p["fits"] else ("-", "-", "-")))
        )  # fmt: skip
    return _rows(head, rows)


def sends(plans: Sequence[Plan]) -> list[str]:
    """Collectives of a step, a row a plan of several chips."""
    head = "recipe | on | mesh d x f x t | GB sent a chip a step | by kind: times, GB"
    rows = []
    for p in sorted(plans, key=_order):
        found = sorted(p["collectives"].items(), key=lambda item: -item[1]["sent"])
        if not found:
            continue
        total = sum(t["sent"] for _, t in found)
        kinds = ", ".join(f"{kind} {t['count']} x, {t['sent'] / 1e9:.1f}" for kind, t in found)
        rows.append((_recipe(p), p["label"], _mesh(p), f"{total / 1e9:.1f}", kinds))
    return _rows(head, rows)


def _grows(p: Plan) -> bool:
    return p["config"] == "gemma7b" and not p["lora"] and p["chips"] > 1 and bool(p["collectives"])


def grows(plans: Sequence[Plan]) -> list[str]:
    """Per chip and micro-batch, as chips are added.

    What is sent is mostly weights and their gradients, whatever the tokens: so there is a number of
    tokens a chip below which sending takes longer than the products.  v6e has v5e's grids: what
    its rows of the table send is v5e's program's.
    """
    head = (
        "on | chips | mesh d x f x t | tokens a chip | GB sent | s computing | s sending | sending is "
        "slower below, tokens a chip | a step of 131,072 tokens in one micro-batch: up to, chips | from"
    )
    order = sorted(plans, key=lambda p: (p["label"].split("-")[0], p["chips"]))
    rows = [_growth(p, CHIPS[p["topology"].split(":")[0]], "compiled") for p in order]
    rows += [
        _growth({**p, "label": p["label"].replace("v5e", "v6e")}, CHIPS["v6e"], "v5e's program")
        for p in order
        if p["topology"].startswith("v5e")
    ]
    return _rows(head, rows)


def _growth(p: Plan, chip: Chip, source: str) -> list[str]:
    own = p["rows"] * p["row_length"] / p["chips"]
    sent = sum(t["sent"] for t in p["collectives"].values()) / p["micros"]
    computing = p["flops"]["executed"] / p["chips"] / p["micros"] / chip.flops
    least = own * sent / chip.ici / computing
    return [
        p["label"], str(p["chips"]), _mesh(p), f"{own:.0f}", f"{sent / 1e9:.1f}", f"{computing:.2f}",
        f"{sent / chip.ici:.2f}", f"{least:.0f}", f"{131072 / least:.0f}", source,
    ]  # fmt: skip


def against(plans: Sequence[Plan]) -> list[str]:
    """Our step's bytes beside those of a plain one, same model and rows."""
    ours, plain = (
        {(p["model"], p["label"]): p for p in plans if bool(p["naive"]) is which}
        for which in (False, True)
    )
    head = "model | compiled for | rows | ours, GiB | plain, GiB | ours / plain"
    rows = []
    for name in sorted(ours.keys() & plain.keys()):
        a, b = ours[name]["bytes"]["peak"], plain[name]["bytes"]["peak"]
        size = f"{ours[name]['rows']} x {ours[name]['row_length']}"
        rows.append((*name, size, _gib(a), _gib(b), f"{a / b:.2f}"))
    return _rows(head, rows)


def samples(plans: Sequence[Plan]) -> list[str]:
    """What decoding needs, by formula, a row a recipe and chip."""
    head = "recipe | chip | a slot's cache, GiB | rollout.tensor: weights, GiB; slots a process"
    rows = {}
    for p in sorted(plans, key=_order):
        a, kind = p["sampler"], p["topology"].split(":")[0]
        options = [
            f"{tensor}: {_gib(o['weights'])}; {o['slots']}" for tensor, o in a["tensor"].items()
        ]
        name = f"{kind}, {a['chips']} a process"
        rows[p["config"], name] = (
            _recipe(p), name, f"{a['slot'] / GIB:.2f}", ", ".join(options)
        )  # fmt: skip
    return _rows(head, rows.values())


def chips() -> list[str]:
    """The figures that seconds are computed from."""
    head = (
        "chip | bf16 TFLOP/s | HBM, GiB | HBM, GB/s | one ring, both ways, GB/s | network, GB/s | "
        "from"
    )
    rows = [
        (c.name, f"{c.flops / 1e12:.0f}", f"{c.hbm / GIB:.2f}", f"{c.hbm_rate / 1e9:.0f}",
         f"{c.ici / 1e9:.0f}", f"{c.dcn / 1e9:g}", c.source)
        for c in CHIPS.values() if c.name != "cpu"
    ]  # fmt: skip
    return [
        *_rows(head, rows), "",
        f"Of the slowest of a step's resources {EFFICIENCY:.0%} of the published rate is reached.",
    ]  # fmt: skip
