"""How far M-DPO lands from the Q-Gibbs policy when the tool is random: docs/theory_term_c.png.

    python tools/theory_plot.py [--out docs/theory_term_c.png]        six minutes on a CPU

Three-turn tabular MDPs with stochastic observations; the loss is minimised exactly, without a
margin, with the exact one, and with C estimated from n samples at every state in three ways (nested,
whole continuations, and values regressed on the policy's own log-ratios).  Prints the plotted
numbers.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np

from mdpo_jax.objectives import gibbs, tabular

SAMPLES = tuple(4**k for k in range(1, 9))
MDPS, REPEATS = 4, 4
# Of the alternation of values and policy; it converges quadratically, so the last one decides.
ROUNDS = 5


def nested(mdp: gibbs.MDP, samples: int, rng: np.random.Generator) -> gibbs.Table:
    """C from the recursion over sampled actions and sampled observations."""
    drawn = gibbs.sampled(mdp, samples, rng)
    return gibbs.term_c(drawn, gibbs.solve(drawn).v)


def whole(mdp: gibbs.MDP, samples: int, rng: np.random.Generator) -> gibbs.Table:
    """C from log-mean-exp over whole continuations, and resampled observations."""
    values = gibbs.continuation_values(mdp, samples, rng)
    return gibbs.term_c(gibbs.sampled(mdp, samples, rng), values)


def value(mdp: gibbs.MDP, samples: int, rng: np.random.Generator) -> gibbs.Tables:
    """The policy that alternates with its regressed values, on new draws of its own each round."""
    draw = functools.partial(gibbs.sampled, samples=samples, rng=rng)
    return tabular.minimise_with_values(mdp, draw=draw, rounds=ROUNDS).policy


def fit(mdp: gibbs.MDP, term_c: gibbs.Table | None) -> gibbs.Tables:
    """M-DPO's minimiser with this C."""
    return tabular.minimise(tabular.pair_loss, mdp, tabular.bradley_terry(mdp, term_c=term_c))


def errors(mdp: gibbs.MDP, found: gibbs.Tables) -> tuple[float, float]:
    """(max |delta pi|, share of the possible gain in J that is lost) of a policy."""
    best = gibbs.solve(mdp)
    apart = max(np.abs(p - o).max() for p, o in zip(found, best.policy, strict=True))
    gain = best.value - gibbs.objective(mdp, mdp.reference)
    return float(apart), (best.value - gibbs.objective(mdp, found)) / gain


def measure() -> dict[str, np.ndarray]:
    """Name -> [2] for what has no samples, [samples, 2, MDPs x repeats] for the estimates."""
    mdps = [
        gibbs.random_mdp(np.random.default_rng(seed), horizon=3, eta=0.7) for seed in range(MDPS)
    ]

    def repeated(policy: Callable, samples: int) -> np.ndarray:
        rng = np.random.default_rng(samples)
        runs = [errors(m, policy(m, samples, rng)) for m in mdps for _ in range(REPEATS)]
        return np.array(runs).T

    def with_c(estimate: Callable) -> Callable:
        return lambda mdp, samples, rng: fit(mdp, estimate(mdp, samples, rng))

    exact = [errors(m, fit(m, gibbs.decompose(m, gibbs.solve(m)).c)) for m in mdps]
    limit = [errors(m, fit(m, gibbs.term_c(m, gibbs.continuation_values(m)))) for m in mdps]
    own = [errors(m, tabular.minimise_with_values(m, rounds=ROUNDS).policy) for m in mdps]
    return {
        "plain M-DPO": np.median([errors(m, fit(m, None)) for m in mdps], axis=0),
        "exact C": np.max(exact, axis=0),
        "value, exact expectations": np.max(own, axis=0),
        "limit of whole continuations": np.median(limit, axis=0),
        "nested Monte Carlo": np.stack([repeated(with_c(nested), n) for n in SAMPLES]),
        "whole continuations": np.stack([repeated(with_c(whole), n) for n in SAMPLES]),
        "value": np.stack([repeated(value, n) for n in SAMPLES]),
    }


def draw(found: dict[str, np.ndarray], path: Path) -> None:
    """Two panels, medians with quartiles."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    titles = ("max |π - Gibbs policy|", "share of the gain in J that is lost")
    for index, (axes, title) in enumerate(zip(panels, titles, strict=True)):
        axes.axhline(found["plain M-DPO"][index], color="C3", ls="--", label="plain M-DPO")
        curves = {"whole continuations": "C1", "nested Monte Carlo": "C0", "value": "C2"}
        for name, color in curves.items():
            low, middle, high = np.quantile(found[name][:, index], (0.25, 0.5, 0.75), axis=-1)
            axes.fill_between(SAMPLES, low, high, color=color, alpha=0.2, lw=0)
            axes.plot(SAMPLES, middle, color=color, marker="o", ms=3, label=name)
        axes.axhline(found["limit of whole continuations"][index], color="C1", ls=":", lw=1)
        axes.plot([], [], " ", label=f"exact C: {found['exact C'][index]:.0e}, below the axis")
        axes.set(xscale="log", yscale="log", xlabel="samples at each state", title=title)
        axes.legend(fontsize=7, loc="lower left")
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Measure, print, draw."""
    parser = argparse.ArgumentParser(
        description="Error of M-DPO with and without term (C), tabular."
    )
    parser.add_argument("--out", type=Path, default=Path("docs/theory_term_c.png"))
    path = parser.parse_args().out
    found = measure()
    for name, values in found.items():
        if values.ndim == 1:
            print(f"{name:30s} {values[0]:.2e} {values[1]:.2e}")
            continue
        for samples, pair in zip(SAMPLES, np.median(values, axis=-1), strict=True):
            print(f"{name:22s} {samples:7d} {pair[0]:.2e} {pair[1]:.2e}")
    draw(found, path)


if __name__ == "__main__":
    main()
