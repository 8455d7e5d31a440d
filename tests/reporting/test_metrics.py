import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mdpo_jax.reporting.metrics import (
    MetricsError,
    MetricsWriter,
    bootstrap_interval,
    paired_interval,
    pass_at_k,
    pass_at_k_by_problem,
    read_metrics,
    share_interval,
    wilson_interval,
)


def test_what_is_written_is_read_back(tmp_path):
    path = tmp_path / "new" / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        writer.write(step=1, loss=np.float32(0.5), stage="mdpo", done=True, missing=None)
        assert read_metrics(path) == [
            {"step": 1, "loss": 0.5, "stage": "mdpo", "done": True, "missing": None}
        ]
        writer.write(step=np.int64(2), norms=np.array([1.0, 2.0]), rewards={"margin": 0.25})
    with MetricsWriter(path) as writer:
        writer.write(step=3)
    rows = read_metrics(path)
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert rows[1]["norms"] == [1.0, 2.0]
    assert rows[1]["rewards"] == {"margin": 0.25}


def test_non_finite_becomes_null_and_is_named(tmp_path):
    with MetricsWriter(tmp_path / "m.jsonl") as writer:
        writer.write(a=math.nan, b=np.float32(np.inf), c=1.0, d={"e": [-math.inf, 2.0]})
    (line,) = (tmp_path / "m.jsonl").read_text().splitlines()
    row = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert row == {
        "a": None,
        "b": None,
        "c": 1.0,
        "d": {"e": [None, 2.0]},
        "non_finite": ["a", "b", "d.e.0"],
    }


def test_what_cannot_be_written_is_named_and_leaves_no_line(tmp_path):
    with MetricsWriter(tmp_path / "m.jsonl") as writer:
        with pytest.raises(MetricsError, match=r"loss\.x: .*object.*expected a number"):
            writer.write(loss={"x": object()})
        with pytest.raises(MetricsError, match="non_finite"):
            writer.write(non_finite=[])
    assert (tmp_path / "m.jsonl").read_text() == ""


@pytest.mark.parametrize("torn", ['{"step": 2, "lo', '{"step": 2', "\x00\x00\x00", "7\n"])
def test_a_torn_last_line_is_left_out_and_then_cut_off(tmp_path, torn):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n' + torn)
    assert read_metrics(path) == [{"step": 1}]
    with MetricsWriter(path) as writer:
        writer.write(step=2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_a_whole_last_line_without_its_newline_is_kept(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}')
    with MetricsWriter(path) as writer:
        writer.write(step=3)
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3]


@pytest.mark.parametrize("size", [65_500, 65_536, 200_000])
def test_a_last_line_longer_than_what_is_read_at_once(tmp_path, size):
    path = tmp_path / "m.jsonl"
    whole = json.dumps({"text": "x" * size})
    path.write_text(f'{{"a": 1}}\n{whole}')
    MetricsWriter(path).close()
    assert path.read_text() == f'{{"a": 1}}\n{whole}\n'
    path.write_text(f'{{"a": 1}}\n{whole[:-3]}')
    MetricsWriter(path).close()
    assert path.read_text() == '{"a": 1}\n'
    path.write_text(whole[:-3])
    MetricsWriter(path).close()
    assert path.read_text() == ""


def test_a_broken_line_inside_is_an_error_with_its_place(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(MetricsError, match=r"m\.jsonl:2: "):
        read_metrics(path)


def test_every_write_that_returned_survives_sigkill(tmp_path):
    path, told = tmp_path / "m.jsonl", tmp_path / "told"
    code = (
        "import sys; from mdpo_jax.reporting.metrics import MetricsWriter\n"
        "writer, told = MetricsWriter(sys.argv[1]), open(sys.argv[2], 'wb', buffering=0)\n"
        "i = 0\n"
        "while True:\n"
        "    writer.write(step=i, text='x' * 500); told.write(b'.'); i += 1\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, path, told])
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not (told.exists() and told.stat().st_size > 50):
            time.sleep(0.01)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    steps = [row["step"] for row in read_metrics(path)]
    assert steps == list(range(len(steps)))
    assert len(steps) >= told.stat().st_size > 50


def test_pass_at_k_is_the_share_of_subsets_that_hold_a_right_one():
    n = 6
    for right in range(n + 1):
        for k in range(1, n + 1):
            subsets = list(itertools.combinations(range(n), k))
            share = sum(any(i < right for i in subset) for subset in subsets) / len(subsets)
            assert pass_at_k(np.array([right]), n, k) == pytest.approx(share, abs=1e-12)


@given(st.integers(1, 400), st.data())
@settings(max_examples=50, deadline=None)
def test_pass_at_k_is_stable_and_between_0_and_1(n, data):
    k = data.draw(st.integers(1, n))
    right = data.draw(st.integers(0, n))
    expected = 1 - math.comb(n - right, k) / math.comb(n, k)
    value = pass_at_k_by_problem(np.array([right]), n, k)[0]
    assert 0 <= value <= 1
    assert value == pytest.approx(expected, abs=1e-10)


def test_pass_at_k_is_a_mean_over_problems():
    correct = np.array([0, 8, 4])
    assert pass_at_k(correct, 8, 1) == pytest.approx(0.5)
    assert pass_at_k_by_problem(correct, 8, 8).tolist() == [0.0, 1.0, 1.0]
    assert math.isnan(pass_at_k(np.array([], dtype=int), 8, 1))


@pytest.mark.parametrize(
    ("correct", "n", "k", "named"),
    [([1], 4, 5, "k: 5"), ([1], 4, 0, "k: 0"), ([5], 4, 1, "0 to n = 4"), ([0.5], 4, 1, "integ")],
)
def test_pass_at_k_refuses_what_makes_no_sense(correct, n, k, named):
    with pytest.raises(MetricsError, match=named):
        pass_at_k(np.array(correct), n, k)


def test_wilson_interval_holds_the_shares_that_the_score_test_does_not_reject():
    for right, n in ((8, 10), (3, 7), (500, 1319)):
        for bound in wilson_interval(right, n, z=1.5):
            distance = abs(right / n - bound) / math.sqrt(bound * (1 - bound) / n)
            assert distance == pytest.approx(1.5, rel=1e-9)


def test_wilson_interval_at_the_ends():
    # With no success the upper bound is z^2 / (n + z^2).
    assert wilson_interval(0, 10, z=2.0) == pytest.approx((0.0, 4 / 14))
    assert wilson_interval(10, 10, z=2.0) == pytest.approx((10 / 14, 1.0))
    assert wilson_interval(0, 0) == (0.0, 1.0)
    with pytest.raises(MetricsError, match="successes: 3 of n = 2"):
        wilson_interval(3, 2)


def test_bootstrap_interval_is_that_of_the_mean():
    values = np.random.default_rng(0).random(400)
    low, high = bootstrap_interval(values, seed=1)
    error = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - error, abs=0.003)
    assert high == pytest.approx(values.mean() + error, abs=0.003)
    assert bootstrap_interval(values, seed=1) == (low, high)
    assert bootstrap_interval(values, seed=2) != (low, high)
    assert bootstrap_interval(np.array([0.5]), seed=0) == (0.5, 0.5)


def test_the_bootstrap_is_the_same_whatever_the_block(monkeypatch):
    values = np.random.default_rng(0).random(50)
    whole = bootstrap_interval(values, seed=1, samples=30)
    monkeypatch.setattr("mdpo_jax.reporting.metrics._RESAMPLED_AT_ONCE", 200)
    assert bootstrap_interval(values, seed=1, samples=30) == whole


@pytest.mark.parametrize("values", [[], [[1.0]], [math.nan, 1.0]])
def test_bootstrap_refuses_what_has_no_mean(values):
    with pytest.raises(MetricsError, match="values"):
        bootstrap_interval(np.array(values), seed=0)


def test_a_paired_interval_is_narrower_than_the_spread_of_problems():
    rng = np.random.default_rng(0)
    hardness = rng.random(300)
    result = paired_interval(hardness + 0.02 + 0.01 * rng.standard_normal(300), hardness, seed=0)
    assert result.low < result.difference < result.high
    assert result.low > 0.015
    assert result.high < 0.025
    with pytest.raises(MetricsError, match=r"\(3,\) and \(2,\)"):
        paired_interval(np.ones(3), np.ones(2), seed=0)


def test_equal_problems_are_no_certainty():
    low, high = share_interval(np.array([2.0]), np.array([4.0]), 0)
    assert low < 0.2
    assert high > 0.8
    assert paired_interval(np.ones(3), np.zeros(3), 0) == (
        1.0,
        pytest.approx(0.4385, abs=1e-3),
        1.0,
    )
    difference, low, high = paired_interval(np.ones(8), np.ones(8), 0)
    assert (difference, -low) == (0.0, high)
    assert 0.2 < high < 0.4
