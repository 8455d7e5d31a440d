"""Tools that are slow, stuck or late, and what an engine counts."""

import threading
import time
from concurrent.futures import Future

import pytest

from mdpo_jax.environment.tool import Observation
from mdpo_jax.rollout.activity import Activity
from mdpo_jax.rollout.calls import STUCK, Guarded, wait_for_one


class Session:
    """Calls that never end by themselves; closing waits as long as a call is in flight."""

    def __init__(self):
        self.calls, self.release, self.closed = [], threading.Event(), threading.Event()

    def run(self, action):
        self.calls.append(Future())
        return self.calls[-1]

    def close(self):
        if self.calls and not self.calls[-1].done():
            self.release.wait(30)
        self.closed.set()


def test_a_stuck_call_times_out_and_its_session_is_not_asked_again():
    session = Session()
    guarded = Guarded(session, 0.1)
    call = guarded.run("a")
    assert not call.ready
    begun = time.monotonic()
    observation = call.result()
    assert 0.05 < time.monotonic() - begun < 5
    assert (observation.text, observation.status) == (STUCK, "timeout")
    assert call.stuck
    again = guarded.run("b")
    assert again.ready
    assert again.result().status == "timeout"
    assert len(session.calls) == 1
    guarded.close()  # does not wait
    session.release.set()
    assert session.closed.wait(10)


def test_an_answer_in_time_is_the_answer_and_a_failure_stays_one():
    session = Session()
    guarded = Guarded(session, 30.0)
    call, broken = guarded.run("a"), guarded.run("b")
    session.calls[0].set_result(Observation("4", "ok", 0.0))
    wait_for_one([call, broken])
    assert (call.ready, broken.ready) == (True, False)
    assert call.result().text == "4"
    assert not call.stuck
    session.calls[1].set_exception(TimeoutError("of the tool itself"))
    with pytest.raises(TimeoutError, match="of the tool itself"):
        broken.result()
    guarded.close()
    assert session.closed.is_set()


def test_overlap_is_the_part_of_a_block_that_some_call_covers():
    now = time.monotonic()
    calls = [Guarded(Session(), None).run("a") for _ in range(3)]
    for call, ended in zip(calls, (now - 8, now - 3, now - 5), strict=True):
        call.ended = ended
    a = Activity()
    a.block(now - 10, 4, calls)
    assert a.decode_seconds == pytest.approx(10, abs=0.1)
    assert a.overlap_seconds == pytest.approx(7, abs=0.1)
    assert a.slot_seconds == pytest.approx(40, abs=0.4)
    before = a.copy()
    a.block(now - 10, 4, calls[:1])
    assert (a - before).overlap_seconds == pytest.approx(2, abs=0.1)
    a.block(now, 4, [])
    calls[0].ended = None
    a.block(now - 10, 0, calls)
    assert (a - before).overlap_seconds == pytest.approx(12, abs=0.1)


def test_a_report_of_nothing_divides_by_nothing():
    assert Activity().report()["tokens_per_second"] == 0
