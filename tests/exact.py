"""What the tests of exactness share: a model in which every part matters, pairs, and their layouts.

Gemma-2's two kinds of layers, with frequencies of their own, in the smallest sizes that four devices
divide (two key heads over four devices are left whole); caps that bend every score and logit.
"""

import dataclasses
import functools

import jax
import naive
import numpy as np

from mdpo_jax import hosts
from mdpo_jax.data.packing import Layout, item, pack
from mdpo_jax.model import sharding
from mdpo_jax.model.families import LayerKind, ModelConfig, Rope, param_shapes
from mdpo_jax.training.losses import Objective
from mdpo_jax.training.step import loss_and_gradients, put
from mdpo_jax.types import Role, Trajectory

CONFIG = ModelConfig(
    "gemma2", 48, 16, 24, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8,
    kinds=(LayerKind(7, Rope(100.0)), LayerKind(None, Rope(10000.0))), layer_kinds=(0, 1),
    attention_cap=2.0, logit_cap=3.0,
)  # fmt: skip
PLAIN = ModelConfig("gemma", 48, 16, 24, num_layers=2, num_heads=4, num_kv_heads=1, head_dim=8)
OBJECTIVE = Objective("pairs", eta=0.5, nll_weight=0.3)
# Chosen and rejected in turn; no two fit into a row of the packed layouts.
LENGTHS = (37, 22, 31, 20, 26, 19)
MARGINS = (0.0, 0.4, -0.2)
# micro-batches, rows, columns, sequences: what every layout below is fitted to, so that one program
# computes them all.
SHAPE = (4, 8, 64, 6)
LAYOUTS = {
    ("apart", "whole"): Layout(8, 37, 6),
    ("apart", "accumulated"): Layout(4, 37, 4),  # micro-batches of two pairs and of one
    ("packed", "whole"): Layout(4, 48, 6),  # a pair's sides in two rows
    ("packed", "accumulated"): Layout(4, 48, 4),
    ("shared", "whole"): Layout(4, 64, 6, shared_prompts=True),
    ("shared", "accumulated"): Layout(1, 64, 6, shared_prompts=True),
}


@functools.cache
def params(config=CONFIG, seed=0):
    """Random float32 everywhere, the norms too."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: rng.normal(scale=0.3, size=x.shape).astype(np.float32), param_shapes(config)
    )


@functools.cache
def sequences():
    """Trajectories of two or more turns; both sides of a pair have its prompt."""
    return tuple(_trajectory(i, length) for i, length in enumerate(LENGTHS))


def _trajectory(index, length):
    rng, ask = np.random.default_rng(index), np.random.default_rng(100 + index // 2)
    prompt = 3 + index // 2
    roles = [Role.PROMPT] * prompt
    while length - len(roles) > 11:
        roles += [Role.ACTION] * (2 + index % 3) + [Role.OBSERVATION] * 4 + [Role.TEMPLATE] * 2
    roles += [Role.ACTION] * (length - len(roles))
    ids = np.concatenate([ask.integers(1, 48, prompt), rng.integers(1, 48, length - prompt)])
    zeros = np.zeros(length, np.float32)
    roles = np.array(roles, np.uint8)
    return Trajectory(f"p/{index // 2}", index, "p", ids.astype(np.int32), roles, zeros)


def sides():
    """(chosen, rejected, margin) of each pair."""
    return list(zip(sequences()[::2], sequences()[1::2], MARGINS, strict=True))


def plain(loss, config=CONFIG):
    """((loss, metrics), gradients) of loss(config, params, reference) in float64."""
    with jax.enable_x64(True):
        trees = (params(config, seed) for seed in (0, 1))
        trees = [jax.tree.map(np.float64, tree) for tree in trees]
        compute = jax.value_and_grad(functools.partial(loss, config), has_aux=True)
        return jax.tree.map(np.asarray, compute(*trees))


@functools.cache
def expected():
    """Of `OBJECTIVE`."""
    eta, nll = OBJECTIVE.eta, OBJECTIVE.nll_weight
    return plain(lambda *given: naive.mdpo(*given, sides(), eta=eta, nll=nll))


def scores(config=CONFIG, found=None):
    """[length] log-probs of each sequence (or of others) under the reference, in float64."""
    with jax.enable_x64(True):
        reference = jax.tree.map(np.float64, params(config, 1))
        return [np.asarray(naive.log_probs(config, reference, t.ids)) for t in found or sequences()]


def fitted(batch):
    """The batch in `SHAPE`: empty rows between its rows, empty columns and slots behind."""
    micros, rows, length, slots = SHAPE
    assert len(batch.tokens) == micros

    def fit(x):
        if x.ndim >= 3:
            out = np.zeros((micros, rows, length, *x.shape[3:]), x.dtype)
            out[:, :: rows // x.shape[1], : x.shape[2]] = x
        else:
            paired = x.shape[1] == len(batch.pair_mask[0])
            out = np.zeros((micros, slots // 2 if paired else slots), x.dtype)
            out[:, : x.shape[1]] = x
        return out

    return type(batch)(**{f.name: fit(getattr(batch, f.name)) for f in dataclasses.fields(batch)})


def items(scores=None):
    """What is packed; scores: [length] reference log-probs of each, by default wrong ones."""
    if scores is None:
        scores = [np.full(len(t.ids), 7.0) for t in sequences()]
    return [
        item(t, "sampled", reference=s)._replace(correct=i % 3 == 0)
        for i, (t, s) in enumerate(zip(sequences(), scores, strict=True))
    ]


def pairs(scores=None):
    """(chosen, rejected) of each pair, with its margin as the rejected one's (C)."""
    found = items(scores)
    return [
        (found[2 * i], found[2 * i + 1]._replace(term_c=margin)) for i, margin in enumerate(MARGINS)
    ]


def arranged(groups, name):
    batch = pack(groups, LAYOUTS[name])
    prompts = name[0] == "shared" and any(len(group) == 2 for group in groups)
    assert batch.prefixes.any() == prompts
    return fitted(batch)


def _placed(tree, config, mesh):
    """Parameters on a mesh, which may span processes."""
    return jax.tree.map(hosts.place, tree, sharding.param_shardings(config, mesh))


def program(config, forward, objective, mesh):
    """f(params, batch, reference, mismatched) -> gradients and metrics on the host; one program."""

    @jax.jit
    def compute(params, batch, reference, mismatched):
        return loss_and_gradients(
            config, forward, objective, params, batch, reference=reference, mismatched=mismatched
        )

    def run(params, batch, reference=None, mismatched=None):
        trees = [None if p is None else _placed(p, config, mesh) for p in (params, reference)]
        batches = [None if b is None else put(b, mesh) for b in (batch, mismatched)]
        with jax.set_mesh(mesh):
            found = compute(trees[0], batches[0], trees[1], batches[1])
        assert compute._cache_size() == 1
        return jax.tree.map(hosts.fetch, found)

    return run


def check(found, expected, tolerance=1e-5):
    """Gradients leaf by leaf against their norm, and every metric that the plain code has."""
    gradients, metrics = found
    (loss, known), right = expected
    for name, value in {"loss": loss, **known}.items():
        error = abs(float(metrics[name]) - float(value))
        limit = tolerance * max(abs(float(value)), 1e-2)
        assert error <= limit, f"{name}: {metrics[name]}; expected {value}"
    for (path, leaf), other in zip(
        jax.tree.leaves_with_path(gradients), jax.tree.leaves(right), strict=True
    ):
        error = np.linalg.norm(leaf - other) / np.linalg.norm(other)
        assert error <= tolerance, f"{jax.tree_util.keystr(path)}: off by {error:.1e} of its norm"
