"""Loss and gradients of the step against a naive float64 one, in every way in which it computes them.

Layouts (a sequence a row, packed, with shared prompts; one micro-batch or several) run through one
program each of remat policy and mesh; head chunk, attention and where the reference is scored are
spread over these, each with every other.  Without remat and with a chunked head the layers are
unrolled.  The whole product is `slow`.
"""

import itertools

import exact
import naive
import numpy as np
import pytest

from mdpo_jax.data.packing import item
from mdpo_jax.model import attention, sharding, skipping
from mdpo_jax.training.losses import Forward, Objective
from mdpo_jax.types import Role, Trajectory

WHOLE = 10_000
# data x fsdp x tensor, remat, chunk of the head, attention, reference
PROGRAMS = [
    ((1, 1, 1), "none", WHOLE, "reference", "stored"),
    ((1, 1, 1), "full", 24, "skipping", "in_step"),
    ((1, 1, 1), "dots", 24, "skipping", "stored"),
    ((1, 4, 1), "none", 24, "skipping", "in_step"),
    ((2, 2, 1), "full", WHOLE, "reference", "stored"),
    ((4, 1, 1), "dots", WHOLE, "skipping", "stored"),
    ((1, 2, 2), "none", 24, "skipping", "stored"),
    ((2, 1, 2), "full", 24, "reference", "stored"),
    ((1, 2, 2), "dots", WHOLE, "reference", "in_step"),
    ((1, 1, 4), "none", WHOLE, "skipping", "stored"),
    ((1, 1, 4), "full", 24, "reference", "stored"),
    ((1, 1, 4), "dots", WHOLE, "skipping", "in_step"),
]
MESHES = [(1, 1, 1), (1, 4, 1), (2, 2, 1), (4, 1, 1), (1, 2, 2), (2, 1, 2), (1, 1, 4)]
PRODUCT = itertools.product(
    MESHES, ("none", "full", "dots"), (WHOLE, 24), ("reference", "skipping"), ("stored", "in_step")
)


@pytest.fixture(autouse=True)
def _narrow_blocks(monkeypatch):
    """Rows of several blocks."""
    monkeypatch.setattr(attention, "BLOCK", 24)
    monkeypatch.setattr(skipping, "BLOCK", 16)


def _every_layout(mesh, remat, chunk, backend, reference):
    shared = remat != "none"
    unrolled = remat == "none" and chunk != WHOLE
    forward = Forward("float32", remat, chunk, backend, shared, unrolled)
    run = exact.program(exact.CONFIG, forward, exact.OBJECTIVE, sharding.make_mesh(*mesh))
    stored = reference == "stored"
    groups = exact.pairs(exact.scores() if stored else None)
    for layout in exact.LAYOUTS:
        if layout[0] == "shared" and not shared:
            continue
        batch = exact.arranged(groups, layout)
        found = run(exact.params(), batch, None if stored else exact.params(seed=1))
        exact.check(found, exact.expected())


def _name(program):
    return "-".join("x".join(map(str, x)) if isinstance(x, tuple) else str(x) for x in program)


@pytest.mark.parametrize("program", PROGRAMS, ids=_name)
def test_loss_and_gradients_are_the_naive_ones(program):
    _every_layout(*program)


@pytest.mark.slow
@pytest.mark.parametrize("program", [p for p in PRODUCT if p not in PROGRAMS], ids=_name)
def test_the_other_programs_too(program):
    _every_layout(*program)


FORWARD = Forward("float32", "full", 24, "skipping", shared_prompts=True)


def _other(objective, groups, expected, config=exact.CONFIG, borrowed=None):
    """Every layout of another objective, on a mesh."""
    run = exact.program(config, FORWARD, objective, sharding.make_mesh(2, 2, 1))
    for layout in exact.LAYOUTS:
        batches = [None if g is None else exact.arranged(g, layout) for g in (groups, borrowed)]
        exact.check(run(exact.params(config), batches[0], None, batches[1]), expected)


def test_means_over_tokens_with_smoothed_labels_on_a_plain_gemma():
    objective = Objective("pairs", eta=2.0, label_smoothing=0.1, length_normalised=True)
    expected = exact.plain(
        lambda *given: naive.mdpo(*given, exact.sides(), eta=2.0, smoothing=0.1, means=True),
        exact.PLAIN,
    )
    _other(objective, exact.pairs(exact.scores(exact.PLAIN)), expected, exact.PLAIN)


def _borrowed():
    """Each prompt with the completion of the next sequence's sequence but one: another problem's."""
    found, out = exact.sequences(), []
    for i, t in enumerate(found):
        other = found[(i + 2) % len(found)]
        cut, start = (int(np.argmax(x.roles == Role.ACTION)) for x in (t, other))
        ids = np.concatenate([t.ids[:cut], other.ids[start:]])[:37]
        roles = np.concatenate([t.roles[:cut], other.roles[start:]])[:37]
        out.append(Trajectory(t.problem_id, i, "p", ids, roles, np.zeros(len(ids), np.float32)))
    return out


def test_kto_with_a_reference_point_of_borrowed_completions():
    """An odd batch: five sequences, and a reference point of six."""
    objective = Objective("unpaired", eta=0.2, lambda_correct=0.7, lambda_wrong=1.3)
    borrowed, items = _borrowed(), exact.items(exact.scores())[:5]
    judged = [(t, i.correct) for t, i in zip(exact.sequences(), items, strict=False)]
    expected = exact.plain(
        lambda *given: naive.mkto(*given, judged, borrowed, eta=0.2, right=0.7, wrong=1.3)
    )
    assert expected[0][1]["kl"] > 0
    stand_ins = [
        [item(t, "sampled", reference=s)]
        for t, s in zip(borrowed, exact.scores(found=borrowed), strict=True)
    ]
    _other(objective, [[i] for i in items], expected, borrowed=stand_ins)


def test_the_likelihood_of_demonstrations():
    expected = exact.plain(lambda *given: naive.likelihood(*given, exact.sequences()))
    _other(Objective("likelihood"), [[i] for i in exact.items()], expected)
