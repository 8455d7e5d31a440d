"""Rollouts on vLLM or SGLang servers: the multi-turn loop here, every turn sampled there.

    slot 0 | HTTP: turn ....... | tool .. | HTTP: turn .. |         each slot goes its own way;
    slot 1 | HTTP: turn .. | tool ......... | HTTP: turn ....... |  nothing waits for a neighbour

Nothing is sampled before the server's tokenizer and model length fit and its log-probs are the
policy's.  A seed is sent with every turn, from (seed, iteration, problem, sample, turn); whether the
same seed gives the same tokens is up to the server, whose batches round as they come: vLLM repeats
a lone request, SGLang heeds seeds only with --enable-deterministic-inference.  What is on disk is
never sampled again, so a resumed run is whole, but not the same to the token as an unbroken one.
"""

from __future__ import annotations

import dataclasses
import logging
import shlex
import shutil
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np

from mdpo_jax.chat import Chat
from mdpo_jax.config import Rollout
from mdpo_jax.environment.tool import Tool
from mdpo_jax.model.policy import Policy, fingerprint
from mdpo_jax.rollout import wire
from mdpo_jax.rollout.calls import Call, soonest
from mdpo_jax.rollout.engine import Engine, Limits, Request, _seed, _Slot, _trajectory
from mdpo_jax.rollout.sampling import Sampling
from mdpo_jax.rollout.servers import Patience, Server, Servers
from mdpo_jax.rollout.wire import Generated, ServerRefused, TurnRequest
from mdpo_jax.types import Trajectory

_log = logging.getLogger(__name__)

_PROBE = "A train leaves at 9:40 and arrives at 13:05. How many minutes does it take?"
_PROBED = 16  # tokens sampled after it
_RELOAD = 3600.0  # seconds that a reload command may take
_TEXTS = (
    "x = 6 * 7\n```python\nfrom sympy import sqrt\nprint(sqrt(2) + 1_000)\n```\n",
    "  The answer is $\\boxed{\\frac{3}{4}}$.\n\n\t",
    "Größe 12 345,67 € → 数学",
)


@dataclasses.dataclass(frozen=True)
class _Probe:
    """Tokens that a server sampled after the probe, and their log-probs by it and by the policy."""

    ids: list[int]
    theirs: np.ndarray
    ours: np.ndarray

    @property
    def apart(self) -> float:
        """Mean |difference| of log-probs, in nats a token."""
        return float(np.abs(self.theirs - self.ours).mean())


class RemoteSampler:
    """The sampling policy on servers, in the place of `Sampler`: `load` brings new weights there.

    as_policy: parameters as a policy that can be saved.  exports: the folder for what servers load;
    they must see it under the same path.
    """

    def __init__(
        self, settings: Rollout, chat: Chat, as_policy: Callable[[Any], Policy], exports: Path,
        patience: Patience | None = None,
    ):  # fmt: skip
        patience = patience or Patience(settings.request_timeout, settings.retries)
        self._settings, self._chat, self._as_policy = settings, chat, as_policy
        self._exports, self._kind = exports, settings.server_kind
        self._wire = wire.KINDS[settings.server_kind]
        self.servers = Servers(settings.urls, patience, self._prepare)
        self._policy: Policy | None = None
        self._version = ""
        self._loaded = False
        # Cut inside the question: what comes next is open, so its log-probs tell policies apart.
        whole = chat.prompt(_PROBE)
        self._probe = whole[: max(1, min(2 * len(whole) // 3, settings.context - _PROBED))]
        self._checked: set[float] = set()  # temperatures

    def rest(self) -> None:
        """Nothing of it is on this process's devices."""

    def load(self, params: Any) -> None:
        """Export the policy, have every server load it, and check that it has.

        Raises ServerRefused, naming both values, for a tokenizer, a length or log-probs that differ;
        ServersGone if no server answers.
        """
        policy = self._as_policy(params)
        version = fingerprint(policy.params)
        if version == self._version and self._loaded:
            return
        self._policy, self._version, self._loaded = policy, version, False
        command = self._settings.reload_command
        if command or self._kind == "sglang":
            if not self._folder.exists():
                policy.save(self._folder, self._settings.decode_dtype)
            if command and "{server}" not in command:
                self._run(command, "")
        self.servers.start()
        self._loaded = True
        for other in self._exports.glob("*"):
            if other != self._folder:
                shutil.rmtree(other, ignore_errors=True)

    def generate(
        self, ids: Sequence[int], room: int, temperature: float, seed: int, last: Server | None
    ) -> tuple[Generated, Server]:
        """At most `room` tokens after `ids`, up to the end of a turn, and the server they are from."""
        asked = self._asked(room, temperature, seed, self._chat.stop_strings)
        return self.servers.call(
            self._wire.path,
            lambda server: self._wire.body(server.model, ids, asked),
            lambda answer: self._wire.read(answer, ids, asked),
            last,
        )

    def check(self, temperature: float) -> None:
        """Refuse servers whose log-probs at this temperature are not the policy's own, untempered."""
        # Greedy decoding is checked by `load`, and at 1 there is nothing to temper.
        if temperature not in (0.0, 1.0) and temperature not in self._checked:
            self._checked.add(temperature)
            self._loaded = False
            self.servers.start()
            self._loaded = True

    def compilations(self) -> int:
        """None: nothing is compiled for sampling."""
        return 0

    def late_compilations(self) -> int:
        return 0

    @property
    def _folder(self) -> Path:
        return self._exports / self._version

    def _asked(
        self, room: int, temperature: float, seed: int, stop_strings: Sequence[str]
    ) -> TurnRequest:
        assert self._policy is not None, "nothing is loaded"
        size = self._policy.config.vocab_size
        stops = tuple(self._chat.stop_ids)
        return TurnRequest(room, temperature, seed, stops, tuple(stop_strings), size)

    def _prepare(self, server: Server) -> None:
        """Bring one server to where it may be asked for turns of this policy."""
        self._check_model(server)
        self._check_tokenizer(server)
        if server.version != self._version:
            self._reload(server)
        before, found = server.kept, self._probed(server, 0.0)
        tolerance = self._settings.fingerprint_tolerance
        if found.apart > tolerance:
            raise ServerRefused(
                f"other weights: {len(found.ids)} tokens have a mean log-prob of "
                f"{found.theirs.mean():.4f} there and {found.ours.mean():.4f} by the policy, "
                f"{found.apart:.4f} apart; expected at most rollout.fingerprint_tolerance={tolerance}"
                f"{self._remedy()}"
            )
        if _unmoved(before, found):
            raise ServerRefused(
                f"old weights: log-probs of {len(found.ids)} tokens are what they were before the "
                f"reload, {found.theirs.mean():.6f} in the mean, by the policy "
                f"{found.ours.mean():.6f}; expected them to move{self._remedy()}"
            )
        server.kept, server.version = found, self._version
        for temperature in self._checked:
            self._check_temperature(server, temperature)

    def _check_temperature(self, server: Server, temperature: float) -> None:
        found = self._probed(server, temperature)
        if found.apart > self._settings.fingerprint_tolerance:
            raise ServerRefused(
                f"log-probs at temperature {temperature} are {found.theirs.mean():.4f} in the mean, by "
                f"the policy {found.ours.mean():.4f}; expected untempered ones: of vLLM with "
                "--logprobs-mode raw_logprobs, of SGLang with SGLANG_RETURN_ORIGINAL_LOGPROB=1"
            )

    def _remedy(self) -> str:
        if self._kind == "sglang" or self._settings.reload_command:
            return ""
        return ", or rollout.reload_command to load the policy into the servers"

    def _check_model(self, server: Server) -> None:
        """The served name, and that whole trajectories fit."""
        served = wire.cards(self.servers.ask(server, "/v1/models"))
        wanted = self._settings.served_model
        # SGLang takes the folder that it has loaded for its name.
        named = [c for c in served if not wanted or c.model == wanted or self._is_ours(c.model)]
        if not named:
            names = ", ".join(c.model for c in served) or "nothing"
            raise ServerRefused(f"it serves {names}; expected rollout.served_model={wanted!r}")
        card, spare = named[0], self._wire.spare
        needed = self._settings.context + spare
        if card.max_model_len is None or card.max_model_len < needed:
            raise ServerRefused(
                f"max_model_len={card.max_model_len} of {card.model}; expected at least {needed}, "
                f"rollout.context={self._settings.context}{f' and {spare} more' if spare else ''}"
            )
        server.model = card.model

    def _is_ours(self, path: str) -> bool:
        return Path(path).parent == self._exports.absolute()

    def _check_tokenizer(self, server: Server) -> None:
        """The same ids for some texts, for special tokens, and at the vocabulary's end."""
        tokenizer = self._chat.tokenizer
        special = [*self._chat.stop_ids, *tokenizer.all_special_ids]
        texts = [*_TEXTS, *tokenizer.convert_ids_to_tokens(list(dict.fromkeys(special)))]
        texts += _last_piece(tokenizer)
        for text in texts:
            ours = tokenizer(text, add_special_tokens=False)["input_ids"]
            body = {"model": server.model, "prompt": text, "add_special_tokens": False}
            theirs = wire.tokens(self.servers.ask(server, "/tokenize", body))
            if theirs != list(ours):
                raise ServerRefused(
                    f"another tokenizer: {text!r} is {theirs} there; expected {list(ours)}"
                )

    def _reload(self, server: Server) -> None:
        """The policy's weights into one server, unless it says that it has them."""
        command = self._settings.reload_command
        if command:
            if "{server}" in command:
                self._run(command, server.url)
        elif self._kind == "sglang":
            # As of python/sglang/srt/entrypoints/http_server.py; its cache is flushed with it.
            folder = str(self._folder.absolute())
            info = self.servers.ask(server, "/get_model_info")
            if not isinstance(info, dict) or info.get("model_path") != folder:
                self.servers.ask(server, "/update_weights_from_disk", {"model_path": folder})

    def _run(self, command: str, server: str) -> None:
        """The user's reload command, waited for."""
        line = command.replace("{path}", shlex.quote(str(self._folder.absolute())))
        line = line.replace("{server}", shlex.quote(server))
        _log.info("rollout: %s", line)
        try:
            done = subprocess.run(
                line, shell=True, capture_output=True, text=True, timeout=_RELOAD, check=False
            )
        except subprocess.TimeoutExpired:
            raise ServerRefused(
                f"rollout.reload_command={command!r}: not done in {_RELOAD:g} s"
            ) from None
        if done.returncode:
            said = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
            raise ServerRefused(
                f"rollout.reload_command={command!r}: exit code {done.returncode}: {' '.join(said)}"
            )

    def _probed(self, server: Server, temperature: float) -> _Probe:
        """A turn of the probe, sampled as all others are, and scored here."""
        # No stop ids: one token of a policy that ends at once would say little.
        asked = dataclasses.replace(self._asked(_PROBED, temperature, 1, ()), stop_ids=())
        body = self._wire.body(server.model, self._probe, asked)
        answer = self.servers.ask(server, self._wire.path, body)
        ids, log_probs = self._wire.read(answer, self._probe, asked)
        return _Probe(ids, np.array(log_probs), self._score(ids))

    def _score(self, ids: Sequence[int]) -> np.ndarray:
        """Log-probs of `ids` after the probe, by one forward of the policy in its own precision."""
        assert self._policy is not None
        start = len(self._probe)
        row = np.zeros(start + _PROBED, np.int32)  # one shape, compiled once
        row[: start + len(ids)] = [*self._probe, *ids]
        logits = np.asarray(self._policy.logits(row[None]))[0, start - 1 :][: len(ids)]
        shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
        sampled = np.take_along_axis(shifted, np.array(ids)[:, None], axis=-1)[:, 0]
        return sampled - np.log(np.exp(shifted).sum(-1))


class RemoteEngine(Engine):
    """`Engine` with every turn sampled by a server; `slots` trajectories at a time."""

    def __init__(
        self, sampler: RemoteSampler, chat: Chat, tool: Tool | None, limits: Limits, slots: int,
        patience: float | None = None,
    ):  # fmt: skip
        super().__init__(sampler, chat, tool, limits, patience=patience)  # pyright: ignore
        self._remote, self._slots = sampler, slots

    def live(self) -> str:
        """What is busy now."""
        turns, tools = self._busy
        return f"slots {turns}/{self._slots}, tools {tools}"

    def stream(
        self, requests: Iterable[Request], *, policy: str, sampling: Sampling
    ) -> Iterator[tuple[int, Trajectory]]:
        """Each trajectory as soon as it is finished, with its request's place.

        Raises ServersGone when no server answers any more, ServerRefused for one that answers wrong;
        ValueError for top-k or top-p, which servers are not asked for.
        """
        if sampling.top_k or sampling.top_p < 1:
            raise ValueError(f"{sampling}: expected neither top_k nor top_p with servers")
        order, temperature = list(requests), sampling.temperature
        queue = deque(range(len(order)))
        homes: dict[int, Server] = {}  # where each slot's last turn was sampled
        # What each slot waits for: a turn from a server (no Call), or a tool's output.
        waits: dict[Future[Any], tuple[int, _Slot, Call | None]] = {}
        servers = self._remote.servers
        with ThreadPoolExecutor(self._slots, "turn") as pool, servers.abandoned_on_error():
            self._remote.check(temperature)

            def ask(place: int, slot: _Slot) -> None:
                turn = pool.submit(self._turn, slot, temperature, homes.get(place))
                waits[turn] = place, slot, None

            try:
                while queue or waits:
                    while queue and len(waits) < self._slots:
                        place = queue.popleft()
                        ask(place, self._admit(order[place], place, self._start(order[place])))
                    finished = []
                    for future in self._there(waits):
                        place, slot, tool = waits.pop(future)
                        if tool is not None:
                            observation = tool.result()
                            self.activity.answered(tool)
                            goes_on, call = self._observe(slot, observation), None
                        else:
                            turn, homes[place] = future.result()
                            self.activity.decoded += len(turn.ids)
                            goes_on = not self._acted(slot, turn)
                            call = None if goes_on else self._end_turn(slot)
                        if call is not None:
                            waits[call.future] = place, slot, call
                        elif goes_on:
                            ask(place, slot)
                        else:
                            del homes[place]
                            finished.append(slot)
                    self.activity.trajectories += len(finished)
                    for slot in finished:
                        yield slot.place, _trajectory(slot, policy)
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _there(
        self, waits: dict[Future[Any], tuple[int, _Slot, Call | None]]
    ) -> list[Future[Any]]:  # fmt: skip
        """Those that ended, and calls that are stuck; waits until there is one."""
        tools = [call for _, _, call in waits.values() if call is not None]
        self._busy = len(waits) - len(tools), sum(call.ended is None for call in tools)
        begun = time.monotonic()
        done = wait(waits, soonest(tools), return_when=FIRST_COMPLETED).done
        if self._busy[0]:
            self.activity.block(begun, self._busy[0], tools)
        self.activity.seconds += time.monotonic() - begun
        stuck = (f for f, (_, _, call) in waits.items() if call is not None and call.ready)
        return list({**dict.fromkeys(done), **dict.fromkeys(stuck)})

    def _turn(
        self, slot: _Slot, temperature: float, last: Server | None
    ) -> tuple[Generated, Server]:
        """More of a slot's turn, on the server that had the last one if that is no busier."""
        emitted = len(slot.ids) - slot.turn_start
        seed = _seed(f"{slot.request.key}/{slot.turns}/{emitted}")[0] >> 1
        return self._remote.generate(slot.ids, self._room(slot), temperature, seed, last)

    def _acted(self, slot: _Slot, turn: Generated) -> bool:
        """Append what was sampled; whether the turn has ended, by the same rules as on the device.

        It has not where a server stopped for a limit of its own, or a stop that is none here.
        """
        slot.act(turn.ids, turn.log_probs)
        cut = self._stop_string(slot)
        return cut or slot.ids[-1] in self._chat.stop_ids or self._room(slot) < 1


def _unmoved(before: _Probe | None, now: _Probe) -> bool:
    """Whether a server says exactly what it said before, though the policy has moved."""
    if before is None or before.ids != now.ids:
        return False
    still = np.array_equal(before.theirs, now.theirs)
    return still and float(np.abs(before.ours - now.ours).max()) > 1e-3


def _last_piece(tokenizer: Any) -> list[str]:
    """The last piece of the vocabulary that text alone can spell; at most one."""
    pieces = sorted(tokenizer.get_vocab().items(), key=lambda item: -item[1])
    for piece, index in pieces[:1000]:
        if tokenizer(piece, add_special_tokens=False)["input_ids"] == [index]:
            return [piece]
    return []
