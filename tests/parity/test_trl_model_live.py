"""M-DPO and M-KTO through fresh random models against TRL 1.16's trainers, in float32 on CPU.

TRL runs whole, from text to gradient; all that it is given is a collator that takes what is no
action out of `completion_mask`.  Ours is the path of a run: `load_policy`, packed rows, the
trainer's `log_probs`, sums by weight, the loss.  Where the two differ on purpose, beside what the
docstrings of `mdpo_loss` and `mkto_loss` say:

- TRL finds where the completion starts by the longest common prefix of tokenised texts, and counts
  all that follows; ours reads the roles, and never tokenises what the policy wrote.
- TRL appends an EOS to text that lacks one and counts it; ours trains what was sampled.
- TRL truncates at `max_length` (1024, silently); ours drops what is too long, whole, and counts it.
- TRL shifts completions by one row for the KL of KTO, which can match a prompt with a completion of
  the same problem; `mismatched_rows` never does if it can be helped.
- TRL scores the reference beside the policy at each step, or stores a sum a sequence; ours stores a
  value a token, so that mask and weights may change afterwards.
"""

import numpy as np
import pytest

trl = pytest.importorskip("trl")
if not trl.__version__.startswith("1.16."):
    pytest.skip("reads TRL 1.16's private metrics", allow_module_level=True)

import datasets  # noqa: E402
import make_fixtures  # noqa: E402
import make_trl_model_fixtures as trl_runs  # noqa: E402
import trl_model_cases as cases  # noqa: E402

from mdpo_jax.model.policy import load_policy  # noqa: E402

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),
]

# A tied head and one key head; caps and both kinds of layer; a head of its own and a window.
MODELS = ["gemma_kv1", "gemma2", "mistral_window"]
SETTINGS = {
    "sigmoid": {"loss_type": "sigmoid", "beta": 0.1},
    "sigmoid_norm": {"loss_type": "sigmoid_norm", "beta": 0.5},
    "ipo": {"loss_type": "ipo", "beta": 0.1},
    "hinge": {"loss_type": "hinge", "beta": 0.1},
    "robust": {"loss_type": "robust", "beta": 0.3, "label_smoothing": 0.1},
    "kto": {"loss_type": "kto", "beta": 0.1, "lambda_correct": 1.2, "lambda_wrong": 0.9},
}


@pytest.fixture(scope="module", params=MODELS)
def pair(request, tmp_path_factory):
    """((folder, config and params) of the policy, the same of a reference that is near it)."""
    datasets.disable_progress_bars()
    out = []
    for name in ("policy", "reference"):
        model = make_fixtures.random_model(request.param, seed=20)
        if name == "reference":
            trl_runs.perturbed(model, seed=21)
        folder = tmp_path_factory.mktemp(request.param) / name
        model.save_pretrained(folder)
        trl_runs.word_tokenizer().save_pretrained(folder)
        policy = load_policy(folder)
        out.append((folder, (policy.config, policy.params)))
    return out


def _theirs(pair, name, **options):
    case = trl_runs.random_case(SETTINGS[name], seed=30 + list(SETTINGS).index(name))
    policy, reference = (trl_runs.load(folder) for folder, _ in pair)
    return trl_runs.run(case, policy, reference, **options)


@pytest.mark.parametrize("name", SETTINGS)
def test_loss_metrics_sums_and_gradients_equal(pair, name, by_name):
    case = _theirs(pair, name)
    log_ratio = case["policy_logps"] - case["reference_logps"]
    assert np.abs(log_ratio).mean() > 0.1
    assert case.get("metrics/kl", 1) > 0  # else the clamp would hide it
    found = cases.differences(case, pair[0][1], pair[1][1], by_name)
    cases.check(found, case)


@pytest.mark.parametrize("pair", ["gemma_kv1"], indirect=True)
@pytest.mark.parametrize("name", ["sigmoid", "kto"])
def test_without_the_collator_trl_counts_observations_and_ours_only_on_request(pair, name, by_name):
    """The masks are what makes the two equal: TRL as it comes is single-turn DPO or KTO."""
    case = _theirs(pair, name, observations=True)
    (_, policy), (_, reference) = pair
    counted = cases.differences(case, policy, reference, by_name, observations=True)
    cases.check(counted, case)
    masked = cases.differences(case, policy, reference, by_name)
    assert masked["loss"] > 1e-3
    assert masked["logps/chosen"] > 0.1
    assert masked["gradient norm"] > 0.01
