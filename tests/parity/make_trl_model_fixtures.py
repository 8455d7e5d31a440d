"""Writes tests/parity/fixtures_trl: what TRL's trainers make of small models and trajectories.

    python tests/parity/make_trl_model_fixtures.py        needs torch and trl 1.16

The models are checkpoints of tests/parity/fixtures: one is the policy, another the reference.
Trajectories go to TRL as text of a tokenizer whose words are the ids, through its own dataset
preparation, data loader, model wrapper and loss.  `MaskedCollator` is all that makes its DPO and
KTO the multi-turn ones.  See trl_model_cases.py for what a case holds.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import datasets
import make_fixtures
import numpy as np
import torch
import trl_model_cases as cases
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

from mdpo_jax.types import Role

FIXTURES = Path(__file__).parent / "fixtures_trl"
SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>")
NAMED = ("embed_tokens.weight", "layers.0.self_attn.q_proj.weight")  # frozen whole
# Case -> policy and reference (checkpoints), TRL's settings.
FROZEN: dict[str, tuple[str, str, dict[str, Any]]] = {
    "sigmoid": ("gemma_kv1", "gemma_kv2", {"loss_type": "sigmoid", "beta": 0.1}),
    "ipo": ("gemma_kv1", "gemma_kv2", {"loss_type": "ipo", "beta": 0.4}),
    "hinge": ("gemma_kv1", "gemma_kv2", {"loss_type": "hinge", "beta": 0.05}),
    "robust": (
        "gemma_kv1", "gemma_kv2", {"loss_type": "robust", "beta": 0.2, "label_smoothing": 0.1},
    ),
    "kto": ("gemma_kv1", "gemma_kv2", {"loss_type": "kto", "beta": 0.1, "lambda_wrong": 0.8}),
}  # fmt: skip


class MaskedCollator:
    """TRL's collator, with `completion_mask` 0 on every completion token that is no action."""

    def __init__(self, collator: Any, actions: dict[tuple[int, ...], torch.Tensor]):
        self.collator, self.actions = collator, actions

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = self.collator(examples)
        for prefix in ("", "KL_"):
            if f"{prefix}input_ids" in batch:
                rows = zip(
                    batch[f"{prefix}input_ids"], batch[f"{prefix}completion_mask"], strict=True
                )
                for ids, mask in rows:
                    completion = mask.bool()
                    mask[completion] = self.actions[tuple(ids[completion].tolist())]
        return batch


def word_tokenizer() -> PreTrainedTokenizerFast:
    """`w7` is id 7."""
    words = [*SPECIAL, *(f"w{i}" for i in range(len(SPECIAL), cases.VOCAB))]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = dict(zip(("pad_token", "eos_token", "bos_token", "unk_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=core, **names)


def load(folder: Path) -> PreTrainedModel:
    """In float32; eager, as the fixtures of the models were made."""
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )


def perturbed(model: PreTrainedModel, seed: int, share: float = 0.2) -> PreTrainedModel:
    """The model with noise of that share of each tensor's spread, in place."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * parameter.std() * share)
    return model


def random_case(settings: dict[str, Any], seed: int, pairs: int = 5) -> dict[str, Any]:
    """Trajectories and settings, all that a case holds but TRL's outcome."""
    rng = np.random.default_rng(seed)
    case = {"label_smoothing": 0.0, "lambda_correct": 1.0, "lambda_wrong": 1.0} | settings
    if settings["loss_type"] != "kto":
        drawn = [cases.draw(rng, 2) for _ in range(pairs)]
        return case | cases.table([pair[side] for side in (0, 1) for pair in drawn])
    rows = [cases.draw(rng, 1)[0] for _ in range(2 * pairs - 1)]
    case["label"] = np.arange(len(rows)) % 3 != 1
    return case | cases.table(rows)


def _split(ids: np.ndarray, roles: np.ndarray) -> tuple[tuple[int, ...], tuple[int, ...]]:
    prompt = int((roles == Role.PROMPT).sum())
    return tuple(ids[:prompt].tolist()), tuple(ids[prompt:].tolist())


def _text(ids: tuple[int, ...]) -> str:
    """A leading space, for TRL joins prompt and completion."""
    return "".join(f" {SPECIAL[i] if i < len(SPECIAL) else f'w{i}'}" for i in ids)


def _examples(case: dict[str, Any]) -> list[dict[str, Any]]:
    texts = [tuple(map(_text, _split(t.ids, t.roles))) for t in cases.trajectories(case)]
    if "label" in case:
        return [
            {"prompt": prompt, "completion": completion, "label": bool(label)}
            for (prompt, completion), label in zip(texts, case["label"], strict=True)
        ]
    half = len(texts) // 2
    return [
        {"prompt": prompt, "chosen": chosen, "rejected": rejected}
        for (prompt, chosen), (_, rejected) in zip(texts[:half], texts[half:], strict=True)
    ]


def trainer(
    case: dict[str, Any], policy: PreTrainedModel, reference: PreTrainedModel, out: str,
    *, observations: bool = False,
) -> Any:  # fmt: skip
    """TRL's own; `observations` leaves its collator as it is, so that they count."""
    examples = _examples(case)
    settings = {
        "output_dir": out, "beta": case["beta"], "loss_type": case["loss_type"],
        "per_device_train_batch_size": len(examples), "max_length": None, "bf16": False,
        "use_cpu": True, "gradient_checkpointing": False, "report_to": "none", "save_strategy": "no",
        "train_sampling_strategy": "sequential",
    }  # fmt: skip
    kind: Any = KTOTrainer if "label" in case else DPOTrainer
    if "label" in case:
        settings |= {"desirable_weight": case["lambda_correct"]}
        args = KTOConfig(**settings, undesirable_weight=case["lambda_wrong"])
    else:
        args = DPOConfig(**settings, label_smoothing=case["label_smoothing"])
    made = kind(
        policy, reference, args, train_dataset=datasets.Dataset.from_list(examples),
        processing_class=word_tokenizer(),
    )  # fmt: skip
    if not observations:
        made.data_collator = MaskedCollator(made.data_collator, actions_by_completion(case))
    return made


def actions_by_completion(case: dict[str, Any]) -> dict[tuple[int, ...], torch.Tensor]:
    """Completion -> [its tokens] 1 at an action token."""
    masks = {}
    for t in cases.trajectories(case):
        prompt, completion = _split(t.ids, t.roles)
        masks[completion] = torch.from_numpy(t.loss_mask("sampled")[len(prompt) :]).long()
    return masks


def run(
    case: dict[str, Any], policy: PreTrainedModel, reference: PreTrainedModel,
    *, observations: bool = False, whole: tuple[str, ...] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The case with TRL's loss, metrics, sums and gradient (of tensors that end in `whole`)."""
    with tempfile.TemporaryDirectory() as out:
        made = trainer(case, policy, reference, out, observations=observations)
        [batch] = made.get_train_dataloader()
        _check(case, batch)
        made.model.train()
        made.model.zero_grad()
        loss = made.compute_loss(made.model, batch)
        loss.backward()
        sums = [made.compute_ref_log_probs(m, batch) for m in (made.model, made.ref_model)]
    if "label" in case:
        sums = [pair[:1] for pair in sums]  # the second are the mismatched rows'
        case = case | cases.table(_mismatched(case, batch), "kl_")
    gradients = {name: p.grad.numpy().copy() for name, p in policy.named_parameters()}
    metrics = {
        f"metrics/{name}": np.float64(values[-1])
        for name, values in made._metrics["train"].items()
        if name.startswith(("rewards/", "logps/", "kl"))
    }
    return case | metrics | {
        "loss": np.float64(loss.item()),
        "policy_logps": torch.cat(sums[0]).numpy(),
        "reference_logps": torch.cat(sums[1]).numpy(),
        "gradient_names": np.array(list(gradients)),
        "gradient_norms": np.array([np.linalg.norm(g) for g in gradients.values()]),
    } | {
        f"gradient/{name}": g
        for name, g in gradients.items()
        if whole is None or name.endswith(whole)
    }  # fmt: skip


def _check(case: dict[str, Any], batch: dict[str, torch.Tensor]) -> None:
    """TRL's batch holds the trajectories' ids, in their order."""
    for row, expected in zip(batch["input_ids"], cases.trajectories(case), strict=True):
        assert row[: len(expected.ids)].tolist() == expected.ids.tolist()
    assert batch["attention_mask"].sum() == case["lengths"].sum()


def _mismatched(case: dict[str, Any], batch: dict[str, torch.Tensor]) -> list[Any]:
    """TRL's mismatched rows: prompt i with the completion that it chose, and that one's roles."""
    roles_of = {}
    for t in cases.trajectories(case):
        prompt, completion = _split(t.ids, t.roles)
        roles_of[completion] = t.roles[len(prompt) :]
    rows = []
    for i, t in enumerate(cases.trajectories(case)):
        prompt, _ = _split(t.ids, t.roles)
        length = int(batch["KL_attention_mask"][i].sum())
        ids = batch["KL_input_ids"][i, :length].numpy().astype(np.int32)
        assert tuple(ids[: len(prompt)].tolist()) == prompt
        after = roles_of[tuple(ids[len(prompt) :].tolist())]
        rows.append((ids, np.concatenate([t.roles[: len(prompt)], after])))
    return rows


def main() -> None:
    """Writes all fixtures anew."""
    datasets.disable_progress_bars()
    FIXTURES.mkdir(exist_ok=True)
    for seed, (name, (policy, reference, settings)) in enumerate(FROZEN.items()):
        case = run(
            random_case(settings, seed), load(make_fixtures.FIXTURES / policy),
            load(make_fixtures.FIXTURES / reference), whole=NAMED,
        )  # fmt: skip
        np.savez_compressed(FIXTURES / f"{name}.npz", policy=policy, reference=reference, **case)


if __name__ == "__main__":
    main()
