"""Against transformers on torch, in float32 on CPU, with fresh random weights."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import make_fixtures  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from mdpo_jax.model import transformer  # noqa: E402
from mdpo_jax.model.policy import load_policy  # noqa: E402

pytestmark = pytest.mark.parity


@pytest.fixture(params=sorted(make_fixtures.VARIANTS))
def pair(request, tmp_path, save_tokenizer):
    """(torch model, our policy) of one checkpoint in three shards."""
    model = make_fixtures.random_model(request.param, seed=10, hidden_size=48, intermediate_size=40)
    make_fixtures.save_sharded(model, tmp_path / "hf")
    save_tokenizer(tmp_path / "hf", make_fixtures.VOCAB)
    return model, load_policy(tmp_path / "hf")


def _ids(rows, length, seed=0):
    return np.random.default_rng(seed).integers(1, make_fixtures.VOCAB, (rows, length), np.int32)


def test_logits(pair):
    model, policy = pair
    ids = _ids(3, 40)
    with torch.no_grad():
        expected = model(torch.from_numpy(ids).long()).logits.numpy()
    difference = np.abs(policy.logits(ids) - expected).max() / np.abs(expected).max()
    print(f"\nlogits: max |difference| / scale = {difference:.1e}")
    assert difference <= 1e-4


def test_64_greedy_tokens(pair):
    model, policy = pair
    ids = _ids(1, 8)
    expected = make_fixtures.greedy(model, torch.from_numpy(ids).long(), 64)
    apart = transformer.unstack(policy.params)
    cache = transformer.init_cache(policy.config, 1, 80)
    step = jax.jit(lambda *a: transformer.extend(policy.config, *a))
    tokens, lengths, found = jnp.asarray(ids), jnp.zeros(1, jnp.int32), []
    for _ in range(64):
        new = jnp.full(1, tokens.shape[1])
        hidden, cache = step(apart, cache, tokens, lengths, new)
        lengths = lengths + new
        scores = transformer.logits(policy.config, policy.params, hidden[:, -1:])
        tokens = scores.argmax(-1).astype(jnp.int32)
        found.append(int(tokens[0, 0]))
    assert found == expected.tolist()


def test_loss_gradients(pair, by_name):
    model, policy = pair
    ids = _ids(2, 33, seed=1)
    long = torch.from_numpy(ids).long()
    out = model(long, use_cache=False).logits
    torch.nn.functional.cross_entropy(out[:, :-1].flatten(0, 1), long[:, 1:].flatten()).backward()
    expected = {name: p.grad.numpy() for name, p in model.named_parameters()}

    def loss(params):
        places = jnp.broadcast_to(jnp.arange(33), ids.shape)
        hidden = transformer.hidden_states(
            policy.config, params, ids, places, jnp.ones_like(ids), remat="dots"
        )
        log_probs = jax.nn.log_softmax(transformer.logits(policy.config, params, hidden)[:, :-1])
        return -jnp.take_along_axis(log_probs, ids[:, 1:, None], -1).mean()

    found = by_name(policy.config, jax.jit(jax.grad(loss))(policy.params))
    assert set(found) == set(expected)
    worst = max(np.abs(found[n] - g).max() / np.abs(g).max() for n, g in expected.items())
    print(f"\ngradients: max |difference| / scale of the tensor = {worst:.1e}")
    assert worst <= 1e-4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_we_save_transformers_loads_bit_equal(pair, tmp_path, dtype):
    model, policy = pair
    policy.save(tmp_path / "ours", dtype)
    loaded, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True, dtype="auto"
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert loaded.dtype == getattr(torch, dtype)
    theirs = loaded.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(theirs[name], tensor.to(getattr(torch, dtype))), name
