"""Products with parameters, whose gradients XLA multiplies fast on a CPU."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

_STRIP = 16  # rows turned at a time: their values of a column fill a cache line


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def product(x: jax.Array, kernel: jax.Array, inputs: int, dtype: Any = None) -> jax.Array:
    """x @ kernel over x's last and the kernel's first `inputs` axes; dtype: of the sums, or x's.

    The kernel's gradient is x^T @ g.  jax would write it as g^T @ x and transpose that.  On a CPU
    XLA lays out what comes first a second time, transposed, value by value, which costs as much as
    a tenth of the products: in float32 it is there the narrower of the two, and turned in strips.
    """
    return jnp.tensordot(x, kernel, inputs, preferred_element_type=dtype)


def _forward(x: jax.Array, kernel: jax.Array, inputs: int, dtype: Any) -> tuple[jax.Array, Any]:
    return product(x, kernel, inputs, dtype), (x, kernel)


def _backward(inputs: int, dtype: Any, kept: Any, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = kept
    outputs = kernel.ndim - inputs
    rows = x.ndim - inputs
    contract = functools.partial(_contract, dtype=dtype)

    def plain(x: jax.Array, g: jax.Array) -> jax.Array:
        return contract(x, g, (tuple(range(rows)),) * 2)

    def in_strips(x: jax.Array, g: jax.Array) -> jax.Array:
        count = math.prod(x.shape[:rows])
        x = x.reshape(count, math.prod(kernel.shape[:inputs]))
        g = g.reshape(count, math.prod(kernel.shape[inputs:]))
        narrow = x.shape[1] <= g.shape[1]
        left, right = (x, g) if narrow else (g, x)
        # Behind a barrier: XLA would write a transpose of it as the product of the transposes.
        of_kernel = jax.lax.optimization_barrier(contract(_turned(left), right, ((1,), (0,))))
        return (of_kernel if narrow else of_kernel.T).reshape(kernel.shape)

    # A loop over rows would gather those that lie on other devices, and in bfloat16 a CPU converts
    # all that has been turned in each of its rounds.
    if on_one_device() and x.dtype == g.dtype == jnp.float32:
        of_kernel = jax.lax.platform_dependent(x, g, cpu=in_strips, default=plain)
    else:
        of_kernel = plain(x, g)
    back = tuple(range(g.ndim - outputs, g.ndim)), tuple(range(inputs, kernel.ndim))
    of_x = contract(g, kernel, back)
    return of_x.astype(x.dtype), of_kernel.astype(kernel.dtype)


def on_one_device() -> bool:
    """Whether what is traced is for one device: outside of `jax.set_mesh`, or in that of one.

    Arrays that lie on several devices all the same get right values, with more exchanges.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.empty or mesh.size == 1


def _contract(a: jax.Array, b: jax.Array, axes: Any, dtype: Any) -> jax.Array:
    return jax.lax.dot_general(a, b, (axes, ((), ())), preferred_element_type=dtype)


def _turned(x: jax.Array) -> jax.Array:
    """The transpose of a matrix, by a loop: XLA neither fuses that nor reads it value by value."""
    count, width = x.shape
    if count < _STRIP:
        return x.T

    def strip(i: jax.Array, turned: jax.Array) -> jax.Array:
        start = jnp.minimum(i * _STRIP, count - _STRIP)  # the last may turn some rows again
        rows = jax.lax.dynamic_slice(x, (start, 0), (_STRIP, width))
        return jax.lax.dynamic_update_slice(turned, rows.T, (0, start))

    return jax.lax.fori_loop(0, -(-count // _STRIP), strip, jnp.zeros((width, count), x.dtype))


product.defvjp(_forward, _backward)
