"""Our path on a case of make_trl_model_fixtures.py: packed rows of a real model, sums, losses.

A case holds `ids`, `roles` [rows, longest], `lengths` [rows], TRL's settings and what TRL made of
them.  Rows of DPO are chosen then rejected; KTO's have `label`, and `kl_ids`, ... are its
mismatched rows.  Neither torch nor trl is needed here.
"""

import jax
import jax.numpy as jnp
import numpy as np
import objective_cases

from mdpo_jax import objectives
from mdpo_jax.data.packing import Layout, item, pack, unpack
from mdpo_jax.training import step
from mdpo_jax.types import Role, Trajectory

VOCAB = 97
EOS = 1
LAYOUT = Layout(rows=2, row_length=56, sequences=6)  # more than one micro-batch a case
FORWARD = step.Forward(logprob_chunk=32)  # more than one chunk a micro-batch
_log_probs = jax.jit(step.log_probs, static_argnums=(0, 1))


def draw(rng, count):
    """[(ids, roles)] of one prompt: up to three turns, tool output between them, EOS at the end."""
    roles = {"prompt": [Role.PROMPT] * rng.integers(2, 7)}
    prompt = rng.integers(4, VOCAB, len(roles["prompt"]))
    rows = []
    for _ in range(count):
        after = []
        for turn in range(rng.integers(1, 4)):
            if turn:  # what closes the action, the tool's whole turn, and the next model header
                after += [Role.TEMPLATE] * rng.integers(0, 2)
                after += [Role.OBSERVATION] * rng.integers(1, 8)
                after += [Role.TEMPLATE] * rng.integers(0, 3)
            after += [Role.ACTION] * rng.integers(1, 7)
        after += [rng.choice([Role.ACTION, Role.TEMPLATE])]  # EOS, sampled or put there
        ids = np.concatenate([prompt, rng.integers(4, VOCAB, len(after) - 1), [EOS]])
        rows.append((ids.astype(np.int32), np.array(roles["prompt"] + after, np.uint8)))
    return rows


def table(rows, prefix=""):
    """[(ids, roles)] as arrays of a case."""
    lengths = np.array([len(ids) for ids, _ in rows])
    ids, roles = (
        np.stack([np.pad(row[i], (0, max(lengths) - len(row[i]))) for row in rows]) for i in (0, 1)
    )
    return {f"{prefix}ids": ids, f"{prefix}roles": roles, f"{prefix}lengths": lengths}


def trajectories(case, prefix=""):
    rows = zip(*(case[prefix + name] for name in ("ids", "roles", "lengths")), strict=True)
    return [
        Trajectory("p", i, "m", ids[:n], roles[:n], np.zeros(n, np.float32))
        for i, (ids, roles, n) in enumerate(rows)
    ]


def _micros(batch):
    """What `log_probs` reads of each micro-batch that holds a sequence."""
    for m in np.flatnonzero(batch.sequence_mask.any(axis=1)):
        yield m, {name: getattr(batch, name)[m] for name in ("tokens", "positions", "segments")}


def _slots(batch, items):
    """[i] -> the slot of item i; the packing may place them in any order."""
    found = {tuple(ids): slot for slot, ids in unpack(batch.tokens, batch).items()}
    return np.array([found[tuple(entry.ids)] for entry in items])


def per_token(model, items):
    """Log-probs of each item's tokens under (config, params), through packed rows."""
    batch = pack([[entry] for entry in items], LAYOUT)
    values = np.zeros(batch.tokens.shape, np.float32)
    for m, micro in _micros(batch):
        values[m] = _log_probs(model[0], FORWARD, model[1], micro)
    by_slot = unpack(values, batch)
    return [by_slot[slot] for slot in _slots(batch, items)]


@jax.jit
def _by_sequence(values, reference, weights, segments):
    """[slots + 1, 3]: log-prob, log-ratio, tokens; slot 0 is padding."""
    columns = jnp.stack([values, values - reference, jnp.ones_like(values)], -1)
    weighted = (columns * weights[..., None]).reshape(-1, 3)
    return jax.ops.segment_sum(weighted, segments.reshape(-1), num_segments=LAYOUT.sequences + 1)


def summed(config, params, items):
    """(log-prob, log-ratio, tokens) of each item, summed by weight as the step sums them."""
    batch = pack([[entry] for entry in items], LAYOUT)
    sums = []
    for m, micro in _micros(batch):
        values = _log_probs(config, FORWARD, params, micro)
        own = batch.reference[m], batch.weights[m], micro["segments"]
        sums.append(_by_sequence(values, *own)[1:])
    return jnp.concatenate(sums)[_slots(batch, items)].T


def _dpo(case, log_prob, log_ratio, tokens):
    kind, normalised = objective_cases.KINDS[str(case["loss_type"])]
    half = len(log_prob) // 2
    value, metrics = objectives.mdpo_loss(
        log_ratio[:half], log_ratio[half:], eta=float(case["beta"]), kind=kind,
        label_smoothing=float(case["label_smoothing"]),
        lengths=(tokens[:half], tokens[half:]) if normalised else None,
    )  # fmt: skip
    sides = {"logps/chosen": log_prob[:half], "logps/rejected": log_prob[half:]}
    return value, metrics | {name: jnp.mean(x) for name, x in sides.items()}


def _kto(case, log_prob, log_ratio, mismatched):
    value, metrics = objectives.mkto_loss(
        log_ratio, case["label"], objectives.kl_estimate(mismatched), eta=float(case["beta"]),
        lambda_correct=float(case["lambda_correct"]), lambda_wrong=float(case["lambda_wrong"]),
    )  # fmt: skip
    sides = {"logps/chosen": case["label"], "logps/rejected": ~case["label"]}
    return value, metrics | {name: jnp.mean(log_prob[side]) for name, side in sides.items()}


def ours(case, policy, reference, *, observations=False):
    """(loss, metrics, log-probs, reference log-probs, gradient); models are (config, params)."""

    def items(prefix=""):
        bare = trajectories(case, prefix)
        scores = per_token(reference, [item(t, "sampled") for t in bare])
        return [
            item(t, "sampled", observations=observations, reference=r)
            for t, r in zip(bare, scores, strict=True)
        ]

    rows = items()
    mismatched = summed(policy[0], policy[1], items("kl_"))[1] if "label" in case else None

    def loss(params):
        log_prob, log_ratio, tokens = summed(policy[0], params, rows)
        if "label" in case:
            value, metrics = _kto(case, log_prob, log_ratio, mismatched)
        else:
            value, metrics = _dpo(case, log_prob, log_ratio, tokens)
        return value, (metrics, log_prob, log_prob - log_ratio)

    (value, (metrics, log_prob, ref)), gradient = jax.value_and_grad(loss, has_aux=True)(policy[1])
    return value, metrics, log_prob, ref, gradient


def difference(found, expected):
    """The largest |difference| over max(1, |expected|): what `1e-5, relative or absolute` bounds."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return float(np.max(np.abs(found - expected) / np.maximum(1, np.abs(expected))))


def differences(case, policy, reference, by_name, **options):
    """Of loss, each shared metric, sequence sums, gradient norm and gradient tensors."""
    value, metrics, log_prob, ref, gradient = ours(case, policy, reference, **options)
    theirs = {k.removeprefix("metrics/"): v for k, v in case.items() if k.startswith("metrics/")}
    out = {name: difference(metrics[name], v) for name, v in theirs.items() if name in metrics}
    out["loss"] = difference(value, case["loss"])
    out["policy sums"] = difference(log_prob, case["policy_logps"])
    out["reference sums"] = difference(ref, case["reference_logps"])
    tensors = by_name(policy[0], gradient)
    assert set(tensors) == set(case["gradient_names"])
    norms = np.array([np.linalg.norm(tensors[name]) for name in case["gradient_names"]])
    scale = np.linalg.norm(case["gradient_norms"])
    out["gradient norm"] = float(abs(np.linalg.norm(norms) / scale - 1))
    out["gradient norms"] = float(np.max(np.abs(norms / case["gradient_norms"] - 1)))
    for key, expected in case.items():
        if key.startswith("gradient/"):
            error = np.abs(tensors[key.removeprefix("gradient/")] - expected).max()
            out[key] = error / np.abs(expected).max()
    return out


def check(found, case):
    """That every metric of ours which TRL has was compared, and agrees."""
    expected = {"loss", "rewards/chosen", "rewards/rejected", "rewards/margins"}
    expected |= {"logps/chosen", "logps/rejected", "policy sums", "reference sums"}
    expected |= {"kl"} if "label" in case else {"rewards/accuracies"}
    assert set(found) >= expected
    assert np.linalg.norm(case["gradient_norms"]) > 0.01
    print()
    for name, value in found.items():
        print(f"{case['loss_type']}  {name:45} {value:.1e}")
        assert value <= (1e-4 if name.startswith("gradient") else 1e-5), name
