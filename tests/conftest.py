"""Four fake CPU devices for every test, one cache of compiled programs, and the order of the files.

The environment must be set before jax is imported; workers and what tests start inherit it.
"""

import gc
import os
import tempfile

flags = os.environ.get("XLA_FLAGS", "")
# Nearly all of the tests' time is compilation of programs that run once.  The emitters of fusions
# by MLIR take more than half of it, and programs cut for parallel compilation a fifth of the rest.
flags += " --xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
flags += " --xla_cpu_parallel_codegen_split_count=1"
if "xla_force_host_platform_device_count" not in flags:
    flags += " --xla_force_host_platform_device_count=4"
os.environ["XLA_FLAGS"] = flags.strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Tracing makes many small objects that live: to look for dead ones among them as often as Python does,
# and to note a hundred frames of each operation as jax does, takes a tenth of the tests' time.
gc.set_threshold(200_000, 50, 50)
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    # Programs recur within a file, between files and in processes that tests start.
    compiled = tempfile.TemporaryDirectory(prefix="compiled-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = compiled.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

import jax  # noqa: E402

# Un-awaited calls on fake devices can deadlock in a rendezvous on two cores.
jax.config.update("jax_cpu_enable_async_dispatch", False)
import pytest  # noqa: E402

# Files are dealt to workers whole, in this order: what takes long, or is one long test, goes first.
LONGEST = (
    "recovery/test_kill", "recovery/test_hosts", "pipeline/test_smoke", "pipeline/test_methods",
    "rollout/test_exactness", "training/test_exact", "pipeline/test_loop", "pipeline/test_lora_run",
    "training/test_lora_step", "training/test_step", "pipeline/test_evaluate",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    places = {f"tests/{name}.py": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.nodeid.partition("::")[0], len(places)))


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
