"""Where a model lies: a local folder, or `org/name[@revision]` of the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

# Weights, configuration, tokenizer, and what an export must carry along; no other formats.
WANTED = [
    "*.safetensors", "*.json", "tokenizer.model", "*.jinja", "merges.txt", "vocab.txt",
    "README.md", "LICENSE*", "NOTICE*", "USE_POLICY*",
]  # fmt: skip
# Sub-folders and `consolidated` hold the same weights again, under other names.
UNWANTED = ["*/*", "consolidated*"]
_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w./-]+))?")


def split_id(name: str | Path) -> tuple[str, str | None] | None:
    """(repository, revision or None) of what is spelt like a hub id; None for anything else."""
    match = _ID.fullmatch(str(name))
    return (match[1], match[2]) if match else None


def find_model(name: str | Path) -> Path:
    """The folder of a model; one of the hub is downloaded, or found in the local cache.

    A local folder comes first.  Raises FileNotFoundError, in one line that says what was tried, for
    what is neither.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    parts = split_id(name)
    if folder.exists() or parts is None:
        what = "not a folder" if folder.exists() else "no such folder"
        raise FileNotFoundError(f"{folder}: {what}; expected a local Hugging Face model")
    import huggingface_hub

    repository, revision = parts
    try:
        return Path(
            huggingface_hub.snapshot_download(
                repository, revision=revision, allow_patterns=WANTED, ignore_patterns=UNWANTED
            )
        )
    except Exception as error:  # the library and its HTTP client raise all kinds
        raise FileNotFoundError(
            f"{name}: no such folder here, and {_reason(error)}; expected a local Hugging Face "
            "model or the hub's org/name[@revision]"
        ) from None


def _reason(error: Exception) -> str:
    from huggingface_hub import constants, errors

    if isinstance(error, errors.GatedRepoError):
        return "the hub says it is gated (accept its licence there, then `hf auth login`)"
    if isinstance(error, errors.RevisionNotFoundError):
        return "the hub has no such revision"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "the hub has no such model (or it is private, and this machine is not logged in)"
    if constants.HF_HUB_OFFLINE:
        return "it is not in the hub's local cache, and HF_HUB_OFFLINE is set"
    if isinstance(error, errors.LocalEntryNotFoundError):
        return "it is not in the hub's local cache, and the hub cannot be reached"
    return f"the hub failed ({type(error).__name__}: {' '.join(str(error).split())[:160]})"
