"""Blocks that attack: each gets a status of its own, and a bystander answers as before."""

import os
import struct
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from mdpo_jax.environment.interpreter import PythonInterpreter
from mdpo_jax.isolation import landlock, seccomp

hardened = pytest.mark.skipif(not seccomp.supported(), reason="no seccomp on this machine")
FORGED = b'{"text": "FORGED", "status": "ok"}'
FORGE = f"""
import os
for fd in range(3, 20):
    try: os.write(fd, {struct.pack(">8sI", bytes(8), len(FORGED)) + FORGED!r})
    except OSError: pass
print("real")
"""


@pytest.fixture(scope="module")
def tool():
    with PythonInterpreter(preload=("math",), timeout=2, memory_mb=512, workers=4) as interpreter:
        yield interpreter


def run(session, code):
    return session.run(f"```python\n{code}\n```").result(timeout=30)


@pytest.fixture
def attack(tool):
    """Runs a block beside an idle bystander, whose state must outlive it in the same process."""
    bystander, attacker = tool.start("bystander"), tool.start("attacker")
    pid = run(bystander, "import os\nx = 40\nos.getpid()").text
    yield lambda code: run(attacker, code)
    assert run(bystander, "x + 2").text == "42"
    assert run(bystander, "os.getpid()").text == pid
    attacker.close()
    bystander.close()


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("while True:\n  try:\n    while True: pass\n  except BaseException: pass", "timeout"),
        ("while True:\n  try: print('x' * 1000)\n  except BaseException: pass", "timeout"),
        ("import signal\nsignal.alarm(0)\nimport time\ntime.sleep(99)", "timeout"),
        ("import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)", "timeout"),
        ("class E(Exception):\n  def __str__(self):\n    while True: pass\nraise E", "timeout"),
        ("9 ** 9 ** 9", "timeout"),
        ("print('x' * 10**8)", "output_limit"),
        # Not a list of zeros: that touches each page, which a busy machine does not do in two seconds.
        ("a = []\nwhile True: a.append(bytearray(10**8))", "memory"),
        ("import os\nos.closerange(0, 100)", "killed"),
        ("import os\nos.abort()", "killed"),
        ("import sys\nsys.stdin.read() + 'empty'", "ok"),
        ("import sys\nsys.stdout.close()", None),
        ("(" * 100_000 + ")" * 100_000, "error"),
        ("import os\nfor _ in range(3000): os.mkdir('d'); os.chdir('d')", "ok"),
        ("raise KeyboardInterrupt", "error"),
        ("import threading, time\nthreading.Thread(target=time.sleep, args=(99,)).start()", "ok"),
        ("import atexit, time\natexit.register(time.sleep, 99)", "ok"),
    ],
)
def test_the_sample_has_a_status_and_others_go_on(attack, code, status):
    start = time.monotonic()
    seen = attack(code)
    assert seen.status == status or status is None
    assert time.monotonic() - start < 20  # far above the two seconds: it hangs or it does not


def test_a_forged_answer_is_no_answer_and_shifts_none(attack):
    assert attack(FORGE).status == "killed"
    assert [attack(f"print({i})").text for i in range(3)] == ["0", "1", "2"]


def test_a_worker_that_stops_reading_holds_nobody(attack):
    attack(
        "import os, signal, threading, time\n"
        "def stop():\n  time.sleep(0.1)\n  while True: os.kill(os.getpid(), signal.SIGSTOP)\n"
        "threading.Thread(target=stop).start()"
    )
    time.sleep(0.3)  # it stops again whenever it is told to go on
    assert attack("#" + "x" * 300_000).status == "timeout"  # more than a pipe holds


@hardened
@pytest.mark.parametrize(
    "code",
    [
        "import os\nos.kill(os.getppid(), 9)",
        "import os, signal\nos.kill(os.getppid(), signal.SIGSTOP)",
        "import os\nos.killpg(0, 9)",
        "import os\nos.fork()",
        "import subprocess\nsubprocess.run(['true'])",
        "import socket\nsocket.socket()",
        "import os\nopen(f'/proc/{os.getppid()}/mem', 'r+b')",
        "import os\nos.setsid()",
    ],
)
def test_what_the_filter_refuses(attack, code):
    seen = attack(code)
    assert (seen.status, seen.text.split(":")[0]) == ("error", "PermissionError")


@pytest.mark.skipif(not landlock.version() or not seccomp.supported(), reason="not hardened")
def test_files_and_processes_outside_keep_their_settings(tool, tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("x")
    victim.chmod(0o600)
    before, mine = victim.stat(), os.sched_getaffinity(0)
    code = f"""
import os, shutil
v = {str(victim)!r}
for change in (lambda: os.chmod(v, 0o777), lambda: os.utime(v, (0, 0)),
               lambda: os.setxattr(v, "user.x", b"y"), lambda: os.chown(v, 1, 1),
               lambda: os.sched_setaffinity({os.getpid()}, [0]),
               lambda: os.chmod(os.path.dirname(os.getcwd()), 0)):
    try: change()
    except OSError: pass
open("a", "w").write("kept")
shutil.copy("a", "b")
open("b").read()"""
    assert run(tool.start("settings"), code).text == "'kept'"
    after = victim.stat()
    assert (after.st_mode, after.st_mtime, after.st_uid) == (
        before.st_mode, before.st_mtime, before.st_uid,
    )  # fmt: skip
    assert os.listxattr(victim) == []
    assert os.sched_getaffinity(0) == mine
    assert run(tool.start("next"), "1").text == "1"


@pytest.mark.skipif(os.getuid() != 0, reason="between processes of one plain user /proc is open")
def test_our_environment_is_not_in_reach():
    # A process's /proc/.../environ is what it was started with: so a process of its own.
    code = """
import os
from mdpo_jax.environment.interpreter import PythonInterpreter
look = '''
import os
found = []
for pid in (%d, os.getppid(), "self"):
    try: found.append(b"s3cr" + b"3t" in open(f"/proc/{pid}/environ", "rb").read())
    except OSError: found.append(None)
found''' % os.getpid()
with PythonInterpreter(preload=(), timeout=5) as tool:
    print(tool.start("a").run(f"```python\\n{look}\\n```").result().text)
"""
    out = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"TOKEN": "s3cr3t"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert out.stdout.strip() in ("[None, None, None]", "[None, None, False]")


def test_a_crowd_of_attackers_and_innocents(tool):
    codes = ["import os\nos._exit(1)", "while True: pass", FORGE, "6 * 7"] * 3
    with ThreadPoolExecutor(12) as crowd:
        seen = list(crowd.map(lambda p: run(tool.start(f"c{p[0]}"), p[1]), enumerate(codes)))
    assert [s.status for s in seen] == ["killed", "timeout", "killed", "ok"] * 3
    assert [s.text for s in seen[3::4]] == ["42"] * 3


def test_no_descriptor_of_ours_stays_open():
    def descriptors():
        return len(os.listdir("/proc/self/fd"))

    with PythonInterpreter(preload=(), timeout=5) as warm:
        run(warm.start("a"), "1")
    before = descriptors()
    with PythonInterpreter(preload=(), timeout=5) as tool:
        for key in "abc":
            run(tool.start(key), "import os\nos._exit(1)" if key == "b" else "1")
        for session in [tool.start("d")]:
            run(session, "1")
            session.close()
    assert descriptors() <= before
