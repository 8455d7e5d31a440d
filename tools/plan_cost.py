"""How long a chip takes for a step by formula, and what a sampler needs beside it.

FLOPs are `mdpo_jax/model/flops.py`'s for full rows with every token scored (`useful`), and one forward
more where layers and head are computed again (`executed`; remat=full).

Bytes of a chip's memory a step: of each micro-batch three passes over the gathered weights in the
compute type, written and read, and 16 a parameter of its own for adding gradients up; of activations
and logits what is written and read, roughly; once a step 28 a parameter of its own for AdamW.
The slowest of matmuls, memory, interconnect and data centre's network decides, the others hidden
behind it, and `EFFICIENCY` of its published rate is what is reached.
"""

from __future__ import annotations

from typing import Any

# MaxText's published 45 % MFU of Llama-3.1-8B on v6e-256 with recomputation is 60 % of the peak
# executed (4 forwards' worth for 3).
EFFICIENCY = 0.6


def step_flops(
    model: Any, rows: int, row_length: int, remat: str, adapter: Any = None, *,
    reference: bool = False, point: bool = False,
) -> tuple[float, float]:  # fmt: skip
    """(useful, executed) of a step over full rows; adapter: a `Lora` that is trained instead.

    reference: its forward is part of the step.  point: so are the forwards of KTO's reference point.
    """
    from mdpo_jax.model import flops

    full, scored = [row_length] * rows, rows * row_length
    useful = flops.step_flops(model, full, scored, adapter=adapter, reference=reference)
    forward = flops.forward_flops(model, full, scored, adapter=adapter)
    useful += (1 + reference) * forward if point else 0
    again = forward if remat == "full" else 0
    return useful, useful + again


def memory_traffic(
    model: Any, params: int, chips: int, tensor: int, tokens: float, micros: int, adapter: bool
) -> float:
    """Bytes that a chip reads and writes in a step; tokens: its own."""
    layers, width = model.num_layers, model.hidden_size
    heads = (model.num_heads + model.num_kv_heads) * model.head_dim
    weights = micros * 3 * 2 * 2 * params / tensor
    state = 0 if adapter else (28 + 16 * micros) * params / chips
    activations = (
        tokens * layers * 3 * 2 * 2 * (4 * width + 2 * heads + 3 * model.intermediate_size)
    )
    logits = tokens * model.vocab_size * 4 * 6
    return weights + state + (activations + logits) / tensor


def seconds(chip: Any, flops: float, memory: float, traffic: dict[str, Any]) -> dict[str, Any]:
    """Of a step on one chip by resource at its published rate, which one binds, and the step."""
    across = sum(t.across for t in traffic.values())
    inside = sum(t.sent for t in traffic.values()) - across
    times = {
        "compute": flops / chip.flops,
        "memory": memory / chip.hbm_rate,
        "interconnect": inside / chip.ici,
        "network": across / chip.dcn,
    }
    bound = max(times, key=lambda name: times[name])
    return {**times, "bound": bound, "step": times[bound] / EFFICIENCY}


def sampler(model: Any, params: int, rollout: Any, chip: Any, chips: int) -> dict[str, Any]:
    """Bytes a chip of decoding: the weights' copy over `tensor` chips of a process and its slots'
    caches.  `slots` of a process fit beside that copy; each trainer's weight is gone by then."""
    local = min(chip.host, chips)
    itemsize = 2 if rollout.decode_dtype == "bfloat16" else 4
    slot = 0
    for layer in range(model.num_layers):
        window = model.kind(layer).window
        length = min(rollout.context, window or rollout.context)
        slot += length * 2 * model.num_kv_heads * model.head_dim * itemsize
    options = {}
    for tensor in (t for t in (1, 2, 4, 8) if local % t == 0 and model.num_kv_heads % t == 0):
        weights = itemsize * params / tensor
        room = int((0.9 * chip.hbm - weights) * local // slot)
        options[tensor] = {"weights": weights, "slots": max(0, room)}
    return {"slot": slot, "slots": rollout.slots, "chips": local, "tensor": options}
