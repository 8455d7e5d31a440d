"""A training stage that is interrupted goes on to the same bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import learnt, model_config, params, trajectories

from mdpo_jax.data.batches import Shuffled
from mdpo_jax.data.packing import Layout, item
from mdpo_jax.model import lora, sharding
from mdpo_jax.model.lora import Lora
from mdpo_jax.pipeline.progress import Progress, finished
from mdpo_jax.reporting.metrics import MetricsWriter
from mdpo_jax.training.losses import Forward, Objective
from mdpo_jax.training.state import Optimiser, TrainState
from mdpo_jax.training.step import Fixed
from mdpo_jax.training.trainer import Plan, Trainer, copy_params
from mdpo_jax.training.value import ValueTerm

PLAN = Plan(3, 7, 1e-3, 2, 0.1, 0)
LAYOUT = Layout(4, 224, 8)


class Killed(BaseException):
    pass


def fit(folder, trainer, objective, start, fixed, every=2, killed_at=None):
    """Trains the stage in a folder; returns its parameters, steps reported, and where it began."""
    groups = [[item(t, "sampled")._replace(correct=t.sample % 2 == 0)] for t in trajectories()]
    saves = Progress(folder, every, PLAN.steps)
    began, kept = saves.steps, {}
    saves.begin()
    with MetricsWriter(folder / "metrics.jsonl") as metrics:

        def report(step, values):
            metrics.write(step=step, **values)
            if step == killed_at:
                raise Killed

        final = trainer.fit(
            start, Shuffled(groups, PLAN.batch, 0), PLAN, objective, fixed=fixed, report=report,
            keep=lambda step, params: kept.update({step: jax.device_get(params())}), saves=saves,
        )  # fmt: skip
    return final, kept, began


def full(mesh=None, **options):
    start = params()
    if mesh is not None:
        start = jax.device_put(start, sharding.param_shardings(model_config(), mesh))
    trainer = Trainer(model_config(), Forward(), Optimiser(**options), LAYOUT, mesh)
    return trainer, lambda: copy_params(start), Fixed()


def adapter():
    small, optimiser = Lora(2, 4.0, ("all-linear",)), Optimiser(name="adamw_bf16_moments", ema=0.9)
    trainer = Trainer(model_config(), Forward(), optimiser, LAYOUT, adapter=small)
    return trainer, lambda: lora.init(model_config(), small, jax.random.key(0)), Fixed(params())


CASES = {
    "adapter, average, moments rounded at random": adapter,
    "every weight": lambda: full(name="adamw_bf16_moments", ema=0.9),
    "factored moments": lambda: full(name="adafactor"),
    "mesh, value head": lambda: full(sharding.make_mesh(2, 2, 1)),
}


FIRST, *OTHERS = CASES


@pytest.mark.parametrize(
    "case", [FIRST, *(pytest.param(case, marks=pytest.mark.slow) for case in OTHERS)]
)
def test_a_stage_killed_twice_ends_in_the_same_bits(case, tmp_path):
    trainer, start, fixed = CASES[case]()
    value = ValueTerm(1.0, 0.1, 10.0) if "value" in case else None
    objective = Objective("pairs" if value else "likelihood", value=value)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir(), cut.mkdir()
    expected, kept, began = fit(whole, trainer, objective, start(), fixed, every=0)
    assert began == 0
    assert sorted(p.name for p in whole.iterdir()) == ["metrics.jsonl"]
    # Once between two saves, after more rows, and once more before the next.
    for killed_at, kept_at in ((5, 4), (4, 4)):
        with pytest.raises(Killed):
            fit(cut, trainer, objective, start(), fixed, killed_at=killed_at)
        assert Progress(cut, 2, PLAN.steps).steps == kept_at
        assert [p.name for p in cut.glob("progress-*")] == [f"progress-{kept_at}"]
    final, more, began = fit(cut, trainer, objective, start(), fixed)
    assert began == 4
    for a, b in zip(*map(jax.tree.leaves, (final, expected)), strict=True):
        np.testing.assert_array_equal(a, b)
    for step, values in more.items():
        for a, b in zip(*map(jax.tree.leaves, (values, kept[step])), strict=True):
            np.testing.assert_array_equal(a, b)
    assert list(more) == [5, 6, 7]
    rows = [learnt(d / "metrics.jsonl") for d in (whole, cut)]
    assert [row["step"] for row in rows[1]] == list(range(7))
    assert rows[0] == rows[1]
    finished(cut)
    assert [p.name for p in cut.iterdir()] == ["metrics.jsonl"]


def test_what_is_not_whole_is_not_gone_on_from(tmp_path):
    state = TrainState({"a": jnp.arange(3.0)}, (), jnp.int32(4))
    rows = b'{"step": 0}\n{"step": 1}\n'
    (tmp_path / "metrics.jsonl").write_bytes(rows)
    kept = Progress(tmp_path, 2, 8)
    assert kept.steps == 0
    for step in (2, 3, 4, 8):  # every second, and not the last
        kept.after(step, state, {"next_index": step})
    again = Progress(tmp_path, 2, 8)
    assert again.steps == 4
    restored, place = again.restore(state)
    assert restored.params["a"].tolist() == [0, 1, 2]
    assert place == {"next_index": 4}
    (tmp_path / "metrics.jsonl").write_bytes(rows[:-1])  # rows that were never synced
    assert Progress(tmp_path, 2, 8).steps == 0
    (tmp_path / "metrics.jsonl").write_bytes(rows)
    (tmp_path / "progress-4").rename(tmp_path / "elsewhere")
    Progress(tmp_path, 2, 8).begin()
    # Neither when a later try has written as many rows, and what the note named is there again.
    (tmp_path / "elsewhere").rename(tmp_path / "progress-4")
    (tmp_path / "metrics.jsonl").write_bytes(rows)
    assert Progress(tmp_path, 2, 8).steps == 0
