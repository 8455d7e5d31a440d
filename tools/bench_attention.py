"""Forward + backward time of the attention backends on one layer's shapes: one JSON line a case.

    python tools/bench_attention.py                                # TPU or GPU
    python tools/bench_attention.py --rows 1 --length 256 --heads 2 --interpret   # CPU: it runs

A line has the device, the median over --repeats, the seconds of the first call (compilation), and
the largest difference from the reference of the same dtype, for the output and the gradients each.
A backend that refuses the case has a line with its message.  Rows are packed with --segments
trajectories and some padding.  The default length is twice Gemma-2's window: at 4096 it hides nothing.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mdpo_jax.model.attention import attend
from mdpo_jax.model.kernels import KERNELS, PLATFORMS, choose

# heads, key heads, head_dim, and what `attend` takes; scale is 256 ** -0.5 in both
LAYERS: dict[str, tuple[int, int, int, dict[str, Any]]] = {
    "gemma-7b": (16, 16, 256, {}),
    "gemma-2-9b": (16, 8, 256, {"window": 4096, "softcap": 50.0}),
}
INTERPRETED = ("splash", "pallas_triton")


def draw(options: argparse.Namespace, heads: int, kv_heads: int, head_dim: int) -> tuple:
    """q, k, v and a cotangent [rows, length, heads, head_dim], and packed segments [rows, length]."""
    rng = np.random.default_rng(options.seed)
    shapes = [
        (options.rows, options.length, h, head_dim) for h in (heads, kv_heads, kv_heads, heads)
    ]
    arrays = [jnp.asarray(rng.normal(size=shape), options.dtype) for shape in shapes]
    # One cut in each stretch keeps every segment non-empty; what lies after the last cut is padding.
    edges = np.linspace(0, options.length, options.segments + 1)
    cuts = rng.uniform(edges[:-1] + 1, edges[1:], (options.rows, options.segments)).astype(int)
    places = np.arange(options.length)
    segments = 1 + (places[None, :, None] >= cuts[:, None, :]).sum(-1)
    return *arrays, jnp.asarray(np.where(segments > options.segments, 0, segments), jnp.int32)


def both_passes(run: Callable, q, k, v, cotangent, segments) -> tuple[jax.Array, ...]:
    """The output and the gradients of q, k and v, without those of padding."""
    out, pull = jax.vjp(lambda *qkv: run(*qkv, segments), q, k, v)
    return out, *pull(jnp.where((segments > 0)[:, :, None, None], cotangent, 0))


def measure(run: Callable, arrays: tuple, repeats: int) -> tuple[tuple, dict[str, float]]:
    """The results, and their times."""
    program = jax.jit(functools.partial(both_passes, run))
    start = time.perf_counter()
    results = jax.block_until_ready(program(*arrays))
    first = time.perf_counter() - start
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(program(*arrays))
        times.append(time.perf_counter() - start)
    return results, {
        "ms": round(1e3 * statistics.median(times), 3),
        "first_call_s": round(first, 2),
    }


def differences(got: tuple, want: tuple, segments: jax.Array) -> dict[str, list[float]]:
    """Of each array: the largest difference and the reference's largest value; padding left out."""
    real = np.asarray(segments > 0)
    pairs = [
        (np.asarray(a, np.float32)[real], np.asarray(b, np.float32)[real])
        for a, b in zip(got, want, strict=True)
    ]
    return {
        name: [float(f"{np.abs(x).max():.3g}") for x in (a - b, b)]
        for name, (a, b) in zip(("out", "dq", "dk", "dv"), pairs, strict=True)
    }


def bench(layer: str, options: argparse.Namespace) -> None:
    """Prints the reference's line and one for each backend."""
    heads, kv_heads, head_dim, cap = LAYERS[layer]
    if options.heads:
        heads, kv_heads = options.heads, max(1, kv_heads * options.heads // heads)
    arrays = draw(options, heads, kv_heads, head_dim)
    scale, device = head_dim**-0.5, jax.devices()[0]
    case = {"device": device.device_kind, "layer": layer, "dtype": options.dtype}
    case |= {"rows": options.rows, "length": options.length, "heads": [heads, kv_heads], **cap}
    limits = {"window": None, "softcap": None} | cap
    case["chosen"] = choose(
        device.platform, **limits, head_dim=head_dim, length=options.length, dtype=options.dtype
    )

    def reference(q, k, v, segments):
        return attend(q, k, v, segments=segments, scale=scale, **cap)

    want, times = measure(reference, arrays, options.repeats)
    print(json.dumps(case | {"backend": "reference"} | times), flush=True)
    here = [name for name, platform in PLATFORMS.items() if platform == device.platform]
    for name in INTERPRETED if options.interpret else here:
        how = limits | {"scale": scale} | ({"interpret": True} if options.interpret else {})
        try:
            got, times = measure(functools.partial(KERNELS[name], **how), arrays, options.repeats)
        except ValueError as error:
            print(json.dumps(case | {"backend": name, "refused": str(error)}), flush=True)
            continue
        delta = {"max_delta_and_max": differences(got, want, arrays[-1])}
        print(json.dumps(case | {"backend": name} | times | delta), flush=True)


def main() -> None:
    """All layers, or the one asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--layer", choices=LAYERS)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--segments", type=int, default=4)
    parser.add_argument("--heads", type=int, default=0, help="fewer heads than the model's")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--interpret", action="store_true", help="kernels as plain jax, on any platform"
    )
    options = parser.parse_args()
    for layer in LAYERS if options.layer is None else (options.layer,):
        bench(layer, options)


if __name__ == "__main__":
    main()
