"""The whole loop on a model too small to learn: every stage, its files, and what a kill leaves."""

import json
import shutil

import numpy as np
import pytest
from support import SMALL_RUN

from mdpo_jax import evaluate, export, report, train
from mdpo_jax.data import store
from mdpo_jax.pipeline import files
from mdpo_jax.recipes import parse


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run; random answers are graded by chance so that pairs exist."""
    folder = tmp_path_factory.mktemp("run") / "r"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mdpo_jax.pipeline.evaluation.verdict", _by_parity)
        assert train.main([*SMALL_RUN, f"--config.workdir={folder}"]) == 0
    return folder


def _by_parity(context, gold, trajectory):
    from mdpo_jax.types import Verdict

    return Verdict(
        "correct" if (trajectory.ids.sum() + trajectory.sample) % 2 else "wrong", "parity", "0"
    )


@pytest.fixture
def graded_by_parity(monkeypatch):
    monkeypatch.setattr("mdpo_jax.pipeline.evaluation.verdict", _by_parity)
    # Limit-cut trajectories are all there are.
    return monkeypatch


def test_results_hold_what_others_script_against(finished):
    results = json.loads((finished / "results.json").read_text())
    assert results["config"]["name"] == "tiny"
    fields = {
        "stage", "iteration", "split", "decoding", "accuracy", "low", "high", "n", "mean_turns",
        "tool_error_rate",
    }  # fmt: skip
    for row in results["rows"]:
        assert fields <= row.keys()
        assert row["low"] <= row["accuracy"] <= row["high"]
    test = {(r["iteration"], r["decoding"]) for r in results["rows"] if r["split"] == "test"}
    assert {(0, "greedy"), (0, "sampled"), (2, "greedy"), (2, "sampled")} <= test


def test_a_rollout_says_what_its_engine_did(finished):
    for t in (1, 2):
        done = json.loads((finished / f"iteration-{t}" / "rollout" / "done.json").read_text())
        activity = done["activity"]
        assert activity["tokens_prefilled"] > activity["tokens_copied"] > 0
        assert activity["tokens_per_second"] > 0
        assert 0 < activity["mean_slots_busy"] <= 8
        assert 0 <= activity["tool_overlap"] <= 1
        assert activity["stuck_calls"] == 0


def test_no_iteration_compiles_the_step_or_the_sampler_again(finished):
    steps = [
        json.loads((finished / f"iteration-{t}" / "train" / "done.json").read_text())
        for t in (1, 2)
    ]
    assert [s["compilations"] for s in steps] == [1, 1]
    assert min(s["steps"] for s in steps) > 0
    assert max(s["sampler_trainer"]["max"] for s in steps) < 1e-4  # of really sampled tokens
    results = json.loads((finished / "results.json").read_text())
    assert results["compilations"]["rollout"] > 0
    assert results["compilations"]["rollout_after_warm_up"] == 0
    assert results["compilations"]["step"] == 1


def test_the_report_shows_trajectories_by_role(finished, tmp_path, capsys):
    page = (finished / "report" / "index.html").read_text()
    assert "observation" in page
    assert "SFT" in page
    assert "iteration 2, mixture: " in page
    assert (finished / "report" / "accuracy.svg").exists()
    assert report.main(["--checkpoint", str(finished)]) == 0
    assert report.main(["--checkpoint", str(tmp_path)]) == 2
    assert "not a run directory" in capsys.readouterr().err


def test_a_run_of_sft_alone_ends_with_its_report(finished, tmp_path, capsys):
    for name in ("problems", "start", "sft", "sft-dev", "sft-test"):
        shutil.copytree(finished / name, tmp_path / "r" / name)
    run = [*SMALL_RUN, "--config.method=sft", f"--config.workdir={tmp_path / 'r'}"]
    assert train.main(run) == 0
    results = json.loads((tmp_path / "r" / "results.json").read_text())
    assert {row["stage"] for row in results["rows"]} == {"sft"}
    assert (results["chosen_iteration"], results["comparisons"]) == (0, [])
    assert report.main(["--checkpoint", str(tmp_path / "r")]) == 0
    assert evaluate.main(["--checkpoint", str(tmp_path / "r"), "--iteration", "0"]) == 0
    assert evaluate.main(["--checkpoint", str(tmp_path / "r"), "--iteration", "1"]) == 2
    assert "expected 0 (SFT) to 0" in capsys.readouterr().err


def test_a_run_from_before_a_field_came_goes_on(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "r")
    known = tmp_path / "r" / "config.json"
    fields = json.loads(known.read_text())
    del fields["term_c"], fields["problems"]["fault"]
    known.write_text(json.dumps(fields))
    assert train.main([*SMALL_RUN, f"--config.workdir={tmp_path / 'r'}"]) == 0


def test_problem_sets_are_disjoint(finished):
    names = ("dev", "test", "iteration-1", "iteration-2")
    sets = [
        {row["id"] for row in store.read_lines(finished / "problems" / f"{n}.jsonl.gz")}
        for n in names
    ]
    assert sum(map(len, sets)) == len(set.union(*sets)) == 18


def test_a_finished_run_does_nothing_again(finished):
    def state():
        return {
            p: p.stat().st_mtime_ns for p in finished.rglob("*.json") if "report" not in p.parts
        }

    before = state()
    assert before
    assert train.main([*SMALL_RUN, f"--config.workdir={finished}"]) == 0
    assert before == state()


def test_a_run_that_was_cut_ends_in_the_same_place(finished, tmp_path, graded_by_parity):
    """What a kill in the second iteration's rollout leaves: one chunk, and no done.json after it."""
    again = tmp_path / "again"
    shutil.copytree(finished, again)
    (again / "results.json").unlink()
    (again / "start" / "done.json").unlink()  # killed between the model and its done.json
    shutil.rmtree(again / "export")
    for name in ("train", "train-dev", "train-test", "reference", "pairs"):
        shutil.rmtree(again / "iteration-2" / name)
    (again / "iteration-2" / "rollout" / "done.json").unlink()
    chunks = sorted((again / "iteration-2" / "rollout").glob("*.gz"))
    assert len(chunks) > 2
    for chunk in chunks[1:]:
        chunk.unlink()
    assert train.main([*SMALL_RUN, f"--config.workdir={again}"]) == 0
    for name in ("rollout/000-000002.jsonl.gz", "pairs/pairs.jsonl.gz", "reference/pairs.jsonl.gz"):
        ours, theirs = (d / "iteration-2" / name for d in (again, finished))
        assert ours.read_bytes() == theirs.read_bytes(), name
    a, b = (json.loads((d / "results.json").read_text())["rows"] for d in (again, finished))
    assert a == b


def test_another_configuration_is_refused(finished, capsys):
    code = train.main([*SMALL_RUN, f"--config.workdir={finished}", "--config.train.eta=0.5"])
    assert code == 2
    assert "train.eta: 1.0 -> 0.5" in capsys.readouterr().err


def test_export_writes_a_folder_and_never_twice(finished, tmp_path, capsys):
    from mdpo_jax.model.policy import load_policy

    out = tmp_path / "hf"
    arguments = ["--checkpoint", str(finished), "--iteration", "0", "--out", str(out)]
    assert export.main(arguments) == 0
    policy = load_policy(out)
    assert np.isfinite(np.asarray(policy.logits([[2, 5, 6]]))).all()
    assert export.main(arguments) == 2
    assert "exists already" in capsys.readouterr().err
    assert export.main(["--checkpoint", str(tmp_path), "--out", str(tmp_path / "x")]) == 2
    assert "not a run directory" in capsys.readouterr().err


def test_export_of_a_step_and_what_its_card_says(finished, tmp_path, capsys):
    import huggingface_hub

    for source in ("iteration-2", "iteration-2/train", "iteration-2/train/params"):
        out = tmp_path / source.replace("/", "-")
        flags = ["--checkpoint", str(finished / source), "--out", str(out), "--dtype", "bfloat16"]
        assert export.main(flags) == 0
        assert "iteration-2/train/params of" in capsys.readouterr().out
    card = (out / "README.md").read_text()
    front = huggingface_hub.metadata_load(out / "README.md")
    assert "mdpo_jax" in front["tags"]
    assert not {"license", "base_model"} & front.keys()
    for words in ("iteration 2 of mdpo", "| `train.eta` | `1.0` |", "| test | SFT |", "2409.02392"):
        assert words in card
    [command] = [line for line in card.splitlines() if line.startswith("python -m mdpo_jax.train")]
    again = parse(command.split()[3:])
    assert again.as_dict() | {"workdir": ""} == files.read_json(finished / "config.json")
    assert str(finished) not in card
    wrong = [
        "--checkpoint",
        str(finished / "iteration-2" / "rollout"),
        "--out",
        str(tmp_path / "x"),
    ]
    assert export.main(wrong) == 2
    assert "no parameters here; expected params or train/params" in capsys.readouterr().err


def test_evaluate_reads_what_is_done_and_makes_what_is_not(finished, capsys):
    results = json.loads((finished / "results.json").read_text())
    assert evaluate.main(["--checkpoint", str(finished), "--iteration", "2"]) == 0
    row = next(r for r in results["rows"] if (r["iteration"], r["split"]) == (2, "test"))
    assert f"{100 * row['accuracy']:.1f}".replace("100.0", "100") in capsys.readouterr().out
    assert evaluate.main(["--checkpoint", str(finished), "--iteration", "7"]) == 2
    assert "has no parameters; expected 0 (SFT) to 2" in capsys.readouterr().err


def test_a_run_is_evaluated_with_its_own_configuration(
    finished, tmp_path, graded_by_parity, capsys
):
    out = tmp_path / "e"
    flags = ["--checkpoint", str(finished), "--iteration", "2", "--out", str(out)]
    assert evaluate.main(["--config=tiny", *flags]) == 0
    found, results = (json.loads((d / "results.json").read_text()) for d in (out, finished))
    row = next(
        r
        for r in results["rows"]
        if (r["iteration"], r["split"], r["decoding"]) == (2, "test", "greedy")
    )
    [suite] = found["suites"]
    assert suite["greedy"]["value"] == row["accuracy"]
    assert suite["problems"] == row["n"] == 6
    assert found["harness"]["limits"]["turn_tokens"] == 8
    assert (
        found["policy"]["fingerprint"]
        == files.read_json(finished / "iteration-2" / "train" / "done.json")["policy"]
    )
    other = ["--config=tiny_stochastic", *flags]
    assert evaluate.main(other) == 2
    assert "the run's own recipe is tiny" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--config.train.etaa=1", "did you mean 'eta'?"),
        ("--config.workdir=/proc/nowhere", "expected a writable folder"),
        ("--config.problems.path=/nowhere.jsonl", "/nowhere.jsonl"),
        ("--config.model.path=/nowhere", "/nowhere"),
    ],
)
def test_wrong_input_ends_in_one_line_and_2(argument, message, tmp_path, capsys):
    assert train.main([*SMALL_RUN, f"--config.workdir={tmp_path / 'w'}", argument]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_help_lists_every_field(capsys):
    assert train.main(["--help"]) == 0
    assert "--config.train.eta=1.0  (float)" in capsys.readouterr().out


def test_a_stage_that_was_cut_starts_anew(tmp_path):
    calls = []

    def work(folder):
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError
        return {"n": len(calls)}

    with pytest.raises(RuntimeError):
        files.stage(tmp_path / "s", work)
    assert files.stage(tmp_path / "s", work) == {"n": 2}
    assert files.stage(tmp_path / "s", work) == {"n": 2}


def test_rows_are_rounded_up_to_what_the_mesh_divides(tmp_path):
    from mdpo_jax.pipeline.context import Context

    config = parse([*SMALL_RUN, "--config.train.rows=10", "--config.mesh.fsdp=4"])
    assert Context(config, tmp_path)._rows == 12


def test_one_sample_gives_pass_at_1_as_the_sampled_accuracy():
    from mdpo_jax.data.store import Graded
    from mdpo_jax.pipeline.evaluation import _pass_figures
    from mdpo_jax.types import Trajectory, Verdict

    one = np.ones(1)
    first = [
        Graded(Trajectory(f"p{i}", 0, "x", one, one, one), Verdict(label, "exact"))
        for i, label in enumerate(("correct", "wrong", "wrong", "correct"))
    ]
    assert _pass_figures(first, [], 1) == {"pass_at_k": {"1": 0.5}}
    assert _pass_figures(first, first, 2)["pass_at_k"] == {"1": 0.5, "2": 0.5}


def test_bad_demonstrations_are_set_aside_and_counted(tmp_path):
    from mdpo_jax.config import ConfigError
    from mdpo_jax.pipeline.demonstrations import _read

    turn = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    rows = [{"messages": turn}, {"messages": turn[:1]}, {"messages": [{"role": "user"}]}, {"x": 1}]
    path, aside = tmp_path / "demos.jsonl", tmp_path / "quarantine.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    assert _read(path, aside) == [turn]
    assert [json.loads(line)["line"] for line in aside.read_text().splitlines()] == [2, 3, 4]
    path.write_text('{"x": 1}')
    with pytest.raises(ConfigError, match="no usable row; line 1"):
        _read(path, aside)


def test_the_recipe_parses_with_the_tests_overrides():
    assert parse(SMALL_RUN).iterations == 2
