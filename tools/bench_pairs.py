"""The pairs, the counts and the figures of the step benchmark, by the shared specification.

The same seed gives the same token ids and masks as the generator that the peers' benchmarks use, so
that every trainer sees the same pairs.  The random calls and their order are the specification:

    a pair   length of the prompt; chosen, then rejected: length, ids, places of observations; and
             the prompt's ids last
    lengths  lognormal: prompts of 100 (20 to 300), responses of 300 (150 to 600, or what max_len
             leaves), about 15 % of a response observation in spans of 8 to 40 tokens
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from mdpo_jax.model import flops
from mdpo_jax.model.families import ModelConfig

EOS, FIRST_TOKEN = 1, 4


class BenchPair(NamedTuple):
    """Token ids of the prompt and of both responses; a mask is 1 where the model acted."""

    prompt: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray
    chosen_mask: np.ndarray
    rejected_mask: np.ndarray

    @property
    def lengths(self) -> tuple[int, int]:
        """Of both sequences, each with its own copy of the prompt."""
        return len(self.prompt) + len(self.chosen), len(self.prompt) + len(self.rejected)


def make_pairs(count: int, vocab: int, seed: int = 0, max_len: int = 1024) -> list[BenchPair]:
    """`count` pairs of random ids below `vocab`; fewer are the first of more."""
    rng = np.random.default_rng(seed)

    def ids(length: int) -> np.ndarray:
        return rng.integers(FIRST_TOKEN, vocab, length).astype(np.int32)

    pairs = []
    for _ in range(count):
        prompt, sides = _length(rng, 100, 0.4, 20, 300), []
        for _ in range(2):
            length = min(_length(rng, 300, 0.45, 150, 600), max_len - prompt)
            response = ids(length)
            response[-1] = EOS
            sides.append((response, _acted(rng, length)))
        (chosen, chosen_mask), (rejected, rejected_mask) = sides
        pairs.append(BenchPair(ids(prompt), chosen, rejected, chosen_mask, rejected_mask))
    return pairs


def _length(rng: np.random.Generator, median: float, sigma: float, low: int, high: int) -> int:
    return int(np.clip(round(float(rng.lognormal(np.log(median), sigma))), low, high))


def _acted(rng: np.random.Generator, length: int) -> np.ndarray:
    mask, left = np.ones(length, np.int8), round(length * 0.15)
    while left > 0:
        span = min(left, int(rng.integers(8, 41)))
        start = int(rng.integers(1, max(2, length - span)))
        left -= int(mask[start : start + span].sum())
        mask[start : start + span] = 0
    return mask


def step_flops(config: ModelConfig, pairs: Sequence[BenchPair], in_step: bool) -> float:
    """FLOPs that a step needs without padding or sharing, the head over every token, as the peers
    count them."""
    lengths = [n for pair in pairs for n in pair.lengths]
    return flops.step_flops(config, lengths, sum(lengths), reference=in_step)


class Lap(NamedTuple):
    """One timed step: seconds of the wall clock and of the processor, what it did, and with what.

    processed: tokens, padding included.
    """

    wall: float
    cpu: float
    pairs: Sequence[BenchPair]
    processed: int


def figures(config: ModelConfig, laps: Sequence[Lap], in_step: bool) -> dict[str, Any]:
    """The fields that every training benchmark prints."""
    wall, cpu = sum(lap.wall for lap in laps), sum(lap.cpu for lap in laps)
    real = [sum(sum(pair.lengths) for pair in lap.pairs) for lap in laps]
    gflop = sum(step_flops(config, lap.pairs, in_step) for lap in laps) / 1e9
    return {
        "step_s": spread([lap.wall for lap in laps]),
        "step_cpu_s": spread([lap.cpu for lap in laps]),
        "useful_tokens": {
            "per_s": spread([n / lap.wall for n, lap in zip(real, laps, strict=True)]),
            "per_cpu_s": spread([n / lap.cpu for n, lap in zip(real, laps, strict=True)]),
            "total_per_s": sum(real) / wall,
            "total_per_cpu_s": sum(real) / cpu,
        },
        "pairs_per_cpu_s": sum(len(lap.pairs) for lap in laps) / cpu,
        "useful_gflop_per_s": gflop / wall,
        "useful_gflop_per_cpu_s": gflop / cpu,
        "real_fraction": sum(real) / sum(lap.processed for lap in laps),
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, extremes and number."""
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "n": len(values),
    }


def rounded(value: Any) -> Any:
    """Numbers to five digits, at any depth."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {name: rounded(entry) for name, entry in value.items()}
    return value
