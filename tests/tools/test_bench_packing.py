import bench_packing
import numpy as np
import pytest
from support import trajectories

from mdpo_jax.data import store
from mdpo_jax.data.packing import Item, Layout
from mdpo_jax.types import Pair


def test_the_table_is_of_a_run_s_pairs(tmp_path, capsys):
    found = trajectories()
    pairs = [Pair(a, b, *(np.zeros(len(t.ids), np.float32) for t in (a, b)))
             for a, b in zip(found[::2], found[1::2], strict=True)]  # fmt: skip
    path = tmp_path / "pairs.jsonl.gz"
    store.write_lines(path, map(store.pair_row, pairs * 4))
    longest = max(len(t.ids) for t in found)
    flags = [f"--max-tokens={longest - 1}", "--batch=4", "--rows=8", "--row-length=256"]
    bench_packing.main([f"--pairs={path}", *flags])
    head, _, _, _, row = capsys.readouterr().out.splitlines()
    long = 4 * sum(max(len(p.chosen.ids), len(p.rejected.ids)) == longest for p in pairs)
    assert head.startswith(f"{24 - long} pairs in {(24 - long) // 4} batches, {long} too long")
    *_, balanced, shape, fitted = row.strip("| ").split(" | ")
    assert float(balanced) <= float(fitted) <= 1
    assert shape.split()[1] == "x"


def test_first_fit_by_hand():
    nothing = [np.zeros(n, np.int32) for n in range(11)]

    def group(*sizes):
        return [Item(nothing[n], nothing[n], nothing[n]) for n in sizes]

    groups = [group(6, 6), group(4, 3), group(5, 5)]  # 6 6, then 5 5 alone, then 4 3 beside 6 6
    assert bench_packing.first_fit(groups, Layout(2, 10, 9)) == 2
    assert bench_packing.first_fit(groups[:2], Layout(2, 10, 9)) == 1


def test_a_source_is_asked_for(capsys):
    with pytest.raises(SystemExit):
        bench_packing.main([])
    assert "expected --pairs, or --trajectories and --tokenizer" in capsys.readouterr().err


def test_a_missing_file_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit):
        bench_packing.main([f"--pairs={tmp_path / 'pairs.jsonl.gz'}"])
    assert f"--pairs {tmp_path / 'pairs.jsonl.gz'}: expected a file" in capsys.readouterr().err


def test_fewer_pairs_than_a_batch_are_refused(tmp_path):
    a, b = trajectories()[:2]
    pair = Pair(a, b, *(np.zeros(len(t.ids), np.float32) for t in (a, b)))
    path = tmp_path / "pairs.jsonl.gz"
    store.write_lines(path, [store.pair_row(pair)] * 3)
    with pytest.raises(SystemExit, match="--batch=4: expected at most the 3 pairs found, beside 0"):
        bench_packing.main([f"--pairs={path}", "--batch=4"])
    with pytest.raises(SystemExit, match=r"the 0 pairs found, beside 3 that .* --max-tokens=1$"):
        bench_packing.main([f"--pairs={path}", "--max-tokens=1"])


def test_a_batch_has_a_pair(capsys):
    with pytest.raises(SystemExit):
        bench_packing.main(["--pairs=x", "--batch=0"])
    assert "--batch=0: expected at least 1" in capsys.readouterr().err
