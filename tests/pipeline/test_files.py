"""The run directory: who may work in it, and what it says of files that are not whole."""

import dataclasses
import multiprocessing

import pytest

from mdpo_jax.config import ConfigError
from mdpo_jax.pipeline.files import open_run, read_json, stage, write_json
from mdpo_jax.recipes import load_recipe


@pytest.fixture
def config(tmp_path):
    return dataclasses.replace(load_recipe("tiny"), workdir=str(tmp_path / "run"))


def _open(config, answers):
    try:
        with open_run(config):
            answers.put("opened")
    except ConfigError as error:
        answers.put(str(error))


def test_one_process_a_run(config):
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    with open_run(config):
        process = context.Process(target=_open, args=(config, answers))
        process.start()
        assert "another process works in it" in answers.get(timeout=60)
        process.join()
    process = context.Process(target=_open, args=(config, answers))
    process.start()
    assert answers.get(timeout=60) == "opened"
    process.join()


def test_a_configuration_is_binding_once_a_stage_is_done(config):
    other = dataclasses.replace(config, seed=7)
    with open_run(config):
        pass
    with open_run(other) as directory:
        stage(directory / "problems", lambda folder: None)
    with pytest.raises(ConfigError, match="seed: 7 -> 0"), open_run(config):
        pass


def test_a_torn_file_is_named(tmp_path):
    write_json(tmp_path / "done.json", {"a": 1})
    (tmp_path / "done.json").write_text('{"a": ')
    with pytest.raises(ConfigError, match=r"done.json: not whole .*delete it"):
        read_json(tmp_path / "done.json")


def test_nan_is_not_written_as_json(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "results.json", {"accuracy": float("nan")})
    assert not (tmp_path / "results.json").exists()
