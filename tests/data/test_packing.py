import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mdpo_jax.data.packing import Item, Layout, pack, unpack


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
