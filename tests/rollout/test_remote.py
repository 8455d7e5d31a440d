"""Rollouts on real HTTP servers, against the engine on the device and under faults."""

import functools
import threading
import time
from concurrent.futures import Future

import numpy as np
import pytest
from serving import Serving, other_params
from support import chat, model_config, params, tokenizer

from mdpo_jax import doors
from mdpo_jax.config import Rollout
from mdpo_jax.data.vocabulary import train_tokenizer
from mdpo_jax.environment.tool import Observation
from mdpo_jax.model.policy import Policy
from mdpo_jax.rollout import wire
from mdpo_jax.rollout.engine import Engine, Limits, Prefix, Request
from mdpo_jax.rollout.remote import RemoteEngine, RemoteSampler
from mdpo_jax.rollout.sampler import Sampler
from mdpo_jax.rollout.sampling import GREEDY, Sampling
from mdpo_jax.rollout.servers import API_KEY, Patience, ServersGone
from mdpo_jax.rollout.shapes import Shapes
from mdpo_jax.rollout.wire import ServerRefused, TurnRequest
from mdpo_jax.types import Problem, Role

LIMITS = Limits(
    max_turns=3, turn_tokens=8, trajectory_tokens=20, observation_tokens=16, context=160
)
PROBLEMS = [Problem(f"p/{i}", f"Ana has {i} beads" + " and cards" * (i % 5), "1") for i in range(5)]
QUICK = Patience(timeout=20, retries=6, backoff=0.01, longest=0.1, strikes=3, aside=0.2)


class EchoTool:
    """Says how long the action was, from another thread."""

    def start(self, key):
        return self

    def run(self, action):
        done = Future()
        threading.Timer(0.002, done.set_result, [Observation(str(len(action)), "ok", 0.0)]).start()
        return done

    def close(self):
        pass


@pytest.fixture
def always_tool(monkeypatch):
    """A random model writes no code: let every turn ask for the tool."""
    monkeypatch.setattr("mdpo_jax.rollout.engine.wants_tool", lambda text: True)


@pytest.fixture
def serve():
    """Servers that are gone after the test."""
    made = []

    def start(*args, **kwargs):
        made.append(Serving(*args, **kwargs))
        return made[-1]

    yield start
    for server in made:
        server.die()


@functools.cache
def local():
    shapes = Shapes(4, 160, 8, (4,), (160,), (160,))  # one of each
    sampler = Sampler(model_config(), shapes, chat().stop_ids, "float32")
    sampler.load(params())
    return Engine(sampler, chat(), EchoTool(), LIMITS)


def sampler(folder, *servers, patience=QUICK, **fields):
    settings = Rollout(
        backend="http", servers=",".join(s.url for s in servers), server_kind=servers[0].kind,
        context=160, trajectory_tokens=20, **fields,
    )  # fmt: skip

    def as_policy(weights):
        ids = {"bos_token_id": 2, "eos_token_id": [1]}
        return Policy(model_config(), weights, tokenizer(), dict(ids), dict(ids))

    return RemoteSampler(settings, chat(), as_policy, folder / "served", patience)


def engine(folder, *servers, slots=4, **fields):
    made = sampler(folder, *servers, **fields)
    made.load(params())
    return RemoteEngine(made, chat(), EchoTool(), LIMITS, slots)


def requests(samples=1):
    return [Request(p, s, "0/test") for p in PROBLEMS for s in range(samples)]


def assert_same(found, wanted):
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        assert (a.problem_id, a.sample, a.finish, a.tool_statuses) == (
            b.problem_id, b.sample, b.finish, b.tool_statuses,
        )  # fmt: skip
        np.testing.assert_array_equal(a.ids, b.ids)
        np.testing.assert_array_equal(a.roles, b.roles)
        np.testing.assert_allclose(a.log_probs, b.log_probs, atol=1e-4)


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_greedy_trajectories_equal_the_engines(kind, serve, always_tool, tmp_path, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nothing listens there
    wanted = local().run(requests(), policy="x", sampling=GREEDY)
    assert max(t.turns for t in wanted) == 3
    servers = [serve(kind), serve(kind)]
    told = []
    found = engine(tmp_path, *servers).run(
        requests(), policy="x", sampling=GREEDY, advance=told.append
    )
    assert_same(found, wanted)
    assert told == [1] * len(wanted)
    assert min(len(s.turns) for s in servers) > 3


def test_from_a_prefix_and_past_what_a_server_gives_at_once(serve, always_tool, tmp_path):
    whole = local().run(requests()[:2], policy="x", sampling=GREEDY)
    again = []
    for request, t in zip(requests()[:2], whole, strict=True):
        start = t.actions[1].start
        actions = (chat().decode(t.ids[t.actions[0]]),)
        prefix = Prefix(tuple(t.ids[:start].tolist()), tuple(t.roles[:start].tolist()), actions)
        again.append(Request(request.problem, 0, "0/test", prefix))
    server = serve("sglang")
    remote = engine(tmp_path, server)
    # It ends turns at tokens that are no stops here, and after 3 tokens anyway.
    server.most, server.ends = 3, tuple(range(100, 420, 2))
    assert_same(
        remote.run(again, policy="x", sampling=GREEDY),
        local().run(again, policy="x", sampling=GREEDY),
    )


def test_stop_strings_cut_as_on_the_device(serve, tmp_path, monkeypatch):
    monkeypatch.setattr(chat(), "stop_strings", tuple("aeiourst"))
    wanted = local().run(requests(2), policy="x", sampling=GREEDY)
    found = engine(tmp_path, serve()).run(requests(2), policy="x", sampling=GREEDY)
    assert_same(found, wanted)
    lengths = {t.actions[0].stop - t.actions[0].start for t in found}
    assert min(lengths) < LIMITS.turn_tokens


def test_sampled_turns_have_seeds_of_their_own_and_repeat(serve, always_tool, tmp_path):
    server = serve()
    remote = engine(tmp_path, server, slots=3)
    first = remote.run(requests(2), policy="x", sampling=Sampling())
    seeds = [b["seed"] for b in server.turns[1:]]
    assert len(set(seeds)) == len(seeds)
    assert len({tuple(t.ids) for t in first}) == len(first)
    assert_same(remote.run(requests(2), policy="x", sampling=Sampling()), first)
    actions = np.concatenate([t.log_probs[t.roles == Role.ACTION] for t in first])
    assert (actions < 0).all()


@pytest.mark.parametrize(
    "faults",
    [["503", "502", "429"], ["reset", "reset"], ["garbage", "short"], ["500"] * 4, ["429"] * 5],
    ids=lambda f: "-".join(f),
)
def test_a_request_that_fails_is_tried_again(faults, serve, always_tool, tmp_path, caplog):
    server = serve()
    remote = engine(tmp_path, server, slots=2)
    before = len(server.turns)
    server.faults.extend(faults)
    found = remote.run(requests()[:3], policy="x", sampling=GREEDY)
    assert_same(found, local().run(requests()[:3], policy="x", sampling=GREEDY))
    assert not server.faults
    # One that is busy works; three other failures in a row are too many.
    assert ("set aside" in caplog.text) == (faults == ["500"] * 4)
    assert len(server.turns) - before >= sum(t.turns for t in found) + len(faults)


@pytest.mark.parametrize("fault", ["hang", "drip"])
def test_a_server_that_hangs_is_left_for_another(fault, serve, always_tool, tmp_path):
    good, bad = serve(), serve()
    patience = Patience(timeout=0.5, retries=4, backoff=0.01, longest=0.1, strikes=1, aside=60)
    remote = engine(tmp_path, good, bad, patience=patience, slots=2)
    bad.faults.extend([fault] * 9)
    begin = time.monotonic()
    found = remote.run(requests()[:3], policy="x", sampling=GREEDY)
    assert time.monotonic() - begin < 4
    assert_same(found, local().run(requests()[:3], policy="x", sampling=GREEDY))


def test_a_server_that_dies_takes_no_trajectory_with_it(serve, always_tool, tmp_path):
    good, bad = serve("sglang"), serve("sglang")
    remote = engine(tmp_path, good, bad, slots=6)
    bad.dies_at = len(bad.turns) + 4
    found = remote.run(requests(3), policy="x", sampling=GREEDY)
    assert len(bad.turns) >= bad.dies_at
    assert_same(found, local().run(requests(3), policy="x", sampling=GREEDY))


def test_a_server_that_comes_back_is_checked_and_loaded_again(serve, always_tool, tmp_path):
    good, bad = serve("sglang"), serve("sglang")
    remote = engine(tmp_path, good, bad)
    servers = remote._remote.servers
    bad.die()
    remote.run(requests()[:2], policy="x", sampling=GREEDY)
    assert not servers.all[1].ready
    bad.weights, bad.path, bad.name = other_params(), "/m", "tiny"  # as a new process has them
    bad.come_back()
    time.sleep(QUICK.aside)
    turns = len(bad.turns)
    found = remote.run(requests(2), policy="x", sampling=GREEDY)
    assert_same(found, local().run(requests(2), policy="x", sampling=GREEDY))
    assert bad.reloads[-1].startswith(str(tmp_path))
    assert len(bad.turns) > turns + 1
    # One that comes back wrong is not used, and stops nothing.
    bad.weights, bad.frozen, bad.path = other_params(), True, "/m"
    servers.all[1].ready = False
    servers.all[1].version = None
    found = remote.run(requests(2), policy="x", sampling=GREEDY)
    assert_same(found, local().run(requests(2), policy="x", sampling=GREEDY))
    assert "weights" in servers.all[1].error


def test_without_any_server_the_run_can_be_resumed(serve, tmp_path, capsys):
    servers = [serve(), serve()]
    remote = engine(tmp_path, *servers)
    for server in servers:
        server.die()
    with pytest.raises(ServersGone) as caught:
        remote.run(requests()[:2], policy="x", sampling=GREEDY)
    for server in servers:
        assert f"{server.url} (ConnectionRefusedError" in str(caught.value)

    def work():
        raise caught.value

    assert doors.guarded(work) == doors.EXIT_RESUMABLE
    assert "the same command resumes" in capsys.readouterr().err
    with pytest.raises(ServersGone, match="none answered in 7 attempts"):
        sampler(tmp_path, *servers).load(params())


def test_leaving_early_waits_for_no_server(serve, tmp_path):
    server = serve()
    remote = engine(tmp_path, server)
    server.faults.extend(["", *["hang"] * 3])
    begin = time.monotonic()
    stream = remote.stream(requests(), policy="x", sampling=GREEDY)
    next(stream)
    stream.close()
    assert time.monotonic() - begin < 2


def words():
    return train_tokenizer(["user\nmodel\nquite another text with other pieces"] * 30, 420)


def missing(*path):
    def spoil(answer):
        holder = answer
        for key in path[:-1]:
            holder = holder[key]
        del holder[path[-1]]
        return answer

    return spoil


def no_ids(answer):
    choice = answer["choices"][0]
    del choice["token_ids"]
    choice["logprobs"]["tokens"] = [" x"] * len(choice["logprobs"]["tokens"])
    return answer


def with_bos(answer):
    answer["choices"][0]["prompt_token_ids"] = [2, *answer["choices"][0]["prompt_token_ids"]]
    return answer


@pytest.mark.parametrize(
    ("kind", "traits", "fields", "message"),
    [
        ("vllm", {"words": words}, {}, r"another tokenizer: 'x = 6 .* is \[.*; expected \["),
        ("vllm", {"weights": other_params}, {}, r"log-prob of -\d.* there and -\d.* by the policy"),
        ("vllm", {"weights": other_params}, {}, "or rollout.reload_command to load the policy"),
        (
            "vllm",
            {"max_model_len": 159},
            {},
            "max_model_len=159 .* at least 160, rollout.context=160",
        ),
        ("vllm", {"max_model_len": None}, {}, "max_model_len=None"),
        ("sglang", {"max_model_len": 160}, {}, "at least 161, rollout.context=160 and 1 more"),
        ("vllm", {}, {"served_model": "gemma"}, "it serves tiny; expected .*served_model='gemma'"),
        ("vllm", {"spoil": no_ids}, {}, "without token ids; expected choices.0..token_ids"),
        ("vllm", {"spoil": with_bos}, {}, "it read the prompt as"),
        (
            "vllm",
            {"spoil": missing("choices", 0, "logprobs", "token_logprobs")},
            {},
            "no log-probs",
        ),
        ("sglang", {"frozen": True, "weights": other_params}, {}, "other weights: "),
        (
            "sglang",
            {"spoil": missing("meta_info", "output_token_logprobs")},
            {},
            "without token ids; expected meta_info.output_token_logprobs",
        ),
        (
            "vllm",
            {},
            {"reload_command": "echo no disk >&2; test -f {path}"},
            "exit code 1: no disk",
        ),
    ],
)
def test_a_wrong_server_is_refused(kind, traits, fields, message, serve, tmp_path):
    made = {k: v() if k in ("words", "weights") else v for k, v in traits.items()}
    later = {k: made.pop(k) for k in ("spoil", "frozen") if k in made}
    server = serve(kind, **made)
    for name, value in later.items():
        setattr(server, name, value)
    with pytest.raises(ServerRefused, match=message) as caught:
        sampler(tmp_path, server, **fields).load(params())
    if "reload_command" not in fields:
        assert str(caught.value).startswith(f"{server.url}: ")


def test_new_weights_reach_sglang_and_old_ones_are_noticed(serve, tmp_path):
    servers = [serve("sglang"), serve("sglang")]
    remote = sampler(tmp_path, *servers, fingerprint_tolerance=100.0)
    remote.load(params())
    remote.load(params())
    assert [len(s.reloads) for s in servers] == [1, 1]
    remote.load(other_params())
    assert [len(s.reloads) for s in servers] == [2, 2]
    assert [p.name for p in (tmp_path / "served").iterdir()] == [remote._version]
    servers[1].frozen = True
    with pytest.raises(ServerRefused, match="old weights: log-probs of 16 tokens"):
        remote.load(params())


def test_a_reload_command_gets_the_folder_and_the_server(serve, tmp_path):
    servers = [serve(), serve()]
    for line, times in (("echo {path} {server}", 2), ("echo {path}", 1)):
        log = tmp_path / f"log{times}"
        remote = sampler(tmp_path, *servers, reload_command=f"{line} >> {log}")
        remote.load(params())
        said = sorted(log.read_text().split("\n")[:-1])
        folder = str(tmp_path / "served" / remote._version)
        urls = sorted(f" {s.url}" for s in servers) if times == 2 else [" "]
        assert [s.strip() for s in said] == [f"{folder}{u}".strip() for u in urls]


def test_tempered_log_probs_are_refused(serve, tmp_path, always_tool):
    remote = engine(tmp_path, serve("sglang"))
    with pytest.raises(ServerRefused, match=r"temperature 0.5 .* SGLANG_RETURN_ORIGINAL_LOGPROB"):
        remote.run(requests()[:1], policy="x", sampling=Sampling(0.5))
    [t] = engine(tmp_path, serve("vllm")).run(requests()[:1], policy="x", sampling=Sampling(0.5))
    assert t.turns > 1


def test_the_key_is_sent_as_a_bearer_token(serve, tmp_path, monkeypatch):
    monkeypatch.setenv(API_KEY, "secret")
    server = serve()
    sampler(tmp_path, server).load(params())
    assert {h["Authorization"] for h in server.headers} == {"Bearer secret"}


def test_answers_of_older_and_of_careless_servers():
    sampling = TurnRequest(4, 1.0, 1, (1,), (), 10)

    def vllm(ids, scores=None, **fields):
        scored = {"tokens": ids, "token_logprobs": scores or [-1.0] * len(ids)}
        choice = {"finish_reason": "stop", "logprobs": scored, **fields}
        return wire.VLLM().read({"choices": [choice]}, [2], sampling)

    assert vllm(["token_id:3", "token_id:1"]).ids == [3, 1]
    assert vllm([], [-1.0, -2.0, -3.0], token_ids=[3, 1, 4]) == ([3, 1], [-1.0, -2.0])
    for wrong in ([10], [True], [3.0], ["3"], [-1], 3):
        with pytest.raises(ServerRefused, match="expected integers from 0 to 9"):
            vllm([], [-1.0], token_ids=wrong)
    for scores in ([float("nan")], [None], [0.5], ["-1"]):
        with pytest.raises(ServerRefused, match="expected finite ones"):
            vllm([], scores, token_ids=[3])
    with pytest.raises(ServerRefused, match="5 tokens; expected at most 4"):
        vllm([], [-1.0] * 5, token_ids=[3] * 5)
    for answer in ([], {}, {"choices": []}, {"choices": [{"finish_reason": "abort"}]}, None):
        with pytest.raises(wire.Malformed):
            wire.VLLM().read(answer, [2], sampling)
        with pytest.raises(wire.Malformed):
            wire.SGLang().read(answer, [2], sampling)
    with pytest.raises(wire.Malformed, match="no token"):
        vllm([], token_ids=[])
