"""A sampler over meshes of four fake devices, beside one device; and weights on their way to it."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import Printer, chat, tokenizer

from mdpo_jax.model import lora, transformer
from mdpo_jax.model.families import LayerKind, ModelConfig, Rope, param_shapes
from mdpo_jax.model.sharding import make_mesh, param_shardings
from mdpo_jax.rollout import layout
from mdpo_jax.rollout.engine import Engine, Limits, Request
from mdpo_jax.rollout.layout import ONE_DEVICE, Placement, decode_mesh, flat, resharded
from mdpo_jax.rollout.sampler import Sampler
from mdpo_jax.rollout.sampling import GREEDY, Sampling
from mdpo_jax.rollout.shapes import Shapes
from mdpo_jax.types import Problem, Role

LIMITS = Limits(
    max_turns=3, turn_tokens=7, trajectory_tokens=18, observation_tokens=90, context=256
)
SHAPES = Shapes(8, 256, 4, (8,), (256,), (256,))
PROBLEMS = [Problem(f"p/{i}", "Ana has" + " beads" * i, "1") for i in range(3)]


def model(family, kv_heads=2):
    kind = LayerKind(24 if family == "mistral" else None, Rope(100.0))
    return ModelConfig(family, len(tokenizer()), 16, 32, 1, 4, kv_heads, 8, kinds=(kind,))


@functools.cache
def draw(config):
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: jnp.asarray(rng.normal(scale=0.3, size=x.shape), x.dtype), param_shapes(config)
    )


def sampler(config, tensor, dtype="float32"):
    """On 4 / tensor shards of rows, its weights from a training layout; tensor 0: one device."""
    params, placement = draw(config), ONE_DEVICE
    if tensor:
        mesh = make_mesh(fsdp=4 // tensor, tensor=tensor)
        params = jax.device_put(params, param_shardings(config, mesh))
        placement = Placement(decode_mesh(mesh))
        assert dict(placement.mesh.shape) == {"data": 4 // tensor, "fsdp": 1, "tensor": tensor}
    made = Sampler(config, SHAPES, chat().stop_ids, dtype, placement)
    made.load(params)
    return made


@functools.cache
def trajectories(config, tensor):
    """Of twelve requests over eight slots: refills, copies, observations; greedy and at T = 1."""
    requests = [Request(p, s, "0/mesh") for p in PROBLEMS for s in range(4)]
    made, found = sampler(config, tensor), {}
    engine = Engine(made, chat(), Printer((4, 12, 80)), LIMITS)
    for sampling in (GREEDY, Sampling()):
        found[sampling] = engine.run(requests, policy="x", sampling=sampling)
    assert made.tokens_copied > 0
    assert made.late_compilations() == 0
    return found, made.tokens_prefilled


@pytest.mark.parametrize(
    ("family", "tensor"), [("gemma", 4), ("gemma", 2), ("gemma", 1), ("mistral", 2)]
)
def test_every_mesh_gives_what_one_device_gives(family, tensor, monkeypatch):
    monkeypatch.setattr("mdpo_jax.rollout.engine.wants_tool", lambda text: True)
    monkeypatch.setattr("mdpo_jax.rollout.sampler._FEWEST", 1)  # decode a part of a shard's rows
    expected, prefilled = trajectories(model(family), 0)
    found, read = trajectories(model(family), tensor)
    assert read == prefilled
    for one, other in zip(expected[GREEDY], found[GREEDY], strict=True):
        assert one.turns > 1
        assert one.ids.tolist() == other.ids.tolist()
        np.testing.assert_allclose(one.log_probs, other.log_probs, atol=1e-4)
    # Drawn by the same keys; where two tokens are as near as rounding, another may come.
    pairs = list(zip(expected[Sampling()], found[Sampling()], strict=True))
    equal = [a.ids.tolist() == b.ids.tolist() for a, b in pairs]
    assert sum(equal) >= len(equal) - 1
    assert any((t.roles == Role.OBSERVATION).any() for t, _ in pairs)


def test_shards_copy_slots_of_each_other_in_bfloat16():
    made = sampler(model("gemma"), 1, "bfloat16")
    every = np.zeros(4 * 8, np.int32)
    copy = made._copy.lower(64, made.start(), every, every, every, np.zeros((32, 2), np.uint32))
    assert moved(copy.compile().as_text()) > 0  # on a CPU the compiler ended the process


def moved(text):
    """Bytes that the largest collective of a compiled program gives to a device; all are 32 bits."""
    kinds = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    most = 0
    for shapes in re.findall(rf"= (.*?) (?:{kinds})(?:-start)?\(", text):
        sizes = re.findall(r"\[([\d,]*)\]", shapes)
        most = max(most, 4 * sum(np.prod([int(d) for d in s.split(",") if d]) for s in sizes))
    return most


def test_nothing_but_hidden_states_logits_and_copied_rows_is_sent():
    config, tensor = model("gemma"), 4  # which does not divide the two key heads
    made = sampler(config, tensor)
    state = made.start()
    words, none = np.zeros((8, 2), np.uint32), np.zeros(8, np.int32)
    tokens, sampling = np.zeros((8, 64), np.int32), Sampling(*map(np.float32, GREEDY))
    extend = made._extend.lower(made._params, state, tokens, none, none, none, words)
    decode = made._decode.lower(256, made._params, state, None, none, sampling)
    row, hidden, logits = (4 * n for n in (2 * 2 * 8 * 256, 16, config.vocab_size))
    assert moved(extend.compile().as_text()) <= 8 * max(64 * hidden, logits) < 8 * row
    assert 0 < moved(decode.compile().as_text()) <= 8 * max(hidden, logits)
    made = sampler(config, 2)  # two shards of rows; a key head on each device of a pair
    state = made.start()
    shares = {x.sharding.shard_shape(x.shape)[:2] for x in jax.tree.leaves(state.cache)}
    assert shares == {(4, 1)}
    every = np.zeros(2 * 8, np.int32)
    copy = made._copy.lower(64, state, every, every, every, np.zeros((16, 2), np.uint32))
    assert 0 < moved(copy.compile().as_text()) <= 8 * (row // 2 * 64 // 256 + logits)


def held(device):
    """Bytes of all live arrays on a device; a buffer that two arrays share counts once."""
    buffers = {
        shard.data.unsafe_buffer_pointer(): shard.data.nbytes
        for x in jax.live_arrays()
        for shard in x.addressable_shards
        if shard.device == device
    }
    return sum(buffers.values())


def test_resharding_frees_each_leaf_and_never_holds_a_second_copy(monkeypatch):
    config = dataclasses.replace(model("gemma"), num_layers=8, hidden_size=64, intermediate_size=64)
    mesh = make_mesh(fsdp=2, tensor=2)
    decoding, device = decode_mesh(mesh), jax.devices()[0]
    before = held(device)
    params = jax.jit(
        lambda: jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), param_shapes(config)),
        out_shardings=param_shardings(config, mesh),
    )()
    trained = held(device) - before
    leaves, done, most = flat(params), {}, 0
    largest = max(x.nbytes for x in leaves.values())
    del params

    def moved(x, target):
        nonlocal most
        out = move(x, target)
        most = max(most, held(device) - before)
        return out

    move = layout._moved
    monkeypatch.setattr(layout, "_moved", moved)
    for layers in resharded(leaves, config, "bfloat16", decoding):
        done |= layers
    assert not leaves
    kept = sum(x.addressable_shards[0].data.nbytes for x in done.values())
    assert held(device) - before == kept
    # fsdp halves what is trained, bfloat16 what is decoded with: both layouts are as large.
    assert trained == pytest.approx(kept, rel=0.02)
    # Beside them a leaf in bfloat16, where it was trained (a quarter) and as decoded with (a half).
    assert trained < most <= trained + largest / 2 * 3 / 4 < 1.5 * trained


@pytest.mark.parametrize("adapted", [False, True])
def test_resharded_weights_are_those_of_one_device(adapted):
    config, spec = model("qwen2"), lora.Lora(2, 4.0)
    params = draw(config)
    mesh = make_mesh(fsdp=2, tensor=2)
    placed = jax.device_put(params, param_shardings(config, mesh))
    if adapted:
        low = jax.tree.map(lambda x: x + 0.1, lora.init(config, spec, jax.random.key(0)))
        params = lora.combine(params, low, spec)
        sharded = jax.device_put(low, lora.shardings(config, spec, mesh))
        placed = lora.combine(placed, sharded, spec)
    expected = lora.fold(transformer.unstack(params), jnp.float32)
    found = {}
    for layers in resharded(flat(placed), config, "float32", decode_mesh(mesh)):
        found |= layers
    assert found.keys() == flat(expected).keys()
    for path, x in flat(expected).items():
        np.testing.assert_allclose(found[path], x, rtol=1e-6, atol=1e-6)
        spread = found[path].sharding.spec
        assert any("tensor" in (axis or ()) for axis in spread) or "norm" in path or x.ndim == 1


def test_tensor_is_cut_to_what_divides_the_devices_and_slots_are_dealt_in_turn():
    mesh = make_mesh(fsdp=2, tensor=2)
    assert dict(decode_mesh(mesh).shape) == {"data": 2, "fsdp": 1, "tensor": 2}
    assert dict(decode_mesh(mesh, 1).shape) == {"data": 4, "fsdp": 1, "tensor": 1}
    assert decode_mesh(None) is None
    with pytest.raises(ValueError, match=r"config.rollout.tensor=3: does not divide the 4 devices"):
        decode_mesh(mesh, 3)
    placement = Placement(decode_mesh(mesh))
    with pytest.raises(ValueError, match=r"rollout.slots: 9; expected a multiple of the 2"):
        placement.per_shard(dataclasses.replace(SHAPES, slots=9))
    slots = np.arange(6)
    assert placement.rows(slots).tolist() == [0, 2, 4, 1, 3, 5]
    assert placement.slots(placement.rows(slots)).tolist() == slots.tolist()
    groups = placement.groups(placement.per_shard(SHAPES), [0, 2, 5, 4], [9, 70, 3, 9], 1000)
    assert list(groups) == [[[1, 0, 3], [2]]]
