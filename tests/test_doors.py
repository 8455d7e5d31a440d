"""What the doors make of errors and interrupts: one line and a code."""

import errno
import os
import signal

import pytest
from support import write_model

from mdpo_jax import train
from mdpo_jax.config import StepZeroError
from mdpo_jax.doors import guarded, interrupts_held


def _raise(error):
    def work():
        raise error

    return work


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (ValueError("field: 3; expected 4\nmore"), 2, "error: field: 3; expected 4\n"),
        (OSError(errno.ENOSPC, "No space left on device", "f"), 75, "No space left on device"),
        (StepZeroError("step 0: loss 2"), 1, "stopped: step 0: loss 2\n"),
        (KeyboardInterrupt(), 75, "interrupted; the same command resumes"),
    ],
)
def test_an_error_is_one_line_and_a_code(error, code, words, capsys):
    assert guarded(_raise(error)) == code
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("kind", ["below a file", "a long name", "a dangling link"])
def test_a_place_that_cannot_be_written_is_one_line(kind, tmp_path, capsys):
    from mdpo_jax import export

    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    write_model(tmp_path / "model")
    out = {
        "below a file": tmp_path / "file" / "out",
        "a long name": tmp_path / ("x" * 300),
        "a dangling link": tmp_path / "link",
    }[kind]
    assert export.main(["--checkpoint", str(tmp_path / "model"), "--out", str(out)]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert error[-1].startswith("error: ")
    assert "Traceback" not in "".join(error)
    assert not list(tmp_path.glob("*.partial"))


def test_an_error_of_ours_keeps_its_traceback():
    with pytest.raises(KeyError):
        guarded(_raise(KeyError("x")))


@pytest.fixture
def interruptible():
    """The default handler, which a background job of a shell has not got."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_waits_for_the_end_of_the_imports(interruptible):
    seen = []

    def work():
        with interrupts_held():
            os.kill(os.getpid(), signal.SIGINT)
            seen.append("the block ended")

    assert guarded(work) == 75
    assert seen
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("def get_config(:", "SyntaxError"),
        ("x = 1", "has no attribute 'get_config'"),
        ("def get_config(): return 3", "gave a int; expected a Config"),
        ("from mdpo_jax.config import Config\ndef get_config(): return Config(nam='x')", "'nam'"),
    ],
)
def test_a_recipe_that_is_none_is_one_line(source, words, tmp_path, capsys):
    (tmp_path / "recipe.py").write_text(source)
    assert train.main([f"--config={tmp_path / 'recipe.py'}"]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_help_shows_the_values_that_the_arguments_give(capsys):
    assert train.main(["--config=gemma7b", "--smoke", "--config.train.eta=0.7", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "--config.train.eta=0.7  (float)" in shown
    assert "--config.model.hidden_size=48  (int)" in shown
    assert train.main(["--config=tiny", "--config.train.etaa=1", "--help"]) == 2
