"""Packed causal attention on accelerators: the kernels, and which of them a platform gets.

Every kernel is `f(q_BTHK, k_BSGK, v_BSGK, segments_BT, *, scale, window, softcap, prefix) -> out_BTHK`:
token t sees token s <= t of its row if their segments are equal or s is in t's prefix and, under a
window, if t - s < window.

    backend        platform  window     softcap  prefix   head_dim             skips blocks outside
    splash         TPU       yes        yes      refused  any, padded to 128s  the triangle, the window
    cudnn          CUDA      in a mask  refused  yes      multiples of 8       the triangle
    pallas_triton  GPU       refused    refused  refused  up to 256            the triangle

No kernel here skips the blocks between two segments: segments are data, their block grids are
static.  On a CPU, where loops may have traced bounds, skipping.py does.
Under `jax.set_mesh` each device runs the kernel on its own rows and heads (see `on_mesh`).

Suffixes: B rows, T queries, S keys, H query heads, G key heads, K head_dim.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mdpo_jax.model.sharding import RULES, partition
from mdpo_jax.products import on_one_device

LANES = 128  # a TPU register's minor dimension: splash wants lengths and head_dim in multiples
SPLASH_BLOCK = 512
CUDNN_LENGTH = 16384  # beyond it, the mask and its unwanted gradient take over 1 GiB a row
SPLASH_DTYPES = (jnp.bfloat16, jnp.float32)
HALVES = (jnp.bfloat16, jnp.float16)

Local = Callable[[jax.Array, jax.Array, jax.Array, Any], jax.Array]

# Where a kernel runs, as `jax.default_backend()` names it; what is not here runs anywhere.
PLATFORMS = {"splash": "tpu", "cudnn": "gpu", "pallas_triton": "gpu"}
# Backends in which a segment may go on from another one.
WITH_PREFIX = ("reference", "skipping", "cudnn")


def sees_prefixes(backend: str, platform: str) -> bool:
    """Whether a `Prefix` may be given; whatever `choose` takes for the platform may do."""
    return platform != "tpu" if backend == "auto" else backend in WITH_PREFIX


class Prefix(NamedTuple):
    """What tokens see beside their own segment, where two segments go on from one.

        row        | P P P P P | A A A | B B B B |      A and B go on from P
        bounds     | 0,0 ...   | 0,5   | 0,5     |
        positions  | 0 1 2 3 4 | 5 6 7 | 5 6 7 8 |

    bounds: first place in the row and the place after the last; equal ones for none.
    positions: of each token in its sequence; windows are measured by them.
    """

    bounds: Int[Array, "rows length 2"]
    positions: Int[Array, "rows length"]


def visible(
    segments_BT: Array, prefix: Prefix | None, first: int, start: int, stop: int,
    window: int | None,
) -> Array:  # fmt: skip
    """Bool [rows, stop - start, stop - first]: which keys from `first` on each query sees."""
    queries, keys = jnp.arange(start, stop)[:, None], jnp.arange(first, stop)[None]
    mask = segments_BT[:, start:stop, None] == segments_BT[:, None, first:stop]
    apart = queries - keys
    if prefix is not None:
        begin, end = (prefix.bounds[:, start:stop, None, i] for i in range(2))
        mask |= (keys >= begin) & (keys < end)
        positions = prefix.positions
        apart = positions[:, start:stop, None] - positions[:, None, first:stop]
    mask &= queries >= keys
    return mask if window is None else mask & (apart < window)


def choose(
    platform: str,
    *,
    window: int | None,
    softcap: float | None,
    head_dim: int,
    length: int,
    dtype: Any,
) -> str:
    """The backend for a layer: "reference", "skipping", or one of `KERNELS` that supports it.

    platform: of the devices, as `jax.default_backend()` names it.

    TPU: splash.  GPU: cudnn, and where it cannot run the chunked reference: soft-capped logits
    (Gemma-2), float32, a head_dim beyond the card's (256 from Hopper on, 128 before), masks of
    more than `CUDNN_LENGTH` squared.  pallas_triton is never chosen, only offered by name: it
    repeats grouped key heads, its blocks have not been timed, and jax has deprecated it since 0.11.
    CPU: skipping (skipping.py).  Anything else: the reference.
    """
    del window  # splash takes any; cudnn's mask too
    dtype = jnp.dtype(dtype)
    if platform == "tpu":
        return "splash" if dtype in SPLASH_DTYPES else "reference"
    if platform in ("gpu", "cuda"):
        fits = head_dim % 8 == 0 and head_dim <= _cudnn_head_dim() and length <= CUDNN_LENGTH
        return "cudnn" if softcap is None and dtype in HALVES and fits else "reference"
    return "skipping" if platform == "cpu" else "reference"


def splash(
    q_BTHK: Float[Array, "rows length heads head_dim"],
    k_BSGK: Float[Array, "rows length kv_heads head_dim"],
    v_BSGK: Float[Array, "rows length kv_heads head_dim"],
    segments_BT: Int[Array, "rows length"],
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    prefix: None = None,
    interpret: bool = False,
) -> Float[Array, "rows length heads head_dim"]:
    """Splash attention on TPU; float32 scores, softmax and sums.

    Any length and head_dim: both are padded, the length with segment 0.  interpret: run the kernel
    as plain jax, on any platform and slowly; for tests.
    Raises ValueError for a dtype other than bfloat16 and float32, and for a prefix.
    """
    check("splash", q_BTHK, k_BSGK, window, prefix)
    if q_BTHK.dtype not in SPLASH_DTYPES:
        raise _refused("splash", "dtype", q_BTHK.dtype, "bfloat16 or float32")
    local = functools.partial(
        _splash_rows, scale=scale, window=window, softcap=softcap, interpret=interpret
    )
    return on_mesh(local, q_BTHK, k_BSGK, v_BSGK, segments_BT)


def cudnn(
    q_BTHK: Float[Array, "rows length heads head_dim"],
    k_BSGK: Float[Array, "rows length kv_heads head_dim"],
    v_BSGK: Float[Array, "rows length kv_heads head_dim"],
    segments_BT: Int[Array, "rows length"],
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    prefix: Prefix | None = None,
) -> Float[Array, "rows length heads head_dim"]:
    """cuDNN's flash attention, through `jax.nn.dot_product_attention`.

    Raises ValueError for a soft-cap, a dtype other than bfloat16 and float16, and a head_dim that
    is not a multiple of 8 or is over 256 (jax itself refuses over 128 before Hopper).
    """
    check("cudnn", q_BTHK, k_BSGK, window)
    if softcap is not None:
        raise _refused("cudnn", "softcap", softcap, "None: cuDNN cannot cap scores; use reference")
    if q_BTHK.dtype not in HALVES:
        raise _refused("cudnn", "dtype", q_BTHK.dtype, "bfloat16 or float16")
    head_dim = q_BTHK.shape[-1]
    if head_dim % 8 or head_dim > 256:
        raise _refused("cudnn", "head_dim", head_dim, "a multiple of 8, at most 256")
    local = functools.partial(_cudnn_rows, scale=scale, window=window)
    return on_mesh(local, q_BTHK, k_BSGK, v_BSGK, (segments_BT, prefix))


def pallas_triton(
    q_BTHK: Float[Array, "rows length heads head_dim"],
    k_BSGK: Float[Array, "rows length kv_heads head_dim"],
    v_BSGK: Float[Array, "rows length kv_heads head_dim"],
    segments_BT: Int[Array, "rows length"],
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    prefix: None = None,
    interpret: bool = False,
) -> Float[Array, "rows length heads head_dim"]:
    """jax's Triton flash attention: no dense mask, and key heads repeated to the query heads.

    interpret: run the kernel as plain jax, on any platform and slowly; for tests.
    Raises ValueError for a soft-cap, a prefix, a window shorter than the row, or a head_dim over 256.
    """
    check("pallas_triton", q_BTHK, k_BSGK, window, prefix)
    length, head_dim = q_BTHK.shape[1], q_BTHK.shape[-1]
    if softcap is not None:
        raise _refused("pallas_triton", "softcap", softcap, "None: the kernel cannot cap scores")
    if window is not None and window < length:
        expected = f"None or at least the length {length}: the kernel has no window"
        raise _refused("pallas_triton", "window", window, expected)
    if head_dim > 256:
        raise _refused("pallas_triton", "head_dim", head_dim, "at most 256")
    local = functools.partial(_triton_rows, scale=scale, interpret=interpret)
    return on_mesh(local, q_BTHK, k_BSGK, v_BSGK, segments_BT)


KERNELS: dict[str, Callable[..., jax.Array]] = {
    "splash": splash,
    "cudnn": cudnn,
    "pallas_triton": pallas_triton,
}


def on_mesh(local: Local, q_BTHK, k_BSGK, v_BSGK, packed: Any) -> jax.Array:
    """`local` on each device's share: rows over ("data", "fsdp"), heads over "tensor".

    packed: segments, or a tree of arrays of rows; `local` gets its rows of it.

    A kernel is opaque to the partitioner, which would gather all rows to every device.  Where
    "tensor" divides the query heads but not the key heads, each key head is repeated until it does:

        H = 8, G = 2, tensor = 4     device     0    1    2    3
                                     queries    0 1  2 3  4 5  6 7
                                     keys       0    0    1    1
    """
    if on_one_device():
        return local(q_BTHK, k_BSGK, v_BSGK, packed)
    mesh = jax.sharding.get_abstract_mesh()
    q_spec = partition(("rows", None, "heads", None), q_BTHK.shape, mesh)
    if len(q_spec) > 2:  # the heads are sharded
        kv_heads, ways = k_BSGK.shape[2], math.prod(mesh.shape[name] for name in RULES["heads"])
        repeats = math.lcm(kv_heads, ways) // kv_heads
        k_BSGK, v_BSGK = _repeat_heads(k_BSGK, repeats), _repeat_heads(v_BSGK, repeats)
    kv_spec = partition(("rows", None, "kv_heads", None), k_BSGK.shape, mesh)
    packed_spec = partition(("rows",), q_BTHK.shape[:1], mesh)
    sharded = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(q_spec, kv_spec, kv_spec, packed_spec),
        out_specs=q_spec,
        check_vma=False,  # a pallas call does not say over which axes its results vary
    )
    return sharded(q_BTHK, k_BSGK, v_BSGK, packed)


def _splash_rows(
    q_BTHK, k_BSGK, v_BSGK, segments_BT, *, scale, window, softcap, interpret
) -> jax.Array:
    """One device's rows and heads through splash, which takes one row as [heads, length, head_dim]."""
    # Imported here: Pallas for TPU is of no use to the other platforms.
    from jax.experimental.pallas.ops.tpu import splash_attention as lib

    length, heads, head_dim = q_BTHK.shape[1:]
    block, blocks = _splash_blocks(length)
    padded = block * blocks
    kernel = lib.make_splash_mha(
        _splash_mask(padded, heads, window if window is not None and window < length else None),
        block_sizes=lib.BlockSizes(
            **dict.fromkeys(("block_q", "block_kv", "block_kv_compute"), block),
            **dict.fromkeys(("block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute"), block),
            **dict.fromkeys(("block_q_dq", "block_kv_dq"), block),
        ),
        attn_logits_soft_cap=softcap,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    # The kernel has no scale; one rounding of the scaled query, and none where scale is 2^-n.
    q_BTHK = (q_BTHK.astype(jnp.float32) * scale).astype(q_BTHK.dtype)
    widths = ((0, padded - length), (0, 0), (0, -head_dim % LANES))
    q, k, v = (
        jnp.pad(x, ((0, 0), *widths)).transpose(0, 2, 1, 3) for x in (q_BTHK, k_BSGK, v_BSGK)
    )
    segments = jnp.pad(segments_BT, ((0, 0), widths[0])).astype(jnp.int32)
    out_BHTK: Any = jax.vmap(kernel)(q, k, v, lib.SegmentIds(q=segments, kv=segments))
    return out_BHTK.transpose(0, 2, 1, 3)[:, :length, :, :head_dim]


def _splash_blocks(length: int) -> tuple[int, int]:
    """(block, blocks): the fewest blocks of at most `SPLASH_BLOCK`, no wider than the row needs.

    A wide block reads keys and values fewer times; 512 x 512 float32 scores are 1 MiB, and with
    head_dim 256 the passes compile within the on-chip memory of v5e.  Fitting the block to the row
    keeps padding under 128 tokens a block: 600 tokens run as 2 x 384, not 2 x 512.
    """
    blocks = -(-length // SPLASH_BLOCK)
    per_block = -(-length // blocks)
    return -(-per_block // LANES) * LANES, blocks


@functools.lru_cache(maxsize=64)
def _splash_mask(length: int, heads: int, window: int | None) -> Any:
    """The static mask of all heads.

    Only the mask is kept between traces: the kernel made from it holds arrays of its trace.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as lib

    shape = (length, length)
    mask = lib.CausalMask(shape) if window is None else lib.LocalMask(shape, (window - 1, 0), 0)
    return lib.MultiHeadMask([mask] * heads)


def _cudnn_rows(q_BTHK, k_BSGK, v_BSGK, packed, *, scale, window) -> jax.Array:
    """One device's rows and heads through cuDNN, segments and window as a dense mask [B, 1, T, S].

    jax's public interface has no packed layout.  The window is in the mask and not an argument
    because cuDNN before 9.10.2 refuses a left bound beside a mask.  The triangle is an argument, so
    that the blocks above it are skipped.
    """
    length = q_BTHK.shape[1]
    # jax gives a mask a gradient, and cuDNN before 9.5 has that only for multiples of 64.
    padded = [q_BTHK, k_BSGK, v_BSGK, packed]
    q, k, v, (segments, prefix) = jax.tree.map(lambda x: _pad_length(x, 64), padded)
    narrow = window if window is not None and window < length else None
    mask_BTS = visible(segments, prefix, 0, 0, segments.shape[1], narrow)
    out_BTHK = jax.nn.dot_product_attention(
        q, k, v, mask=mask_BTS[:, None], scale=scale, is_causal=True, implementation="cudnn"
    )
    return out_BTHK[:, :length]


def _triton_rows(q_BTHK, k_BSGK, v_BSGK, segments_BT, *, scale, interpret) -> jax.Array:
    """One device's rows and heads through the Triton kernel.

    Blocks shrink as head_dim grows so that one block of queries and two stages of keys and values
    stay under 100 KiB of shared memory in 16-bit dtypes.
    """
    from jax.experimental.pallas.ops.gpu import attention as lib

    length, heads, head_dim = q_BTHK.shape[1:]
    block_q, block_k = (64, 32) if head_dim > 128 else (128, 64)
    k_BSHK, v_BSHK = (_repeat_heads(x, heads // x.shape[2]) for x in (k_BSGK, v_BSGK))
    q, k, v, segments = (_pad_length(x, 128) for x in (q_BTHK, k_BSHK, v_BSHK, segments_BT))
    sizes = lib.BlockSizes(block_q, block_k, **dict.fromkeys(_TRITON_BACKWARD, 32))
    out_BTHK: Any = lib.mha(
        q, k, v, segments, sm_scale=scale, causal=True, block_sizes=sizes, interpret=interpret
    )
    return out_BTHK[:, :length]


_TRITON_BACKWARD = ("block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq")


def _repeat_heads(x_BSGK, repeats: int) -> jax.Array:
    """Each key head `repeats` times in a row, so that query head h still reads its own."""
    return x_BSGK if repeats == 1 else jnp.repeat(x_BSGK, repeats, axis=2)


def _pad_length(x: jax.Array, multiple: int) -> jax.Array:
    """Zeros at the end of axis 1; in segments they are padding."""
    missing = -x.shape[1] % multiple
    return jnp.pad(x, ((0, 0), (0, missing), *[(0, 0)] * (x.ndim - 2)))


def _cudnn_head_dim() -> int:
    """The largest head_dim of this machine's card; of a Hopper where no CUDA card is to be seen."""
    capability = str(getattr(jax.devices()[0], "compute_capability", "9.0"))
    if not capability.replace(".", "").isdigit():
        return 0  # ROCm names its cards "gfx90a" and has no cuDNN
    return 256 if float(capability) >= 9 else 128


def check(backend: str, q_BTHK, k_BSGK, window: int | None, prefix: Prefix | None = None) -> None:
    """Raises ValueError for key heads that do not divide the heads, a window below 1, or a prefix."""
    if prefix is not None:
        accepted = f"None; segments that go on from another one need {', '.join(WITH_PREFIX)}"
        raise _refused(backend, "prefix", "one", accepted)
    heads, kv_heads = q_BTHK.shape[2], k_BSGK.shape[2]
    if heads % kv_heads:
        raise _refused(backend, "kv_heads", kv_heads, f"a divisor of the {heads} heads")
    if window is not None and window < 1:
        raise _refused(backend, "window", window, "None or a positive integer")


def _refused(backend: str, field: str, value: Any, expected: str) -> ValueError:
    return ValueError(f"attention backend {backend}: {field}: {value}; expected {expected}")
