"""Four fake CPU devices for every test; the environment must be set before jax is imported."""

import os

flags = os.environ.get("XLA_FLAGS", "")
# Nearly all of the tests' time is compilation of programs that run once.
flags += " --xla_backend_optimization_level=0"
# The emitters of old compile a training step in less than half of the time.
flags += " --xla_cpu_use_fusion_emitters=false"
if "xla_force_host_platform_device_count" not in flags:
    flags += " --xla_force_host_platform_device_count=4"
os.environ["XLA_FLAGS"] = flags.strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax  # noqa: E402

# Un-awaited calls on fake devices can deadlock in a rendezvous on two cores.
jax.config.update("jax_cpu_enable_async_dispatch", False)
import pytest  # noqa: E402


@pytest.fixture(scope="session")
def save_tokenizer():
    """(folder, size): writes a word-level tokenizer of that many ids with a chat template."""

    def save(folder, size):
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        special = ["<pad>", "<eos>", "<bos>", "<unk>"]
        words = {w: i for i, w in enumerate([*special, *(f"w{i}" for i in range(4, size))])}
        core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
        core.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=core,
            pad_token="<pad>",
            eos_token="<eos>",
            bos_token="<bos>",
            unk_token="<unk>",
        )
        tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
        tokenizer.save_pretrained(folder)

    return save
