import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mdpo_jax.data.fitting import best_length
from mdpo_jax.data.packing import Item, Layout, pack, shared_prompt, unpack


def make(length, value=1):
    ids = np.arange(value, value + length, dtype=np.int32)
    return Item(ids, np.ones(length, np.float32), np.zeros(length, np.float32))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=20))
def test_every_pair_is_there_once_and_whole(lengths):
    pairs = [(make(a, 100 * i + 1), make(b, 100 * i + 51)) for i, (a, b) in enumerate(lengths)]
    batch = pack(pairs, Layout(3, 16, 8))
    tokens = unpack(batch.tokens, batch)
    found = set()
    slots = batch.sequence_mask.shape[1]
    for m in range(len(batch.tokens)):
        for p in np.flatnonzero(batch.pair_mask[m]):
            chosen, rejected = (
                tokens[m * slots + int(side[m, p])] for side in (batch.chosen, batch.rejected)
            )
            index = int(chosen[0]) // 100
            np.testing.assert_array_equal(chosen, pairs[index][0].ids)
            np.testing.assert_array_equal(rejected, pairs[index][1].ids)
            found.add(index)
    assert found == set(range(len(pairs)))
    assert batch.pair_mask.sum() == len(pairs)
    positions = unpack(batch.positions, batch)
    assert all(np.array_equal(p, np.arange(len(p))) for p in positions.values())


def test_micro_batches_come_in_powers_of_two():
    batch = pack([(make(10), make(10)) for _ in range(5)], Layout(2, 16, 4))
    assert len(batch.tokens) == 8
    assert (batch.sequence_mask.sum(1) > 0).tolist() == [True] * 5 + [False] * 3


def test_a_sequence_longer_than_a_row_is_refused():
    with pytest.raises(ValueError, match=r"\[17\] tokens do not fit into 2 rows of 16"):
        pack([[make(17)]], Layout(2, 16, 4))


def test_fill_counts_tokens():
    assert pack([[make(8)], [make(8)]], Layout(1, 16, 2)).fill == 1.0


def _one_prompt(prompt, chosen, rejected, value=1):
    """A pair whose sides begin with the same `prompt` tokens, none of which counts."""

    def side(length, first):
        ids = np.r_[value + np.arange(prompt), first + np.arange(length)].astype(np.int32)
        weights = np.repeat([0.0, 1.0], [prompt, length]).astype(np.float32)
        return Item(ids, weights, weights / 2, np.repeat([0, 1], [prompt, length]))

    return side(chosen, value + 1000)._replace(correct=True), side(rejected, value + 2000)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 6), st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=12
    )
)
def test_a_shared_prompt_is_there_once_and_both_sides_go_on_from_it(lengths):
    groups = [_one_prompt(*sizes, 50 * i + 1) for i, sizes in enumerate(lengths)]
    layout = Layout(3, 16, 6, shared_prompts=True)
    batch = pack(groups, layout)
    found, slots = {}, batch.sequence_mask.shape[1]
    for m, r in np.ndindex(batch.tokens.shape[:2]):
        for segment in np.unique(batch.segments[m, r]):
            here = batch.segments[m, r] == segment
            if not 0 < segment <= slots:
                continue
            (start, stop), *others = np.unique(batch.prefixes[m, r, here], axis=0)
            assert not others
            places = np.r_[start:stop, np.flatnonzero(here)]
            assert batch.positions[m, r, places].tolist() == list(range(len(places)))
            assert not batch.weights[m, r, start:stop].any()
            found[tuple(batch.tokens[m, r, places])] = m, segment - 1, stop - start
    apart = 0
    for chosen, rejected in groups:
        (m, c, shared), (n, w, also) = (found.pop(tuple(s.ids)) for s in (chosen, rejected))
        assert (m, shared) == (n, also)
        pair = np.flatnonzero(batch.chosen[m] == c)[0]
        assert batch.rejected[m, pair] == w
        prompt = int(np.sum(chosen.weights == 0))
        # In one row where that is long enough.
        fits = len(chosen.ids) + len(rejected.ids) - (prompt - 1) <= 16
        assert shared in ({0, prompt - 1} if fits else {0})
        apart += 0 if shared else prompt - 1
    assert not found
    prompts = sum(prompt - 1 for prompt, *_ in lengths)
    total = sum(len(s.ids) for pair in groups for s in pair)
    assert (batch.segments > 0).sum() == total - prompts + apart


def test_a_prompt_that_differs_or_counts_is_not_shared():
    chosen, rejected = _one_prompt(5, 3, 4)
    assert shared_prompt(chosen, rejected) == 4
    other = rejected.ids.copy()
    other[2] += 1
    assert shared_prompt(chosen, rejected._replace(ids=other)) == 1
    counted = rejected.weights.copy()
    counted[3] = 1
    assert shared_prompt(chosen, rejected._replace(weights=counted)) == 2
    assert shared_prompt(*_one_prompt(1, 3, 4)) == 0


def test_the_row_length_is_the_one_that_leaves_the_least_padding():
    groups = [(make(10), make(10)), (make(12), make(8))]
    layout = Layout(1, 64, 8)
    assert best_length(groups, layout, [20, 32, 40, 64]).row_length == 20
    assert best_length(groups, layout, [24, 32, 41]).row_length == 41
    with pytest.raises(ValueError, match=r"do not fit into 1 rows of 16 tokens"):
        best_length(groups, layout, [8, 16])
