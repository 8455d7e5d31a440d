"""Writes tests/parity/fixtures_objectives: what TRL's own loss code makes of given log-probs.

    python tests/parity/make_objective_fixtures.py        needs torch and trl 1.16

TRL's trainers compute loss and metrics in one method each, from what the model returns.  Here that
method runs unchanged, on a trainer that carries its settings only and a model that returns given
log-probs: 0 where its labels are ignored, as the fused head does.  `completion_mask` is 0 on
observations, which makes TRL's DPO and KTO the multi-turn ones.

Each `<case>.npz` holds the settings, `policy` and `reference` [rows, length - 1] (log-probs of all
tokens but the first), `mask` [rows, length], and what came out: `loss`, `gradient` (with respect to
`policy`) and `metrics/...`.  Rows of DPO are chosen then rejected; KTO adds `label`, `kl_policy`,
`kl_reference`, `kl_mask`.
"""

from __future__ import annotations

import collections
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from trl import DPOTrainer, KTOTrainer

FIXTURES = Path(__file__).parent / "fixtures_objectives"
LENGTH = 16
Case = dict[str, Any]

# Name -> TRL's settings.
DPO: dict[str, Case] = {
    "sigmoid": {"loss_type": "sigmoid", "beta": 0.1},
    "sigmoid_sharp": {"loss_type": "sigmoid", "beta": 2.5},
    "sigmoid_norm": {"loss_type": "sigmoid_norm", "beta": 1.5},
    "hinge": {"loss_type": "hinge", "beta": 0.4},
    "ipo": {"loss_type": "ipo", "beta": 0.1},
    "robust": {"loss_type": "robust", "beta": 0.3, "label_smoothing": 0.1},
    "robust_none": {"loss_type": "robust", "beta": 0.3, "label_smoothing": 0.0},
}
# `labels` and the sign of the shift that the policy's log-probs get on the mismatched rows.
KTO: dict[str, Case] = {
    "kto": {"beta": 0.1, "labels": [1, 0, 1, 1, 0, 0, 1], "shift": 1},
    "kto_weights": {
        "beta": 0.5, "labels": [0, 0, 1, 0, 1], "shift": 1, "desirable": 1.25, "undesirable": 0.8,
    },
    "kto_clamped": {"beta": 0.3, "labels": [1, 0, 1, 0], "shift": -1},
    "kto_only_correct": {"beta": 0.2, "labels": [1, 1, 1], "shift": 1},
    "kto_only_wrong": {"beta": 0.2, "labels": [0, 0], "shift": 1},
}  # fmt: skip


def random_rows(rng: np.random.Generator, rows: int, shift: float = 0.0) -> Case:
    """Ragged rows of prompt, action, observation, action; log-probs around -1.5 nats."""
    mask = np.zeros((rows, LENGTH), np.int64)
    for row in mask:
        prompt, first, seen, last = rng.integers((2, 1, 0, 1), (5, 5, 3, 5))
        row[prompt : prompt + first] = 1
        start = prompt + first + seen
        row[start : start + last] = 1
    reference = -rng.gamma(2.0, 0.75, (rows, LENGTH - 1))
    policy = np.minimum(reference + rng.normal(shift, 0.8, reference.shape), -1e-3)
    return {
        "mask": mask,
        "policy": policy.astype(np.float32),
        "reference": reference.astype(np.float32),
    }


def _model(tables: dict[int, torch.Tensor]):
    """A model that looks its log-probs up by the first input id."""

    def forward(input_ids, labels, **_):
        log_probs = tables[int(input_ids[0, 0])] * (labels[:, 1:] != -100)
        nothing = torch.zeros_like(log_probs)
        return SimpleNamespace(
            log_probs=log_probs, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool()
        )

    return forward


def _trainer(**settings: Any) -> SimpleNamespace:
    def gather(x):
        return x

    accelerator = SimpleNamespace(
        device=torch.device("cpu"), gather=gather, gather_for_metrics=gather
    )
    return SimpleNamespace(
        model=SimpleNamespace(training=True), accelerator=accelerator, aux_loss_enabled=False,
        precompute_ref_logps=True, _total_train_tokens=0, _tp_size=1,
        _metrics={"train": collections.defaultdict(list)}, **settings,
    )  # fmt: skip


def _inputs(mask: np.ndarray, mark: int, prefix: str = "") -> dict[str, torch.Tensor]:
    ids = torch.full(mask.shape, mark)
    return {
        f"{prefix}input_ids": ids,
        f"{prefix}attention_mask": torch.ones_like(ids),
        f"{prefix}completion_mask": torch.from_numpy(mask),
    }


def _summed(table: np.ndarray, mask: np.ndarray) -> torch.Tensor:
    return torch.from_numpy((table * mask[:, 1:]).sum(1))


def _outcome(trainer: SimpleNamespace, loss: torch.Tensor, policy: torch.Tensor) -> Case:
    loss.backward()
    metrics = {
        f"metrics/{name}": np.float64(values[-1])
        for name, values in trainer._metrics["train"].items()
        if name.startswith(("rewards/", "logps/", "kl"))
    }
    return {"loss": np.float64(loss.item()), "gradient": policy.grad.numpy(), **metrics}


def run_dpo(settings: Case, seed: int, pairs: int = 5) -> Case:
    """TRL's DPO on random pairs."""
    case = random_rows(np.random.default_rng(seed), 2 * pairs)
    smoothing = settings.get("label_smoothing", 0.0)
    trainer = _trainer(
        loss_types=[settings["loss_type"]], loss_weights=[1.0], beta=settings["beta"],
        label_smoothing=smoothing, f_divergence_type="reverse_kl", ld_alpha=None,
        use_weighting=False,
    )  # fmt: skip
    policy = torch.from_numpy(case["policy"]).requires_grad_()
    reference = _summed(case["reference"], case["mask"])
    inputs = _inputs(case["mask"], 1) | {
        "ref_chosen_logps": reference[:pairs],
        "ref_rejected_logps": reference[pairs:],
    }
    loss = DPOTrainer._compute_loss(trainer, _model({1: policy}), inputs, False)
    settings = {"label_smoothing": 0.0} | settings
    return case | settings | _outcome(trainer, loss, policy)


def run_kto(settings: Case, seed: int) -> Case:
    """TRL's KTO on random rows and random mismatched rows."""
    rng = np.random.default_rng(seed)
    label = np.array(settings["labels"], bool)
    case = random_rows(rng, len(label))
    kl = random_rows(rng, len(label), settings["shift"] * 0.5)
    desirable, undesirable = settings.get("desirable", 1.0), settings.get("undesirable", 1.0)
    trainer = _trainer(
        beta=settings["beta"], loss_type="kto", calculate_KL=True,
        desirable_weight=desirable, undesirable_weight=undesirable,
    )  # fmt: skip
    policy = torch.from_numpy(case["policy"]).requires_grad_()
    model = _model({1: policy, 2: torch.from_numpy(kl["policy"])})
    trainer._compute_kl_logps = lambda m, b: KTOTrainer._compute_kl_logps(trainer, m, b)
    inputs = _inputs(case["mask"], 1) | _inputs(kl["mask"], 2, "KL_")
    inputs |= {
        "label": torch.from_numpy(label),
        "ref_logps": _summed(case["reference"], case["mask"]),
        "ref_KL_logps": _summed(kl["reference"], kl["mask"]),
    }
    loss = KTOTrainer._compute_loss(trainer, model, inputs, False)
    case |= {f"kl_{name}": value for name, value in kl.items()}
    case |= {"label": label, "beta": settings["beta"]}
    case |= {"lambda_correct": desirable, "lambda_wrong": undesirable}
    return case | _outcome(trainer, loss, policy)


def main() -> None:
    """Writes all fixtures anew."""
    warnings.simplefilter("ignore")
    FIXTURES.mkdir(exist_ok=True)
    for seed, (name, settings) in enumerate(DPO.items()):
        np.savez_compressed(FIXTURES / f"{name}.npz", **run_dpo(settings, seed))
    for seed, (name, settings) in enumerate(KTO.items(), start=100):
        np.savez_compressed(FIXTURES / f"{name}.npz", **run_kto(settings, seed))


if __name__ == "__main__":
    main()
