import html.parser
import re

import pytest

from mdpo_jax.reporting.site.build import (
    Report,
    ReportError,
    SampleTrajectory,
    build_report,
)
from mdpo_jax.reporting.text import one_line, visible

HOSTILE = "<script>alert(1)</script>&lt;<start_of_turn>\x00\x1b[31m\u202e\ud800{{ 7*7 }}\r\n</pre>"
SHOWN = (
    "<script>alert(1)</script>&lt;<start_of_turn>\\x00\\x1b[31m\\u202e\\ud800{{ 7*7 }}\\x0d\n</pre>"
)


class _Page(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.texts = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.texts.append(data)


def _sample(text="\\boxed{4}", **fields):
    values = {"problem": "2+2?", "gold": "4", "verdict": "correct", "rule": "exact", "stage": "sft"}
    segments = [("prompt", "2+2?", None), ("action", text, -0.25), ("template", "\n", None)]
    return SampleTrajectory(**(values | {"segments": segments} | fields))


def test_a_full_report_stands_alone(tmp_path, rows, curves):
    report = Report(
        title="Arithmetic",
        config={"seed": 1, "training": {"eta": 0.1, "adam": {"b1": 0.9}}},
        rows=rows,
        curves=curves,
        pass_at_k={"SFT": {1: 0.5, 8: 0.8}},
        samples=[_sample(), _sample(verdict="wrong")],
        notes=["a note"],
        environment={"jax": "0.10"},
    )
    index = build_report(tmp_path / "report", report)
    assert index == tmp_path / "report" / "index.html"
    assert sorted(p.name for p in index.parent.iterdir()) == [
        "accuracy.svg",
        "index.html",
        "pass_at_k.svg",
        "training.svg",
    ]
    assert [p.name for p in tmp_path.iterdir()] == ["report"]
    text = index.read_text()
    for expected in ("76.0 [73.9, 78.1]", "adam.b1", "a note", "mean log-prob -0.25", "M-DPO 2"):
        assert expected in text
    assert not re.search(r"https?:|//|url\(|@import", text)


def test_model_text_shows_as_text_wherever_it_stands(tmp_path):
    sample = _sample(
        problem=HOSTILE,
        gold=HOSTILE,
        verdict=HOSTILE,
        rule=HOSTILE,
        stage=HOSTILE,
        segments=[("action", HOSTILE, None), ('x" onload="alert(1)', HOSTILE, float("nan"))],
    )
    report = Report(
        title=HOSTILE,
        config={HOSTILE: HOSTILE, "nested": {HOSTILE: [HOSTILE]}},
        rows=[{"split": HOSTILE, "stage": HOSTILE, "iteration": 1, "accuracy": 0.5}],
        samples=[sample],
        notes=[HOSTILE],
        environment={HOSTILE: HOSTILE},
    )
    text = build_report(tmp_path / "report", report).read_text("utf-8")
    assert "<script" not in text
    assert "{{ 7*7 }}" in text
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", text)
    page = _Page(text)
    assert not set(page.tags) & {"script", "iframe", "object", "start_of_turn"}
    assert page.tags.count("pre") == 2
    assert "onload" not in dict(page.attributes)
    assert sum(SHOWN in data for data in page.texts) >= 8


def test_visible_keeps_text_and_marks_what_hides():
    assert visible("a\tb\né ∑ 数") == "a\tb\né ∑ 数"
    assert visible("\x7f\u200b\u2066\ufeff") == "\\x7f\\u200b\\u2066\\ufeff"
    assert visible("x" * 20_001).endswith("x\n[1 more characters]")
    assert one_line(" a\n\tb\x1b ") == "a b\\x1b"
    assert one_line("x" * 111) == "x" * 107 + "..."


def test_an_empty_report_has_a_heading_and_no_plot(tmp_path):
    index = build_report(tmp_path / "report", Report(title="Nothing yet"))
    assert "<h1>Nothing yet</h1>" in index.read_text()
    assert [p.name for p in index.parent.iterdir()] == ["index.html"]


def test_an_earlier_report_is_replaced_whole(tmp_path, rows):
    out = tmp_path / "report"
    build_report(out, Report(title="first", rows=rows))
    (tmp_path / "report.partial").mkdir()
    (tmp_path / "report.partial" / "left by a kill").touch()
    build_report(out, Report(title="second"))
    assert "second" in (out / "index.html").read_text()
    assert [p.name for p in out.iterdir()] == ["index.html"]
    assert [p.name for p in tmp_path.iterdir()] == ["report"]


def test_a_report_that_fails_leaves_the_earlier_one(tmp_path):
    out = tmp_path / "report"
    build_report(out, Report(title="first"))
    with pytest.raises(AttributeError):
        build_report(out, Report(title="second", samples=[None]))
    assert "first" in (out / "index.html").read_text()


def test_what_is_no_report_is_never_removed(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "index.html").write_text("mine")
    for path in (tmp_path / "file", tmp_path):
        with pytest.raises(ReportError, match=r"out_dir: .*expected"):
            build_report(path, Report(title="x"))
    assert (tmp_path / "file").read_text() == "mine"
