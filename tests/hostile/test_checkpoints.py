"""Spoiled and foreign models at the door: exit code 2 and one line that names what is wrong."""

import json
import os
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support import write_model

from mdpo_jax import export

QUERY = "model.layers.1.self_attn.q_proj.weight"
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A model in three or more shards."""
    folder = tmp_path_factory.mktemp("good") / "model"
    write_model(folder, max_shard_bytes=15_000)
    assert len(list(folder.glob("model-*"))) >= 3
    return folder


def shard(folder, name=QUERY):
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][name]


def edit(folder, change, name=QUERY):
    """Rewrites one tensor in its shard."""
    file = shard(folder, name)
    tensors = load_file(file)
    changed = change(tensors.pop(name))
    save_file(tensors | ({} if changed is None else {name: changed}), file)


def edit_json(folder, name, **fields):
    raw = json.loads((folder / name).read_text()) | fields
    (folder / name).write_text(json.dumps(raw))


def put(value):
    def change(x):
        x = x.copy()
        x.flat[-1] = value
        return x

    return change


def edit_map(folder, **fields):
    where = json.loads((folder / INDEX).read_text())["weight_map"]
    edit_json(
        folder, INDEX, weight_map=where | {k.replace("__", "."): v for k, v in fields.items()}
    )


def drop_from_map(folder):
    where = json.loads((folder / INDEX).read_text())["weight_map"]
    where.pop(QUERY)
    edit_json(folder, INDEX, weight_map=where)


def swap(folder):
    a, b = sorted(folder.glob("model-*"))[1:3]
    a.rename(folder / "x")
    b.rename(a)
    (folder / "x").rename(b)


def only(folder, *names):
    """Leaves nothing of the model but files of these names."""
    shutil.rmtree(folder)
    folder.mkdir()
    for name in names:
        (folder / name).write_bytes(b"\0" * 32)


def adapter(folder):
    only(folder, "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')


def without_weights(folder, name):
    for file in folder.glob("model*"):
        file.unlink()
    (folder / name).write_bytes(b"\0" * 32)


def directory(folder, name):
    (folder / name).unlink(missing_ok=True)
    (folder / name).mkdir()


def forbid(file):
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    file.chmod(0)


def header(folder):
    shard(folder).write_bytes((10**6).to_bytes(8, "little") + b'{"a": ')


def no_tokenizer(folder):
    for file in [*folder.glob("*token*"), *folder.glob("chat*")]:
        file.unlink()


def outside(folder):
    edit_map(folder, **{QUERY.replace(".", "__"): "../elsewhere.safetensors"})


CASES = {
    "missing shard": (lambda f: shard(f).unlink(), "missing shard"),
    "missing tensor": (drop_from_map, f"missing tensor {QUERY}"),
    "tensor in no shard": (lambda f: edit(f, lambda x: None), f"{QUERY}: not in its shard"),
    "tensor in the wrong shard": (
        lambda f: edit_map(f, **{QUERY.replace(".", "__"): sorted(f.glob("model-*"))[0].name}),
        f"{QUERY}: not in its shard",
    ),
    "swapped shards": (swap, "not in its shard"),
    "index names no file": (
        lambda f: edit_map(f, **{QUERY.replace(".", "__"): "model-9.safetensors"}),
        "model-9.safetensors: missing shard",
    ),
    "index leads out of the folder": (outside, "not beside it"),
    "index of no JSON": (lambda f: (f / INDEX).write_text("{"), "not an index of shards"),
    "index of a list": (lambda f: (f / INDEX).write_text("[]"), "not an index of shards"),
    "truncated file": (lambda f: os.truncate(shard(f), 5000), "truncated or corrupt"),
    "truncated header": (header, "truncated or corrupt"),
    "zero bytes": (lambda f: shard(f).write_bytes(b""), "truncated or corrupt: 0 bytes"),
    "not safetensors": (lambda f: shard(f).write_bytes(b"PK\3\4" * 99), "truncated or corrupt"),
    "more bytes than the header says": (
        lambda f: shard(f).write_bytes(shard(f).read_bytes() + b"x"), "truncated or corrupt",
    ),
    "wrong shape": (lambda f: edit(f, lambda x: x[:-1]), f"{QUERY}: shape [15, 16]"),
    "transposed": (
        lambda f: edit(f, lambda x: np.zeros((32, 16), "f4"), "model.layers.0.mlp.down_proj.weight"),
        "shape [32, 16]; expected [16, 32]",
    ),
    "NaN": (lambda f: edit(f, put(np.nan)), f"{QUERY}: NaN or infinite"),
    "infinite": (lambda f: edit(f, put(-np.inf)), f"{QUERY}: NaN or infinite"),
    "quantised tensors": (lambda f: edit(f, lambda x: x.astype("i1")), "quantised (I8)"),
    "quantised by its config": (
        lambda f: edit_json(f, "config.json", quantization_config={"bits": 4}),
        "quantization_config: quantised weights",
    ),
    "unknown architecture": (
        lambda f: edit_json(f, "config.json", architectures=["T5Model"]), "architectures: T5Model",
    ),
    "unknown rope": (
        lambda f: edit_json(
            f, "config.json", rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}
        ),
        "rope_type: 'yarn'",
    ),
    "config of another size": (
        lambda f: edit_json(f, "config.json", hidden_size=24), "shape [",
    ),
    "config of another depth": (
        lambda f: edit_json(f, "config.json", num_hidden_layers=3), "missing tensor model.layers.2",
    ),
    "config of a shallower model": (
        lambda f: edit_json(f, "config.json", num_hidden_layers=1), "is not one of a gemma model",
    ),
    "head missing though untied": (
        lambda f: edit_json(f, "config.json", tie_word_embeddings=False),
        "missing tensor lm_head.weight",
    ),
    "config of no JSON": (lambda f: (f / "config.json").write_text("{"), "config.json: not JSON"),
    "config of a list": (lambda f: (f / "config.json").write_text("[]"), "expected a JSON object"),
    "config is a directory": (lambda f: directory(f, "config.json"), "config.json: cannot be read"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json: missing"),
    "weights are a directory": (
        lambda f: (without_weights(f, "x"), directory(f, "model.safetensors")),
        "model.safetensors: cannot be read",
    ),
    "tokenizer larger than the vocabulary": (
        lambda f: edit_json(f, "config.json", vocab_size=100), "a vocabulary of 100",
    ),
    "no tokenizer": (no_tokenizer, "no tokenizer"),
    "broken tokenizer": (
        lambda f: (f / "tokenizer.json").write_text("{"), "tokenizer cannot be read",
    ),
    "empty folder": (lambda f: only(f), "empty, no weights"),
    "no weights": (lambda f: without_weights(f, "x"), "no weights"),
    "pickled weights only": (
        lambda f: without_weights(f, "pytorch_model.bin"), "pickled torch weights",
    ),
    "GGUF only": (lambda f: only(f, "model-q4.gguf"), "GGUF weights"),
    "adapter only": (adapter, "a PEFT adapter without its base"),
    "no permission": (lambda f: forbid(shard(f)), "cannot be read: Permission denied"),
    "absent": (shutil.rmtree, "no such folder"),
    "a file": (lambda f: (shutil.rmtree(f), f.write_text("x")), "not a folder"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_one_clear_line_and_exit_code_2(case, good, tmp_path, capsys):
    spoil, words = CASES[case]
    model, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(good, model)
    spoil(model)
    capsys.readouterr()
    assert export.main(["--checkpoint", str(model), "--out", str(out)]) == 2
    error = capsys.readouterr().err.strip()
    assert words in error
    assert error.startswith("error: ")
    assert "\n" not in error
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith("out")) == []
