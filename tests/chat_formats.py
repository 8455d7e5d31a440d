"""A small real tokenizer of every kind, with its family's special tokens and chat template."""

import functools
import io
import json

import sentencepiece
import support
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import LlamaTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer

from mdpo_jax.data import synthetic, vocabulary

# The templates of the families' own tokenizer_config.json, without what they have for tools.
_INST = (
    "{{ bos_token }}{%% for m in messages %%}{%% if m['role'] == 'user' %%}{{ '%s' + m['content'] "
    "+ '%s' }}{%% else %%}{{ ' ' + m['content'] + eos_token }}{%% endif %%}{%% endfor %%}"
)
JINJA = {
    "gemma": vocabulary.CHAT_TEMPLATE,
    "mistral": _INST % (" [INST] ", " [/INST]"),  # the recipe's; of Mistral-7B-Instruct-v0.2 too
    "mistral-instruct": _INST % ("[INST] ", "[/INST]"),  # Mistral-7B-Instruct-v0.3
    "llama2": (
        "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}"
        "{% set system = messages[0]['content'] %}{% else %}{% set rest = messages %}"
        "{% set system = false %}{% endif %}{% for m in rest %}"
        "{% if loop.index0 == 0 and system != false %}"
        "{% set content = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + m['content'] %}"
        "{% else %}{% set content = m['content'] %}{% endif %}{% if m['role'] == 'user' %}"
        "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% else %}"
        "{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
    ),
    "llama3": (
        "{% for m in messages %}{% set content = '<|start_header_id|>' + m['role'] + "
        "'<|end_header_id|>\\n\\n' + m['content'] | trim + '<|eot_id|>' %}"
        "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
        "{{ content }}{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
    ),
    "chatml": (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + "
        "'<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
}
QWEN25_JINJA = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nYou are a helpful assistant."
    "<|im_end|>\\n' }}{% endif %}" + JINJA["chatml"]
)
LLAMA3_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_SPECIALS = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>",
                   "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>"]  # fmt: skip
QWEN_SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
KINDS = tuple(JINJA)


def texts():
    demos = synthetic.demonstrations(support.SUITE, 200, 0)
    return [m["content"] for demo in demos for m in demo] + ["[INST] user assistant"] * 20


@functools.cache
def tokenizer(kind):
    """The kind's tokenizer; `llama2/always` and `llama2/legacy` differ in where a space is put."""
    kind, _, spaces = kind.partition("/")
    if kind == "gemma":
        return support.tokenizer()
    if kind == "llama3":
        made = _llama3()
    elif kind == "chatml":
        made = _qwen()
    else:
        made = _sentencepiece(kind.startswith("mistral"), spaces or "first")
    made.chat_template = JINJA[kind]
    return made


def _byte_level(regex, specials, normalizer=None):
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(regex), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=450, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts(), trainer)
    return backend


def _llama3():
    return PreTrainedTokenizerFast(
        tokenizer_object=_byte_level(LLAMA3_REGEX, LLAMA3_SPECIALS),
        bos_token="<|begin_of_text|>",
        eos_token="<|end_of_text|>",
        clean_up_tokenization_spaces=True,  # as Llama 3's tokenizer_config.json has it
        clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output=True,
    )


def _qwen():
    backend = _byte_level(LLAMA3_REGEX.replace("{1,3}", ""), [], normalizers.NFC())
    made = Qwen2Tokenizer(
        vocab=backend.get_vocab(),
        merges=[tuple(m) for m in _merges(backend)],
        eos_token="<|im_end|>",
        extra_special_tokens=QWEN_SPECIALS,
    )
    assert made.bos_token is None
    return made


def _merges(backend):
    return json.loads(backend.to_str())["model"]["merges"]


@functools.cache
def sentencepiece_model(inst):
    """Llama's sentencepiece settings; with Mistral v0.3's control tokens [INST] 3 and [/INST] 4."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts()),
        model_writer=model,
        model_type="bpe",
        vocab_size=450,
        hard_vocab_limit=False,
        byte_fallback=True,
        split_digits=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        add_dummy_prefix=True,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        control_symbols=["[INST]", "[/INST]"] if inst else [],
        num_threads=1,
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def _sentencepiece(inst, spaces):
    processor = sentencepiece_model(inst)
    vocab = {processor.id_to_piece(i): i for i in range(processor.vocab_size())}
    made = LlamaTokenizer(
        vocab=vocab,
        merges=vocabulary._merges(processor, vocab),
        legacy=spaces != "first",
        extra_special_tokens=["[INST]", "[/INST]"] if inst else [],
    )
    if spaces == "legacy":  # tokenizer.json of the first Llama-2 and Mistral releases
        backend = made.backend_tokenizer
        backend.pre_tokenizer = None
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        )
    return made
