"""A projection's product, with a gradient of the kernel that XLA multiplies fast on a CPU."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def product(x: jax.Array, kernel: jax.Array, inputs: int) -> jax.Array:
    """x @ kernel over x's last and the kernel's first `inputs` axes.

    The kernel's gradient is x^T @ g.  jax would write it as g^T @ x and transpose that.  On a CPU
    XLA lays out what comes first a second time, transposed, which costs as much as a tenth of the
    products: there it is the narrower of the two.
    """
    return jnp.tensordot(x, kernel, inputs)


def _forward(x: jax.Array, kernel: jax.Array, inputs: int) -> tuple[jax.Array, Any]:
    return product(x, kernel, inputs), (x, kernel)


def _backward(inputs: int, kept: Any, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = kept
    rows, outputs = tuple(range(x.ndim - inputs)), kernel.ndim - inputs

    def plain(x: jax.Array, g: jax.Array) -> jax.Array:
        return jnp.tensordot(x, g, (rows, rows))

    def narrow(x: jax.Array, g: jax.Array) -> jax.Array:
        turned = jax.lax.optimization_barrier(plain(g, x))  # else XLA turns the product back
        return jnp.moveaxis(turned, range(outputs), range(inputs, kernel.ndim))

    back = tuple(range(g.ndim - outputs, g.ndim)), tuple(range(inputs, kernel.ndim))
    if g.size < x.size:
        of_kernel = jax.lax.platform_dependent(x, g, cpu=narrow, default=plain)
    else:
        of_kernel = plain(x, g)
    return jnp.tensordot(g, kernel, back), of_kernel


product.defvjp(_forward, _backward)
