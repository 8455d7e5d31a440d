"""SIGKILL of the real process, between stages and inside them: the same command ends the same."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support import SMALL_RUN, learnt

SCRIPT = Path(__file__).with_name("loop.py")
SAVES = "--config.train.save_every=1"
# (what must be there when the signal comes, how many lines of it); in the order of the run.
INSTANTS = [
    ("sft/metrics.jsonl", 2),  # inside the warm-up
    ("iteration-1/rollout/000-000000.jsonl.gz", 0),  # between two chunks
    ("iteration-1/pairs/done.json", 0),  # between stages
    ("iteration-2/train/metrics.jsonl", 1),  # inside the preference steps
]


@pytest.fixture(scope="module")
def environment():
    return os.environ | {
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }


def _start(folder, environment):
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), *SMALL_RUN, f"--config.workdir={folder}", SAVES],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def _finish(folder, environment):
    process = _start(folder, environment)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-2000:]


def _reached(path, lines):
    return path.exists() and path.read_bytes().count(b"\n") >= lines


def test_a_run_killed_at_four_instants_ends_in_the_same_files(tmp_path, environment):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    _finish(whole, environment)
    for name, lines in INSTANTS:
        process = _start(cut, environment)
        deadline = time.monotonic() + 300
        while not _reached(cut / name, lines):
            assert process.poll() is None, f"ended before {name}: {process.stderr.read()[-2000:]}"
            assert time.monotonic() < deadline, name
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert not (cut / "results.json").exists()
    _finish(cut, environment)
    for path in sorted(whole.glob("iteration-*/*/*.jsonl.gz")):
        name = path.relative_to(whole)
        assert (cut / name).read_bytes() == path.read_bytes(), name
    for name in ("sft", "iteration-1/train", "iteration-2/train"):
        one, other = (json.loads((d / name / "done.json").read_text()) for d in (whole, cut))
        assert one["steps"] == other["steps"] > 0
        assert one["policy"] == other["policy"], name
        rows = [learnt(d / name / "metrics.jsonl") for d in (whole, cut)]
        assert rows[0] == rows[1], name
    one, other = (json.loads((d / "results.json").read_text()) for d in (whole, cut))
    assert one["rows"] == other["rows"]
    left = [p for pattern in ("*.partial", "*tmp*", "progress*") for p in cut.rglob(pattern)]
    assert not left
