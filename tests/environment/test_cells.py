"""What a cell finds around it: its module, its stream, its seeds; and what it cannot leave behind."""

import pytest

from mdpo_jax.environment.interpreter import PythonInterpreter


@pytest.fixture(scope="module")
def tool():
    with PythonInterpreter(preload=("math",), timeout=3, memory_mb=1024) as interpreter:
        yield interpreter


def run(session, code):
    seen = session.run_cell(code).result(timeout=60)
    return seen.text, seen.status


def texts(tool, key, *cells):
    session = tool.start(key)
    found = [run(session, cell)[0] for cell in cells]
    session.close()
    return found


def test_the_cell_is_the_main_module(tool):
    session = tool.start("main")
    run(session, "import pickle\nclass A: pass\ndef f(x: int) -> str: ...")
    assert run(session, "pickle.loads(pickle.dumps(A())).__class__ is A") == ("True", "ok")
    assert run(session, "from __main__ import f as g\ng is f") == ("True", "ok")
    assert run(session, "f.__annotations__['x'] is int") == ("True", "ok")


def test_who_kept_the_stream_prints_to_the_next_cell(tool):
    cells = [
        "import logging, sys\nout = sys.stdout\nlogging.warning('one')",
        "logging.warning('two')",
    ]
    assert texts(tool, "log", *cells, "out.write('three')\nNone") == [
        "WARNING:root:one", "WARNING:root:two", "three",
    ]  # fmt: skip
    session = tool.start("closes")
    assert run(session, "import sys\nsys.stdout.close()\nprint(1)") == ("1", "ok")
    assert run(session, "sys.stdout = None\n2") == ("2", "ok")
    assert run(session, "print(3)") == ("3", "ok")


def test_a_long_error_is_cut_and_costs_no_process(tool):
    session = tool.start("long")
    run(session, "x = 1")
    pid = session._worker.pid
    text, status = run(session, "raise ValueError('y' * 2_000_000)")
    assert (len(text), status) == (20_000, "error")
    assert run(session, "x") == ("1", "ok")
    assert session._worker.pid == pid


@pytest.mark.parametrize(
    "draw",
    [
        "import numpy as np\nfloat(np.random.rand())",
        "import numpy as np\n(np.random.default_rng().random(), np.random.default_rng().random())",
        "import random\nrandom.random()",
    ],
)
def test_a_draw_follows_from_the_key_wherever_the_module_comes_from(tool, draw):
    with PythonInterpreter(preload=("numpy",), timeout=20) as warm:
        for there in (tool, warm):
            first, again, other = (texts(there, key, draw)[0] for key in "aab")
            assert first == again != other
        assert texts(tool, "a", draw) == texts(warm, "a", draw)
    assert "0." in first


def test_a_seed_that_is_given_is_kept(tool):
    code = "import numpy as np\nround(float(np.random.default_rng(0).random()), 6)"
    assert texts(tool, "k", code) == ["0.636962"]


def test_an_interrupt_leaves_no_half_module():
    slow = (
        "import importlib, sys, time\nopen('slow.py', 'w').write('import time; time.sleep(60)')\n"
    )
    with PythonInterpreter(preload=(), timeout=0.5) as tool:
        session = tool.start("half")
        run(session, "x = 1")
        pid = session._worker.pid
        text, status = run(session, slow + "sys.path.insert(0, '.')\nimport slow")
        assert (text, status) == ("Timeout Error", "timeout")
        assert run(session, "x") == ("1", "ok")
        assert session._worker.pid != pid


def test_an_action_ends_with_the_block_that_was_interrupted():
    with PythonInterpreter(preload=(), timeout=0.5) as tool:
        session = tool.start("several")
        action = "```python\nx = 1\nwhile True: pass\n```\n```python\nx = 2\n```"
        assert session.run(action).result(timeout=60).status == "timeout"
        assert run(session, "x") == ("1", "ok")


@pytest.mark.parametrize("before", ["x = 5\nprint('a' * 30_000)", "x = 5\nwhile True: pass"])
def test_what_cut_cells_left_is_there_when_a_warm_module_is_named(before):
    with PythonInterpreter(preload=("numpy",), timeout=1) as tool:
        session = tool.start("moves")
        run(session, before)
        assert run(session, "# numpy\nx + 1") == ("6", "ok")


def test_a_replay_gives_each_block_its_own_time():
    with PythonInterpreter(preload=(), timeout=1.5) as tool:
        session = tool.start("slow")
        for i in range(3):
            assert run(session, f"import time\ntime.sleep(0.7)\nx = {i}")[1] == "ok"
        assert run(session, "import os\nos._exit(1)")[1] == "killed"
        assert run(session, "x") == ("2", "ok")


def test_a_hit_is_followed_in_the_right_process():
    with PythonInterpreter(preload=("numpy",), timeout=20, cache=True) as tool:
        draw = "import numpy as np\nx = float(np.random.rand())\nx"
        first = texts(tool, "a", draw)[0]
        assert texts(tool, "b", draw, "x + 0") == [first, first]
        assert tool.servers.light.pid is None
