import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mdpo_jax.model.families import FAMILIES, ModelConfig, weight_map
from mdpo_jax.model.sharding import RULES, make_mesh, param_shardings
from mdpo_jax.model.weights import (
    INDEX,
    SINGLE,
    CheckpointError,
    read_params,
    stored_dtypes,
    write_params,
)


def _same(a, b):
    return jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), a, b))


@pytest.fixture
def folder(tmp_path, config, params):
    """Three or more shards with an index."""
    write_params(tmp_path, params, config, "float32", max_shard_bytes=20_000)
    return tmp_path


def _spoil(folder, name, change):
    """Rewrites the shard of one tensor."""
    file = folder / json.loads((folder / INDEX).read_text())["weight_map"][name]
    tensors = load_file(file)
    tensors[name] = change(tensors[name])
    save_file(tensors, file, metadata={"format": "pt"})


def _add(folder, name):
    """Another tensor, in its own shard."""
    save_file({name: np.zeros(3, np.float32)}, folder / "more.safetensors")
    _edit_index(folder, lambda m: m.update({name: "more.safetensors"}))


def test_shards_round_trip_bit_equal(folder, config, params):
    assert len(list(folder.glob("model-*-of-*.safetensors"))) >= 3
    index = json.loads((folder / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in jax.tree.leaves(params))
    assert "lm_head.weight" not in index["weight_map"]
    assert _same(read_params(folder, config), params)


def test_one_file_round_trips_bit_equal_in_bfloat16(tmp_path, config, params):
    small = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    write_params(tmp_path, params, config, "bfloat16")
    assert [p.name for p in tmp_path.iterdir()] == [SINGLE]
    assert load_file(tmp_path / SINGLE)["model.norm.weight"].dtype == ml_dtypes.bfloat16
    assert _same(read_params(tmp_path, config, dtype=jnp.bfloat16), small)
    assert _same(read_params(tmp_path, config), jax.tree.map(lambda x: x.astype("f4"), small))


@pytest.mark.parametrize("sizes", [{"fsdp": 2, "tensor": 2}, {"fsdp": 4}, {"tensor": 4}], ids=str)
def test_onto_a_mesh_and_back(folder, config, params, tmp_path_factory, sizes):
    mesh = make_mesh(**sizes)
    placed = read_params(folder, config, mesh)
    assert _same(placed, params)
    shardings = param_shardings(config, mesh)
    jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim) or 1 / 0, placed, shardings)
    again = tmp_path_factory.mktemp("again")
    write_params(again, placed, config, "float32")
    assert _same(read_params(again, config), params)


def test_each_shard_reads_only_its_slice(folder, config, monkeypatch):
    """Over fsdp=4, no read is longer than a quarter of a matrix."""
    from mdpo_jax.model import weights

    sizes, real = [], weights._part

    def spy(weight, tensor, spans, config):
        part, turned = real(weight, tensor, spans, config)
        if "norm" not in weight.path:
            sizes.append(part.size / np.prod(weight.stored_shape(config)))
        return part, turned

    monkeypatch.setattr(weights, "_part", spy)
    read_params(folder, config, make_mesh(fsdp=4))
    assert set(sizes) == {0.25}


@pytest.mark.parametrize("family", FAMILIES)
def test_our_layout_is_the_stored_one_or_its_transpose(family):
    """What reading by blocks relies on, and that inner axes are never split."""
    for w in weight_map(ModelConfig(family, 8, 8, 8, 1, 2, 2, 4, tied=False)):
        flat = [axis for group in w.groups for axis in group]
        turned = [axis for group in w.groups[::-1] for axis in group]
        assert w.axes.split() in (flat, turned), w
        assert not {axis for _, *rest in w.groups for axis in rest} & set(RULES), w


def test_loaded_parameters_may_be_donated(folder, config, params):
    placed = read_params(folder, config, make_mesh(data=4))
    double = jax.jit(lambda p: jax.tree.map(lambda x: 2 * x, p), donate_argnums=0)
    assert _same(double(placed), jax.tree.map(lambda x: 2 * x, params))


def test_a_stored_head_and_rotary_tables_are_ignored(tmp_path, config, params):
    write_params(tmp_path, params, config, "float32")
    tensors = load_file(tmp_path / SINGLE)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(8, np.float32)
    save_file(tensors, tmp_path / SINGLE)
    assert _same(read_params(tmp_path, config), params)


QUERY = "model.layers.1.self_attn.q_proj.weight"


def _poison(value):
    def change(x):
        x = x.copy()
        x.flat[7] = value
        return x

    return change


def _edit_index(folder, change):
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def _truncate(folder):
    file = sorted(folder.glob("*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:-100])


def _scribble(folder):
    sorted(folder.glob("*.safetensors"))[0].write_bytes(b"\xff" * 64)


def _nothing(folder):
    for file in folder.iterdir():
        file.unlink()


CASES = {
    "missing shard": (
        lambda f: sorted(f.glob("*.safetensors"))[1].unlink(),
        ["00002-of-", "missing shard"],
    ),
    "missing tensor": (
        lambda f: _edit_index(f, lambda m: m.pop(QUERY)),
        ["missing tensor", QUERY],
    ),
    "tensor in another shard": (
        lambda f: _edit_index(f, lambda m: m.update({QUERY: m["model.embed_tokens.weight"]})),
        [QUERY, "not in its shard"],
    ),
    "unknown tensor": (
        lambda f: _add(f, "model.layers.9.x"),
        ["model.layers.9.x", "another model"],
    ),
    "truncated": (_truncate, ["00002-of-", "truncated or corrupt"]),
    "no header": (_scribble, ["00001-of-", "truncated or corrupt"]),
    "empty file": (
        lambda f: sorted(f.glob("*.safetensors"))[0].write_bytes(b""),
        ["truncated or corrupt"],
    ),
    "no index": (lambda f: (f / INDEX).write_text("{"), [INDEX, "not an index"]),
    "index without map": (lambda f: (f / INDEX).write_text("{}"), [INDEX, "weight_map"]),
    "wrong shape": (
        lambda f: _spoil(f, QUERY, lambda x: x[:-1]),
        [QUERY, "[63, 32]", "[64, 32]"],
    ),
    "transposed": (
        lambda f: _spoil(f, QUERY, lambda x: np.ascontiguousarray(x.T)),
        [QUERY, "[32, 64]", "[64, 32]"],
    ),
    "nan": (lambda f: _spoil(f, QUERY, _poison(np.nan)), [QUERY, "NaN"]),
    "infinite": (lambda f: _spoil(f, QUERY, _poison(np.inf)), [QUERY, "infinite"]),
    "quantised": (
        lambda f: _spoil(f, QUERY, lambda x: x.astype(np.int8)),
        [QUERY, "quantised", "I8"],
    ),
    "no weights": (_nothing, ["no weights", SINGLE]),
}


@pytest.mark.parametrize("case", CASES)
def test_a_spoiled_checkpoint_gives_one_clear_line(folder, config, case):
    spoil, words = CASES[case]
    spoil(folder)
    with pytest.raises(CheckpointError) as caught:
        read_params(folder, config)
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


def test_nan_is_found_on_a_mesh_too(folder, config):
    _spoil(folder, QUERY, _poison(np.nan))
    with pytest.raises(CheckpointError, match="NaN"):
        read_params(folder, config, make_mesh(fsdp=4))


def test_parameters_of_another_shape_are_not_written(tmp_path, config, params):
    wrong = {**params, "final_norm": {"weight": jnp.zeros(31)}}
    with pytest.raises(ValueError, match=r"final_norm/weight: shape \[31\]; expected \[32\]"):
        write_params(tmp_path, wrong, config, "float32")


def test_multimodal_names_of_both_dialects_and_what_is_beside_the_text(
    tmp_path, config, params, caplog
):
    write_params(tmp_path, params, config, "float32")
    plain = load_file(tmp_path / SINGLE)
    other = {"vision_tower.a": np.ones(2, np.int8), "multi_modal_projector.b": np.ones(2, "f4")}
    for text, beside in (("language_model.model.", ""), ("model.language_model.", "model.")):
        named = {text + name.removeprefix("model."): x for name, x in plain.items()}
        named["lm_head.weight"] = plain["model.embed_tokens.weight"]
        save_file(named | {beside + name: x for name, x in other.items()}, tmp_path / SINGLE)
        caplog.clear()
        assert _same(read_params(tmp_path, config), params)
        [record] = caplog.records
        assert "text half of a multimodal model; 2 tensors ignored" in record.getMessage()


def test_each_tensor_keeps_a_type_of_its_own(tmp_path, config, params):
    write_params(tmp_path, params, config, "bfloat16")
    mixed = stored_dtypes(tmp_path) | {QUERY: np.dtype("f4"), "model.norm.weight": np.dtype("f8")}
    half = read_params(tmp_path, config)
    write_params(tmp_path, half, config, mixed)
    assert stored_dtypes(tmp_path) == mixed
    assert _same(read_params(tmp_path, config), half)


def test_a_value_that_the_wanted_type_cannot_hold_is_found(folder, config):
    _spoil(folder, QUERY, _poison(1e5))
    read_params(folder, config, dtype=jnp.bfloat16)
    with pytest.raises(CheckpointError, match=f"{QUERY}: NaN or infinite as float16"):
        read_params(folder, config, dtype=jnp.float16)
