"""`tiny` with a tool that prints a wrong number in a quarter of its calls: for term (C).

Result    docs/benchmarks.md, "Term (C) in the pipeline"
Hardware  2 CPU cores, 3 GiB of memory
Command   python -m mdpo_jax.train --config=tiny_stochastic --config.term_c.kind=monte_carlo

The observations are stochastic, so plain M-DPO blames actions for the tool's luck (equation 13).
Against `tiny`: no warning lines, two iterations, and a right answer is worth 4 logits.
"""

import dataclasses

from mdpo_jax.config import Config, TermC
from mdpo_jax.recipes import load_recipe


def get_config() -> Config:
    """The recipe."""
    tiny = load_recipe("tiny")
    return dataclasses.replace(
        tiny,
        name="tiny-stochastic",
        iterations=2,
        problems=dataclasses.replace(tiny.problems, fault=0.25, noise=0.0),
        term_c=TermC(utility=4.0),
    )
