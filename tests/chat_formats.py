"""A small real tokenizer of every kind, with its family's special tokens and chat template."""

import functools

import support
from tokenizers import normalizers

from mdpo_jax.data import spellings, synthetic, vocabulary

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


def _llama3():
    return spellings.llama3_tokenizer(texts(), 450)


def _qwen():
    made = spellings.qwen_tokenizer(texts(), 450)
    assert made.bos_token is None
    return made


@functools.cache
def sentencepiece_model(inst):
    """Llama's sentencepiece settings; with Mistral v0.3's control tokens [INST] 3 and [/INST] 4."""
    return spellings.sentencepiece_model(texts(), 450, spellings.INST if inst else ())


def _sentencepiece(inst, spaces):
    specials = spellings.INST if inst else ()
    made = spellings.llama_tokenizer(sentencepiece_model(inst), specials, legacy=spaces != "first")
    if spaces == "legacy":  # tokenizer.json of the first Llama-2 and Mistral releases
        backend = made.backend_tokenizer
        backend.pre_tokenizer = None
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        )
    return made
