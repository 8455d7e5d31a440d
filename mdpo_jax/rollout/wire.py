"""What vLLM and SGLang read and answer over HTTP: token ids in, token ids and their log-probs out.

Formats as of these pages and files; nothing here was written against a running server of either:

- vLLM, `POST /v1/completions` with `prompt` as a list of ids: docs.vllm.ai/en/v0.28.0, "OpenAI-
  Compatible Server", and `vllm/entrypoints/openai/completion/protocol.py`.  `return_token_ids` (vllm
  pull request 22587) answers `prompt_token_ids` and `token_ids`; servers before it answer `tokens`
  as `token_id:N` under `return_tokens_as_token_ids`.  Log-probs are untempered (`--logprobs-mode
  raw_logprobs`, the default).  `/inference/v1/generate` takes ids alone but needs its own server
  flags, and old servers lack it.
- SGLang, `POST /generate` with `input_ids`: docs.sglang.io/basic_usage/native_api and
  /sampling_params, and the source of 0.5.23.  `meta_info.output_token_logprobs` holds (log-prob,
  id, text) of each token.  Log-probs are tempered unless the server runs with
  SGLANG_RETURN_ORIGINAL_LOGPROB=1; `sampling_seed` counts only with
  `--enable-deterministic-inference`.
- both: `GET /v1/models` (`id`, `max_model_len`) and `POST /tokenize` (`tokens`).

Every sampling parameter is sent, for both servers take what is missing from generation_config.json.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple


class ServerRefused(ValueError):
    """A server that must not be sampled from; the message says what it is and what was expected."""


class Malformed(Exception):
    """An answer that is not what the server's kind gives: another try may get a better one."""


@dataclasses.dataclass(frozen=True)
class TurnRequest:
    """How one turn is sampled.  top_k: 0 for all tokens.  vocabulary: ids lie below it."""

    max_tokens: int
    temperature: float
    seed: int
    stop_ids: tuple[int, ...]
    stop_strings: tuple[str, ...]
    vocabulary: int
    top_k: int = 0
    top_p: float = 1.0


class Generated(NamedTuple):
    """Ids and log-probs that a server sampled, a stop token included."""

    ids: list[int]
    log_probs: list[float]


class VLLM:
    """vLLM's completions.  spare: of max_model_len, tokens that a request may not use."""

    path, spare = "/v1/completions", 0

    def body(self, model: str, ids: Sequence[int], request: TurnRequest) -> dict[str, Any]:
        """The request for one turn after `ids`."""
        return {
            "model": model,
            "prompt": list(ids),
            "max_tokens": request.max_tokens,
            "seed": request.seed,
            # Our stop ids hold the model's, and alone decide where a turn ends.
            "ignore_eos": True,
            "include_stop_str_in_output": True,
            "logprobs": 0,  # of the sampled token alone
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            **_drawn(request),
        }

    def read(self, answer: Any, prompt: Sequence[int], request: TurnRequest) -> Generated:
        """The sampled turn; ServerRefused for an answer without ids or log-probs."""
        choice = _first(answer.get("choices")) if isinstance(answer, dict) else None
        if not isinstance(choice, dict):
            raise Malformed("no choices in the answer")
        _finished(choice.get("finish_reason"))
        said = choice.get("prompt_token_ids")
        if said is not None and said != list(prompt):
            raise ServerRefused(
                f"it read the prompt as {_short(said)}; expected the ids that were sent, "
                f"{_short(prompt)}"
            )
        scored = choice.get("logprobs")
        scored = scored if isinstance(scored, dict) else {}
        ids = choice.get("token_ids")
        if ids is None:
            ids = _spelled(scored.get("tokens"))
        if ids is None:
            raise ServerRefused(
                "it answers without token ids; expected choices[0].token_ids, which vLLM gives for "
                "return_token_ids: text would have to be encoded again"
            )
        return _checked(ids, scored.get("token_logprobs"), request)


class SGLang:
    """SGLang's native generation.  spare: it refuses a request that would fill its context."""

    path, spare = "/generate", 1

    def body(self, model: str, ids: Sequence[int], request: TurnRequest) -> dict[str, Any]:
        """The request for one turn after `ids`; a server has one model, so none is named."""
        return {
            "input_ids": list(ids),
            "sampling_params": {
                "max_new_tokens": request.max_tokens,
                "sampling_seed": request.seed,
                # It ignores stop_token_ids as well; so an end that is not ours is gone past instead.
                "ignore_eos": not request.stop_ids,
                "no_stop_trim": True,
                **_drawn(request),
            },
            "return_logprob": True,
            "stream": False,
        }

    def read(self, answer: Any, prompt: Sequence[int], request: TurnRequest) -> Generated:
        """The sampled turn; ServerRefused for an answer without ids or log-probs."""
        meta = answer.get("meta_info") if isinstance(answer, dict) else None
        if not isinstance(meta, dict):
            raise Malformed("no meta_info in the answer")
        reason = meta.get("finish_reason")
        _finished(reason.get("type") if isinstance(reason, dict) else reason)
        count = meta.get("prompt_tokens")
        if count is not None and count != len(prompt):
            raise ServerRefused(f"it read a prompt of {count} ids; expected {len(prompt)}")
        entries = meta.get("output_token_logprobs")
        if not isinstance(entries, list) or not all(
            isinstance(e, list | tuple) and len(e) >= 2 for e in entries
        ):
            raise ServerRefused(
                "it answers without token ids; expected meta_info.output_token_logprobs, which "
                "SGLang gives for return_logprob: text would have to be encoded again"
            )
        ids = [e[1] for e in entries]
        whole = answer.get("output_ids")  # some versions leave the stop token out of it
        if isinstance(whole, list) and whole != ids[: len(whole)]:
            raise ServerRefused(f"output_ids {_short(whole)}, but log-probs of {_short(ids)}")
        return _checked(ids, [e[0] for e in entries], request)


KINDS: dict[str, VLLM | SGLang] = {"vllm": VLLM(), "sglang": SGLang()}


class Card(NamedTuple):
    """What a server says that it serves."""

    model: str
    max_model_len: int | None


def cards(answer: Any) -> list[Card]:
    """Of `/v1/models`: the models, adapters left out."""
    found = answer.get("data") if isinstance(answer, dict) else None
    if not isinstance(found, list):
        raise Malformed("no data in the answer of /v1/models")
    models = [m for m in found if isinstance(m, dict) and isinstance(m.get("id"), str)]
    lengths = [n if type(n := m.get("max_model_len")) is int else None for m in models]
    every = [Card(m["id"], n) for m, n in zip(models, lengths, strict=True)]
    return [c for c, m in zip(every, models, strict=True) if not m.get("parent")]


def tokens(answer: Any) -> list[int]:
    """Of `/tokenize`."""
    found = answer.get("tokens") if isinstance(answer, dict) else None
    if not isinstance(found, list) or not all(type(i) is int for i in found):
        raise Malformed("no tokens in the answer of /tokenize")
    return found


def _drawn(request: TurnRequest) -> dict[str, Any]:
    """The parameters that both servers know by the same names."""
    return {
        "temperature": request.temperature,
        "stop_token_ids": list(request.stop_ids),
        "stop": list(request.stop_strings),
        "skip_special_tokens": True,
        "n": 1,
        "top_p": request.top_p,
        "top_k": request.top_k or -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
    }


def _first(values: Any) -> Any:
    return values[0] if isinstance(values, list) and values else None


def _finished(reason: Any) -> None:
    if reason not in ("stop", "length"):
        raise Malformed(f"finish_reason {reason!r}; expected stop or length")


def _spelled(tokens: Any) -> list[int] | None:
    """Ids of tokens that are spelled `token_id:N`; None if one is not."""
    if not isinstance(tokens, list):
        return None
    parts = [str(t).removeprefix("token_id:") for t in tokens if str(t).startswith("token_id:")]
    whole = len(parts) == len(tokens) and all(p.isdecimal() for p in parts)
    return [int(p) for p in parts] if whole else None


def _checked(ids: Any, log_probs: Any, request: TurnRequest) -> Generated:
    """Ids up to the first stop token, each with its log-prob."""
    if not isinstance(ids, list) or not all(
        type(i) is int and 0 <= i < request.vocabulary for i in ids
    ):
        raise ServerRefused(
            f"token ids {_short(ids)}; expected integers from 0 to {request.vocabulary - 1}"
        )
    if not isinstance(log_probs, list) or len(log_probs) != len(ids):
        count = len(log_probs) if isinstance(log_probs, list) else "no"
        raise ServerRefused(f"{count} log-probs of {len(ids)} tokens; expected one each")
    if not all(isinstance(x, int | float) and math.isfinite(x) and x < 1e-3 for x in log_probs):
        raise ServerRefused(f"log-probs {_short(log_probs)}; expected finite ones, at most 0")
    if not ids:
        raise Malformed("no token was sampled")
    if len(ids) > request.max_tokens:
        raise ServerRefused(f"{len(ids)} tokens; expected at most {request.max_tokens}")
    ends = [place for place, i in enumerate(ids) if i in request.stop_ids]
    keep = ends[0] + 1 if ends else len(ids)
    return Generated(ids[:keep], [float(x) for x in log_probs[:keep]])


def _short(values: Any) -> str:
    text = str(list(values) if isinstance(values, list | tuple) else values)
    return text if len(text) <= 80 else f"{text[:77]}..."
