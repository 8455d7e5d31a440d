"""mdpo_jax: multi-turn, tool-integrated, iterative preference learning in JAX (arXiv 2409.02392)."""

__version__ = "0.1.0"
