"""What slow tools and the end of a queue cost the rollout engine: one JSON line.

    python tools/bench_engine.py --size nano --slots 32 --trajectories 128 --collect arrival
    python tools/bench_engine.py --size nano --slots 256 --trajectories 768 --answers 0.4 --delay 0

Random weights at T = 1 and no tokenizer: every turn takes --turn-new tokens and calls the tool, or
answers in a share --answers of the turns; a call takes --delay seconds in a share --share of them and
is instant otherwise.  Runs with instant tools and with slow ones take turns.  On a machine with other
work the model is slower and a tool of fixed latency would look faster, so the delay of a run is
stretched by the wall seconds a CPU second of the instant run before it: `stretch`, 1 if idle.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import threading
import time
import zlib
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np
from bench_rollout import make_prompts
from bench_step import SIZES

SIZES = {**SIZES, "tiny": (448, 64, 192, 2, 4, 2, 32)}  # configs/tiny.py's model


class Ids:
    """A chat without text: a turn reads as code, or as an answer by a hash of its ids."""

    stop_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()

    def __init__(self, prompts: list[list[int]], answers: float, observation: int):
        self._prompts, self._answers, self._observation = prompts, answers, observation

    def prompt(self, question: str) -> list[int]:
        return self._prompts[int(question)]

    def decode(self, ids: Sequence[int]) -> str:
        drawn = zlib.crc32(np.asarray(ids, np.int32).tobytes()) / 2**32
        return "boxed" if drawn < self._answers else f"```python\n{drawn}"

    def observation(self, text: str, *, ended: bool, limit: int) -> tuple[list[int], list[int]]:
        from mdpo_jax.types import Role

        del ended, limit
        ids = np.random.default_rng(zlib.crc32(text.encode())).integers(4, 400, self._observation)
        return ids.tolist(), [int(Role.OBSERVATION)] * len(ids)


class Sleeper:
    """A tool, and its own session, that answers at once or after `delay` seconds."""

    def __init__(self, share: float):
        self.share, self.delay = share, 0.0

    def start(self, key: str) -> Sleeper:
        del key
        return self

    def run(self, action: str) -> Future:
        from mdpo_jax.environment.tool import Observation

        answer: Future = Future()
        done = Observation(action, "ok", 0.0)
        if self.delay and zlib.crc32(action.encode()) < self.share * 2**32:
            timer = threading.Timer(self.delay, answer.set_result, [done])
            timer.daemon = True
            timer.start()
        else:
            answer.set_result(done)
        return answer

    def close(self) -> None:
        pass


def main() -> None:
    """Warm up, time the runs, print the line."""
    options = _options()
    engine, tool, requests = _engine(options)
    from mdpo_jax.rollout.sampling import Sampling

    def once(delay: float) -> dict[str, Any]:
        tool.delay, before = delay, engine.activity.copy()
        wall, cpu = time.perf_counter(), time.process_time()
        found = engine.run(requests, policy="x", sampling=Sampling())
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        did = (engine.activity - before).report()
        ids = zlib.crc32(np.concatenate([t.ids for t in found]).tobytes())
        return {"wall": wall, "cpu": cpu, "ids": ids, **did}

    began = time.process_time()
    once(0.0)
    runs: dict[str, list[dict[str, Any]]] = {"instant": [], "slow": []}
    began = time.process_time() - began
    stretches = []
    for _ in range(options.repeats):
        instant = once(0.0)
        runs["instant"].append(instant)
        if options.delay:
            stretches.append(max(1.0, instant["wall"] / instant["cpu"]))
            runs["slow"].append(once(options.delay * stretches[-1]))
    kept = [a["wall"] / b["wall"] for a, b in zip(runs["instant"], runs["slow"], strict=False)]
    fields = {
        "bench": "engine", "size": options.size, "slots": options.slots,
        "trajectories": options.trajectories, "collect": options.collect, "delay": options.delay,
        "throughput_kept": [round(k, 3) for k in kept],
        "stretch": [round(s, 2) for s in stretches],
        "same_ids": len({run["ids"] for some in runs.values() for run in some}) == 1,
        **{kind: _summary(some) for kind, some in runs.items() if some},
        "first_run_cpu_s": round(began, 1), "cores": len(os.sched_getaffinity(0)),
    }  # fmt: skip
    print(json.dumps(fields), flush=True)


def _summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    names = ("wall", "cpu", "tokens_decoded", "mean_slots_busy", "mean_tools_busy", "tool_overlap")
    return {name: round(statistics.median(run[name] for run in runs), 3) for name in names}


def _engine(options: argparse.Namespace) -> tuple[Any, Sleeper, list[Any]]:
    """An engine over random weights, its tool, and the requests."""
    import jax

    from mdpo_jax.model import transformer
    from mdpo_jax.model.families import ModelConfig
    from mdpo_jax.rollout.engine import Engine, Limits, Request
    from mdpo_jax.rollout.sampler import Sampler
    from mdpo_jax.rollout.shapes import Shapes
    from mdpo_jax.types import Problem

    config = ModelConfig("gemma", *SIZES[options.size])
    prompts = make_prompts(options.trajectories, config.vocab_size, 0, options.prompt_len)
    turns, new, observation = options.turns, options.turn_new, options.observation
    context = -(-(max(map(len, prompts)) + turns * (new + observation) + 8) // 128) * 128
    fine = jax.default_backend() == "cpu"
    shapes = Shapes.make(options.slots, context, options.block, fine=fine)
    sampler = Sampler(config, shapes, (), "float32")
    sampler.load(transformer.init_params(config, jax.random.key(0)))
    tool, chat = Sleeper(options.share), Ids(prompts, options.answers, observation)
    limits = Limits(turns, new, turns * new, observation, context)
    chat_like: Any = chat
    engine = Engine(sampler, chat_like, tool, limits, collect=options.collect)
    requests = [Request(Problem(f"p/{i}", str(i), "1"), 0, "0") for i in range(len(prompts))]
    return engine, tool, requests


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=list(SIZES), default="nano")
    parser.add_argument("--slots", type=int, default=32)
    parser.add_argument("--trajectories", type=int, default=128)
    parser.add_argument("--prompt-len", type=int, default=None, help="default: lognormal, ~100")
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--turn-new", type=int, default=60)
    parser.add_argument("--observation", type=int, default=30)
    parser.add_argument("--answers", type=float, default=0.0, help="share of turns that answer")
    parser.add_argument("--delay", type=float, default=0.2, help="seconds of a slow call; 0: none")
    parser.add_argument("--share", type=float, default=0.5, help="of the calls that are slow")
    parser.add_argument("--collect", choices=("fixed", "arrival"), default="fixed")
    parser.add_argument("--block", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    return parser.parse_args()


if __name__ == "__main__":
    main()
