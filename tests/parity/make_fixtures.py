"""Writes tests/parity/fixtures: random checkpoints of each family and what transformers computes.

    python tests/parity/make_fixtures.py [NAME ...]        needs torch and transformers

Each `<name>/` is a checkpoint in three shards; `<name>.npz` holds ids [2, 24], logits [2, 24, V],
64 greedy tokens that follow the first 8 ids, the loss (mean next-token NLL), and the L2 norm of its
gradient for each tensor.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

FIXTURES = Path(__file__).parent / "fixtures"
VOCAB = 97
WINDOW = 7  # shorter than the 24 tokens of a row and than the 8 of a prompt

_ALTERNATING = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
_LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip
# Name -> model_type and what differs from `_sizes`; together they use every branch of the decoder.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma_kv1": ("gemma", {"num_key_value_heads": 1}),
    "gemma_kv2": ("gemma", {}),
    "gemma2": ("gemma2", {**_ALTERNATING, "query_pre_attn_scalar": 24}),
    "gemma3": (
        "gemma3_text",
        {
            "num_hidden_layers": 3, "query_pre_attn_scalar": 24, "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
            },
        },
    ),
    "llama2": ("llama", {"num_key_value_heads": 4, "head_dim": None}),
    "llama3": ("llama", {"rope_parameters": _LLAMA3}),
    "mistral": ("mistral", {"sliding_window": None, "rope_theta": 1e6}),
    "mistral_window": ("mistral", {"sliding_window": WINDOW}),
    "qwen2": ("qwen2", {"head_dim": None, "tie_word_embeddings": True, "rope_theta": 1e6}),
    "qwen2_window": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", {"rope_theta": 1e6}),
}  # fmt: skip


def random_model(name: str, seed: int, **sizes: int) -> PreTrainedModel:
    """A float32 model with every tensor random, norms and biases too, and logits of about one unit.

    The embedding is small beside what the layers add, else the tied head repeats its input.
    """
    torch.manual_seed(seed)
    model_type, own = VARIANTS[name]
    fields = {
        "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "head_dim": 16,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1,
    }  # fmt: skip
    fields |= own | sizes
    config = AutoConfig.for_model(
        model_type, **{k: v for k, v in fields.items() if v is not None or k == "sliding_window"}
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for label, parameter in model.named_parameters():
            spread = 0.3 if parameter.ndim == 1 else 2 * parameter.shape[-1] ** -0.5
            spread *= 0.2 if "embed" in label else 1.0
            parameter.copy_(torch.randn(parameter.shape) * spread)
    return model


def save_sharded(model: PreTrainedModel, path: Path) -> None:
    """In three shards."""
    size = sum(p.numel() * 4 for p in model.parameters())
    for limit in range(int(size / 3), int(size / 2), 512):
        shutil.rmtree(path, ignore_errors=True)
        model.save_pretrained(path, max_shard_size=limit)
        if len(list(path.glob("*.safetensors"))) == 3:
            return
    raise ValueError(f"{path}: no limit gives three shards")


def expectations(model: PreTrainedModel, seed: int) -> dict[str, np.ndarray]:
    """What a test compares with."""
    # Not id 0: torch gives the padding's row of an embedding no gradient.
    ids = torch.from_numpy(np.random.default_rng(seed).integers(1, VOCAB, (2, 24)))
    out = model(ids, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(out[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    names, norms = zip(
        *((n, float(p.grad.norm())) for n, p in model.named_parameters()), strict=True
    )
    return {
        "ids": ids.numpy().astype(np.int32),
        "logits": out.detach().numpy(),
        "greedy": greedy(model, ids[:1, :8], 64),
        "loss": np.float32(loss.item()),
        "gradient_names": np.array(names),
        "gradient_norms": np.array(norms, np.float32),
    }


def greedy(model: PreTrainedModel, ids: torch.Tensor, count: int) -> np.ndarray:
    """[count] most likely tokens after ids [1, length], without a cache and without a stop."""
    prompt = ids.shape[1]
    for _ in range(count):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return ids[0, prompt:].numpy().astype(np.int32)


def main(names: list[str]) -> None:
    """Writes these fixtures anew, or all."""
    for seed, name in enumerate(VARIANTS, start=1):
        if not names or name in names:
            model = random_model(name, seed)
            save_sharded(model, FIXTURES / name)
            np.savez_compressed(FIXTURES / f"{name}.npz", **expectations(model, seed))


if __name__ == "__main__":
    main(sys.argv[1:])
