"""A small real tokenizer: sentencepiece BPE with split digits, saved in Hugging Face format."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

# Gemma's first ids are pad, eos, bos, unk; its chat tokens are single pieces.
SPECIALS = ("<start_of_turn>", "<end_of_turn>")
CHAT_TEMPLATE = """{{ bos_token }}{% for message in messages %}{{ '<start_of_turn>' + \
('model' if message['role'] == 'assistant' else message['role']) + '\\n' + \
message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Any:
    """A Gemma tokenizer (BPE, byte fallback, one piece a digit) learnt from `texts`.

    Returns a `transformers.GemmaTokenizer`; `save_pretrained` writes `tokenizer.json`, which any
    Hugging Face reader opens.  The sentencepiece model's own segmentation is the one it gives.
    """
    from transformers import GemmaTokenizer

    processor = train_sentencepiece(
        texts,
        vocab_size,
        add_dummy_prefix=False,
        user_defined_symbols=[*SPECIALS, "\n"],
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        pad_piece="<pad>",
        eos_piece="<eos>",
        bos_piece="<bos>",
    )
    vocab = {processor.id_to_piece(i): i for i in range(processor.vocab_size())}
    tokenizer = GemmaTokenizer(
        vocab=vocab,
        merges=merge_list(processor, vocab),  # pyright: ignore[reportArgumentType]
        mask_token=None,  # pyright: ignore[reportArgumentType]
        extra_special_tokens=list(SPECIALS),
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.sentencepiece_model = processor.serialized_model_proto()
    return tokenizer


def train_sentencepiece(texts: Iterable[str], vocab_size: int, **options: Any) -> Any:
    """A sentencepiece BPE processor: byte fallback, a piece a digit; options of its trainer."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        byte_fallback=True,
        split_digits=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        num_threads=1,  # the merges of a tie must not depend on timing
        minloglevel=2,
        **options,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def save_tokenizer(tokenizer: Any, path: str | Path) -> None:
    """Write the Hugging Face files and the sentencepiece model they came from."""
    tokenizer.save_pretrained(path)
    (Path(path) / "tokenizer.model").write_bytes(tokenizer.sentencepiece_model)


def merge_list(processor: Any, vocab: dict[str, int]) -> list[tuple[str, str]]:
    """The merge list that gives sentencepiece's segmentation: pieces by rank, every split of each."""
    merges = []
    for piece, index in vocab.items():
        learnt = not (processor.is_control(index) or processor.is_unknown(index))
        if len(piece) < 2 or not learnt or processor.is_byte(index) or piece in SPECIALS:
            continue
        splits = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        merges += [
            (-processor.get_score(index), a, b) for a, b in splits if a in vocab and b in vocab
        ]
    return [(a, b) for _, a, b in sorted(merges, key=lambda m: m[0])]
