"""Every method from an iteration's rollouts to its policy: reference, data, training, metrics."""

import dataclasses
import json
import logging
import shutil
from concurrent.futures import Future

import jax
import numpy as np
import pytest
from support import trajectories, write_model

from mdpo_jax.config import ConfigError, StepZeroError
from mdpo_jax.data import packing, pairs, store
from mdpo_jax.data.store import Graded
from mdpo_jax.environment.tool import Observation
from mdpo_jax.objectives.term_c import soft_value
from mdpo_jax.pipeline import examples, monte_carlo, reference, settings, stages
from mdpo_jax.pipeline.context import PARAMS, Context
from mdpo_jax.pipeline.files import read_json, stage
from mdpo_jax.pipeline.progress import Progress
from mdpo_jax.recipes import parse
from mdpo_jax.rollout.engine import Request
from mdpo_jax.rollout.sampling import GREEDY
from mdpo_jax.training.losses import Objective
from mdpo_jax.training.trainer import Trainer
from mdpo_jax.training.value import ValueTerm
from mdpo_jax.types import Problem, Role, Verdict

RUN = (
    "sft.steps=0", "problems.per_iteration=4", "problems.dev=4", "problems.test=4",
    "train.row_length=224", "train.batch_pairs=2", "train.rows=4", "train.epochs=9",
    "train.max_steps=6", "train.learning_rate=3e-3", "raft.learning_rate=3e-3", "raft.batch=4",
    "raft.epochs=9", "raft.max_steps=6", "pairs.max_tokens=224", "train.eta=0.1", "mesh.fsdp=1",
    "problems.noise=0",
)  # fmt: skip


def context(folder, *overrides):
    parts = [f"--config.{part}" for part in (*RUN, *overrides)]
    where = [f"--config.workdir={folder / 'run'}", f"--config.model.path={folder / 'model'}"]
    return Context(parse(["--config=tiny", *where, *parts]), folder / "run")


@pytest.fixture(scope="module")
def sampled(tmp_path_factory):
    """A run up to iteration 1's rollout: demonstrations as the policy's own, right ones and wrong."""
    folder = tmp_path_factory.mktemp("methods")
    write_model(folder / "model")
    made = context(folder)
    run = folder / "run"
    stage(run / "problems", lambda f: stages.prepare_problems(made, f))
    stage(run / "sft", lambda f: stages.sft(made, f, lambda done: None))
    items = [packing.item(t, "sampled") for t in trajectories()]
    scores = made.trainer().score(made.load(run / "sft" / PARAMS), items, 4)
    graded = [
        Graded(
            dataclasses.replace(
                t, problem_id=f"train/{i // 3}", sample=i % 3, policy="sft/params", log_probs=s,
                tool_statuses=("ok",) * (t.turns - 1),
            ),
            Verdict("correct" if i % 3 == 0 else "wrong", "test", "0"),
        )
        for i, (t, s) in enumerate(zip(trajectories(), scores, strict=True))
    ]  # fmt: skip
    rows = map(store.graded_row, graded)
    store.write_lines(run / "iteration-1" / "rollout" / "000-000000.jsonl.gz", rows)
    stage(run / "iteration-1" / "pairs", lambda f: stages.build_pairs(made, f, 1))
    return folder


@pytest.fixture
def run(sampled, tmp_path):
    shutil.copytree(sampled / "run", tmp_path / "run")
    (tmp_path / "model").symlink_to(sampled / "model")
    return tmp_path


def trained(folder, *overrides, start="sft"):
    """(done.json, metrics) of iteration 1's train stage."""
    made, iteration = context(folder, *overrides), folder / "run" / "iteration-1"
    updated, fixed = folder / "run" / start / PARAMS, folder / "run" / "sft" / PARAMS
    of = reference.sources(made, updated, fixed)
    if made.config.preset.objective != "likelihood":
        files = [iteration / "pairs" / "pairs.jsonl.gz"]
        stage(iteration / "reference", lambda f: reference.score_reference(made, f, files, of))
    done = stage(
        iteration / "train", lambda f: stages.train(made, f, updated, of, 0, lambda done: None)
    )
    lines = (iteration / "train" / "metrics.jsonl").read_text().splitlines()
    return done, [json.loads(line) for line in lines]


OWN = {  # what each method's objective is to move
    "raft": ("loss", -1), "dpo": ("rewards/margins", 1), "kto": ("rewards/margins", 1),
    "mdpo": ("rewards/margins", 1), "mdpo_fixed_ref": ("rewards/margins", 1),
    "mkto": ("rewards/margins", 1), "mdpo_nll": ("loss/nll", -1),
}  # fmt: skip


@pytest.mark.parametrize("method", OWN)
def test_every_method_moves_its_own_objective(run, method):
    done, metrics = trained(run, f"method={method}")
    assert (done["method"], done["steps"]) == (method, 6)
    name, sign = OWN[method]
    assert sign * (metrics[-1][name] - metrics[0][name]) > 1e-3
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    assert 0 < metrics[0]["action_share"] < 0.7
    assert done["sampler_trainer"]["max"] < 1e-4
    assert done["sampler_trainer"]["tokens"] > 100
    if method != "raft":
        expected = {"kto": 0.5, "mkto": 0.5}.get(method, np.log(2))
        assert metrics[0]["loss/preference"] == pytest.approx(expected, abs=1e-4)
        turns = sum(metrics[-1][f"log_ratio/chosen/turn_{t}"] for t in range(1, 5))
        chosen = metrics[-1]["rewards/chosen"] / 0.1
        assert turns == pytest.approx(chosen, rel=1e-4)
        parts = sum(metrics[-1][f"log_ratio/chosen/{p}"] for p in ("text", "code", "answer"))
        counted = method in ("dpo", "kto")  # observations have no part of their own
        assert (parts == pytest.approx(chosen, rel=1e-4)) != counted


def test_a_training_finds_nothing_on_the_devices_but_its_own(run, monkeypatch):
    """Neither the model that the run began with, nor the sampler's copy and the slots' caches."""
    made, iteration = context(run), run / "run" / "iteration-1"
    path = run / "run" / "sft" / PARAMS
    of = reference.sources(made, path, path)
    files = [iteration / "pairs" / "pairs.jsonl.gz"]
    size = sum(4 * x.size for x in jax.tree.leaves(made.parameters.like))

    def held():
        return sum({x.unsafe_buffer_pointer(): x.nbytes for x in jax.live_arrays()}.values())

    before, seen = held(), []
    stage(iteration / "reference", lambda f: reference.score_reference(made, f, files, of))
    made.sampler.load(made.load(path))
    made.engine.run([Request(Problem("p", "q", "1"), 0, "0")], policy="x", sampling=GREEDY)
    assert held() - before > 1.5 * size
    fit = Trainer.fit

    def watched(self, params, *given, **named):
        seen.append(held() - before)
        return fit(self, params, *given, **named)

    monkeypatch.setattr(Trainer, "fit", watched)
    stage(iteration / "train", lambda f: stages.train(made, f, path, of, 0, lambda done: None))
    made.close()
    assert size <= seen[0] < 1.2 * size


def test_single_turn_counts_more_tokens_than_multi_turn(run):
    shares = []
    for method in ("mdpo", "dpo"):
        shutil.rmtree(run / "run" / "iteration-1" / "train", ignore_errors=True)
        shares.append(trained(run, f"method={method}")[1][0]["action_share"])
    assert shares[1] > 1.2 * shares[0]


@pytest.mark.parametrize("method", ["mdpo", "mkto"])
def test_a_reference_in_the_step_ends_in_the_same_policy(run, method):
    end = []
    for kind in ("stored", "in_step"):
        for name in ("train", "reference"):
            shutil.rmtree(run / "run" / "iteration-1" / name, ignore_errors=True)
        kl = ("train.kl=batch_mean",) if method == "mkto" else ()
        trained(run, f"method={method}", f"train.reference_log_probs={kind}", *kl)
        path = run / "run" / "iteration-1" / "train" / PARAMS
        end.append(context(run).load(path))
    for a, b in zip(*map(jax.tree.leaves, end), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4)
    rows = list(store.read_lines(run / "run" / "iteration-1" / "reference" / "pairs.jsonl.gz"))
    assert not any(rows[0]["chosen_reference"])


@pytest.mark.parametrize("options", ["train.reference_log_probs=in_step", "term_c.kind=value"])
def test_an_adapter_is_trained_alone_whatever_the_reference(run, options):
    shutil.rmtree(run / "run" / "sft")
    made = context(run, "lora.rank=2")
    stage(run / "run" / "sft", lambda f: stages.sft(made, f, lambda done: None))
    done, metrics = trained(run, "lora.rank=2", options)
    assert done["compilations"] == 1
    assert metrics[0]["loss/preference"] == pytest.approx(np.log(2), abs=1e-4)
    assert metrics[-1]["rewards/margins"] > metrics[0]["rewards/margins"]
    note = read_json(run / "run" / "iteration-1" / "train" / "params.json")
    assert note["base"] == made.parameters.fingerprint


def test_the_step_gets_what_the_configuration_says(run):
    pairs = (
        "train.eta=0.2", "method=mdpo_nll", "train.nll_weight=0.3", "train.loss=robust",
        "train.label_smoothing=0.1", "train.length_normalised=true", "rollout.max_turns=5",
        "train.observation_ce_weight=0.4",
    )  # fmt: skip
    assert settings.objective(context(run, *pairs).config) == Objective(
        kind="pairs", eta=0.2, nll_weight=0.3, loss="robust", label_smoothing=0.1,
        length_normalised=True, observation_ce_weight=0.4, turns=5,
    )  # fmt: skip
    unpaired = (
        "method=kto", "train.lambda_correct=1.1", "train.lambda_wrong=0.9", "train.kl=zero",
    )  # fmt: skip
    assert settings.objective(context(run, *unpaired).config) == Objective(
        kind="unpaired", lambda_correct=1.1, lambda_wrong=0.9, kl="zero", turns=4
    )
    value = ("term_c.kind=value", "term_c.utility=2", "term_c.weight=3", "train.eta=0.5",
             "term_c.learning_rate_scale=4")  # fmt: skip
    assert settings.objective(context(run, *value).config) == Objective(
        kind="pairs", eta=0.5, value=ValueTerm(2.0, 3.0, 4.0), turns=4
    )


def test_a_turn_discount_multiplies_the_weights_of_later_turns(run):
    folder = run / "run" / "iteration-1"
    trained(run)
    name = read_json(run / "run" / "sft" / "done.json")["policy"]
    plain, discounted = (
        examples.examples(context(run, *more), folder / "train", name, 0).groups
        for more in ((), ("train.turn_discount=0.5",))
    )
    for before, after in zip(plain, discounted, strict=True):
        for a, b in zip(before, after, strict=True):
            total = int(a.turns.max())
            for turn in range(total):
                here = (a.turns == turn + 1) & (a.weights > 0)
                factor = 0.5**turn * (1 - 0.5 ** (total - turn)) / (1 - 0.5**total)
                np.testing.assert_allclose(b.weights[here], factor, rtol=1e-5)


def test_the_first_loss_has_the_stored_term_c_of_each_side(run):
    where = run / "run" / "iteration-1" / monte_carlo.TERM_C
    count = len(list(store.read_lines(run / "run" / "iteration-1" / "pairs" / "pairs.jsonl.gz")))
    rows = [{"chosen": 0.5 * i, "rejected": -0.25 - 0.1 * i} for i in range(count)]
    for start in range(0, count, 2):  # two files, as two chunks leave them
        store.write_lines(where / f"{start:06d}.jsonl.gz", rows[start : start + 2])
    _, metrics = trained(run, "term_c.kind=monte_carlo", f"train.batch_pairs={count}")
    logits = np.array([row["chosen"] - row["rejected"] for row in rows])
    expected = np.mean(np.log1p(np.exp(-logits)))
    assert metrics[0]["loss/preference"] == pytest.approx(expected, abs=1e-4)


def test_kto_s_reference_point_is_of_the_stored_stand_ins(run):
    params, folder = moved_policy(run), run / "run" / "iteration-1"
    count = len(list(store.read_lines(folder / "pairs" / "pairs.jsonl.gz")))
    options = ("method=mkto", "train.reference=fixed", f"train.batch_pairs={count}")
    _, metrics = trained(run, *options, start="other")
    rows = list(store.read_lines(folder / "reference" / "mismatched.jsonl.gz"))
    assert len(rows) == 2 * count
    found = [store.scored_from(row) for row in rows]
    scores = context(run).trainer().score(params, [packing.item(t, "sampled") for t, _ in found], 4)
    ratios = [
        np.sum((s - r)[t.roles == Role.ACTION]) for (t, r), s in zip(found, scores, strict=True)
    ]
    assert abs(np.mean(ratios)) > 0.01
    assert metrics[0]["kl"] == pytest.approx(max(0, np.mean(ratios)), rel=1e-3, abs=1e-4)


def test_a_stand_in_longer_than_a_row_is_cut_and_counted(run, caplog):
    sides = [dataclasses.replace(t, problem_id=str(t.sample)) for t in trajectories()]
    length = sorted(len(t.ids) for t in sides)[6]
    with caplog.at_level(logging.WARNING, "mdpo_jax.pipeline.reference"):
        rows, cut = reference._mismatched(context(run, f"train.row_length={length}"), sides)
    assert max(len(t.ids) for t in rows) == length
    tails = {tuple(t.ids[t.actions[0].start :]) for t in sides}
    assert cut == sum(tuple(t.ids[t.actions[0].start :]) not in tails for t in rows) > 0
    assert f"{cut} of 12 completions are cut at train.row_length={length}" in caplog.text


def test_what_no_row_holds_is_left_out_whole_and_counted(run):
    """Of pairs, of right trajectories and of a value head's rollouts."""
    iteration = run / "run" / "iteration-1"
    sizes = sorted(len(t.ids) for t in trajectories())
    length = sizes[len(sizes) // 2]
    shutil.rmtree(iteration / "pairs")
    made = context(run, f"train.row_length={length}", "term_c.kind=value", "term_c.rollouts=9")
    before = pairs.select(
        map(store.graded_from, store.read_folder(iteration / "rollout")),
        pairs.Rules(4, 224, False, False, True, "random"), "0/1",
    )  # fmt: skip
    done = stage(iteration / "pairs", lambda f: stages.build_pairs(made, f, 1))
    right = [len(t.ids) for t in before.correct]
    sides = [(len(q.chosen.ids), len(q.rejected.ids)) for q in before.pairs]
    assert done["dropped"]["pair_beyond_row"] == sum(max(two) > length for two in sides) > 0
    assert done["dropped"]["correct_beyond_row"] == sum(n > length for n in right) > 0
    rows = list(store.read_lines(iteration / "pairs" / "pairs.jsonl.gz"))
    found = [store.pair_from(row) for row in rows]
    kept = [two for two in sides if max(two) <= length]
    assert sorted((len(q.chosen.ids), len(q.rejected.ids)) for q in found) == sorted(kept)
    rollouts, long = reference._unselected(made, iteration / "reference", len(sides))
    assert long == sum(n > length for n in sizes)
    assert sorted(len(g.trajectory.ids) for g in rollouts) == [n for n in sizes if n <= length]


def test_one_problem_alone_warns_that_its_stand_ins_are_its_own(run, caplog):
    sides = trajectories()[:4]
    with caplog.at_level(logging.WARNING, "mdpo_jax.pipeline.reference"):
        reference._mismatched(context(run), sides)
    assert "4 of 4 prompts are scored with a completion of their own problem" in caplog.text


def test_the_suite_s_faulty_tool_is_installed(run):
    made = context(run, "problems.fault=1")
    session = made.tool.start("t")
    assert session.run("```python\nprint(40 + 2)\n```").result(timeout=60).text != "42"
    session.close()
    made.close()


def test_a_stale_reference_is_refused(run):
    trained(run)
    folder = run / "run" / "iteration-1"
    path = folder / "reference" / "pairs.jsonl.gz"
    rows = list(store.read_lines(path))
    assert {row["reference"] for row in rows} == {read_json(run / "run/sft/done.json")["policy"]}
    rows[1]["reference"] = "0" * 16
    store.write_lines(path, rows)
    shutil.rmtree(folder / "train")
    with pytest.raises(
        StepZeroError, match=r"reference 0{16}, but this iteration's is \w{16}; del"
    ):
        trained(run)


def moved_policy(run):
    """Another policy, as an earlier iteration would have left it."""
    made = context(run)
    params = jax.tree.map(lambda x: x * 1.01, made.begin())
    folder = run / "run" / "other"
    folder.mkdir()
    made.parameters.save(folder / PARAMS, params, None)
    (folder / "done.json").write_text(
        json.dumps({"policy": made.parameters.identity(params, None)})
    )
    return params


@pytest.mark.parametrize(("weight", "terms"), [(0.25, 2), (0.0, 1), (1.0, 1)])
def test_a_mixture_is_of_probabilities_token_by_token(run, weight, terms):
    params = moved_policy(run)
    made = context(run, "train.reference=mixture", f"train.mixture={weight}")
    folder = run / "run"
    of = reference.sources(made, folder / "other" / PARAMS, folder / "sft" / PARAMS)
    assert len(of) == terms
    files = [folder / "iteration-1" / "pairs" / "pairs.jsonl.gz"]
    where = folder / "iteration-1" / "reference"
    done = stage(where, lambda f: reference.score_reference(made, f, files, of))
    assert done["reference"] == reference.identity(of)
    pair = store.pair_from(next(iter(store.read_lines(where / "pairs.jsonl.gz"))))
    fixed, updated = (
        made.trainer().score(p, [packing.item(pair.chosen, "sampled")], 4)[0].astype(np.float64)
        for p in (made.begin(), params)
    )
    expected = np.log(weight * np.exp(fixed) + (1 - weight) * np.exp(updated))
    np.testing.assert_allclose(pair.chosen_reference, expected, atol=1e-5)


@pytest.mark.parametrize(
    "options", [("train.reference=mixture",), ("train.reference_log_probs=in_step",)]
)
def test_parameters_that_their_stage_did_not_write_are_refused(run, options):
    moved_policy(run)
    note = run / "run" / "other" / "done.json"
    note.write_text(json.dumps({"policy": "0" * 16}))
    with pytest.raises(
        ConfigError, match=r"other/params: its fingerprint is \w{16}, but its stage"
    ):
        trained(run, *options, start="other")
    note.write_text("{}")
    with pytest.raises(ConfigError, match="notes no policy"):
        trained(run, *options, start="other")


def test_a_reference_whose_checkpoint_is_gone_stops_at_once(run):
    made = context(run, "method=mdpo_fixed_ref")
    gone = run / "run" / "nowhere" / PARAMS
    with pytest.raises(ConfigError, match=r"train.reference=fixed: .*nowhere/params is missing"):
        reference.sources(made, run / "run" / "sft" / PARAMS, gone)


def test_falling_chosen_log_probs_raise_the_alarm_once(tmp_path, caplog):
    seen = []

    def told(limit, values, before=()):
        saves = Progress(tmp_path, 0, 9)
        saves.rows = lambda: [{"displacement": value} for value in before]
        report = stages._alarmed(lambda step, values: seen.append(step), limit, saves)
        with caplog.at_level(logging.WARNING, "mdpo_jax.pipeline.stages"):
            caplog.clear()
            for step, value in enumerate(values):
                report(step, {"displacement": value})
            report(len(values), {"loss": 0.0})
        return [r.getMessage() for r in caplog.records]

    [message] = told(10.0, [0.0, -15.0, -20.0, -30.0])
    assert "step 2: chosen trajectories are 11.7 nats less likely" in message
    assert "train.displacement_alarm=10" in message
    assert told(10.0, [5.0, -9.0, -9.9, 4.0]) == []
    assert told(0.0, [-100.0]) == []
    assert len(seen) == 12
    # A stage that goes on knows the steps before, and that it has warned.
    [message] = told(10.0, [-30.0], before=[0.0, -15.0])
    assert "step 0: chosen trajectories are 15.0 nats less likely" in message
    assert told(10.0, [-30.0], before=[0.0, -15.0, -20.0]) == []


def test_a_value_head_learns_from_the_unselected_rollouts(run):
    _, metrics = trained(run, "term_c.kind=value", "term_c.utility=2", "term_c.rollouts=2")
    rows = list(store.read_lines(run / "run" / "iteration-1" / "reference" / "rollouts.jsonl.gz"))
    pairs = list(store.read_lines(run / "run" / "iteration-1" / "pairs" / "pairs.jsonl.gz"))
    assert len(rows) == 2 * len(pairs)
    assert {row["correct"] for row in rows} == {True, False}
    assert metrics[-1]["loss/value"] < metrics[0]["loss/value"]
    assert metrics[0]["term_c/margin_mean_abs"] == 0 < metrics[-1]["term_c/margin_mean_abs"]
    assert metrics[0]["loss/preference"] == pytest.approx(np.log(2), abs=1e-4)


class Dice:
    """A tool that says 1 or 2 by its key, and remembers what it was asked."""

    def __init__(self):
        self.asked = []

    def start(self, key):
        tool = self

        class Session:
            def run(self, action):
                tool.asked.append((key, action))
                done = Future()
                said = "1" if key.endswith(("0", "1", "2")) else "2"
                done.set_result(Observation(said, "ok", 0.0))
                return done

            def close(self):
                pass

        return Session()

    def close(self):
        pass


def test_monte_carlo_weighs_the_states_that_could_have_come(run, monkeypatch):
    """Of four calls three say 1; continuations are right as often as a table says."""
    made = context(
        run, "term_c.kind=monte_carlo", "term_c.utility=2", "train.eta=0.5", "problems.fault=0.3"
    )
    made.__dict__["tool"] = Dice()
    t = max(trajectories(), key=lambda t: t.turns)
    first, problem = t.actions[0], Problem("p", "q", "1")
    ids, roles = made.chat.observation("1", ended=True, limit=48)
    t = dataclasses.replace(
        t,
        ids=np.concatenate([t.ids[: first.stop], ids, t.ids[t.actions[-1]]]).astype(np.int32),
        roles=np.concatenate([t.roles[: first.stop], roles, t.roles[t.actions[-1]]]).astype(
            np.uint8
        ),
        log_probs=np.zeros(first.stop + len(ids) + len(t.ids[t.actions[-1]]), np.float32),
    )
    right = {"1": [1, 1, 0, 1], "2": [0, 0, 0, 1]}
    seen = []

    class Engine:
        def run(self, requests, policy, sampling, advance):
            found = []
            for request in requests:
                last = np.flatnonzero(np.array(request.prefix.roles) == Role.OBSERVATION)
                text = made.chat.decode(np.array(request.prefix.ids)[last])
                said = "1" if "1" in text else "2"
                seen.append((said, request.key))
                entry = dataclasses.replace(t, finish="answered", sample=request.sample)
                found.append((entry, right[said][request.sample]))
            self.verdicts = [Verdict("correct" if r else "wrong", "table") for _, r in found]
            return [entry for entry, _ in found]

    engine = made.__dict__["engine"] = Engine()
    monkeypatch.setattr(monte_carlo, "verdict", lambda *_: engine.verdicts.pop(0))
    [c] = monte_carlo._term_c(made, [t], {"p": problem}, "iteration-1", lambda done: None)
    v = {s: float(soft_value(2.0 * np.array(r, np.float32), eta=0.5)) for s, r in right.items()}
    assert c == pytest.approx(v["1"] - (3 * v["1"] + v["2"]) / 4, rel=1e-5)
    assert len(seen) == 8
    assert len({key for _, key in seen}) == 8
    assert len(made.tool.asked) == 4

    class Certain(Dice):
        def start(self, key):
            return super().start("0")

    made.__dict__["tool"], seen[:] = Certain(), []
    assert monte_carlo._term_c(made, [t], {"p": problem}, "i", lambda done: None) == [0.0]
    assert not seen


def test_estimates_are_kept_in_the_pairs_order_and_not_made_twice(run, monkeypatch):
    made = context(run, "term_c.kind=monte_carlo", "rollout.chunk_problems=3")
    made.__dict__["sampler"] = type("Sampler", (), {"load": lambda self, params: None})()
    trained(run)
    folder = run / "run" / "iteration-1" / monte_carlo.TERM_C
    rows = list(store.read_lines(folder.parent / "reference" / "pairs.jsonl.gz"))
    asked = []

    def by_length(context, sides, problems, stream, advance):
        asked.append(len(sides))
        return [float(len(t.ids)) for t in sides]

    monkeypatch.setattr(monte_carlo, "_term_c", by_length)
    problems = [Problem(row["chosen"]["problem_id"], "q", "1") for row in rows]
    start = run / "run" / "sft" / PARAMS
    for _ in range(2):
        done = monte_carlo.estimate(made, folder, problems, start, lambda done: None)
    lengths = [{s: float(len(row[s]["ids"])) for s in ("chosen", "rejected")} for row in rows]
    assert monte_carlo.read(folder) == lengths
    assert asked == [2 * 3] * (len(rows) // 3) + [2 * (len(rows) % 3)] * (len(rows) % 3 > 0)
    margins = [abs(r["chosen"] - r["rejected"]) for r in lengths]
    assert done["mean_abs_margin"] == pytest.approx(np.mean(margins))
