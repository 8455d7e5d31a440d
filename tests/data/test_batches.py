import functools
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mdpo_jax.data.batches import Beside, InTurn, Shuffled, balanced, feed
from mdpo_jax.data.bins import arrange, fit_rows
from mdpo_jax.data.fitting import fitted
from mdpo_jax.data.packing import Item, Layout, pack, pieces, unpack

LENGTHS = st.lists(st.tuples(st.integers(1, 60), st.integers(1, 60)), min_size=1, max_size=40)


@functools.cache
def item(length, name=1):
    ids = np.full(length, name, np.int32)
    return Item(ids, np.ones(length, np.float32), np.zeros(length, np.float32))


def pairs(count, seed=0, low=20, high=500):
    """Each of ids that name it."""
    sizes = np.random.default_rng(seed).integers(low, high, (count, 2))
    return [(item(int(a), i + 1), item(int(b), i + 1)) for i, (a, b) in enumerate(sizes)]


def names(groups):
    return [int(group[0].ids[0]) for group in groups]


def totals(batches, steps):
    return np.asarray([sum(sum(pieces(g)) for g in batches[s]) for s in range(steps)])


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.integers(2, 5), st.integers(60, 200), st.integers(2, 20))
def test_arranged_rows_hold_every_sequence_once(sizes, rows, length, slots):
    found = arrange(sizes, rows, length, slots)
    assert sorted(g for places in found for g, _ in places) == list(range(len(sizes)))
    for places in found:
        used = np.zeros(rows, int)
        for g, where in places:
            np.add.at(used, where, sizes[g])
        assert used.max() <= length
        assert places
        assert sum(len(where) for _, where in places) <= slots
    assert found == arrange(sizes, rows, length, slots)


def test_rows_are_filled_to_the_last_token_where_they_can_be():
    sizes = [7, 6, 5, 5, 4, 3, 2]  # 32 = 2 rows of 16; longest first into the first room needs 3
    place = fit_rows(sizes, 2, 16)
    assert [sum(s for s, r in zip(sizes, place, strict=True) if r == row) for row in (0, 1)] == [
        16,
        16,
    ]
    assert fit_rows([9, 9, 9], 2, 16) is None


def test_a_batch_takes_as_few_micro_batches_as_its_tokens_need():
    rng = np.random.default_rng(0)
    for count in (1, 2, 3):
        sizes = rng.integers(50, 500, (32, 2)).tolist()
        length = -(-sum(map(sum, sizes)) * 100 // (98 * 4 * count))  # 98 % full
        assert len(arrange(sizes, 4, length, 64)) == count


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 3))
def test_every_group_comes_once_an_epoch_whatever_the_batch(count, batch, seed):
    groups = pairs(count)
    batches = Shuffled(groups, batch, seed)
    steps = -(-3 * count // batch)
    seen = [name for step in range(steps) for name in names(batches[step])]
    for epoch in range(3):
        found = seen[epoch * count : (epoch + 1) * count]
        assert sorted(found) == list(range(1, count + 1))[: len(found)] or len(found) < count
    assert all(len(batches[step]) == batch for step in range(steps))


def test_batches_are_of_equal_tokens_and_otherwise_as_they_were_shuffled():
    groups = pairs(323)
    batches = Shuffled(groups, 16, 5)
    found = totals(batches, 60)  # three epochs, and the batches in which one ends
    mean = 16 * np.mean([sum(pieces(g)) for g in groups])
    assert np.abs(found / mean - 1).max() < 0.01
    plain = np.random.default_rng((5, 0)).permutation(323)
    moved = sum(
        name - 1 not in plain[16 * s : 16 * (s + 1)]
        for s in range(20)
        for name in names(batches[s])
    )
    assert 0 < moved < 0.25 * 320
    first, second = ([frozenset(names(batches[s])) for s in r] for r in (range(20), range(21, 40)))
    assert not set(first) & set(second)


def test_groups_of_one_length_stay_where_they_are():
    order = np.random.default_rng(0).permutation(12)
    same = balanced(order.copy(), np.full(12, 7), np.asarray([4, 8]))
    np.testing.assert_array_equal(same, order)


def test_no_group_is_refused():
    with pytest.raises(ValueError, match="no sequence; expected at least one"):
        Shuffled([], 2, 0)


def test_parts_in_turn_and_beside():
    one, two = Shuffled(pairs(6), 2, 0), Shuffled([[item(9, 77)]], 1, 0)
    turn = InTurn([(2, two), (3, one), (1, two)])
    assert [names(turn[s]) for s in range(7)] == [[77]] * 2 + [names(one[s]) for s in range(3)] + [
        [77]
    ] * 2
    assert names(Beside(one, two)[1]) == [*names(one[1]), 77]


def same(a, b):
    for field in a.batch.__dataclass_fields__:
        np.testing.assert_array_equal(getattr(a.batch, field), getattr(b.batch, field))


def test_the_feed_goes_on_where_its_state_says():
    make = functools.partial(feed, Shuffled(pairs(20), 3, 0), Layout(4, 512, 6), 9)
    whole = list(make())
    assert len(whole) == 9
    source = make()
    for _ in range(4):
        next(source)
    place = source.get_state()
    source.close()
    again = make()
    again.set_state(place)
    rest = list(again)
    assert len(rest) == 5
    for a, b in zip(rest, whole[4:], strict=True):
        same(a, b)


def test_every_host_makes_the_same_steps_of_the_same_arrays(monkeypatch):
    """What a host packs depends on nothing of its own."""
    import jax

    views = []
    for host in (0, 1):
        monkeypatch.setattr(jax, "process_index", lambda host=host: host)
        monkeypatch.setattr(jax, "process_count", lambda: 2)
        views.append(feed(Shuffled(pairs(13), 4, 2), Layout(4, 512, 8), 11))
    steps = 0
    for a, b in itertools.zip_longest(*views):
        same(a, b)
        steps += 1
    assert steps == 11


def test_stand_ins_are_packed_beside():
    groups = [[item(5, 1)._replace(mismatched=item(7, 2))], [item(6, 3)]]
    (fed,) = feed([groups], Layout(2, 16, 2), 1)
    assert fed.batch.sequence_mask.sum() == 2
    values = unpack(fed.mismatched.tokens, fed.mismatched)
    assert [v.tolist() for v in values.values()] == [[2] * 7]


def test_a_thread_s_error_is_the_packer_s():
    with pytest.raises(ValueError, match=r"\[700, 20\] tokens do not fit into 4 rows of 512"):
        next(feed([[(item(700), item(20))]], Layout(4, 512, 8), 1))


@pytest.mark.parametrize(("rows", "ways", "high"), [(8, 1, 900), (8, 2, 900), (16, 8, 500)])
def test_a_fitted_layout_is_full_and_takes_no_more_memory(rows, ways, high):
    within = Layout(rows, 2048, 64)
    batches = Shuffled(pairs(640, 1, 20, high), 32, 0)
    found = fitted(batches, 20, within, ways, high)
    assert found.rows % ways == found.row_length % 128 == 0
    assert high <= found.row_length
    assert found.rows * found.row_length <= rows * 2048
    assert found.rows * found.row_length**2 <= rows * 2048**2
    fill = np.mean([pack(batches[s], found).fill for s in range(20)])
    assert fill > 0.95 > np.mean([pack(batches[s], within).fill for s in range(20)])


def test_a_layout_that_cannot_be_bettered_stays():
    within = Layout(2, 100, 4)  # no length in 128s is within it
    batches = Shuffled([(item(100, 1), item(100, 2))], 2, 0)
    assert fitted(batches, 3, within, 1, 100) == within
