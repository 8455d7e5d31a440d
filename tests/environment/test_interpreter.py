import os
import signal
import subprocess
import sys
import time

import pytest

from mdpo_jax.environment.interpreter import PythonInterpreter
from mdpo_jax.environment.noisy import NoisyTool, with_wrong_number
from mdpo_jax.environment.replay import Replayed
from mdpo_jax.environment.tool import code_blocks, wants_tool


@pytest.fixture(scope="module")
def tool():
    with PythonInterpreter(preload=("math",), timeout=3, memory_mb=512) as interpreter:
        yield interpreter


def run(session, *cells):
    return session.run("\n".join(f"```python\n{c}\n```" for c in cells)).result(timeout=60)


def text(tool, code):
    session = tool.start("t")
    out = run(session, code)
    session.close()
    return out.text, out.status


@pytest.mark.parametrize(
    ("code", "expected", "status"),
    [
        ("print(5)\n3 + 4", "5\n7", "ok"),
        ("x = 1", "Result is not defined", "ok"),
        ("'a'", "'a'", "ok"),
        ("None", "Result is not defined", "ok"),
        ("foo", "NameError: name 'foo' is not defined", "error"),
        ("print(1)\n1/0", "ZeroDivisionError: division by zero", "error"),
        ("1 +", "SyntaxError: invalid syntax", "error"),
        ('print("a\\nb")', "a\nb", "ok"),
        ("import sys; sys.exit(3)", "SystemExit: 3", "error"),
        ("input ()", "EOFError: EOF when reading a line", "error"),
        ("print('\\udc80')", "?", "ok"),
        ("x = bytearray(1 << 30)", "MemoryError", "memory"),
        ("while True: pass", "Timeout Error", "timeout"),
        ("import os; os._exit(0)", "The process was killed", "killed"),
        ("import os; os.abort()", "The process was killed", "killed"),
        ("import ctypes; ctypes.string_at(0)", "The process was killed", "killed"),
    ],
)
def test_one_cell(tool, code, expected, status):
    assert text(tool, code) == (expected, status)


def test_state_lasts_over_turns_and_not_over_trajectories(tool):
    a, b = tool.start("a"), tool.start("b")
    run(a, "import math\nx = math.gcd(12, 8)")
    assert run(a, "x").text == "4"
    assert run(b, "x").status == "error"
    run(a, "import builtins; builtins.sum = None; math.gcd = None")
    assert run(b, "import math\nsum([math.gcd(4, 6)])").text == "2"
    assert run(a, "y = 1", "y + 1").text == "2"


def test_after_a_kill_the_blocks_that_succeeded_are_replayed(tool):
    session = tool.start("r")
    run(session, "x = 41")
    assert run(session, "import os; os._exit(1)").status == "killed"
    assert run(session, "x + 1").text == "42"


def test_output_is_capped(tool):
    out = text(tool, "while True: print('x' * 1000)")
    assert out[1] == "output_limit"
    assert len(out[0]) <= 20_000


def test_seeds_follow_the_key(tool):
    code = "import random\nrandom.random()"
    same = [run(tool.start("k"), code).text for _ in range(2)]
    assert same[0] == same[1] != run(tool.start("other"), code).text


def test_no_secret_no_folder_and_no_process_stays(tool, monkeypatch):
    assert "SECRET" not in text(tool, "import os\nprint(dict(os.environ))")[0]
    assert text(tool, "import os\nos.listdir('.')")[0] == "[]"
    text(tool, "import subprocess\nsubprocess.Popen(['sleep', '98765'], start_new_session=True)")
    listing = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True)
    assert "sleep 98765" not in listing.stdout


def test_a_killed_fork_server_is_replaced_and_state_rebuilt():
    with PythonInterpreter(preload=(), timeout=5) as tool:
        session = tool.start("a")
        run(session, "x = 6")
        os.kill(tool.servers.warm.pid, signal.SIGKILL)
        assert run(session, "x * 7").text == "42"


def test_closing_leaves_no_process():
    tool = PythonInterpreter(preload=(), timeout=5)
    sessions = [tool.start(str(i)) for i in range(4)]
    pids = [run(s, "import os\nos.getpid()").text for s in sessions]
    zygote = tool.servers.warm.pid
    tool.close()
    for pid in [*map(int, pids), zygote]:
        assert not os.path.exists(f"/proc/{pid}")


def test_a_killed_parent_leaves_no_process():
    code = (
        "from mdpo_jax.environment.interpreter import PythonInterpreter as I\n"
        "t = I(preload=(), timeout=9)\n"
        "o = t.start('a').run('```python\\nimport os\\nos.getpid()\\n```').result()\n"
        "print(o.text, t.servers.warm.pid, flush=True)\n"
        "import time; time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    pids = parent.stdout.readline().split()
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 20
    while any(os.path.exists(f"/proc/{p}") for p in pids) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(os.path.exists(f"/proc/{p}") for p in pids)


def test_the_cache_runs_equal_histories_once():
    with PythonInterpreter(preload=(), timeout=5, cache=True) as tool:
        for _ in range(3):
            session = tool.start("any")
            run(session, "x = 2")
            assert run(session, "x + 3").text == "5"
        assert tool.executed == 2
        session = tool.start("other")
        run(session, "x = 2")
        assert run(session, "x * 10").text == "20"  # a miss replays the history that was cached


def test_noise_depends_on_the_key_alone(tool):
    noisy = NoisyTool(tool, 0.5, seed=1)
    outs = [[run(noisy.start(f"k{i}"), "print(1)").text for i in range(12)] for _ in range(2)]
    assert outs[0] == outs[1]
    warned = [o.startswith("Warning: ") for o in outs[0]]
    assert any(warned)
    assert not all(warned)
    assert all(o.endswith("1") for o in outs[0])
    with pytest.raises(ValueError, match="expected a probability"):
        NoisyTool(tool, 1.5, 0)


def test_blocks_and_the_wish_for_the_tool():
    action = "text\n```python\na\nb\n```\nmore\n```python\nc\n```\n```python\nopen"
    assert code_blocks(action) == ["a\nb", "c"]
    assert wants_tool(action)
    assert not wants_tool("```python\n1\n```\n\\boxed{1}")
    assert not wants_tool("no code")


def test_an_action_without_a_closed_block_is_refused(tool):
    assert tool.start("x").run("```python\n1").result().status == "refused"


def test_a_worker_that_somebody_else_kills_changes_no_observation(tool):
    """The kernel short of memory, an operator: the block runs once more and gives what it gives."""
    session = tool.start("stable")
    assert run(session, "a = 2").status == "ok"
    call = session.run("```python\nimport time\ntime.sleep(0.6)\nprint(a + 1)\n```")
    time.sleep(0.2)
    os.kill(session._worker.pid, signal.SIGKILL)
    seen = call.result(timeout=60)
    assert (seen.text, seen.status) == ("3", "ok")
    session.close()


def test_how_long_a_block_took_is_not_shared_with_others():
    with PythonInterpreter(preload=(), timeout=0.5, memory_mb=512, cache=True) as interpreter:
        slow = "```python\nimport time\ntime.sleep(30)\n```"
        quick = "```python\nprint(1)\n```"
        for action, status in ((slow, "timeout"), (quick, "ok")):
            session = interpreter.start("t")
            assert session.run(action).result(timeout=60).status == status
            session.close()
        assert list(interpreter.cache) == [("print(1)",)]


def test_a_cancelled_call_cancels_its_noisy_twin():
    from concurrent.futures import Future

    class Never:
        def start(self, key):
            return self

        def run(self, action):
            self.call = Future()
            return self.call

    inner = Never()
    outer = NoisyTool(inner, 1.0, 0).start("t").run("x")
    inner.call.cancel()
    inner.call.set_running_or_notify_cancel()
    assert outer.cancelled()


@pytest.mark.parametrize(
    ("text", "number", "fraction", "expected"),
    [
        ("12\n37", 0, 0, "12\n38"),
        ("37 coins", 8, 1, "28 coins"),
        ("x = 3", 4, 1, "x = 8"),  # never below 0
        ("NameError: name 'math' is not defined", 1, 1, "NameError: name 'math' is not defined"),
    ],
)
def test_a_wrong_number_is_off_by_one_to_nine(text, number, fraction, expected):
    assert with_wrong_number(text, number, fraction) == expected


def test_a_replayed_session_runs_what_was_run_and_tells_the_last_alone(tool):
    session = Replayed(tool.start("replayed"), ["```python\na = 2\n```", "```python\na += 3\n```"])
    assert run(session, "print(a)").text == "5"
    assert run(session, "print(a + 1)").text == "6"  # and only once
    session.close()


def test_a_replay_that_breaks_or_is_cancelled_says_so():
    from concurrent.futures import Future

    class Broken:
        def __init__(self):
            self.calls = []

        def run(self, action):
            self.calls.append(Future())
            return self.calls[-1]

    inner = Broken()
    outer = Replayed(inner, ["x"]).run("y")
    inner.calls[0].set_exception(OSError("gone"))
    with pytest.raises(OSError, match="gone"):
        outer.result(timeout=5)
    assert len(inner.calls) == 1
    outer = Replayed(inner, ["x"]).run("y")
    inner.calls[1].cancel()
    inner.calls[1].set_running_or_notify_cancel()
    assert outer.cancelled()
