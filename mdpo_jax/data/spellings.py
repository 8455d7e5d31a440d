"""Small tokenizers that spell other families' special tokens, as vocabulary.py does Gemma's.

    mistral   sentencepiece BPE with byte fallback; [INST] 3 and [/INST] 4 as control tokens
    llama2    the same without them
    llama3    byte-level BPE, up to three digits a piece; <|begin_of_text|>, <|eot_id|> ...
    chatml    Qwen's byte-level BPE, one digit a piece; <|im_start|>, <|im_end|>, no bos

For models that are made here: what they are trained on is a few hundred texts.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from mdpo_jax.data.vocabulary import merge_list, train_sentencepiece, train_tokenizer

INST = ("[INST]", "[/INST]")
LLAMA3_SPECIALS = (
    "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|eot_id|>", "<|eom_id|>",
)  # fmt: skip
QWEN_SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# How Llama 3 parts a text before it merges; Qwen's parts digits one by one.
LLAMA3_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
_OF_FAMILY = {"llama": "llama3", "mistral": "mistral", "qwen2": "chatml", "qwen3": "chatml"}


def family_tokenizer(family: str, texts: Iterable[str], vocab_size: int) -> Any:
    """A tokenizer of about `vocab_size` pieces with the special tokens of a model family."""
    kind = _OF_FAMILY.get(family, "gemma")
    if kind == "llama3":
        return llama3_tokenizer(texts, vocab_size)
    if kind == "chatml":
        return qwen_tokenizer(texts, vocab_size)
    if kind == "mistral":
        return llama_tokenizer(sentencepiece_model(texts, vocab_size, INST), INST)
    return train_tokenizer(texts, vocab_size)


def llama3_tokenizer(texts: Iterable[str], vocab_size: int) -> Any:
    """Llama 3's, with the clean-up that its tokenizer_config.json asks for."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=_byte_level(texts, vocab_size, LLAMA3_REGEX, list(LLAMA3_SPECIALS)),
        bos_token="<|begin_of_text|>",
        eos_token="<|end_of_text|>",
        clean_up_tokenization_spaces=True,
        clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output=True,
    )


def qwen_tokenizer(texts: Iterable[str], vocab_size: int) -> Any:
    """Qwen 2's, 2.5's and 3's."""
    from tokenizers import normalizers
    from transformers import Qwen2Tokenizer

    regex = LLAMA3_REGEX.replace("{1,3}", "")
    backend = _byte_level(texts, vocab_size, regex, [], normalizers.NFC())
    merges = json.loads(backend.to_str())["model"]["merges"]
    return Qwen2Tokenizer(
        vocab=backend.get_vocab(),
        merges=[tuple(m) for m in merges],  # pyright: ignore[reportArgumentType]
        eos_token="<|im_end|>",
        extra_special_tokens=list(QWEN_SPECIALS),
    )


def _byte_level(
    texts: Iterable[str], vocab_size: int, regex: str, specials: list[str], normalizer: Any = None
) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    backend: Any = Tokenizer(models.BPE())
    backend.normalizer = normalizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(regex), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return backend


def sentencepiece_model(texts: Iterable[str], vocab_size: int, controls: Iterable[str] = ()) -> Any:
    """A processor with Llama's settings, `controls` being ids 3, 4, ..."""
    return train_sentencepiece(
        texts,
        vocab_size,
        add_dummy_prefix=True,
        allow_whitespace_only_pieces=True,
        control_symbols=list(controls),
    )


def llama_tokenizer(processor: Any, specials: Iterable[str] = (), **options: Any) -> Any:
    """Llama 2's and Mistral's over a sentencepiece model; options of `LlamaTokenizer`."""
    from transformers import LlamaTokenizer

    vocab = {processor.id_to_piece(i): i for i in range(processor.vocab_size())}
    settings: dict[str, Any] = {"legacy": False} | options
    return LlamaTokenizer(
        vocab=vocab,
        merges=merge_list(processor, vocab),  # pyright: ignore[reportArgumentType]
        extra_special_tokens=list(specials),
        **settings,
    )
