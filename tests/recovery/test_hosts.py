"""Two processes of two fake devices each: one run, what a killed one leaves, and exact gradients."""

import json
import os
import pickle
import signal
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path

import exact
import pytest
from support import SMALL_RUN, learnt

from mdpo_jax import hosts
from mdpo_jax.checks import ConfigError
from mdpo_jax.data import store

SMALL = [flag for flag in SMALL_RUN if "fsdp" not in flag]
HOSTS = "--config.mesh.hosts=2"
REST = ["1x4x1", "4x1x1", "2x1x2", "1x1x4"]  # data x fsdp x tensor, over both processes


@pytest.fixture(scope="module")
def environment():
    return os.environ | {
        "JAX_CPU_ENABLE_ASYNC_DISPATCH": "false",
        "PYTHONPATH": os.pathsep.join(map(str, Path(__file__).parents[1:3])),
    }


def _devices(environment, count):
    flags = environment["XLA_FLAGS"].split()
    flags = [f for f in flags if "device_count" not in f]
    flags.append(f"--xla_force_host_platform_device_count={count}")
    return environment | {"XLA_FLAGS": " ".join(flags)}


def _together(script, flags, environment):
    """Exit codes and errors of two processes that run a script together."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    shared = _devices(environment, 2) | {
        "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
        "JAX_NUM_PROCESSES": "2",
    }
    command = [sys.executable, str(Path(__file__).with_name(script)), *map(str, flags)]
    processes = [
        subprocess.Popen(
            command, env=shared | {"JAX_PROCESS_ID": str(i)}, stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE, text=True,
        )
        for i in range(2)
    ]  # fmt: skip
    errors = [process.communicate(timeout=600)[1] for process in processes]
    return [process.returncode for process in processes], errors


def test_a_killed_host_loses_no_problem_and_doubles_none(tmp_path, environment):
    run = tmp_path / "run"
    flags = [
        *SMALL, HOSTS, f"--config.workdir={run}", "--config.problems.per_iteration=8",
        "--config.rollout.slots=3", "--config.rollout.context=128",
    ]  # fmt: skip
    rollout = run / "iteration-1" / "rollout"
    codes, errors = _together("rollout.py", flags, environment | {"VICTIM": "1"})
    assert codes[1] == -signal.SIGKILL, errors[1][-2000:]
    assert codes[0] != 0  # it does not wait for ever
    assert not (rollout / "done.json").exists()
    left = {path: path.stat().st_mtime_ns for path in rollout.glob("*.jsonl.gz")}
    assert rollout / "000-000002.jsonl.gz" in left  # the other's first
    assert rollout / "000-000006.jsonl.gz" not in left  # the other's second

    codes, errors = _together("rollout.py", flags, environment)
    assert codes == [0, 0], (errors[0][-2000:], errors[1][-2000:])
    assert {path: path.stat().st_mtime_ns for path in left} == left
    problems = [row["id"] for row in store.read_lines(run / "problems" / "iteration-1.jsonl.gz")]
    found = Counter((row["problem_id"], row["sample"]) for row in store.read_folder(rollout))
    assert found == {(name, sample): 1 for name in problems for sample in range(2)}
    done = json.loads((rollout / "done.json").read_text())
    assert done["trajectories"] == 16
    assert done["compilations_after_warm_up"] == 0
    assert done["activity"]["tokens_decoded"] > 0


@pytest.mark.slow
def test_hosts_go_on_inside_a_training_stage_to_the_same_bits(tmp_path, environment):
    ends = []
    for name, victims in (("whole", ("",)), ("cut", ("1", ""))):
        run = f"--config.workdir={tmp_path / name}"
        flags = [*SMALL, HOSTS, run, "--config.train.save_every=2"]
        sft = tmp_path / name / "sft"
        for victim in victims:
            told = environment | {"STAGE": "sft", "VICTIM": victim}
            codes, errors = _together("rollout.py", flags, told)
            if victim:
                assert codes[1] == -signal.SIGKILL, errors[1][-2000:]
                assert json.loads((sft / "progress.json").read_text())["step"] == 2
        assert codes == [0, 0], (errors[0][-2000:], errors[1][-2000:])
        done = json.loads((sft / "done.json").read_text())
        del done["speed"]
        ends.append((done, learnt(sft / "metrics.jsonl")))
    assert ["goes on after step 2" in text for text in errors] == [True, True]
    assert ends[0] == ends[1]


@pytest.mark.slow
def test_a_whole_run_is_that_of_one_process(tmp_path, environment):
    both, alone = tmp_path / "both", tmp_path / "alone"
    flags = [*SMALL, HOSTS, f"--config.workdir={both}"]
    codes, errors = _together("loop.py", flags, environment)
    assert codes == [0, 0], (errors[0][-2000:], errors[1][-2000:])
    command = [sys.executable, str(Path(__file__).with_name("loop.py")), *SMALL]
    subprocess.run(
        [*command, f"--config.workdir={alone}"], env=_devices(environment, 4), check=True
    )
    one, other = (json.loads((folder / "results.json").read_text()) for folder in (both, alone))
    for row, same in zip(one["rows"], other["rows"], strict=True):
        kl, expected = row.pop("kl", 0), same.pop("kl", 0)
        assert kl == pytest.approx(expected, abs=1e-4)
        for name in ("kl_by_turn", "kl_by_part"):
            row.pop(name, None), same.pop(name, None)
        assert row == same
    assert one["comparisons"] == other["comparisons"]
    names = {path.relative_to(both) for path in both.rglob("*.jsonl*")}
    assert names == {path.relative_to(alone) for path in alone.rglob("*.jsonl*")}
    assert (both / "report" / "index.html").exists()
    assert not list(both.rglob("*-of-2"))  # the processes' own parts of an evaluation
    # Another configuration is refused in all, by the one that holds the folder.
    codes, errors = _together("loop.py", [*flags, "--config.seed=7"], environment)
    assert codes == [2, 2], (errors[0][-2000:], errors[1][-2000:])
    assert "seed: 0 -> 7" in errors[0]
    assert "the first process: " in errors[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        ["--config.lora.rank=4", "--config.explore.strategy=mcts"],
        ["--config.term_c.kind=value", "--config.explore.strategy=checkpoints"],
        ["--config.term_c.kind=monte_carlo", "--config.train.optimiser=lion"],
    ],
)
def test_whatever_is_trained_two_processes_end_together(tmp_path, environment, flags):
    small = [*SMALL, HOSTS, f"--config.workdir={tmp_path / 'run'}", "--config.iterations=1"]
    codes, errors = _together("loop.py", [*small, *flags], environment)
    assert codes == [0, 0], (errors[0][-2000:], errors[1][-2000:])


@pytest.mark.parametrize("meshes", [["1x2x2"], pytest.param(REST, marks=pytest.mark.slow)])
def test_loss_and_gradients_are_the_naive_ones(tmp_path, environment, meshes):
    out = tmp_path / "found"
    codes, errors = _together("gradients.py", [out, *meshes], environment)
    assert codes == [0, 0], (errors[0][-2000:], errors[1][-2000:])
    found = pickle.loads(out.read_bytes())
    assert len(found) == len(meshes) * len(exact.LAYOUTS)
    for one in found:
        exact.check(one, exact.expected())


def test_a_number_that_is_none_is_refused_by_name(monkeypatch):
    monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
    with pytest.raises(ConfigError, match="JAX_NUM_PROCESSES=two; expected a whole number"):
        hosts.connect(2)
