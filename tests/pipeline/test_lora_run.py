"""The whole loop with adapters: over a fresh model's warm-up, and over a loaded model."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from support import SMALL_RUN

from mdpo_jax import evaluate, export, train
from mdpo_jax.model import lora
from mdpo_jax.model.families import leaf
from mdpo_jax.model.policy import load_policy
from mdpo_jax.pipeline import files, stages
from mdpo_jax.pipeline.context import Context
from mdpo_jax.types import Verdict

RUN = [*SMALL_RUN, "--config.lora.rank=2", "--config.lora.alpha=4"]


def _by_parity(context, gold, trajectory):
    return Verdict(
        "correct" if (trajectory.ids.sum() + trajectory.sample) % 2 else "wrong", "parity", "0"
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of a fresh model; answers are graded by chance so that pairs exist."""
    folder = tmp_path_factory.mktemp("run") / "r"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mdpo_jax.pipeline.evaluation.verdict", _by_parity)
        assert train.main([*RUN, f"--config.workdir={folder}"]) == 0
    return folder


@pytest.fixture(scope="module")
def loaded(finished, tmp_path_factory):
    """A finished RAFT run over the first one's SFT policy as `model.path`."""
    where = tmp_path_factory.mktemp("loaded")
    base = where / "model"
    arguments = ["--checkpoint", str(finished), "--iteration", "0", "--out", str(base)]
    assert export.main(arguments) == 0
    more = [
        f"--config.model.path={base}",
        "--config.method=raft",
        f"--config.workdir={where / 'r'}",
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mdpo_jax.pipeline.evaluation.verdict", _by_parity)
        assert train.main([*RUN, *more, "--config.iterations=1"]) == 0
    return where / "r"


def size(folder):
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def test_the_run_learns_from_ln_2_in_one_program(finished):
    results = json.loads((finished / "results.json").read_text())
    assert results["compilations"]["step"] == 1
    assert results["compilations"]["rollout_after_warm_up"] == 0
    for t in (1, 2):
        lines = (finished / f"iteration-{t}" / "train" / "metrics.jsonl").read_text().splitlines()
        first = json.loads(lines[0])
        assert first["loss/preference"] == pytest.approx(np.log(2), abs=1e-5)
        done = files.read_json(finished / f"iteration-{t}" / "train" / files.DONE)
        assert done["steps"] == len(lines)
    kl = [row["kl"] for row in results["rows"] if row["iteration"] and row["decoding"] == "sampled"]
    assert np.isfinite(kl).all()


def test_a_stage_keeps_its_adapter_alone_and_names_its_base(finished):
    context = Context(files.read_config(finished), finished)
    kept = context.parameters
    note = files.read_json(finished / "iteration-2" / "train" / "params.json")
    assert note == {"base": kept.fingerprint, "source": None}
    assert not (finished / "sft" / "params.json").exists()
    first, second = (
        kept.trainable(finished / f"iteration-{t}" / "train" / "params")[0] for t in (1, 2)
    )
    assert jax.tree.structure(first) == jax.tree.structure(
        jax.eval_shape(lambda: lora.init(kept.config, kept.adapter, jax.random.key(0)))
    )
    b = [leaf(x, "layers/attention/query_lora_b") for x in (first, second)]
    assert np.abs(b[0]).max() > 0
    assert not np.array_equal(*b)
    whole, low = (size(finished / f / "params") for f in ("sft", "iteration-1/train"))
    assert low < whole


def test_a_run_that_was_cut_ends_in_the_same_place(finished, tmp_path, monkeypatch):
    monkeypatch.setattr("mdpo_jax.pipeline.evaluation.verdict", _by_parity)
    again = tmp_path / "again"
    shutil.copytree(finished, again)
    (again / "results.json").unlink()
    shutil.rmtree(again / "export")
    for name in ("train-dev", "train-test"):
        shutil.rmtree(again / "iteration-2" / name)
    # A kill after the note and before the parameters.
    shutil.rmtree(again / "iteration-2" / "train" / "params")
    (again / "iteration-2" / "train" / files.DONE).unlink()
    assert train.main([*RUN, f"--config.workdir={again}"]) == 0
    a, b = (files.read_json(d / "iteration-2" / "train" / files.DONE) for d in (again, finished))
    del a["speed"], b["speed"]
    assert a == b
    a, b = (json.loads((d / "results.json").read_text())["rows"] for d in (again, finished))
    assert a == b


def test_export_merges_or_writes_the_adapter(finished, tmp_path):
    run = ["--checkpoint", str(finished), "--iteration", "2"]
    assert export.main([*run, "--out", str(tmp_path / "hf")]) == 0
    assert export.main([*run, "--merge-lora", "--out", str(tmp_path / "same")]) == 0
    assert export.main([*run, "--peft", "--out", str(tmp_path / "peft")]) == 0
    merged = load_policy(tmp_path / "hf")
    named = json.loads((tmp_path / "peft" / lora.CONFIG).read_text())["base_model_name_or_path"]
    assert named == str(finished / "base")
    base = load_policy(named)
    adapters, which = lora.read_peft(tmp_path / "peft", base.config)
    assert (which.rank, which.alpha) == (2, 4)
    expected = lora.merge(base.params, adapters, which)
    jax.tree.map(np.testing.assert_array_equal, merged.params, expected)
    ids = [[2, 5, 6, 7]]
    assert np.abs(merged.logits(ids) - base.logits(ids)).max() > 0
    one, other = (load_file(tmp_path / d / "model.safetensors") for d in ("hf", "same"))
    assert all(np.array_equal(one[name], other[name]) for name in one)


def test_over_a_loaded_model_even_the_warm_up_is_an_adapter(loaded, tmp_path):
    for name in ("params", "params-earlier"):
        assert (loaded / "sft" / f"{name}.json").exists()
    assert size(loaded / "sft" / "params") < size(loaded.parent / "model")
    run = ["--checkpoint", str(loaded), "--iteration"]
    assert export.main([*run, "1", "--peft", "--out", str(tmp_path / "peft")]) == 0
    raw = json.loads((tmp_path / "peft" / lora.CONFIG).read_text())
    assert raw["base_model_name_or_path"] == str(loaded.parent / "model")
    assert export.main([*run, "0", "--peft", "--out", str(tmp_path / "warm")]) == 0
    b = "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"
    warm, after = (load_file(tmp_path / d / lora.TENSORS)[b] for d in ("warm", "peft"))
    assert np.abs(warm).max() > 0
    assert not np.array_equal(warm, after)


def test_without_a_warm_up_the_first_policy_is_the_loaded_one_to_the_bit(loaded, tmp_path):
    config = files.read_config(loaded)
    config = dataclasses.replace(config, sft=dataclasses.replace(config.sft, steps=0))
    context = Context(config, tmp_path)
    stages.prepare_problems(context, tmp_path / "problems")
    assert stages.sft(context, tmp_path / "sft", lambda done: None)["steps"] == 0
    for name in ("params", "params-earlier"):
        policy = context.policy(context.load(tmp_path / "sft" / name))
        jax.tree.map(np.testing.assert_array_equal, policy.params, context.begin())


def test_another_base_is_refused_in_one_line(loaded, tmp_path, capsys):
    run, model = tmp_path / "r", loaded.parent / "model"
    shutil.copytree(loaded, run)
    config = files.read_json(run / "config.json")
    policy = load_policy(model)
    changed = jax.tree.map(lambda x: x + 1e-3, policy.params)
    Context(files.read_config(run), run).policy(changed).save(tmp_path / "other")
    config["model"]["path"] = str(tmp_path / "other")
    files.write_json(run / "config.json", config)
    for door, more in ((export, ["--out", str(tmp_path / "x")]), (evaluate, ["--split", "dev"])):
        shutil.rmtree(run / "iteration-1" / "train-dev", ignore_errors=True)
        assert door.main(["--checkpoint", str(run), "--iteration", "1", *more]) == 2
        error = capsys.readouterr().err
        assert "is an adapter over" in error
        assert "expected the base that the run began with" in error
        assert "Traceback" not in error


def test_what_cannot_be_exported_is_refused_in_one_line(finished, tmp_path, capsys):
    run, out = ["--checkpoint", str(finished)], ["--out", str(tmp_path / "x")]
    assert export.main([*run, "--iteration", "0", "--peft", *out]) == 2
    assert "is the base of the run's adapters" in capsys.readouterr().err
    assert export.main([*run, "--iteration", "7", "--peft", *out]) == 2
    assert "expected 0 (SFT) to 2" in capsys.readouterr().err
    dense = tmp_path / "dense"
    dense.mkdir()
    config = files.read_json(finished / "config.json")
    config["lora"]["rank"] = 0
    files.write_json(dense / "config.json", config)
    run = ["--checkpoint", str(dense), "--iteration", "1"]
    assert export.main([*run, "--peft", *out]) == 2
    assert "every weight was trained; expected a LoRA run" in capsys.readouterr().err
    assert export.main([*run, "--merge-lora", *out]) == 2
    assert "expected a LoRA run" in capsys.readouterr().err
