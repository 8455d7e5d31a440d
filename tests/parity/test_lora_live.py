"""Our adapters in PEFT and PEFT's in ours, over fresh random models, in float32 on CPU."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import transformers  # noqa: E402

from mdpo_jax.config import PROJECTIONS  # noqa: E402
from mdpo_jax.model import lora  # noqa: E402
from mdpo_jax.model.families import FAMILIES  # noqa: E402
from mdpo_jax.model.lora import Lora  # noqa: E402
from mdpo_jax.model.policy import Policy, load_policy  # noqa: E402

pytestmark = pytest.mark.parity

VOCAB = 67
WHICH = {"all": Lora(3, 6.0), "some": Lora(2, 1.0, ("q_proj", "v_proj", "down_proj"))}


@pytest.fixture
def base(request, tmp_path, save_tokenizer):
    """(family's folder) of a random transformers model, every tensor random, biases too."""
    traits = FAMILIES[request.param]
    config = transformers.AutoConfig.for_model(
        traits.model_type, vocab_size=VOCAB, hidden_size=24, intermediate_size=40,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        max_position_embeddings=64, pad_token_id=0, bos_token_id=2, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = 0.3 if parameter.ndim == 1 else 2 * parameter.shape[-1] ** -0.5
            parameter.copy_(torch.randn(parameter.shape) * spread * (0.2 if "embed" in name else 1))
    model.save_pretrained(tmp_path / "base")
    save_tokenizer(tmp_path / "base", VOCAB)
    return tmp_path / "base"


def theirs(folder, adapter=None):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = model if adapter is None else peft.PeftModel.from_pretrained(model, adapter)
    return model.eval()


def logits(model, ids):
    with torch.no_grad():
        return model(torch.from_numpy(ids).long()).logits.numpy()


def tokens():
    return np.random.default_rng(0).integers(0, VOCAB, (3, 20), np.int32)


def drawn(config, which):
    rng = np.random.default_rng(1)
    tree = lora.init(config, which, jax.random.key(0))
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), x.dtype), tree)


def difference(found, expected):
    worst = np.abs(np.asarray(found) - expected).max() / np.abs(expected).max()
    print(f"max |difference| / scale = {worst:.1e}")
    return worst


@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("base", FAMILIES, indirect=True)
def test_peft_computes_what_we_compute(base, tmp_path, which):
    """Our adapter loaded by PEFT, combined, merged, and exported merged: one set of logits."""
    policy, ids, which = load_policy(base), tokens(), WHICH[which]
    adapters = drawn(policy.config, which)
    lora.write_peft(tmp_path / "adapter", adapters, policy.config, which, str(base))
    expected = logits(theirs(base, tmp_path / "adapter"), ids)
    assert np.abs(expected - logits(theirs(base), ids)).max() > 0.1
    merged = lora.merge(policy.params, adapters, which)
    for params in (merged, lora.combine(policy.params, adapters, which)):
        ours = Policy(policy.config, params, policy.tokenizer, policy.hf_config)
        assert difference(ours.logits(ids), expected) <= 1e-5
    ours = Policy(policy.config, merged, policy.tokenizer, policy.hf_config)
    assert difference(logits(theirs(ours.save(tmp_path / "merged")), ids), expected) <= 1e-5


@pytest.mark.parametrize("base", ["gemma", "qwen2"], indirect=True)
def test_we_compute_what_peft_wrote(base, tmp_path):
    """A default adapter of PEFT's, moved off its start, saved by PEFT and read by us."""
    settings = peft.LoraConfig(
        r=4, lora_alpha=10, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(theirs(base), settings).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape) * 0.3)
    expected = logits(model, tokens())
    model.save_pretrained(tmp_path / "theirs")
    policy = load_policy(base)
    adapters, which = lora.read_peft(tmp_path / "theirs", policy.config)
    assert (which.rank, which.alpha) == (4, 10)
    assert lora.resolve(policy.config, which) == PROJECTIONS
    params = lora.combine(policy.params, adapters, which)
    ours = Policy(policy.config, params, policy.tokenizer, policy.hf_config)
    assert difference(ours.logits(tokens()), expected) <= 1e-5
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == lora.count(policy.config, which)


@pytest.mark.parametrize("base", ["gemma"], indirect=True)
def test_a_new_adapter_is_drawn_from_pefts_distribution(base):
    config = load_policy(base).config
    settings = peft.LoraConfig(r=64, target_modules="all-linear", task_type="CAUSAL_LM")
    found = peft.get_peft_model(theirs(base), settings).state_dict()
    ours = lora.init(config, Lora(64, 64.0), jax.random.key(0))["layers"]
    for name, half in (("self_attn.o_proj", ours["attention"]["output_lora_a"]),
                       ("mlp.down_proj", ours["mlp"]["down_lora_a"])):  # fmt: skip
        a = found[f"base_model.model.model.layers.0.{name}.lora_A.default.weight"].numpy()
        assert np.abs(a).max() == pytest.approx(float(jnp.abs(half).max()), rel=0.02)
        assert a.std() == pytest.approx(float(half.std()), rel=0.05)
