"""The step benchmark: the shared specification's pairs, and one line with the peers' fields."""

import hashlib
import json

import bench_step
import pytest
from bench_pairs import Lap, figures, make_pairs, step_flops
from support import write_model

from mdpo_jax.model.families import ModelConfig

# Of prompt, responses and masks, computed once with the generator that the peers' benchmarks use.
FROZEN = {
    (512, 0, 1024): ["df9c3b8e5a43be08", "0dff166b1445bd00", "d1c51737d8058211"],
    (8192, 7, 1024): ["3303619ed17a8c67", "bfe21939b9f160a5", "c2f241d24a7b9172"],
    (8192, 0, 384): ["fa5434ddba07bc2a", "c61452e9416785c7", "efc059ea9ad13d93"],
}
# The fields of the peers' line.
FIELDS = {
    "bench", "peer", "size", "model", "reference", "attention", "checkpointing", "bf16",
    "pairs_per_step", "step_s", "step_cpu_s", "useful_tokens", "pairs_per_cpu_s",
    "useful_gflop_per_s", "useful_gflop_per_cpu_s", "real_fraction", "python", "cores", "versions",
    "peak_rss_mb",
}  # fmt: skip


def digest(pair):
    total = hashlib.sha256()
    for x in pair:
        total.update(x.dtype.str.encode() + str(x.shape).encode() + x.tobytes())
    return total.hexdigest()[:16]


@pytest.mark.parametrize(("vocab", "seed", "max_len"), FROZEN)
def test_the_pairs_are_those_of_the_shared_generator(vocab, seed, max_len):
    found = [digest(pair) for pair in make_pairs(3, vocab, seed, max_len)]
    assert found == FROZEN[vocab, seed, max_len]
    assert found[:2] == [digest(pair) for pair in make_pairs(2, vocab, seed, max_len)]


@pytest.mark.parametrize(
    ("size", "in_step", "flops"),
    [("nano", True, 23083909120.0), ("nano", False, 17312931840.0), ("micro", False, 504118837248)],
)
def test_flops_are_those_of_the_shared_formula(size, in_step, flops):
    config = ModelConfig("gemma", *bench_step.SIZES[size])
    assert step_flops(config, make_pairs(3, config.vocab_size), in_step) == flops


def test_figures_are_sums_over_the_timed_steps():
    config = ModelConfig("gemma", *bench_step.SIZES["nano"])
    pairs = make_pairs(3, 512)
    real = [sum(pair.lengths) for pair in pairs]
    laps = [Lap(2.0, 1.0, pairs[:1], 2000), Lap(4.0, 3.0, pairs[1:], 4000)]
    found = figures(config, laps, False)
    assert found["step_s"] == {"median": 3.0, "min": 2.0, "max": 4.0, "n": 2}
    assert found["useful_tokens"]["per_cpu_s"]["max"] == real[0]
    assert found["useful_tokens"]["total_per_cpu_s"] == sum(real) / 4
    assert found["pairs_per_cpu_s"] == 3 / 4
    assert found["useful_gflop_per_s"] == pytest.approx(17312931840.0 / 6e9)
    assert found["real_fraction"] == sum(real) / 6000


@pytest.mark.parametrize("given", ["--rows=0", "--lengths=0", "--model=no/folder"])
def test_what_cannot_be_measured_is_said(given, capsys):
    with pytest.raises(SystemExit):
        bench_step.arguments([given])
    assert f"{given}: " in capsys.readouterr().err


@pytest.mark.parametrize("reference", ["in_step", "precomputed"])
def test_a_run_on_a_folder_prints_one_line(reference, tmp_path, capsys, monkeypatch):
    config = write_model(tmp_path / "small", "gemma2")
    (tmp_path / "small" / "tokenizer.json").unlink()
    monkeypatch.setitem(bench_step.SIZES, "nano", (config.vocab_size,))
    few = ["--pairs=1", "--steps=1", "--rows=2", "--max-len=384", f"--reference={reference}"]
    bench_step.main([f"--model={tmp_path / 'small'}", *few])
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    line = json.loads(out)
    assert line.keys() >= FIELDS
    assert (line["model"], line["reference"], line["step_s"]["n"]) == ("small", reference, 1)
    # Policy and reference are one model, whichever way it is scored.
    assert line["first_loss"] == pytest.approx(0.69315, abs=1e-4)
    assert line["compilations"] == 1
    assert 0 < line["real_fraction"] <= 1
