"""A real HTTP server on loopback that samples from a tiny model and speaks as vLLM or SGLang do."""

import collections
import functools
import http.server
import json
import socket
import struct
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
from support import model_config, params, tokenizer

from mdpo_jax.model import transformer
from mdpo_jax.model.policy import load_policy

WIDTH = 256


@jax.jit
def _log_probs(weights, tokens, last):
    places = jnp.arange(WIDTH)[None]
    hidden = transformer.hidden_states(
        model_config(), weights, tokens, places, jnp.ones_like(tokens)
    )
    logits = transformer.logits(model_config(), weights, hidden[:, last])
    return jax.nn.log_softmax(logits[0])


def next_log_probs(weights, ids):
    """[V] after `ids`, by a full forward."""
    return np.asarray(_log_probs(weights, np.pad(ids, (0, WIDTH - len(ids)))[None], len(ids) - 1))


@functools.cache
def other_params(seed=5):
    return transformer.init_params(model_config(), jax.random.key(seed))


class Serving:
    """One server.  faults: what the next requests for a turn meet, in order, or "" for an answer.

    spoil: a function on answers.  ends: stop tokens of its own, as generation_config.json gives.
    dies_at: the request for a turn at which the process is gone.
    """

    def __init__(self, kind="vllm", weights=None, max_model_len=161, name="tiny", words=None):
        self.kind, self.name, self.max_model_len = kind, name, max_model_len
        self.weights = params() if weights is None else weights
        self.tokenizer = words or tokenizer()
        self.faults, self.dies_at, self.ends = collections.deque(), None, ()
        self.spoil, self.most, self.frozen, self.path = (lambda answer: answer), 10**9, False, "/m"
        self.turns, self.reloads, self.headers = [], [], []
        self._lock = threading.Lock()
        self.httpd = self._listen(0)
        self.port = self.httpd.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def _listen(self, port):
        handler = type("Bound", (Handler,), {"serving": self})
        httpd = http.server.ThreadingHTTPServer(("127.0.0.1", port), handler)
        httpd.daemon_threads = True
        threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
        return httpd

    def die(self):
        self.httpd.shutdown()
        self.httpd.server_close()

    def come_back(self):
        self.httpd = self._listen(self.port)

    def sample(self, ids, count, temperature, seed, stop_ids, stops):
        """Ids, log-probs as this kind states them, and why it ended."""
        rng, ids, found, scores = np.random.default_rng(seed), list(ids), [], []
        for _ in range(min(count, self.most)):
            log_probs = next_log_probs(self.weights, ids)
            token = int(log_probs.argmax())
            if temperature:
                tempered = np.exp(log_probs / temperature - (log_probs / temperature).max())
                mass = np.cumsum(tempered)
                token = int((mass <= rng.random() * mass[-1]).sum())
                if self.kind == "sglang":
                    log_probs = np.log(tempered / mass[-1])
            ids.append(token)
            found.append(token)
            scores.append(float(log_probs[token]))
            text = self.tokenizer.decode(found, skip_special_tokens=True)
            if token in stop_ids or token in self.ends:
                return found, scores, token
            for stop in stops:
                if stop in text:
                    return found, scores, stop
        return found, scores, None

    def answer(self, path, body):
        """(status, JSON) of a request."""
        if path == "/v1/models":
            return 200, {"data": [{"id": self.name, "max_model_len": self.max_model_len}]}
        if path == "/tokenize":
            assert body["add_special_tokens"] is False
            ids = self.tokenizer(body["prompt"], add_special_tokens=False)["input_ids"]
            return 200, {"tokens": ids, "count": len(ids), "max_model_len": self.max_model_len}
        if self.kind == "sglang" and path == "/get_model_info":
            return 200, {"model_path": self.path, "is_generation": True}
        if self.kind == "sglang" and path == "/update_weights_from_disk":
            self.reloads.append(body["model_path"])
            if not self.frozen:
                self.weights = load_policy(body["model_path"]).params
            self.name = self.path = body["model_path"]
            return 200, {"success": True, "message": "ok", "num_paused_requests": 0}
        if self.kind == "vllm" and path == "/v1/completions":
            if body["model"] != self.name:
                return 404, {"error": {"message": f"The model `{body['model']}` does not exist."}}
            return 200, self.spoil(self._vllm(body))
        if self.kind == "sglang" and path == "/generate":
            return 200, self.spoil(self._sglang(body))
        return 404, {"detail": "Not Found"}

    def _vllm(self, b):
        assert b["ignore_eos"]
        assert len(b["prompt"]) + b["max_tokens"] <= self.max_model_len
        ids, scores, why = self.sample(
            b["prompt"],
            b["max_tokens"],
            b["temperature"],
            b["seed"],
            b["stop_token_ids"],
            b["stop"],
        )
        choice = {
            "index": 0, "text": self.tokenizer.decode(ids), "stop_reason": why,
            "finish_reason": "length" if why is None else "stop",
            "logprobs": {
                "text_offset": [0] * len(ids), "token_logprobs": scores,
                "tokens": [f"token_id:{i}" for i in ids],
                "top_logprobs": [{f"token_id:{i}": x} for i, x in zip(ids, scores, strict=True)],
            },
            "token_ids": ids, "prompt_token_ids": b["prompt"], "prompt_logprobs": None,
        }  # fmt: skip
        usage = {"prompt_tokens": len(b["prompt"]), "completion_tokens": len(ids)}
        return {
            "object": "text_completion",
            "model": b["model"],
            "choices": [choice],
            "usage": usage,
        }

    def _sglang(self, b):
        s = b["sampling_params"]
        assert len(b["input_ids"]) + s["max_new_tokens"] < self.max_model_len
        ends = () if s["ignore_eos"] else s["stop_token_ids"]
        ids, scores, why = self.sample(
            b["input_ids"],
            s["max_new_tokens"],
            s["temperature"],
            s["sampling_seed"],
            ends,
            s["stop"],
        )
        reason = {"type": "length", "length": len(ids)}
        if why is not None:
            reason = {"type": "stop", "matched": why}
        meta = {
            "id": "x", "finish_reason": reason, "prompt_tokens": len(b["input_ids"]),
            "completion_tokens": len(ids), "cached_tokens": 0,
            "output_token_logprobs": [[x, i, None] for i, x in zip(ids, scores, strict=True)],
        }  # fmt: skip
        return {"text": self.tokenizer.decode(ids), "output_ids": ids, "meta_info": meta}


class Handler(http.server.BaseHTTPRequestHandler):
    """One request."""

    serving: Serving

    def log_message(self, format, *args):
        pass

    def do_GET(self):
        self._do(None)

    def do_POST(self):
        self._do(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def _do(self, body):
        s = self.serving
        with s._lock:  # one forward at a time: there are two cores
            s.headers.append(dict(self.headers))
            turn = self.path in ("/v1/completions", "/generate")
            fault = s.faults.popleft() if turn and s.faults else ""
            if turn:
                s.turns.append(body)
                if s.dies_at is not None and len(s.turns) >= s.dies_at:
                    if len(s.turns) == s.dies_at:
                        s.die()
                    fault = "reset"
        if fault == "reset":
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.connection.close()
            self.close_connection = True
        elif fault == "hang":
            time.sleep(6)
        elif fault == "drip":  # a byte at a time: no single read ever times out
            self._say(200, b"", 10**6)
            for _ in range(120):
                self.wfile.write(b" ")
                time.sleep(0.05)
        elif fault == "garbage":
            self._say(200, b"<html>gateway</html>")
        elif fault == "short":
            self._say(200, b'{"choices"', 100)
        elif fault:
            self._say(int(fault), b'{"error": "later"}')
        else:
            with s._lock:
                status, answer = s.answer(self.path, body)
            self._say(status, json.dumps(answer).encode())

    def _say(self, status, data, length=None):
        self.send_response(status)
        self.send_header("Content-Length", str(len(data) if length is None else length))
        self.end_headers()
        self.wfile.write(data)
