"""The loop on a Hugging Face folder and a GSM8K file: every stage real, accuracy what it may be."""

import json

import pytest
from support import SMALL_RUN, model_config, params, tokenizer

from mdpo_jax import train
from mdpo_jax.model.policy import Policy

# SMALL_RUN's model fields do not apply to a model that comes from a folder.
SETTINGS = [
    *(a for a in SMALL_RUN if ".model." not in a and ".mesh." not in a),
    "--config.iterations=1", "--config.mesh.fsdp=1", "--config.rollout.context=192",
    "--config.train.row_length=192",
]  # fmt: skip


def _row(index):
    a, b = index + 2, index + 3
    answer = f"Sam has {a}+{b} = <<{a}+{b}={a + b}>>{a + b} coins.\n#### {a + b}"
    return {"question": f"Sam has {a} coins and {b} more. How many?", "answer": answer}


@pytest.fixture
def inputs(tmp_path):
    """Arguments of a run on a folder and a file of 30 good rows, one bad and one too long."""
    special = {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
    policy = Policy(model_config(), params(), tokenizer(), dict(special), dict(special))
    policy.save(tmp_path / "hf")
    rows = [json.dumps(_row(i)) for i in range(30)]
    long = {"question": "How many? " * 200, "answer": "#### 1"}
    rows = [*rows[:5], '{"question": "no answer"}', json.dumps(long), *rows[5:]]
    (tmp_path / "gsm8k.jsonl").write_text("\n".join(rows) + "\n")
    return [
        *SETTINGS, f"--config.model.path={tmp_path / 'hf'}",
        f"--config.problems.path={tmp_path / 'gsm8k.jsonl'}",
        f"--config.workdir={tmp_path / 'run'}",
    ]  # fmt: skip


def test_the_loop_completes_on_gsm8k(inputs, tmp_path):
    assert train.main(inputs) == 0
    run = tmp_path / "run"
    problems = json.loads((run / "problems" / "done.json").read_text())
    assert problems["counts"] == {"dev": 3, "test": 2, "iteration-1": 4}
    assert (problems["quarantined"], problems["too_long"]) == (1, 1)
    lines = (run / "problems" / "quarantine-train-0.jsonl").read_text().splitlines()
    bad = [json.loads(line) for line in lines]
    assert [row["line"] for row in bad] == [6]
    warm_up = json.loads((run / "sft" / "done.json").read_text())
    assert warm_up["steps"] == 6
    # 30 good rows, less the 5 that dev and test hold out.
    assert warm_up["demonstrations"] == 25
    results = json.loads((run / "results.json").read_text())
    assert {row["iteration"] for row in results["rows"]} == {0, 1}
    assert (run / "export" / "config.json").exists()


def test_no_problem_that_fits_is_one_line(inputs, capsys):
    assert train.main([*inputs, "--config.rollout.context=20"]) == 2
    error = capsys.readouterr().err
    assert "config.rollout.context=20: no prompt of" in error
    assert error.count("\n") == 1
