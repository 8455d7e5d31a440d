"""The evaluation door on real rows of GSM8K and MATH, with a random checkpoint."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from support import chat, write_model

from mdpo_jax import evaluate, report
from mdpo_jax.chat import COT_INSTRUCTION
from mdpo_jax.pipeline.harness import comparable
from mdpo_jax.reporting.metrics import read_metrics
from mdpo_jax.rollout.engine import Engine
from mdpo_jax.types import Role, Verdict

# Of openai/grade-school-math and hendrycks/math (both MIT); of solutions only the ends.
GSM8K = [
    {
        "question": "A robe takes 2 bolts of blue fiber and half that much white fiber.  How many "
        "bolts in total does it take?",
        "answer": "So the total amount of fabric is 2+1=<<2+1=3>>3 bolts of fabric\n#### 3",
    },
    {
        "question": "Mike plays ping pong for 40 minutes.  In the first 20 minutes, he scores 4 "
        "points.  In the second 20 minutes, he scores 25% more points.  How many total points did "
        "he score?",
        "answer": "So he scored 4+5=<<4+5=9>>9 points total\n#### 9",
    },
]
MATH = [
    {
        "problem": "How many vertical asymptotes does the graph of $y=\\frac{2}{x^2+x-6}$ have?",
        "level": "Level 3", "type": "Algebra", "solution": "... has $\\boxed{2}$ vertical asymptotes.",
    },
    {
        "problem": "What is $88 \\div 4 \\div 2$?",
        "level": "Level 1", "type": "Prealgebra", "solution": "Obtain $88/8 = \\boxed{11}$.",
    },
    {
        "problem": "Evaluate $\\lfloor 3.2 \\rfloor$.",
        "level": "Level 1", "type": "Algebra", "solution": "It is $\\boxed{3}$.",
    },
]  # fmt: skip
LIMITS = [
    "--config.rollout.slots=4", "--config.rollout.block=4", "--config.rollout.turn_tokens=6",
    "--config.rollout.trajectory_tokens=8", "--config.rollout.context=256",
    "--config.mesh.fsdp=1",
]  # fmt: skip


def _by_parity(context, gold, trajectory):
    right = trajectory.ids.sum() % 2 == 1
    return Verdict("correct" if right else "wrong", "parity", str(trajectory.ids.sum() % 3))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    write_model(folder / "model", "gemma", vocab_size=len(chat().tokenizer))
    write_model(folder / "other", "gemma", vocab_size=len(chat().tokenizer), dtype="bfloat16")
    for name, rows in (("gsm8k", GSM8K), ("math", MATH)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


def _flags(place, out, *more, model="model", data="gsm8k,math"):
    files = ",".join(str(place / f"{name}.jsonl") for name in data.split(",")) if data else ""
    flags = [
        "--config=tiny",
        "--checkpoint",
        str(place / model),
        *LIMITS,
        "--out",
        str(place / out),
    ]
    return [*flags, *(["--data", files] if files else []), *more]


@pytest.fixture(scope="module")
def whole(place):
    """A finished evaluation with samples; random answers are graded by chance."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mdpo_jax.pipeline.evaluation.verdict", _by_parity)
        assert evaluate.main(_flags(place, "whole", "--samples", "2")) == 0
    return place / "whole"


@pytest.fixture
def asked(monkeypatch):
    """Keys of the trajectories that the engine is asked for."""
    keys = []
    stream = Engine.stream

    def noted(self, requests, **more):
        requests = list(requests)
        keys.extend((more["policy"], r.problem.id, r.sample) for r in requests)
        return stream(self, requests, **more)

    monkeypatch.setattr(Engine, "stream", noted)
    return keys


def _results(folder):
    return json.loads((folder / "results.json").read_text())


def _trajectories(folder):
    rows = read_metrics(folder / "trajectories.jsonl")
    found = {(r["decoding"], r["problem_id"], r["sample"]): r for r in rows}
    assert len(found) == len(rows)
    return found


def test_what_an_evaluation_writes(whole):
    results, rows = _results(whole), _trajectories(whole)
    gsm8k, math = results["suites"]
    assert [(s["name"], s["problems"]) for s in results["suites"]] == [("gsm8k", 2), ("math", 3)]
    assert len(rows) == 5 + 2 * 5
    right = [rows["greedy", f"math/{i}", 0]["label"] == "correct" for i in range(3)]
    assert math["greedy"]["value"] == pytest.approx(np.mean(right))
    assert math["greedy"]["low"] <= math["greedy"]["value"] <= math["greedy"]["high"]
    assert math["groups"]["level"].keys() == {"Level 1", "Level 3"}
    assert {name: of["n"] for name, of in math["groups"]["type"].items()} == {
        "Algebra": 2, "Prealgebra": 1,
    }  # fmt: skip
    assert gsm8k["groups"] == {}
    assert gsm8k["pass_at_k"].keys() == gsm8k["maj_at_k"].keys() == {"1", "2"}
    for name in ("pass_at_k.png", "pass_at_k.svg", "report/index.html", "report/pass_at_k.svg"):
        assert (whole / name).stat().st_size > 1000, name


def test_the_harness_says_what_was_measured_with(whole, place):
    harness = _results(whole)["harness"]
    assert harness["chat"]["prompt"].endswith(
        "<start_of_turn>user\n{question}<end_of_turn>\n<start_of_turn>model\n"
    )
    assert "```output\n{output}\n```" in harness["chat"]["observation"]
    assert harness["limits"]["turn_tokens"] == 6
    assert harness["grader"]["policy"] == "strict"
    assert harness["data"]["math"]["problems"] == 3
    assert {"python", "jax", "sympy", "math-verify"} <= harness["versions"].keys()
    assert harness["tool"]["timeout"] == 5.0
    assert len(_results(whole)["policy"]["fingerprint"]) == 16


def test_the_report_door_shows_an_evaluation(whole, capsys):
    page = whole / "report" / "index.html"
    shutil.rmtree(page.parent)
    assert report.main(["--checkpoint", str(whole)]) == 0
    text = page.read_text()
    for words in ("Prealgebra", "maj@k", "vertical asymptotes", "math-verify", "gold answer 11"):
        assert words in text, words


def test_a_finished_evaluation_is_read(whole, place, asked, capsys):
    before = (whole / "trajectories.jsonl").read_bytes()
    assert evaluate.main(_flags(place, "whole", "--samples", "2")) == 0
    assert not asked
    assert before == (whole / "trajectories.jsonl").read_bytes()
    out = capsys.readouterr().out
    value = _results(whole)["suites"][1]["pass_at_k"]["2"]["value"]
    assert f"{100 * value:.1f}".replace("100.0", "100") in out
    assert max(map(len, out.splitlines()[:-3])) <= 100


def test_another_harness_or_policy_is_refused(whole, place, capsys):
    for more, words in (
        (["--samples", "3"], "sampling.samples: 2 -> 3"),
        (["--samples", "2", "--mode", "cot"], "mode: 'tool' -> 'cot'"),
        (["--samples", "2", "--policy", "lenient"], "grader.policy: 'strict' -> 'lenient'"),
    ):
        assert evaluate.main(_flags(place, "whole", *more)) == 2
        assert words in capsys.readouterr().err
    flags = _flags(place, "whole", "--samples", "2", model="other")
    assert evaluate.main(flags) == 2
    assert "policy.fingerprint: " in capsys.readouterr().err


def test_a_killed_evaluation_goes_on_without_repeating(whole, place, asked, monkeypatch):
    cut = place / "cut"
    flags = _flags(place, "cut", "--samples", "2")
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen(
        [sys.executable, "-m", "mdpo_jax.evaluate", *flags],
        env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    kept, deadline = cut / "trajectories.jsonl", time.monotonic() + 120
    while not kept.exists() or kept.read_bytes().count(b"\n") < 3:
        assert process.poll() is None, process.stderr.read()[-2000:]
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (cut / "results.json").exists()
    before = {key: row["ids"] for key, row in _trajectories(cut).items()}
    with open(kept, "a") as file:
        file.write('{"problem_id": "math/0", "samp')  # what a kill in the middle of a write leaves
    monkeypatch.setattr("mdpo_jax.pipeline.evaluation.verdict", _by_parity)
    assert evaluate.main(flags) == 0
    assert asked
    assert not set(asked) & before.keys()
    after, expected = _trajectories(cut), _trajectories(whole)
    assert len(asked) + len(before) == len(after) == len(expected)
    assert {k: r["ids"] for k, r in after.items()} == {k: r["ids"] for k, r in expected.items()}
    assert [s["problems"] for s in _results(cut)["suites"]] == [2, 3]


def test_reasoning_alone_has_its_instruction_one_turn_and_no_tool(place, asked, monkeypatch):
    monkeypatch.setattr("mdpo_jax.rollout.engine.wants_tool", lambda text: True)
    monkeypatch.setattr("mdpo_jax.pipeline.context.PythonInterpreter", None)
    flags = _flags(place, "cot", "--mode", "cot", "--problems", "2", data="math")
    assert evaluate.main(flags) == 0
    rows = _trajectories(place / "cot")
    assert len(rows) == 2
    for (_, name, _), row in rows.items():
        question = MATH[int(name.split("/")[1])]["problem"]
        told = "Please reason step by step, and put your final answer within \\boxed{}."
        prompt = chat().prompt(f"{question}\n{told}")
        ids = np.array(row["ids"])
        assert ids[np.array(row["roles"]) == Role.PROMPT].tolist() == prompt
        assert row["turns"] == 1
        assert row["tool_statuses"] == []
        assert row["finish"] in ("token_limit", "no_code")
    harness = _results(place / "cot")["harness"]
    assert (harness["tool"], harness["instruction"]) == ("off", COT_INSTRUCTION)


def test_a_comparison_says_whether_it_may_be_made(whole, place, monkeypatch, capsys):
    monkeypatch.setattr("mdpo_jax.pipeline.evaluation.verdict", _by_parity)
    versus = ["--versus", str(whole)]
    same = _flags(place, "same", "--samples", "2", *versus, model="other")
    assert evaluate.main([*same, "--config.model.param_dtype=float32"]) == 0
    found = _results(place / "same")["versus"]
    assert found["differences"] == []
    assert found["suites"].keys() == {"gsm8k", "math"}
    names = [row["figure"] for row in found["suites"]["math"]]
    assert names == ["greedy accuracy", "pass@1", "maj@2"]
    assert "NOT COMPARABLE" not in capsys.readouterr().out
    alone = [f for f in same if f not in versus]
    assert evaluate.main([*alone, "--config.model.param_dtype=float32"]) == 0
    assert "versus" not in _results(place / "same")
    other = _flags(place, "differs", *versus, data="math,gsm8k")
    assert evaluate.main([*other, "--config.rollout.turn_tokens=5"]) == 0
    found = _results(place / "differs")["versus"]
    named = [line.split(":")[0] for line in found["differences"]]
    assert named == ["limits.turn_tokens"]  # no samples there, so greedy alone is compared
    assert [row["figure"] for row in found["suites"]["math"]] == ["greedy accuracy"]
    assert "NOT COMPARABLE" in capsys.readouterr().out
    a, b = _results(whole), _results(place / "differs")
    assert comparable(a, b) == found["differences"]
    assert comparable(a, a) == []
    b = json.loads(json.dumps(a))
    b["harness"]["data"]["math"]["file_sha256"] = "of a gzipped copy"
    b["harness"]["data"]["more"] = {"problems": 1}
    b["harness"]["sampling"]["seed"] = 7
    assert comparable(a, b) == comparable(b, a) == []
    b["harness"]["batching"]["slots"] += 1
    assert [line.split(":")[0] for line in comparable(a, b)] == ["batching.slots"]
    fewer = _flags(place, "fewer", *versus, "--problems", "2", data="math")
    assert evaluate.main(fewer) == 2
    assert "math with 2 problems is not what was evaluated there" in capsys.readouterr().err


def test_an_evaluation_without_its_trajectories_is_no_evaluation(whole, place, capsys):
    torn = place / "torn"
    shutil.copytree(whole, torn)
    lines = (torn / "trajectories.jsonl").read_text().splitlines(keepends=True)
    (torn / "trajectories.jsonl").write_text("".join(lines[:-1]))
    same = _flags(place, "torn-versus", "--samples", "2", "--versus", str(torn), model="other")
    assert evaluate.main(same) == 2
    assert "lacks those of 1 problems of" in capsys.readouterr().err
    assert _results(place / "torn-versus")["suites"]  # what was sampled is scored all the same
    assert evaluate.main(_flags(place, "torn", "--samples", "2")) == 2
    assert f"--out={torn}: trajectories.jsonl lacks those of 1" in capsys.readouterr().err
    (torn / "trajectories.jsonl").unlink()
    assert evaluate.main(_flags(place, "torn", "--samples", "1")) == 2
    assert (
        "holds an evaluation of another kind (sampling.samples: 2 -> 1" in capsys.readouterr().err
    )


def test_a_comparison_of_other_problems_stops_before_anything_is_sampled(whole, place, capsys):
    flags = _flags(place, "early", "--versus", str(whole), "--problems", "1", data="math")
    assert evaluate.main(flags) == 2
    assert "math with 1 problems is not what was evaluated there" in capsys.readouterr().err
    assert not (place / "early" / "trajectories.jsonl").exists()


def test_a_prompt_that_does_not_fit_counts_as_wrong(place, monkeypatch, capsys):
    monkeypatch.setattr("mdpo_jax.pipeline.evaluation.verdict", _by_parity)
    size = len(chat().prompt(MATH[0]["problem"])) - 5
    flags = _flags(place, "short", data="math")
    flags[flags.index("--config.rollout.context=256")] = f"--config.rollout.context={size}"
    assert evaluate.main(flags) == 0
    [suite] = _results(place / "short")["suites"]
    assert suite["greedy"]["n"] == 3
    assert suite["slices"]["greedy"]["prompt_too_long"] == 1
    assert ("greedy", "math/0", 0) not in _trajectories(place / "short")
    assert "1 prompts do not fit and count as wrong" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--data", "nowhere.jsonl"], "--data=nowhere.jsonl: no such file"),
        (["--mode", "both"], "--mode=both: expected one of tool, cot"),
        (["--policy", "kind"], "--policy=kind: expected one of strict, lenient"),
        (["--samples", "-1"], "--samples=-1: expected 0 to 512"),
        (["--problems", "-1"], "--problems=-1: expected at least 0"),
        (["--temperature", "0"], "--temperature=0.0: expected a number above 0"),
        (["--temperature", "nan"], "--temperature=nan: expected a number above 0"),
        (["--versus", "nowhere"], "--versus=nowhere: no results.json of an evaluation"),
        (["--iteration", "2"], "is not a run directory"),
        (["--config.rollout.slotz=1"], "did you mean 'slots'?"),
        (["--config.rollout.context=9"], "config.rollout.context=9: no prompt of math fits"),
    ],
)
def test_wrong_input_is_one_line(place, more, words, capsys):
    assert (
        evaluate.main(_flags(place, "wrong", *more, data="" if "--data" in more else "math")) == 2
    )
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert words in error


def test_what_to_evaluate_must_be_said(place, capsys):
    data = ["--data", str(place / "math.jsonl")]
    assert evaluate.main(["--checkpoint", str(place / "model"), *data]) == 2
    assert "--config: not given; expected --config=NAME" in capsys.readouterr().err
    assert evaluate.main(["--config=tiny", *data]) == 2
    assert "config.model.path=None: nothing to evaluate" in capsys.readouterr().err
    assert evaluate.main(["--config=gemma7b", "--checkpoint", str(place / "model")]) == 2
    assert "a recipe on files; expected --data" in capsys.readouterr().err
    (place / "empty.jsonl").write_text('{"question": "What?", "answer": "no mark"}\n')
    flags = _flags(place, "empty", data="empty")
    assert evaluate.main(flags) == 2
    assert "no gold in 'no mark'" in capsys.readouterr().err
    (place / "foreign").mkdir()
    (place / "foreign" / "results.json").write_text("{}")
    assert evaluate.main(_flags(place, "foreign", data="math")) == 2
    assert "holds results.json of something else" in capsys.readouterr().err
