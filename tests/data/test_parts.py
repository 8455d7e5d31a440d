"""Which tokens of an action are text, code and answer."""

import chat_formats
import numpy as np
import pytest
from support import chat, trajectories

from mdpo_jax.chat import Chat
from mdpo_jax.data.parts import parts_of
from mdpo_jax.types import ACTION_PARTS, Part, Role, Trajectory

CODE = "```python\nx = 1\nprint(x)\n```"
TALK = [
    {"role": "user", "content": "q"},
    {"role": "assistant", "content": f"First é 数.\n{CODE}\n```python\nopen"},
    {"role": "user", "content": "```output\n1\n```"},
    {"role": "assistant", "content": f"{CODE}\nSo 数\\boxed{{1}} or 数数\\boxed{{2}}."},
]


def said(kind, messages):
    made = Chat(chat_formats.tokenizer(kind), kind if kind != "llama3" else "llama3")
    ids, roles = made.messages(messages)
    return made, Trajectory("p", 0, "x", ids, roles, np.zeros(len(ids), np.float32))


@pytest.mark.parametrize("kind", ["gemma", "mistral", "llama3", "chatml"])
def test_parts_cover_the_blocks_and_the_last_box(kind):
    made, t = said(kind, TALK)
    parts = parts_of(t, made)
    first, last = (parts[span] for span in t.actions)
    assert made.decode(t.ids[t.actions[0]][first == Part.CODE]).strip() == CODE
    text = made.decode(t.ids[t.actions[0]][first == Part.TEXT])
    assert text.startswith("First é 数.")
    assert "```python\nopen" in text
    assert Part.ANSWER not in first
    assert made.decode(t.ids[t.actions[1]][last == Part.CODE]).strip() == CODE
    assert made.decode(t.ids[t.actions[1]][last == Part.ANSWER]).strip() == "\\boxed{2}."
    assert last[-1] == Part.ANSWER  # the end of the turn
    np.testing.assert_array_equal(np.isin(parts, ACTION_PARTS), t.roles == Role.ACTION)
    for role, part in ((Role.OBSERVATION, Part.OBSERVATION), (Role.PROMPT, Part.PROMPT)):
        np.testing.assert_array_equal(t.roles == role, parts == part)


def test_turn_numbers_count_the_actions_begun():
    t = trajectories()[0]
    for number, span in enumerate(t.actions, 1):
        assert set(t.turn_numbers[span]) == {number}
        assert t.turn_numbers[span.start - 1] == number - 1
    assert not t.turn_numbers[t.roles == Role.PROMPT].any()
    assert parts_of(t, chat()).dtype == np.int32
