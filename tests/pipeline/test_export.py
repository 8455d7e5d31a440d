"""A model through the door as it is: weights, types, configuration, tokenizer, legal files."""

import json

import jax
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from support import write_model

from mdpo_jax import export
from mdpo_jax.model.families import FAMILIES
from mdpo_jax.model.policy import load_policy
from mdpo_jax.model.weights import stored_dtypes


def tensors(folder):
    out = {}
    for file in sorted(folder.glob("*.safetensors")):
        out |= load_file(file)
    return out


def run(source, out, *flags):
    assert export.main(["--checkpoint", str(source), "--out", str(out), *flags]) == 0
    return out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_bits_and_types_are_kept(family, dtype, tmp_path):
    write_model(tmp_path / "in", family, 15_000, dtype=dtype, torch_dtype=dtype)
    out = run(tmp_path / "in", tmp_path / "out")
    before, after = tensors(tmp_path / "in"), tensors(out)
    assert before.keys() == after.keys()
    for name, x in before.items():
        assert x.dtype == after[name].dtype == dtype
        assert x.tobytes() == after[name].tobytes(), name
    for file in out.glob("*.safetensors"):
        with safe_open(file, "numpy") as handle:
            assert handle.metadata() == {"format": "pt"}


def test_every_config_field_and_file_is_kept(tmp_path):
    write_model(tmp_path / "in", "gemma2", initializer_range=0.5, cache_implementation="hybrid")
    kept = {
        "generation_config.json": '{"eos_token_id": [1, 107], "top_k": 64}',
        "tokenizer_config.json": (tmp_path / "in" / "tokenizer_config.json").read_text() + "\n\n",
        "chat_template.jinja": "{# ours #}",
        "special_tokens_map.json": '{"bos_token": "<bos>"}',
        "LICENSE": "terms",
        "NOTICE.txt": "notice",
        "USE_POLICY.md": "policy",
    }
    for name, text in kept.items():
        (tmp_path / "in" / name).write_text(text)
    (tmp_path / "in" / "training_args.bin").write_text("not ours")
    out = run(tmp_path / "in", tmp_path / "out")
    before, after = (json.loads((d / "config.json").read_text()) for d in (tmp_path / "in", out))
    assert before == after
    assert before["cache_implementation"] == "hybrid"
    for name, text in kept.items():
        found = (out / name).read_text()
        same = json.loads(found) == json.loads(text) if name.startswith("gen") else found == text
        assert same, name
    assert not (out / "training_args.bin").exists()


def test_another_type_is_written_when_asked(tmp_path, capsys):
    write_model(tmp_path / "in")
    out = run(tmp_path / "in", tmp_path / "half", "--dtype", "bfloat16")
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "bfloat16"
    for name, x in tensors(tmp_path / "in").items():
        half = tensors(out)[name]
        np.testing.assert_array_equal(half, x.astype("bfloat16"))
    flags = ["--checkpoint", str(tmp_path / "in"), "--out", str(tmp_path / "x"), "--dtype", "int4"]
    assert export.main(flags) == 2
    assert "expected one of float32, bfloat16" in capsys.readouterr().err


def test_tensors_of_different_types_keep_theirs(tmp_path):
    write_model(tmp_path / "in", dtype="bfloat16")
    mixed = {
        name: x.astype("f4") if "norm" in name else x
        for name, x in tensors(tmp_path / "in").items()
    }
    save_file(mixed, tmp_path / "in" / "model.safetensors")
    out = run(tmp_path / "in", tmp_path / "out")
    assert stored_dtypes(out) == stored_dtypes(tmp_path / "in")
    assert len(set(stored_dtypes(out).values())) == 2
    assert all(x.tobytes() == tensors(out)[name].tobytes() for name, x in mixed.items())
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"


def test_never_over_another_folder_and_nothing_half_done(tmp_path, capsys, monkeypatch):
    write_model(tmp_path / "in")
    (tmp_path / "out").mkdir()
    flags = ["--checkpoint", str(tmp_path / "in"), "--out", str(tmp_path / "out")]
    assert export.main(flags) == 2
    assert "exists already" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []
    flags += ["--iteration", "1"]
    (tmp_path / "out").rmdir()
    assert export.main(flags) == 2
    assert "--iteration=1" in capsys.readouterr().err


CARDS = {
    "said by the card": ({"README.md": "---\nlicense: gemma\nlicense_link: x\n---\n# A"}, "gemma"),
    "read off the text": ({"LICENSE": "\n  Apache License\n  Version 2.0"}, "apache-2.0"),
    "not known": ({"LICENSE": "All rights reserved"}, None),
    "not there": ({}, None),
    "a card that is no YAML": ({"README.md": "---\n{: [\n---\n"}, None),
}


@pytest.mark.parametrize("case", CARDS)
def test_the_licence_is_said_only_if_it_is_known(case, tmp_path):
    import huggingface_hub

    files, licence = CARDS[case]
    write_model(tmp_path / "in")
    for name, text in files.items():
        (tmp_path / "in" / name).write_text(text)
    out = run(tmp_path / "in", tmp_path / "out")
    front = huggingface_hub.metadata_load(out / "README.md")
    assert front.get("license") == licence
    assert front["library_name"] == "transformers"
    assert "base_model" not in front
    assert (out / "LICENSE").exists() == ("LICENSE" in files)


def test_the_text_half_of_a_multimodal_model(tmp_path):
    config = write_model(tmp_path / "in", "gemma3")
    text = json.loads((tmp_path / "in" / "config.json").read_text())
    raw = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "text_config": text,
    }
    (tmp_path / "in" / "config.json").write_text(json.dumps(raw))
    plain = tensors(tmp_path / "in")
    stored = {f"language_model.{name}": x for name, x in plain.items()}
    stored["vision_tower.x"] = np.ones(3, np.float32)
    save_file(stored, tmp_path / "in" / "model.safetensors")
    out = run(tmp_path / "in", tmp_path / "out")
    assert load_policy(out).config == config
    assert all(x.tobytes() == tensors(out)[name].tobytes() for name, x in plain.items())
    assert json.loads((out / "config.json").read_text())["architectures"] == ["Gemma3ForCausalLM"]


def test_an_untied_model_keeps_its_head(tmp_path):
    write_model(tmp_path / "in", "llama", tie_word_embeddings=False)
    policy = load_policy(run(tmp_path / "in", tmp_path / "out"))
    assert not policy.config.tied
    same = jax.tree.map(np.array_equal, policy.params, load_policy(tmp_path / "in").params)
    assert jax.tree.all(same)
