"""How full rows are on the lengths of real trajectories, by order, packing and shape.

    python tools/bench_packing.py --tokenizer tokenizer.model --trajectories FILE.jsonl.gz ...

Trajectories: JSON lines with `segments` of {role, content} (system left out), or with a `question` and
`code`, a list of texts.  Those of one model and data set become pairs at random; longer ones than
--max-tokens are dropped and counted.  Or --pairs, of runs: iteration-*/pairs/pairs.jsonl.gz.

Fill is the share of computed tokens that are no padding, over an epoch.  `first fit` deals groups,
longest first, to the first micro-batch and row with room; `subset sums` is data/bins.py; `balanced`
are the batches of data/batches.py, `fitted` the shape of data/fitting.py.
"""

from __future__ import annotations

import argparse
import gzip
import json
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from mdpo_jax.data import store
from mdpo_jax.data.batches import Batches, Groups, Shuffled
from mdpo_jax.data.bins import arrange
from mdpo_jax.data.fitting import fitted
from mdpo_jax.data.packing import Item, Layout, pieces

OVERHEAD = 8  # tokens of a chat's headers and ends, about


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """Of the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trajectories", type=Path, nargs="+", default=[])
    parser.add_argument("--tokenizer", type=Path, help="a sentencepiece model")
    parser.add_argument("--pairs", type=Path, nargs="+", default=[])
    parser.add_argument("--max-tokens", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=32, help="pairs a step")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--row-length", type=int, default=2048)
    parser.add_argument("--ways", type=int, nargs="+", default=[1], help="mesh.data x mesh.fsdp")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(given)
    if options.batch < 1:
        parser.error(f"--batch={options.batch}: expected at least 1")
    if not options.pairs and not (options.trajectories and options.tokenizer):
        parser.error("expected --pairs, or --trajectories and --tokenizer")
    tokenizer = [options.tokenizer] if options.tokenizer else []
    files = {"pairs": options.pairs, "trajectories": options.trajectories, "tokenizer": tokenizer}
    for name, paths in files.items():
        for path in paths:
            if not path.exists() or path.is_dir():  # a pipe will do
                parser.error(f"--{name} {path}: expected a file")
    return options


def lengths(options: argparse.Namespace) -> tuple[list[tuple[int, int]], int]:
    """(chosen, rejected) tokens of each pair, and how many trajectories or pairs were too long."""
    if options.pairs:
        rows = (store.pair_from(r) for path in options.pairs for r in store.read_lines(path))
        found = [(len(pair.chosen.ids), len(pair.rejected.ids)) for pair in rows]
        kept = [pair for pair in found if max(pair) <= options.max_tokens]
        return kept, len(found) - len(kept)
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=str(options.tokenizer))
    kinds, long = defaultdict(list), 0
    for kind, text in _texts(options.trajectories):
        length = len(model.encode(text)) + OVERHEAD
        if length <= options.max_tokens:
            kinds[kind].append(length)
        else:
            long += 1
    rng, out = np.random.default_rng(options.seed), []
    for found in kinds.values():
        out += list(zip(found, rng.permutation(found).tolist(), strict=True))
    return out, long


def _texts(paths: Sequence[Path]) -> Iterator[tuple[tuple[str, str], str]]:
    for path in paths:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as lines:
            for row in map(json.loads, lines):
                if "segments" in row:
                    parts = [s["content"] for s in row["segments"] if s["role"] != "system"]
                else:
                    parts = [row["question"], *row["code"]]
                yield (row.get("model", ""), row.get("dataset", "")), "\n".join(parts)


class Random(Shuffled):
    """Batches as the shuffled epoch has them."""

    def _epoch(self, epoch: int) -> np.ndarray:
        return np.random.default_rng((self.seed, epoch)).permutation(len(self.groups))


def first_fit(groups: Groups, layout: Layout) -> int:
    """Micro-batches of first fit, longest group first."""
    micros: list[list[int]] = []
    for sizes in sorted(map(pieces, groups), key=sum, reverse=True):
        for used in [*micros, new := [0] * layout.rows]:
            trial = used.copy()
            for size in sizes:
                row = next((r for r, u in enumerate(trial) if u + size <= layout.row_length), None)
                if row is None:
                    break
                trial[row] += size
            else:
                used[:] = trial
                if used is new:
                    micros.append(used)
                break
    return len(micros)


def subset_sums(groups: Groups, layout: Layout) -> int:
    """Micro-batches of `pack`."""
    sizes = list(map(pieces, groups))
    return len(arrange(sizes, layout.rows, layout.row_length, layout.sequences))


def fill(batches: Batches, steps: int, layout: Layout, packer) -> float:
    """Tokens by tokens computed, over the steps."""
    tokens = room = 0
    for step in range(steps):
        groups = batches[step]
        tokens += sum(sum(pieces(group)) for group in groups)
        room += packer(groups, layout) * layout.rows * layout.row_length
    return tokens / room


def main(given: Sequence[str] | None = None) -> None:
    """Measure and print a table."""
    options = arguments(given)
    found, long = lengths(options)

    def item(length: int) -> Item:
        nothing = np.zeros(length, np.int32)
        return Item(nothing, nothing, nothing)

    groups = [(item(a), item(b)) for a, b in found]
    tokens = np.asarray(found)
    steps = len(groups) // options.batch
    if not steps:
        raise SystemExit(
            f"--batch={options.batch}: expected at most the {len(groups)} pairs found, beside {long} "
            f"that are longer than --max-tokens={options.max_tokens}"
        )
    print(f"{len(groups)} pairs in {steps} batches, {long} too long; tokens a sequence: mean "
          f"{tokens.mean():.0f}, median {np.median(tokens):.0f}, most {tokens.max()}\n")  # fmt: skip
    names = "rows over", "shape", "first fit", "subset sums", "balanced", "fitted shape", "fitted"
    print(f"| {' | '.join(names)} |\n| {' | '.join(['---'] * len(names))} |")
    random, even = (kind(groups, options.batch, options.seed) for kind in (Random, Shuffled))
    for ways in options.ways:
        rows = -(-options.rows // ways) * ways
        layout = Layout(rows, options.row_length, 2 * options.batch)
        start = time.process_time()
        best = fitted(even, steps, layout, ways, int(tokens.max()))
        took = time.process_time() - start
        fills = [
            fill(random, steps, layout, first_fit),
            fill(random, steps, layout, subset_sums),
            fill(even, steps, layout, subset_sums),
            fill(even, steps, best, subset_sums),
        ]
        cells = " | ".join(f"{value:.3f}" for value in fills[:3])
        print(f"| {ways} | {rows} x {options.row_length} | {cells} | "
              f"{best.rows} x {best.row_length} ({took:.1f} s) | {fills[3]:.3f} |")  # fmt: skip


if __name__ == "__main__":
    main()
