import huggingface_hub
import pytest
import support
from huggingface_hub import errors

from mdpo_jax.model import hub
from mdpo_jax.model.policy import load_policy


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("google/gemma-2b", ("google/gemma-2b", None)),
        ("Qwen/Qwen2.5-Math-7B@v1.0", ("Qwen/Qwen2.5-Math-7B", "v1.0")),
        ("org/name@refs/pr/3", ("org/name", "refs/pr/3")),
        *[(path, None) for path in ("/a/b", "./a/b", "../a", "a", "a/b/c", "~/a", "a/", "a/..")],
    ],
)
def test_what_is_spelt_like_an_id(name, parts):
    assert hub.split_id(name) == parts


def test_a_folder_comes_first(tmp_path, monkeypatch):
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert str(hub.find_model("org/name")) == "org/name"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A hub cache that holds org/name, and no network."""
    commit, root = "a" * 40, tmp_path / "models--org--name"
    support.write_model(root / "snapshots" / commit)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return root / "snapshots" / commit


def test_a_model_of_the_cache_is_found_without_a_network(cache):
    policy = load_policy("org/name")
    assert policy.source == cache
    assert policy.config.num_layers == 2
    assert load_policy(f"org/name@{cache.name}").source == cache


def test_an_unknown_model_without_a_network(cache):
    with pytest.raises(FileNotFoundError) as caught:
        load_policy("org/other@v2")
    message = str(caught.value)
    assert message.startswith("org/other@v2: no such folder here, and it is not in the hub's local")
    assert "HF_HUB_OFFLINE" in message
    assert "org/name[@revision]" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (errors.RepositoryNotFoundError, "no such model"),
        (errors.GatedRepoError, "gated"),
        (errors.RevisionNotFoundError, "no such revision"),
        (errors.LocalEntryNotFoundError, "cannot be reached"),
        (OSError, "the hub failed (OSError: no space)"),
    ],
)
def test_what_the_hub_says_is_told_in_one_line(kind, words, monkeypatch):
    def fail(*_, **__):
        error = kind.__new__(kind)
        error.args = ("no\nspace",)
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(FileNotFoundError) as caught:
        hub.find_model("org/other")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_only_what_is_needed_is_downloaded(monkeypatch, tmp_path):
    asked = {}

    def download(repository, **options):
        asked.update(options, repository=repository)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert hub.find_model("org/name@abc") == tmp_path
    assert (asked["repository"], asked["revision"]) == ("org/name", "abc")
    names = [
        "model-00001-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.model",
        "LICENSE", "pytorch_model.bin", "original/x.safetensors", "consolidated.safetensors",
        "model.gguf", "figure.png",
    ]  # fmt: skip
    kept = huggingface_hub.utils.filter_repo_objects(
        names, allow_patterns=asked["allow_patterns"], ignore_patterns=asked["ignore_patterns"]
    )
    assert list(kept) == names[:4]
