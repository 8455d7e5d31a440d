"""How an iteration's trajectories are sought: the names, their numbers, and what goes with them."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from mdpo_jax.checks import above_zero, at_least, require

Strategy = Literal["mixture", "temperatures", "checkpoints", "west", "branch", "mcts"]
Choice = Literal["random", "west", "siblings", "values"]

# Strategy -> how right and wrong trajectories are paired (data/pairing.py).
CHOICE: dict[Strategy, Choice] = {
    "mixture": "random",
    "temperatures": "random",
    "checkpoints": "random",
    "west": "west",
    "branch": "siblings",
    "mcts": "values",
}
# Those that go on from states of other trajectories.
TREES = ("branch", "mcts")
# Fields of Explore that one strategy alone reads.
_READ_BY: dict[str, Strategy] = {
    "temperatures": "temperatures",
    "checkpoints": "checkpoints",
    "base": "branch",
    "c_puct": "mcts",
    "width": "mcts",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Explore:
    """Where an iteration's trajectories come from (rollout/explore.py).

    strategy: `mixture`, the paper's: rollout.samples of the current policy and
    rollout.previous_samples of the one before.  The others spend both on: `temperatures`, the current
    policy at each of `temperatures` in turn; `checkpoints`, the parameters after these shares of the
    steps of the last training (1: the current policy), in equal parts; `west`, the current policy, of
    which the best right and the worst wrong trajectory make a pair; `branch`, a share `base` from the
    prompt and the rest from states after a tool call of these; `mcts`, tree search over turns.
    budget_tokens: a problem gets another trajectory while fewer tokens have been sampled for it; 0
    gives as many trajectories as rollout.samples + rollout.previous_samples, however long.
    c_puct: weight of the reference's prior.  width: turns that may be sampled from one state.
    """

    strategy: Strategy = "mixture"
    budget_tokens: int = 0
    temperatures: tuple[float, ...] = (0.7, 1.0, 1.3)
    checkpoints: tuple[float, ...] = (0.5, 1.0)
    base: float = 0.5
    c_puct: float = 1.0
    width: int = 4

    def __post_init__(self) -> None:
        at_least(0, "explore", self, "budget_tokens", "c_puct")
        at_least(1, "explore", self, "width")
        above_zero("explore", self, "base")
        require(self.base < 1, "explore.base", self.base, "below 1, or explore.strategy=mixture")
        right = bool(self.temperatures) and min(self.temperatures) > 0
        require(right, "explore.temperatures", self.temperatures, "numbers above 0, at least one")
        found = self.checkpoints
        right = bool(found) and min(found) > 0 and max(found) <= 1 and len({*found}) == len(found)
        accepted = "different shares above 0 and at most 1, at least one"
        require(right, "explore.checkpoints", found, accepted)


def inconsistency(explore: Explore, config: Any) -> str | None:
    """Why a strategy cannot go with the rest of the config, or None.

    What the strategy would silently ignore is refused.
    """
    name, rollout = explore.strategy, config.rollout
    for field, reader in _READ_BY.items():
        default = getattr(Explore(), field)
        if getattr(explore, field) != default and name != reader:
            value = getattr(explore, field)
            return f"explore.{field}={value} is read by {reader} only; expected {default}"
    if name == "temperatures" and rollout.temperature != 1:
        return f"rollout.temperature={rollout.temperature} beside explore.temperatures; expected 1"
    if name == "west" and config.preset.objective == "likelihood":
        return f"its pairs are not read by method={config.method}; expected a method with pairs"
    if name in TREES and rollout.max_turns == 1:
        return "rollout.max_turns=1 leaves no state to go on from; expected at least 2"
    if name in TREES and config.term_c.kind == "value":
        return "term_c.kind=value learns from the policies' own trajectories; expected none"
    if name == "mcts" and config.reference != "updated":
        return (
            f"its prior is the sampling policy's, but the reference is {config.reference}; "
            "expected updated"
        )
    return None
