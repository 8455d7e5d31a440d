"""Several processes as one run: who they are, what they agree on, and arrays that span them.

    every process   samples its share on its own devices, with its own tools, into files of its own
                    takes part in every computation on the mesh of all devices
    the first one   writes everything else, and holds the run directory

With one process everything here does nothing, or what its argument says.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Sharding

from mdpo_jax.checks import ConfigError, HostsGone

T = TypeVar("T")
_LONGEST_WAIT = 30 * 24 * 3600 * 1000  # ms: who is slow is waited for; who is gone, jax notices
_waits = itertools.count()


def connect(count: int) -> None:
    """Join the run's other processes, before a device is touched; 1: there are none.

    count: how many there are, 0 for as many as the cluster says.  On a TPU pod, under Slurm, Open
    MPI and Kubernetes jax finds them; elsewhere the environment names them, by
    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID.  Raises ConfigError.
    """
    if count == 1:
        return
    names = {"num_processes": "JAX_NUM_PROCESSES", "process_id": "JAX_PROCESS_ID"}
    given: dict[str, Any] = {k: _number(name) for k, name in names.items() if name in os.environ}
    # Nothing is lost yet, and jax waits where no handler of Python's would run.
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        jax.distributed.initialize(**given)
    except (ValueError, RuntimeError) as error:
        raise ConfigError(
            f"config.mesh.hosts={count}: {str(error).splitlines()[0]}; expected a TPU pod, Slurm, "
            "Open MPI or Kubernetes, or JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and "
            "JAX_PROCESS_ID in the environment, or 1"
        ) from None
    finally:
        signal.signal(signal.SIGINT, before)
    if count and count != jax.process_count():
        raise ConfigError(
            f"config.mesh.hosts={count}: there are {jax.process_count()} processes; expected as "
            "many, or 0"
        )


def _number(name: str) -> int:
    try:
        return int(os.environ[name])
    except ValueError:
        raise ConfigError(f"{name}={os.environ[name]}; expected a whole number") from None


def several() -> bool:
    """Whether there is another process."""
    return jax.process_count() > 1


def first() -> bool:
    """Whether this is the process that writes what all share."""
    return jax.process_index() == 0


def mine(things: Sequence[T]) -> Sequence[T]:
    """This process's share of what all know in one order."""
    return things[jax.process_index() :: jax.process_count()]


def wait() -> None:
    """Until every process is here; Ctrl-C ends it.  Raises HostsGone if one has ended."""
    if not several():
        return None
    from orbax.checkpoint import multihost  # a second to import, and few need it

    meet = functools.partial(
        multihost.get_barrier_sync_fn(), key=f"mdpo_jax {next(_waits)}", timeout_ms=_LONGEST_WAIT
    )
    came: Future[None] = Future()

    def go() -> None:
        try:
            came.set_result(meet())
        except BaseException as error:
            came.set_exception(error)

    # In a thread, for no signal is handled while a barrier blocks the main one.
    threading.Thread(target=go, daemon=True).start()
    while True:
        try:
            return came.result(timeout=1)
        except TimeoutError:
            continue
        except jax.errors.JaxRuntimeError as error:
            raise HostsGone(f"another process is gone ({str(error).splitlines()[0]})") from None


def everyone(value: Any) -> list[Any]:
    """The values of all processes in their order, each as JSON gives it back."""
    if not several():
        return [value]
    wait()  # collectives have a patience of their own, which may be short
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.asarray([len(text)], np.int32)).reshape(-1)
    padded = np.zeros(-(-max(lengths) // 1024) * 1024, np.uint8)
    padded[: len(text)] = text
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(row[:length].tobytes()) for row, length in zip(rows, lengths, strict=True)]


def by_first(work: Callable[[], T]) -> T:
    """What `work` gives in the first process, in all; JSON, if there are others.

    When it raises, the others raise ConfigError, so that all end.
    """
    if not several():
        return work()
    value, error = None, None
    if first():
        try:
            value = work()
        except Exception as found:
            error = found
    value, told = everyone([value, None if error is None else str(error)])[0]
    if error is not None:
        raise error
    if told is not None:
        raise ConfigError(f"the first process: {told}")
    return value


def fetch(x: jax.Array) -> np.ndarray:
    """The whole of an array, on every host."""
    if x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def place(value: np.ndarray, sharding: Sharding) -> jax.Array:
    """An array that all processes hold, on the devices of all; each copies what is its own."""
    if sharding.is_fully_addressable:
        return jax.device_put(value, sharding)
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def leave(code: int) -> int:
    """A door's exit code.  One that failed is left at once, where others wait for it.

    jax would wait five minutes for them at its exit, and they for this process.
    """
    return _leave_now(code) if code and several() else code


def _leave_now(code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
