import contextlib
import types

import chat_formats
import pytest

from mdpo_jax.chat import ChatError
from mdpo_jax.pipeline.context import Context
from mdpo_jax.pipeline.rollouts import _rechecks
from mdpo_jax.recipes import parse


def context(tmp_path, kind, family, *arguments, eos=None):
    """A run's context whose starting policy has this tokenizer and generation config."""
    made = Context(parse(["--config=tiny", *arguments]), tmp_path)
    made.__dict__["start"] = types.SimpleNamespace(
        tokenizer=chat_formats.tokenizer(kind),
        config=types.SimpleNamespace(family=family),
        generation_config=None if eos is None else {"eos_token_id": eos},
    )
    return made


def test_the_chat_format_follows_the_model_and_its_generation_config(tmp_path):
    end_of_message = chat_formats.tokenizer("llama3").get_vocab()["<|eom_id|>"]
    chat = context(tmp_path, "llama3", "llama", eos=[end_of_message]).chat
    assert chat.format == "llama3"
    assert chat.stop_ids[-1] == end_of_message
    assert context(tmp_path, "llama3", "llama").chat.stop_ids == chat.stop_ids[:-1]


def test_the_configuration_chooses_the_chat_format_and_a_system_prompt(tmp_path):
    chosen = ["--config.model.chat=mistral-instruct"]
    assert context(tmp_path, "mistral", "mistral", *chosen).chat.format == "mistral-instruct"
    system = ["--config.model.system=Be brief."]
    chat = context(tmp_path, "chatml", "qwen2", *system).chat
    text = chat.tokenizer.decode(chat.prompt("q"))
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nq")
    with pytest.raises(ChatError, match=r"'<\|im_start\|>', which the chatml chat format needs"):
        _ = context(tmp_path, "gemma", "gemma", "--config.model.chat=chatml").chat


def test_a_rollout_tells_how_often_its_tool_said_something_else(tmp_path):
    flags = ["check_determinism=1", "semantics=replay", "sandbox=limits", "timeout=5"]
    config = parse(["--config=tiny", *(f"--config.tool.{f}" for f in flags)])
    with contextlib.closing(Context(config, tmp_path)) as context:
        tool = context.interpreter
        assert (tool.semantics, tool.protection, tool.timeout) == ("replay", "limits", 5)
        tool.start("a").run_cell("1").result()
        before = tool.rechecks()
        session = tool.start("b")
        session.run_cell("import time\nt = time.time_ns()").result()
        session.run_cell("t").result()
        assert _rechecks(context, before) == {"rechecked_calls": 2, "differing_calls": 1}
    plain = Context(parse(["--config=tiny"]), tmp_path)
    assert _rechecks(plain, plain.interpreter.rechecks()) == {}
    plain.close()
