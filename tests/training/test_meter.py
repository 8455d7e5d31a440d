"""What a training says of its speed: counted by hand, with a device's peak, and as a trace."""

import dataclasses
import gzip
import json

import jax
import numpy as np
import pytest
from support import chat, model_config, params, trajectories

from mdpo_jax.data.packing import Item, Layout, item, pack
from mdpo_jax.model import flops, lora
from mdpo_jax.model.families import LayerKind, ModelConfig
from mdpo_jax.model.lora import Lora
from mdpo_jax.reporting import speed
from mdpo_jax.training import meter
from mdpo_jax.training.losses import Forward, Objective
from mdpo_jax.training.meter import Meter, Trace
from mdpo_jax.training.state import Optimiser
from mdpo_jax.training.trainer import Plan, Trainer, copy_params

STEPS, LIKELIHOOD = 7, Objective("likelihood")
SHAPE = ModelConfig("gemma2", 96, 16, 32, 2, 4, 2, 8)
RATES = {"speed/step_s", "speed/host_s", "speed/tokens_per_s", "speed/slots_per_s"}


def by_hand(config, lengths, scored):
    """(of weights, of attention) of a forward pass, multiply-add by multiply-add."""
    d, f, k = config.hidden_size, config.intermediate_size, config.head_dim
    layer = d * k * (2 * config.num_heads + 2 * config.num_kv_heads) + 3 * d * f
    weights = 2 * layer * config.num_layers * sum(lengths) + 2 * config.vocab_size * d * scored
    windows = [config.kind(i).window or max(lengths) for i in range(config.num_layers)]
    # A token sees half of itself here: n * n / 2 and not n * (n + 1) / 2.
    seen = sum(min(i + 0.5, w) for w in windows for n in lengths for i in range(n))
    return weights, 2 * 2 * k * config.num_heads * seen


def test_flops_are_a_forward_and_a_backward_by_hand():
    lengths, scored = [30, 7, 100], 41
    weights, attention = by_hand(SHAPE, lengths, scored)
    found = flops.step_flops(SHAPE, lengths, scored)
    assert found == 3 * (weights + attention)
    with_reference = flops.step_flops(SHAPE, lengths, scored, reference=True)
    assert with_reference == 4 * (weights + attention)
    adapter = Lora(4, 8.0, ("all-linear",))
    extra = 2 * lora.count(SHAPE, adapter) * sum(lengths)
    trained = flops.step_flops(SHAPE, lengths, scored, adapter=adapter)
    assert trained == 2 * weights + 3 * (attention + extra)


def test_what_is_beyond_a_window_is_not_counted():
    narrow = dataclasses.replace(SHAPE, kinds=(LayerKind(16), LayerKind()), layer_kinds=(0, 1))
    lengths = [12, 50]
    by_window, everything = (by_hand(c, lengths, 5)[1] for c in (narrow, SHAPE))
    apart = flops.step_flops(SHAPE, lengths, 5) - flops.step_flops(narrow, lengths, 5)
    # One token a sequence is cut at its window's half.
    assert apart == pytest.approx(3 * (everything - by_window), rel=0.01)
    assert by_window < 0.8 * everything


def items():
    chat()
    return [item(t, "sampled") for t in trajectories()[:4]]


def fitted(trace, report=lambda step, values: None, steps=STEPS):
    layout = Layout(2, max(len(i.ids) for i in items()) + 5, 8)
    trainer = Trainer(model_config(), Forward(), Optimiser(), layout)
    plan = Plan(2, steps, 1e-3, 0, 1.0, 0)
    batches = [[[i] for i in items()[s % 3 : s % 3 + 2]] for s in range(steps)]
    with trace:
        return trainer.fit(
            copy_params(params()), batches, plan, LIKELIHOOD, report=report, trace=trace
        )


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    """(parameters, metrics by step, folder of the trace) of a training that is traced."""
    folder, rows = tmp_path_factory.mktemp("run") / "profile", []
    final = fitted(Trace(folder), lambda step, values: rows.append({"step": step} | values))
    return final, rows, folder


def test_every_step_says_what_it_did_and_how_fast(traced):
    _, rows, _ = traced
    for s, row in enumerate(rows):
        some = items()[s % 3 : s % 3 + 2]
        assert row["speed/tokens"] == sum(len(i.ids) for i in some)
        assert row["fill"] == pytest.approx(row["speed/tokens"] / row["speed/slots"])
        counted = sum(int((i.weights > 0).sum()) for i in some)
        needed = flops.step_flops(model_config(), [len(i.ids) for i in some], counted)
        assert row["speed/tflop"] == needed / 1e12
    first, *others = rows
    assert first["speed/compile_s"] > 0
    assert not RATES & first.keys()
    for row in others:
        assert row.keys() >= RATES
        assert "speed/compile_s" not in row
        assert row["speed/tokens_per_s"] == row["speed/tokens"] / row["speed/step_s"]
        assert 0 < row["speed/host_s"] < row["speed/step_s"]
    # A CPU has no peak that is published, nor does it say what it holds.
    assert not {"speed/mfu", "memory/peak_bytes"} & {name for row in rows for name in row}


def test_a_known_device_has_utilisation_and_memory(monkeypatch):
    class Device:
        device_kind = "TPU v5 lite"

        def __init__(self, most):
            self.most = most

        def memory_stats(self):
            return {"peak_bytes_in_use": self.most}

    monkeypatch.setattr(jax, "local_devices", lambda: [Device(5), Device(7)])
    clock = iter([0.0, 1.0, 1.5, 3.0])
    monkeypatch.setattr(meter.time, "perf_counter", lambda: next(clock))
    some = [Item(np.arange(9, dtype=np.int32), np.ones(9, np.float32), np.zeros(9, np.float32))]
    batch = pack([some], Layout(2, 16, 2))
    watched = Meter(SHAPE, LIKELIHOOD, devices=4)
    watched.begin()
    watched.called()
    found = watched.end(batch)
    assert (found["speed/step_s"], found["speed/host_s"]) == (3.0, 1.0)
    assert found["speed/slots_per_s"] == 32 / 3
    assert found["speed/mfu"] == pytest.approx(
        flops.step_flops(SHAPE, [9], 9) / 3 / (4 * 197e12), rel=1e-12
    )
    assert found["memory/peak_bytes"] == 7


def test_what_goes_on_from_a_shared_prompt_is_counted_with_what_it_sees():
    def side(length):
        turns = (np.arange(length) >= 20).astype(np.int32)
        ids = np.arange(length, dtype=np.int32)
        return Item(ids, turns.astype(np.float32), np.zeros(length, np.float32), turns)

    narrow = dataclasses.replace(SHAPE, kinds=(LayerKind(25), LayerKind()), layer_kinds=(0, 1))
    pair = [side(30), side(50)]
    for config in (SHAPE, narrow):
        apart, joint = (
            Meter(config, LIKELIHOOD).end(pack([pair], Layout(2, 96, 2, shared)))
            for shared in (False, True)
        )
        assert apart["speed/tokens"] - joint["speed/tokens"] == 19
        saved = apart["speed/tflop"] - joint["speed/tflop"]
        # The prompt but its last token, whatever comes after it, once.
        assert saved == pytest.approx(flops.step_flops(config, [19], 0) / 1e12)


def test_the_forward_passes_of_a_reference_point_are_counted():
    some = [Item(np.arange(n, dtype=np.int32), np.ones(n, np.float32), np.zeros(n, np.float32))
            for n in (9, 14)]  # fmt: skip
    batch, other = (pack([[i]], Layout(2, 16, 2)) for i in some)
    trained, forward = flops.step_flops(SHAPE, [9], 9), flops.forward_flops(SHAPE, [14], 14)

    def tflop(kl, reference=False, mismatched=None):
        watched = Meter(SHAPE, Objective("unpaired", kl=kl), reference=reference)
        found = watched.end(batch, mismatched)
        assert found["speed/tokens"] == 9
        return 1e12 * found["speed/tflop"]

    assert tflop("zero") == pytest.approx(trained)
    assert tflop("batch_mean") == pytest.approx(trained * 4 / 3)
    assert tflop("mismatched", mismatched=other) == pytest.approx(trained + forward)
    # A reference in the step goes over both.
    assert tflop("mismatched", True, other) == pytest.approx(trained * 4 / 3 + 2 * forward)


@pytest.mark.parametrize(
    ("kind", "rate"),
    [
        ("TPU v4", 275e12), ("TPU v5p", 459e12), ("TPU v6 lite", 918e12), ("TPU v4 lite", None),
        ("NVIDIA H100 80GB HBM3", 989.4e12), ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA L4", 121e12), ("NVIDIA L40", None),
        ("NVIDIA L40S", 362e12), ("Tesla T4", 65e12), ("cpu", None), ("TPU v99", None),
    ],
)  # fmt: skip
def test_a_peak_is_known_or_not_made_up(kind, rate):
    assert meter.peak(kind) == rate


def test_a_trace_is_written_and_changes_nothing(traced, tmp_path):
    final, _, folder = traced
    plain = fitted(Trace())
    jax.tree.map(np.testing.assert_array_equal, final, plain)
    assert list(folder.rglob("*.xplane.pb"))
    [trace] = folder.rglob("perfetto_trace.json.gz")
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    numbers = [e["args"]["step_num"] for e in events if e.get("name") == "step"]
    assert sorted(numbers) == ["3", "4", "5"]
    fitted(Trace(tmp_path / "none"), steps=1)  # which compiles
    assert not (tmp_path / "none").exists()


def test_a_trace_that_an_error_left_open_is_closed(tmp_path):
    def stop(step, values):
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fitted(Trace(tmp_path / "first"), stop)
    assert list((tmp_path / "first").rglob("*.xplane.pb"))
    fitted(Trace(tmp_path / "second"))  # the profiler takes one at a time
    assert list((tmp_path / "second").rglob("*.xplane.pb"))


def test_a_summary_leaves_compilation_out_of_its_medians(traced):
    _, rows, _ = traced
    found = speed.summary(rows)
    assert found["compile_s"] == rows[0]["speed/compile_s"]
    assert found["step_s"] == np.median([row["speed/step_s"] for row in rows[1:]])
    assert not {"mfu", "peak_bytes"} & found.keys()
    known = found | {"mfu": 0.5, "peak_bytes": 2.5 * 2**30}
    table = speed.sheet({"SFT": known, "iteration 1": {"fill": 0.25, "compile_s": 1.0}})
    assert table.rows[0][-2:] == ["50.0", "2.50"]
    assert len({len(row) for row in [table.columns, *table.rows]}) == 1
    assert table.rows[1][:3] == ["iteration 1", "-", "1.0"]
