"""Deadlines, deaths, levels and semantics: how a call ends, and what is left of the trajectory."""

import asyncio
import dataclasses
import os
import signal
import subprocess
import sys
import time

import pytest

from mdpo_jax.environment.interpreter import PythonInterpreter
from mdpo_jax.isolation import landlock, sandbox, seccomp

hardened = pytest.mark.skipif(
    not (seccomp.supported() and landlock.version()), reason="no seccomp or no Landlock here"
)


@pytest.fixture(scope="module")
def tool():
    with PythonInterpreter(preload=("math",), timeout=0.7, memory_mb=512) as interpreter:
        yield interpreter


def run(session, code):
    seen = session.run_cell(code).result(timeout=60)
    return seen.text, seen.status


def test_a_cell_that_can_be_interrupted_keeps_its_process_and_state(tool):
    session = tool.start("soft")
    run(session, "x = 1")
    pid = session._worker.pid
    assert run(session, "x = 2\nwhile True: pass") == ("Timeout Error", "timeout")
    assert run(session, "import time\ntime.sleep(60)") == ("Timeout Error", "timeout")
    assert run(session, "x") == ("2", "ok")
    assert session._worker.pid == pid
    session.close()


def test_one_that_cannot_is_killed_and_its_state_rebuilt(tool):
    session = tool.start("hard")
    run(session, "x = 1")
    run(session, "x += 1\n1/0")  # what ended by itself is replayed, up to its error
    pid = session._worker.pid
    stubborn = (
        "import signal\nx = 9\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nwhile True: pass"
    )
    assert run(session, stubborn) == ("Timeout Error", "timeout")
    assert not os.path.exists(f"/proc/{pid}")
    assert run(session, "x") == ("2", "ok")
    session.close()


def test_an_interrupt_that_comes_too_late_hurts_nobody(tool):
    """The cell ends while the deadline's signal is on its way: between cells it means nothing."""
    session = tool.start("late")
    run(session, "import os, signal")
    assert run(session, "signal.getsignal(signal.SIGINT) is signal.SIG_IGN") == ("False", "ok")
    worker = session._worker
    for _ in range(3):
        os.kill(worker.pid, 2)
        time.sleep(0.02)
    assert run(session, "6 * 7") == ("42", "ok")
    assert session._worker is worker
    session.close()


def test_a_keyboard_interrupt_of_the_cells_own_is_an_error(tool):
    assert run(tool.start("own"), "raise KeyboardInterrupt") == ("KeyboardInterrupt", "error")


def test_a_death_is_seen_though_a_child_holds_the_pipes():
    with PythonInterpreter(preload=(), timeout=30, sandbox="limits") as tool:
        start = time.monotonic()
        code = "import os, time\nif os.fork() == 0: time.sleep(50)\nos._exit(1)"
        assert run(tool.start("holds"), code)[1] == "killed"
        assert time.monotonic() - start < 25  # not the thirty of its deadline


@pytest.mark.parametrize(
    "code",
    [
        "n = 0\nwhile True:\n  n += 1\n  open(f'f{n % 60}', 'wb').write(bytes(10**7))",
        "import itertools\nfor n in itertools.count(): open(f'f{n}', 'w').close()",
        "import os, time\nos.mkdir('d')\nos.chmod('d', 0)\nos.chmod('.', 0)\ntime.sleep(50)",
    ],
)
def test_a_folder_that_fills_up_ends_its_process(code):
    if os.getuid() == 0 and "chmod" in code:
        pytest.skip("root looks into every folder")
    level = "limits" if "chmod" in code else "hardened"  # hardened, chmod does nothing
    with PythonInterpreter(preload=(), timeout=20, sandbox=level) as tool:
        session = tool.start("full")
        assert run(session, code)[1] == "output_limit"
        assert run(session, "import os\nos.listdir('.')") == ("[]", "ok")


def test_a_folder_is_looked_at_after_short_calls_too():
    with PythonInterpreter(preload=(), timeout=20) as tool:
        server = tool.servers.light
        server.limits = dataclasses.replace(server.limits, folder_bytes=2 * 10**6)
        session = tool.start("short")
        assert run(session, "open('a', 'wb').write(bytes(10**6))") == ("1000000", "ok")
        assert run(session, "open('b', 'wb').write(bytes(10**6))")[1] == "output_limit"


def test_what_a_cell_left_running_is_stopped_between_calls(tool):
    session = tool.start("idle")
    count = "import threading, time\nn = 0\ndef up():\n  global n\n"
    count += "  while True: n += 1; time.sleep(0.01)"
    run(session, f"{count}\nthreading.Thread(target=up, daemon=True).start()")
    before = int(run(session, "n")[0])
    time.sleep(0.5)
    assert int(run(session, "n")[0]) - before < 20
    session.close()


def test_closing_ends_a_call_that_is_running():
    with PythonInterpreter(preload=(), timeout=60) as tool:
        a, b = tool.start("a"), tool.start("b")
        calls = [s.run_cell("import time\ntime.sleep(50)") for s in (a, b)]
        time.sleep(0.5)
        start = time.monotonic()
        a.close()
        assert calls[0].result(timeout=20).status == "killed"
        assert a.run_cell("1").result(timeout=20).status == "refused"
    assert calls[1].result(timeout=20).status == "killed"
    assert time.monotonic() - start < 20


def test_a_forked_child_of_ours_keeps_nothing_alive():
    code = (
        "import os, time\nfrom mdpo_jax.environment.interpreter import PythonInterpreter as I\n"
        "t = I(preload=(), timeout=99)\n"
        "o = t.start('a').run_cell('import os\\nos.getpid()').result()\n"
        "if os.fork() == 0: time.sleep(60)\n"
        "print(o.text, t.servers.warm.pid, flush=True)\ntime.sleep(60)"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    pids = parent.stdout.readline().split()
    try:
        parent.kill()
        parent.wait()
        deadline = time.monotonic() + 20
        while any(os.path.exists(f"/proc/{p}") for p in pids) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not any(os.path.exists(f"/proc/{p}") for p in pids)
    finally:
        os.killpg(parent.pid, signal.SIGKILL)


def test_running_out_of_descriptors_is_named_and_hurts_no_session():
    code = (
        "import resource\nfrom mdpo_jax.environment.interpreter import PythonInterpreter as I\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))\nt = I(preload=(), timeout=9)\n"
        "first = t.start('0')\nfirst.run_cell('x = 1').result()\nkept = []\n"
        "try:\n  while True:\n    kept.append(t.start('s'))\n    kept[-1].run_cell('1').result()\n"
        "except Exception as error: print(error)\n"
        "print(len(kept) > 5, first.run_cell('x').result().text)\nt.close()"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    said, last = out.stdout.splitlines()
    assert said.startswith("tool: no pipes for another process (Too many open files)")
    assert said.endswith("may have 40 (`ulimit -n`)")
    assert last == "True 1"


def test_the_folder_of_a_killed_server_does_not_stay():
    with PythonInterpreter(preload=(), timeout=9) as tool:
        session = tool.start("a")
        folder = os.path.dirname(run(session, "import os\nos.getcwd()")[0].strip("'"))
        os.kill(tool.servers.warm.pid, signal.SIGTERM)  # the end of it is ours to decide
        assert run(session, "1") == ("1", "ok")
        os.kill(tool.servers.warm.pid, signal.SIGKILL)
        assert run(tool.start("b"), "2") == ("2", "ok")  # a new process, and so a new server
        assert not os.path.exists(folder)


def test_it_can_be_awaited(tool):
    async def several():
        calls = [tool.start(f"a{i}").run_cell(f"{i} ** 2") for i in range(5)]
        return [c.text for c in await asyncio.gather(*map(asyncio.wrap_future, calls))]

    assert asyncio.run(several()) == ["0", "1", "4", "9", "16"]


@pytest.mark.parametrize(
    ("semantics", "second", "third"),
    [
        ("live", ("9\n2", "ok"), ("2", "ok")),
        ("replay", ("9\n2", "ok"), ("2", "ok")),
        ("last_only", ("NameError: name 'x' is not defined", "error"), ("3", "ok")),
    ],
)
def test_what_a_cell_sees_of_those_before_it(semantics, second, third):
    with PythonInterpreter(preload=(), timeout=5, semantics=semantics) as tool:
        session = tool.start("s")
        run(session, "print('first')\nx = 1")
        assert run(session, "print(9)\nx + 1") == second
        session.run("```python\n1/0\n```").result()  # an error stops no later replay
        action = "```python\nx = 2\n```\n```python\nx\n```"
        if semantics == "last_only":
            action = "```python\nx = 2\n```\n```python\nx = 3\nx\n```"
        seen = session.run(action).result()
        assert (seen.text, seen.status) == third
        assert (session._worker is None) == (semantics != "live")


def test_a_replay_starts_from_nothing_each_time():
    with PythonInterpreter(preload=(), timeout=5, semantics="replay") as tool:
        session = tool.start("s")
        pids = {run(session, "import os\nos.getpid()")[0] for _ in range(3)}
        assert len(pids) == 3


@pytest.mark.parametrize(
    ("codes", "checked", "differed"),
    [
        (("import random\nx = random.random()\nx", "print(x)\n1/0", "len({1, 'a'})"), 3, 0),
        (("import time\nt = time.time_ns()\nt", "t", "1 + 1"), 3, 2),
    ],
)
def test_a_tool_that_says_something_else_the_second_time_is_found(codes, checked, differed):
    with PythonInterpreter(preload=(), timeout=5, check_determinism=1.0) as tool:
        session = tool.start("s")
        for code in codes:
            run(session, code)
        found = tool.rechecks()
        assert (found.checked, found.differed) == (checked, differed)
        assert found.rate == differed / checked
        assert len(found.examples) == differed


@pytest.mark.parametrize("cache", [False, True])
def test_a_share_of_the_calls_is_checked_and_none_that_was_cut(cache):
    with PythonInterpreter(preload=(), timeout=0.5, check_determinism=0.5, cache=cache) as tool:
        for i in range(40):
            run(tool.start(f"{i}"), f"{i}")
        assert 5 < tool.rechecks().checked < 35
    with PythonInterpreter(preload=(), timeout=0.5, check_determinism=1.0) as tool:
        session = tool.start("cut")
        run(session, "while True: pass")
        run(session, "1")  # its process holds what the cut cell left
        assert tool.rechecks().checked == 0
        assert tool.rechecks().rate is None
    with pytest.raises(ValueError, match=r"check_determinism: 1\.5; expected a share from 0 to 1"):
        PythonInterpreter(check_determinism=1.5)


def test_a_trajectory_gets_the_warm_modules_when_it_names_one():
    with PythonInterpreter(preload=("math", "numpy"), timeout=20) as tool:
        session = tool.start("w")
        look = "import sys\n'num' + 'py' in sys.modules"
        assert run(session, f"a = 40\n{look}") == ("False", "ok")
        assert tool.servers.warm.pid is None  # nobody has waited for its imports
        assert run(session, "import numpy\nint(numpy.add(a, 2))") == ("42", "ok")
        assert tool.servers.warm.pid is not None
        draw = "import numpy as np\nfloat(np.random.rand())"
        assert run(tool.start("k"), draw) == run(tool.start("k"), draw)
        assert run(tool.start("k"), draw) != run(tool.start("l"), draw)


def test_a_level_that_cannot_be_had_is_refused(monkeypatch):
    monkeypatch.setattr(landlock, "version", lambda: 0)
    with pytest.raises(sandbox.SandboxError, match=r"'required'.*no Landlock.*or `hardened`"):
        PythonInterpreter(sandbox="required")
    monkeypatch.undo()
    with pytest.raises(ValueError, match="sandbox: 'hard'; expected one of none, limits"):
        PythonInterpreter(sandbox="hard")
    with pytest.raises(ValueError, match="semantics: 'x'; expected one of live, replay"):
        PythonInterpreter(semantics="x")
    for preload in (("nump",), "numpy"):
        with pytest.raises(ValueError, match=r"preload: .*nump.*expected names of modules"):
            PythonInterpreter(preload=preload)


def test_without_landlock_or_filter_hardened_goes_on_and_says_so(monkeypatch, caplog):
    monkeypatch.setattr(landlock, "version", lambda: 0)
    monkeypatch.setattr(seccomp, "supported", lambda: False)
    with PythonInterpreter(preload=(), timeout=5) as tool:
        assert "sandbox hardened (no seccomp, no Landlock)" in caplog.text
        assert run(tool.start("a"), "import os\nos.path.exists('/etc/passwd')") == ("True", "ok")


@hardened
@pytest.mark.parametrize("level", ["none", "limits", "hardened", "required"])
def test_what_each_level_leaves_open(level, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", os.environ["PATH"] + ":/marked-path")
    with PythonInterpreter(preload=(), timeout=10, sandbox=level) as tool:
        session = tool.start("a")
        inherits = "'marked' in __import__('os').environ['PATH']"
        assert run(session, inherits)[0] == str(level == "none")
        target = tmp_path / "out"
        _, status = run(session, f"open({str(target)!r}, 'w').write('x')")
        assert target.exists() == (status == "ok") == (level in ("none", "limits"))
        assert run(session, "open('mine', 'w').write('x')") == ("1", "ok")
        # A module that nobody has loaded yet.
        assert run(session, "import wave, sqlite3\nwave.__name__") == ("'wave'", "ok")


@hardened
def test_files_that_are_not_pythons_own_cannot_be_read(tool, tmp_path):
    secret = tmp_path / "gold.jsonl"
    secret.write_text("s3cret")
    other = tool.start("other")
    folder = run(other, "import os\nopen('f', 'w').write('x')\nos.getcwd()")[0].strip("'")
    for path in (secret, "/etc/passwd", "/proc/1/cmdline", f"{folder}/f", __file__):
        assert run(tool.start("spy"), f"open({str(path)!r}).read()")[0].startswith("PermissionErr")
    assert run(other, "open('f').read()") == ("'x'", "ok")


def test_a_refusal_at_start_is_one_line(tmp_path):
    code = (
        "import sys\nfrom mdpo_jax.isolation import landlock\nlandlock.version = lambda: 0\n"
        "from mdpo_jax import train\nsys.exit(train.main(sys.argv[1:]))"
    )
    arguments = ["--config=tiny", "--config.tool.sandbox=required", f"--config.workdir={tmp_path}"]
    out = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
    )
    assert out.returncode == 2
    *_, last = out.stderr.splitlines()  # before it, transformers may miss PyTorch
    assert last.startswith("error: sandbox: 'required', but this machine gives hardened (")
