import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdpo_jax.model.policy import fingerprint, load_policy
from mdpo_jax.model.sharding import make_mesh, param_shardings
from mdpo_jax.model.transformer import hidden_states, logits
from mdpo_jax.model.weights import CheckpointError


def test_save_and_load_give_the_same_policy(policy, checkpoint, ids):
    again = load_policy(checkpoint)
    assert again.config == policy.config
    assert fingerprint(again.params) == fingerprint(policy.params)
    assert again.hf_config["eos_token_id"] == 1
    assert again.tokenizer.get_vocab() == policy.tokenizer.get_vocab()
    assert again.tokenizer.chat_template == policy.tokenizer.chat_template
    np.testing.assert_array_equal(again.logits(ids(2, 7)), policy.logits(ids(2, 7)))
    names = {p.name for p in checkpoint.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= names


def test_generation_config_and_foreign_fields_travel(policy, checkpoint, tmp_path):
    (checkpoint / "generation_config.json").write_text('{"eos_token_id": [1, 107]}')
    raw = json.loads((checkpoint / "config.json").read_text()) | {"initializer_range": 0.5}
    (checkpoint / "config.json").write_text(json.dumps(raw))
    copy = load_policy(checkpoint).save(tmp_path / "copy")
    assert json.loads((copy / "generation_config.json").read_text()) == {"eos_token_id": [1, 107]}
    assert json.loads((copy / "config.json").read_text())["initializer_range"] == 0.5


def test_logits_are_those_of_the_forward(policy, ids):
    tokens = ids(3, 6)
    places = np.broadcast_to(np.arange(6), tokens.shape)
    forward = jax.jit(hidden_states, static_argnums=0)
    hidden = forward(policy.config, policy.params, tokens, places, np.ones_like(tokens))
    got = policy.logits(tokens.tolist())
    assert got.shape == (3, 6, 64)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, logits(policy.config, policy.params, hidden), atol=2e-5)


def test_bfloat16_on_a_mesh(policy, checkpoint, ids):
    half = load_policy(checkpoint, dtype="bfloat16", mesh=make_mesh(fsdp=2, tensor=2))
    assert half.dtype == "bfloat16"
    expected = policy.logits(ids(2, 7))
    np.testing.assert_allclose(half.logits(ids(2, 7)), expected, atol=0.05 * abs(expected).max())


def test_save_in_another_dtype(policy, tmp_path):
    path = policy.save(tmp_path / "half", "bfloat16")
    raw = json.loads((path / "config.json").read_text())
    assert raw["dtype"] == raw["torch_dtype"] == "bfloat16"
    assert load_policy(path, "bfloat16").dtype == "bfloat16"


def test_save_refuses_to_overwrite_and_clears_what_a_killed_save_left(policy, tmp_path):
    (tmp_path / "a.partial").mkdir()
    (tmp_path / "a.partial" / "junk").write_text("x")
    path = policy.save(tmp_path / "a")
    assert not (path / "junk").exists()
    assert not (tmp_path / "a.partial").exists()
    with pytest.raises(FileExistsError, match="exists already"):
        policy.save(path)


def test_a_save_that_fails_leaves_no_folder(policy, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("mdpo_jax.model.policy.write_params", fail)
    with pytest.raises(OSError, match="disk full"):
        policy.save(tmp_path / "a")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ([[1, 2], [3]], "different lengths"),
        ([1, 2], "1 axes"),
        ([[64]], r"64..64; expected 0..63"),
        ([[-1]], "-1"),
    ],
)
def test_ids_that_are_no_ids_are_refused(policy, bad, words):
    with pytest.raises(ValueError, match=words):
        policy.logits(bad)


def _remove_tokenizer(folder):
    for file in folder.glob("*token*"):
        file.unlink()


CASES = {
    "no config": (lambda f: (f / "config.json").unlink(), FileNotFoundError, "config.json"),
    "config of no JSON": (
        lambda f: (f / "config.json").write_text("{"),
        CheckpointError,
        "not JSON",
    ),
    "config of a list": (
        lambda f: (f / "config.json").write_text("[]"),
        CheckpointError,
        "JSON object",
    ),
    "another architecture": (
        lambda f: (f / "config.json").write_text('{"architectures": ["X"]}'),
        CheckpointError,
        "architectures: X",
    ),
    "no tokenizer": (_remove_tokenizer, FileNotFoundError, "no tokenizer"),
    "a broken tokenizer": (
        lambda f: (f / "tokenizer.json").write_text("{"),
        CheckpointError,
        "tokenizer cannot be read",
    ),
    "no weights": (
        lambda f: (f / "model.safetensors").unlink(),
        CheckpointError,
        "no weights",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_spoiled_folder_gives_one_clear_line(checkpoint, case):
    spoil, kind, words = CASES[case]
    spoil(checkpoint)
    with pytest.raises(kind, match=words) as caught:
        load_policy(checkpoint)
    assert "\n" not in str(caught.value)


def test_an_absent_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        load_policy(tmp_path / "absent")


def test_an_unknown_dtype(checkpoint):
    with pytest.raises(ValueError, match="dtype: 'int4'; expected one of float32"):
        load_policy(checkpoint, dtype="int4")


def test_a_tokenizer_of_another_vocabulary(checkpoint, save_tokenizer):
    save_tokenizer(checkpoint, 70)
    with pytest.raises(CheckpointError, match=r"ids up to 69.* vocabulary of 64"):
        load_policy(checkpoint)


def test_fingerprint_sees_every_bit_and_no_mesh(config, params):
    first = fingerprint(params)
    assert len(first) == 16
    placed = jax.device_put(params, param_shardings(config, make_mesh(fsdp=2, tensor=2)))
    assert fingerprint(placed) == first
    down = params["layers"]["mlp"]["down"]

    def changed(x):
        layers = {**params["layers"], "mlp": {**params["layers"]["mlp"], "down": x}}
        return fingerprint({**params, "layers": layers})

    swapped = down.at[0, 0, 0].set(down[1, 2, 3]).at[1, 2, 3].set(down[0, 0, 0])
    near = down.at[1, 5, 7].set(jnp.nextafter(down[1, 5, 7], jnp.inf))
    assert len({first, changed(swapped), changed(near), changed(down.astype("bfloat16"))}) == 4
    assert changed(down) == first
