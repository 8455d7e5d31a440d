"""Writes tests/parity/fixtures: random Gemma checkpoints and what transformers computes of them.

    python tests/parity/make_fixtures.py        needs torch and transformers

Each `<name>/` is a checkpoint in three shards; `<name>.npz` holds ids [2, 24], logits [2, 24, V],
64 greedy tokens that follow the first 8 ids, the loss (mean next-token NLL), and the L2 norm of its
gradient for each tensor.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import torch
from transformers import GemmaConfig, GemmaForCausalLM

FIXTURES = Path(__file__).parent / "fixtures"
VOCAB = 97


def random_model(kv_heads: int, seed: int, **sizes: int) -> GemmaForCausalLM:
    """A float32 Gemma with every tensor random, the norms too, and logits of about one unit.

    The embedding is small beside what the layers add, else the tied head repeats its input.
    """
    torch.manual_seed(seed)
    defaults = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "head_dim": 16}
    config = GemmaConfig(
        **(defaults | sizes),
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        max_position_embeddings=256,
        attn_implementation="eager",
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=1,
    )
    model = GemmaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = 0.3 if parameter.ndim == 1 else 2 * parameter.shape[-1] ** -0.5
            spread *= 0.2 if "embed" in name else 1.0
            parameter.copy_(torch.randn(parameter.shape) * spread)
    return model


def save_sharded(model: GemmaForCausalLM, path: Path) -> None:
    """In three shards."""
    size = sum(p.numel() * 4 for p in model.parameters())
    for limit in range(int(size / 3), int(size / 2), 512):
        shutil.rmtree(path, ignore_errors=True)
        model.save_pretrained(path, max_shard_size=limit)
        if len(list(path.glob("*.safetensors"))) == 3:
            return
    raise ValueError(f"{path}: no limit gives three shards")


def expectations(model: GemmaForCausalLM, seed: int) -> dict[str, np.ndarray]:
    """What a test compares with."""
    ids = torch.from_numpy(np.random.default_rng(seed).integers(0, VOCAB, (2, 24)))
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


def greedy(model: GemmaForCausalLM, ids: torch.Tensor, count: int) -> np.ndarray:
    """[count] most likely tokens after ids [1, length], without a cache and without a stop."""
    prompt = ids.shape[1]
    for _ in range(count):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return ids[0, prompt:].numpy().astype(np.int32)


def main() -> None:
    """Writes both fixtures anew."""
    for kv_heads in (1, 2):
        model = random_model(kv_heads, seed=kv_heads)
        save_sharded(model, FIXTURES / f"gemma_kv{kv_heads}")
        np.savez_compressed(FIXTURES / f"gemma_kv{kv_heads}.npz", **expectations(model, kv_heads))


if __name__ == "__main__":
    main()
