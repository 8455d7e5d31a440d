"""`--smoke` of every recipe: from warm-up to export, its own settings over a small model.

Those of the paper's and the hub's models run always, shortened; `tiny` and its like, whose loop other
tests run, with `pytest -m slow`.
"""

import json

import pytest

from mdpo_jax import train
from mdpo_jax.chat import Chat
from mdpo_jax.data import synthetic
from mdpo_jax.data.spellings import family_tokenizer
from mdpo_jax.model.families import FAMILIES, ModelConfig
from mdpo_jax.model.hf_config import from_hf, small_config, to_hf
from mdpo_jax.recipes import load_recipe, recipe_folder
from mdpo_jax.smoke import NOTE, is_smoke, smoke

RECIPES = sorted(path.stem for path in recipe_folder().glob("*.py"))
ALWAYS = [name for name in RECIPES if not name.startswith("tiny")]
# What a recipe is about; the counts, shapes and lengths of the other fields shrink.
KEPT = {
    "model": ("family", "chat", "system", "dtype", "param_dtype", "remat", "attention"),
    "rollout": (
        "samples", "previous_samples", "temperature", "top_k", "top_p", "max_turns", "collect",
        "decode_dtype",
    ),
    "train": (
        "eta", "loss", "mask", "reference", "reference_log_probs", "optimiser", "ema", "beta2",
        "learning_rate", "warmup_steps", "clip", "epochs", "data", "start",
    ),
    "sft": ("previous_fraction", "weight_decay"),
}  # fmt: skip
SIZES = (64, 128, 2, 4, 2, 16)


@pytest.mark.parametrize("name", RECIPES)
def test_smoke_keeps_what_the_recipe_is_about(name):
    recipe, small = load_recipe(name), smoke(load_recipe(name))
    for section, fields in KEPT.items():
        for field in fields:
            before, after = (getattr(getattr(c, section), field) for c in (recipe, small))
            assert before == after, f"{section}.{field}"
    for whole in ("method", "seed", "tool", "pairs", "mesh", "lora", "term_c"):
        assert getattr(recipe, whole) == getattr(small, whole), whole
    assert small.directory.name == f"{recipe.name}-smoke-{recipe.method}-0"
    assert is_smoke(small)
    assert not is_smoke(recipe)
    assert small.model.path is small.problems.path is small.sft.path is None


@pytest.mark.parametrize("family", FAMILIES)
def test_a_small_model_computes_what_its_family_does(family):
    config = small_config(family, 448, *SIZES)
    assert from_hf(to_hf(config, {})) == config
    assert config.tied == family.startswith("gemma")
    windows = [config.kind(i).window for i in range(2)]
    assert windows == ([64, None] if config.traits.sandwich else [None, None])
    caps = (50.0, 30.0) if family == "gemma2" else (None, None)
    assert (config.attention_cap, config.logit_cap) == caps
    assert len({kind.rope for kind in config.kinds}) == (2 if family == "gemma3" else 1)
    if family == "gemma":  # as fresh models always were
        assert config == ModelConfig("gemma", 448, *SIZES)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_small_tokenizer_carries_its_family_s_chat(family):
    demos = synthetic.demonstrations(synthetic.Suite(), 300, 0)
    texts = (m["content"] for demo in demos for m in demo)
    tokenizer = family_tokenizer(family, texts, 448)
    assert len(tokenizer) <= 455
    chat = Chat(tokenizer, family)
    names = {"llama": "llama3", "mistral": "mistral", "qwen2": "chatml", "qwen3": "chatml"}
    assert chat.format == names.get(family, "gemma")
    assert chat.decode(chat.messages(demos[0])[0]).count("boxed") == 1


def run(name, folder, capsys, *more):
    place = [f"--config.workdir={folder}", "--config.mesh.fsdp=1"]
    assert train.main([f"--config={name}", "--smoke", *place, *more]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert out.count(NOTE) == 2
    assert (f"profile {folder}" in out) == ("--config.profile=steps" in more)
    results = json.loads((folder / "results.json").read_text())
    assert results["config"]["name"] == f"{load_recipe(name).name}-smoke"
    last = results["config"]["iterations"]
    stages = ("rollout", "pairs", "reference", "train", "train-dev", "train-test")
    done = {s: json.loads((folder / f"iteration-{last}/{s}/done.json").read_text()) for s in stages}
    assert done["train"]["steps"] > 0
    assert done["train"]["speed"]["fill"] > 0
    assert results["compilations"]["step"] == 1
    assert "Speed of training" in (folder / "report" / "index.html").read_text()
    exported = json.loads((folder / "export" / "config.json").read_text())
    family = FAMILIES[load_recipe(name).model.family]
    assert exported["architectures"] == [family.architecture]
    assert (folder / "export" / "model.safetensors").exists()


@pytest.mark.parametrize("name", ALWAYS)
def test_every_stage_of_a_recipe_runs(name, tmp_path, capsys):
    few = ("iterations=1", "rollout.slots=4", "sft.steps=80", "sft.batch=4", "profile=steps")
    run(name, tmp_path, capsys, *(f"--config.{field}" for field in few))
    assert list((tmp_path / "sft" / "profile").rglob("*.xplane.pb"))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in RECIPES if name not in ALWAYS])
def test_every_stage_of_the_other_recipes_runs(name, tmp_path, capsys):
    run(name, tmp_path, capsys)
