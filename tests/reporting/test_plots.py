import subprocess
import sys

import pytest

from mdpo_jax.reporting.plots import accuracy_plot, pass_at_k_plot, training_plot


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_each_plot_is_written_by_suffix(tmp_path, rows, curves, suffix):
    begin = b"<?xml" if suffix == "svg" else b"\x89PNG"
    path = tmp_path / f"plot.{suffix}"
    series = {"SFT": {1: 0.5, 8: 0.8}, "M-DPO $x_": {1: 0.6, 4: None, 8: 0.81}}
    for draw, data in ((accuracy_plot, rows), (training_plot, curves), (pass_at_k_plot, series)):
        draw(data, path)
        assert path.read_bytes().startswith(begin)
        path.unlink()
    assert list(tmp_path.iterdir()) == []


def test_the_same_data_give_the_same_bytes(tmp_path, rows):
    accuracy_plot(rows, tmp_path / "a.svg")
    accuracy_plot(rows, tmp_path / "b.svg")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [{"stage": "sft", "split": "dev", "decoding": "greedy", "accuracy": 0.5}],
        [{"stage": "mdpo", "iteration": 1, "decoding": "sampled", "accuracy": None}],
        [{"stage": "own", "iteration": 2, "accuracy": float("nan"), "low": "x"}],
    ],
)
def test_accuracy_plot_copes_with_few_points(tmp_path, rows):
    accuracy_plot(rows, tmp_path / "a.svg")
    assert (tmp_path / "a.svg").stat().st_size > 1000


@pytest.mark.parametrize(
    "curves",
    [{}, {"a": []}, {"a": [{"loss": None}, {"x": 1}]}, {"a": [{"step": 1, "loss": 0.5}], "b": []}],
)
def test_training_plot_copes_with_missing_fields(tmp_path, curves):
    training_plot(curves, tmp_path / "a.svg")
    assert (tmp_path / "a.svg").stat().st_size > 1000


@pytest.mark.parametrize("series", [{}, {"a": {}}, {"a": {1: None}, "b": {4: 0.5}}])
def test_pass_at_k_plot_copes_with_few_points(tmp_path, series):
    pass_at_k_plot(series, tmp_path / "a.svg")
    assert (tmp_path / "a.svg").stat().st_size > 1000


def test_another_suffix_is_named(tmp_path, rows):
    with pytest.raises(ValueError, match=r"'plot\.gif'; expected a name that ends in \.svg or"):
        accuracy_plot(rows, tmp_path / "plot.gif")


def test_importing_the_room_loads_no_slow_library():
    code = (
        "import sys, mdpo_jax.reporting.plots, mdpo_jax.reporting.site.build\n"
        "import mdpo_jax.reporting.console, mdpo_jax.reporting.metrics, mdpo_jax.data.problems\n"
        "slow = {'matplotlib', 'jax', 'jinja2', 'sympy'} & set(sys.modules)\n"
        "assert not slow, slow\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
