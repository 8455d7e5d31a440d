r"""Search over turns: which state to sample from next.  A tree of one problem; no model, no tokens.

    root = the prompt        an edge is a sampled turn, a node the state after its observation
     /  |  \                 (or the end of a trajectory, with no state to go on from)
    A   B   end
    |
    C                        one simulation: select a node, sample from it to the end, add its turns

PUCT as in AlphaZero (Silver et al. 2017): of the children that lead on, the one with the largest
    Q(child) + c_puct * P(child) * sqrt(N(node)) / (1 + N(child)),
Q the mean reward of the simulations through the child, N how many they are.  A node's actions are
sampled turns, so P is the reference's probability of the turn, normalised over those there are.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple


class Turn(NamedTuple):
    """A sampled turn with its observation.

    key: equal for turns that lead to the same state.  log_prob: of the turn, under the reference, in
    nats.  ended: whether nothing can follow.
    """

    key: Hashable
    log_prob: float
    ended: bool


@dataclasses.dataclass
class Node:
    """A state.  depth: turns before it.  log_prior: of the turn that led to it.

    sample: the simulation that came here first.  visits, total: of simulations through it, and their
    rewards.  sampled: how many turns were sampled from it, equal ones too.
    """

    depth: int = 0
    log_prior: float = 0.0
    ended: bool = False
    sample: int | None = None
    visits: int = 0
    total: float = 0.0
    sampled: int = 0
    children: dict[Hashable, Node] = dataclasses.field(default_factory=dict)

    @property
    def value(self) -> float:
        """Q: the mean reward below; 0 before any."""
        return self.total / self.visits if self.visits else 0.0

    def leads_on(self, width: int) -> bool:
        """Whether a turn may still be sampled here or below."""
        below = (child.leads_on(width) for child in self.children.values())
        return not self.ended and (self.sampled < width or any(below))


def priors(node: Node) -> dict[Hashable, float]:
    """P of each child; they add up to 1."""
    if not node.children:
        return {}
    top = max(child.log_prior for child in node.children.values())
    masses = {key: math.exp(child.log_prior - top) for key, child in node.children.items()}
    whole = sum(masses.values())
    return {key: mass / whole for key, mass in masses.items()}


def scores(node: Node, c_puct: float, width: int) -> dict[Hashable, float]:
    """PUCT of each child that leads on."""
    prior, root = priors(node), math.sqrt(node.visits)
    return {
        key: child.value + c_puct * prior[key] * root / (1 + child.visits)
        for key, child in node.children.items()
        if child.leads_on(width)
    }


def select(root: Node, *, c_puct: float, width: int) -> list[Node]:
    """The path from the root to the node that the next turn is sampled from.

    Progressive widening: N simulations through a node allow 1 + sqrt(N) turns from it, `width` at
    most; then, and where that is all it can have, its children are gone down.  If nothing leads on,
    the root is sampled from beyond its width.  Ties go to the child that is there longer.
    """
    path = [root]
    while True:
        node = path[-1]
        found = scores(node, c_puct, width)
        if not found or node.sampled < min(width, 1 + math.isqrt(node.visits)):
            return path
        path.append(node.children[max(found, key=found.__getitem__)])


def add(path: Sequence[Node], turns: Sequence[Turn], reward: float, sample: int) -> None:
    """A simulation from the end of `path`: its turns become nodes, its reward counts all the way up."""
    nodes = list(path)
    for turn in turns:
        last = nodes[-1]
        last.sampled += 1
        fresh = Node(last.depth + 1, turn.log_prob, turn.ended, sample)
        nodes.append(last.children.setdefault(turn.key, fresh))
    for node in nodes:
        node.visits += 1
        node.total += reward
