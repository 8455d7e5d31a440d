"""mdpo_jax: multi-turn, tool-integrated, iterative preference learning in JAX (arXiv 2409.02392).

policy = mdpo_jax.load_policy("org/name")
policy.logits([[2, 651, 6996]])
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mdpo_jax.model.policy import Policy, load_policy

__version__ = "0.1.0"
__all__ = ["Policy", "load_policy"]


def __getattr__(name: str) -> Any:
    # On first use: the doors parse their arguments before jax is imported, workers never import it.
    if name in __all__:
        from mdpo_jax.model import policy

        return getattr(policy, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
