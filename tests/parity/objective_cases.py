"""Our losses on a case of make_objective_fixtures.py, and the comparison with what TRL gave."""

import jax
import jax.numpy as jnp
import numpy as np

from mdpo_jax.objectives import kl_estimate, mdpo_loss, mkto_loss

# TRL's loss_type -> our kind, and whether it takes means over tokens.
KINDS = {
    "sigmoid": ("sigmoid", False),
    "sigmoid_norm": ("sigmoid", True),
    "hinge": ("hinge", False),
    "ipo": ("ipo", True),
    "robust": ("robust", False),
}


def dpo(case):
    """policy -> (loss, metrics)."""
    kind, normalised = KINDS[str(case["loss_type"])]
    mask = case["mask"][:, 1:]
    tokens = mask.sum(1).astype(np.float32)
    pairs = len(mask) // 2

    def loss(policy):
        logps = jnp.sum(policy * mask, 1)
        ratio = logps - jnp.sum(case["reference"] * mask, 1)
        value, metrics = mdpo_loss(
            ratio[:pairs], ratio[pairs:], eta=float(case["beta"]), kind=kind,
            label_smoothing=float(case["label_smoothing"]),
            lengths=(tokens[:pairs], tokens[pairs:]) if normalised else None,
        )  # fmt: skip
        metrics["logps/chosen"] = jnp.mean(logps[:pairs])
        metrics["logps/rejected"] = jnp.mean(logps[pairs:])
        return value, metrics

    return loss


def kto(case):
    """policy -> (loss, metrics)."""
    mask, label = case["mask"][:, 1:], case["label"]
    mismatched = ((case["kl_policy"] - case["kl_reference"]) * case["kl_mask"][:, 1:]).sum(1)

    def loss(policy):
        ratio = jnp.sum((policy - case["reference"]) * mask, 1)
        return mkto_loss(
            ratio, label, kl_estimate(mismatched), eta=float(case["beta"]),
            lambda_correct=float(case["lambda_correct"]), lambda_wrong=float(case["lambda_wrong"]),
        )  # fmt: skip

    return loss


def compare(case):
    """Loss, every metric that both have, and the gradient in every token's log-prob."""
    loss = kto(case) if "label" in case else dpo(case)
    (value, metrics), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(case["policy"])
    np.testing.assert_allclose(value, case["loss"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(gradient, case["gradient"], rtol=1e-5, atol=1e-5)
    theirs = {k.removeprefix("metrics/"): v for k, v in case.items() if k.startswith("metrics/")}
    compared = {name: value for name, value in theirs.items() if name in metrics}
    for name, expected in compared.items():
        np.testing.assert_allclose(metrics[name], expected, rtol=1e-5, atol=1e-5, err_msg=name)
    return metrics, compared
