"""The model card of an export: README.md with the front matter that the hub reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mdpo_jax.reporting.results import Row, gather
from mdpo_jax.reporting.text import one_line

CITATION = """\
@article{xiong2024building,
  title   = {Building Math Agents with Multi-Turn Iterative Preference Learning},
  author  = {Xiong, Wei and Shi, Chengshuai and Shen, Jiaming and Rosenberg, Aviv and Qin, Zhen
             and Calandriello, Daniele and Khalman, Misha and Joshi, Rishabh and Piot, Bilal
             and Saleh, Mohammad and Jin, Chi and Zhang, Tong and Liu, Tianqi},
  journal = {arXiv preprint arXiv:2409.02392},
  year    = {2024}
}
"""
TAGS = ("mdpo_jax", "math", "tool-use", "multi-turn", "preference-learning")
# What goes along with weights wherever they go.
LEGAL = ("LICEN[CS]E*", "NOTICE*", "USE_POLICY*", "COPYING*")
# A phrase of the first kilobytes of a licence -> the hub's name for it.
_LICENCES = {
    "apache license": "apache-2.0",
    "mit license": "mit",
    "gemma terms of use": "gemma",
    "llama 3.1 community license": "llama3.1",
    "meta llama 3 community license": "llama3",
}


@dataclasses.dataclass(frozen=True)
class Card:
    """What a card says.

    source: the base's folder, whose README.md and LICENSE tell its licence.  base: its hub id, if it
    has one.  recipe: (setting, value).  rows: of results.json.  command: that makes the model anew.
    """

    title: str
    summary: str
    source: Path | None = None
    base: str | None = None
    recipe: Sequence[tuple[str, str]] = ()
    rows: Iterable[Row] = ()
    command: str | None = None


def model_card(card: Card) -> str:
    """The text of README.md."""
    parts = [f"---\n{_front_matter(card)}\n---\n", f"# {card.title}\n", card.summary + "\n"]
    table = _figures(card.rows)
    if table:
        caption = "Accuracy in percent, with 95 % intervals over problems.\n"
        parts += ["## Results\n", caption, table]
    if card.recipe:
        rows = [f"| `{name}` | {_cell(value)} |" for name, value in card.recipe]
        parts += ["## Recipe\n", "\n".join(["| setting | value |", "|---|---|", *rows]) + "\n"]
    if card.command:
        parts += ["## Command\n", f"```\n{card.command}\n```\n"]
    parts += ["## Licence\n", _licence_note(card)]
    if card.recipe:  # a model that only passed through is not the paper's
        parts += ["## Citation\n", f"```bibtex\n{CITATION}```\n"]
    return "\n".join(parts)


def legal_files(folder: Path | None) -> dict[str, Path]:
    """Licence, notice and use policy of a model's folder, by name."""
    found = [p for pattern in LEGAL for p in folder.glob(pattern)] if folder else []
    return {path.name: path for path in sorted(found) if path.is_file()}


def base_licence(folder: Path | None) -> dict[str, Any]:
    """`license` and what belongs to it, from README.md's front matter or a known LICENSE text."""
    if folder is None:
        return {}
    stated = _stated(folder / "README.md")
    names = ("license", "license_name", "license_link")
    if stated.get("license"):
        return {name: stated[name] for name in names if stated.get(name)}
    for path in legal_files(folder).values():
        text = path.read_text(encoding="utf-8", errors="replace")[:4000].lower()
        text = " ".join(text.split())
        for phrase, name in _LICENCES.items():
            if phrase in text:
                return {"license": name}
    return {}


def _stated(readme: Path) -> dict[str, Any]:
    import huggingface_hub

    try:
        return huggingface_hub.metadata_load(readme) or {} if readme.is_file() else {}
    except Exception:  # a card of any kind must not stop an export
        return {}


def _front_matter(card: Card) -> str:
    import huggingface_hub

    return huggingface_hub.ModelCardData(
        base_model=card.base,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=list(TAGS) if card.recipe else None,
        **base_licence(card.source),
    ).to_yaml()


def _licence_note(card: Card) -> str:
    licence = base_licence(card.source).get("license")
    files = ", ".join(legal_files(card.source))
    if card.source is None:
        return "The weights were made from scratch; nobody has given them a licence yet.\n"
    base = f"`{card.base}`" if card.base else "the base model"
    note = f"Derived from {base}, whose licence holds for these weights: "
    note += f"`{licence}`." if licence else "its folder did not say which it is; look it up."
    return f"{note} Its files {files} are included.\n" if files else f"{note}\n"


def _figures(rows: Iterable[Row]) -> str:
    lines = [
        f"| {line.split} | {line.policy} | {line.cells['greedy']} | {line.cells['sampled']} |"
        for line in gather(rows)
    ]
    head = ["| split | policy | greedy | T = 1 |", "|---|---|---|---|"]
    return "\n".join([*head, *lines]) + "\n" if lines else ""


def _cell(value: str) -> str:
    return f"`{one_line(value)}`".replace("|", "\\|")
