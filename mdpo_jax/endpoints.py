"""Where turns are sampled: the part of the rollout's configuration that is about servers."""

from __future__ import annotations

import dataclasses
from typing import Literal
from urllib.parse import urlsplit

from mdpo_jax.checks import above_zero, at_least, require

# Fields that say where and how patiently, but do not decide what is sampled.
TRANSPORT = (
    "servers", "served_model", "request_timeout", "retries", "reload_command",
    "fingerprint_tolerance",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Endpoints:
    """Servers that sample turns in this process's place.

    backend: `local` decodes here; `http` asks servers, rollout.slots trajectories at a time.
    servers: comma-separated base URLs, all of one server_kind.  served_model: the name that they must
    serve; empty for any.  request_timeout: seconds of one turn.  retries: of one request.
    reload_command: loads new weights into the servers, with {path} for the folder and, if it is to
    run once a server, {server} for the URL; without one, SGLang's update_weights_from_disk is used
    and vLLM keeps what it has.
    fingerprint_tolerance: mean |difference| of log-probs, in nats a token, between a server and the
    policy, above which the server is refused.
    """

    backend: Literal["local", "http"] = "local"
    server_kind: Literal["vllm", "sglang"] = "vllm"
    servers: str = ""
    served_model: str = ""
    request_timeout: float = 600.0
    retries: int = 8
    reload_command: str = ""
    fingerprint_tolerance: float = 0.05

    def __post_init__(self) -> None:
        above_zero("rollout", self, "request_timeout", "fingerprint_tolerance")
        at_least(0, "rollout", self, "retries")
        remote, urls, command = self.backend == "http", self.urls, self.reload_command
        accepted = "comma-separated URLs, http://HOST:PORT, with rollout.backend=http"
        require(bool(urls) == remote, "rollout.servers", self.servers, accepted)
        for url in urls:
            require(_is_base_url(url), "rollout.servers", url, "http://HOST[:PORT] or https://...")
        require(len(set(urls)) == len(urls), "rollout.servers", self.servers, "each server once")
        accepted = "a command with {path}, with rollout.backend=http"
        right = not command or ("{path}" in command and remote)
        require(right, "rollout.reload_command", command, accepted)

    @property
    def urls(self) -> tuple[str, ...]:
        """Of the servers."""
        return tuple(u for part in self.servers.split(",") if (u := part.strip().rstrip("/")))


def _is_base_url(text: str) -> bool:
    try:
        parts = urlsplit(text)
        bare = not (parts.query or parts.fragment or parts.username)
        return (
            parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0 and bare
        )
    except ValueError:  # a port that is no number, half an IPv6 address
        return False
