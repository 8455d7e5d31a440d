"""Rollouts by strategy over a run directory: files, budgets, resumption, pairs and figures."""

import contextlib
import dataclasses
import shutil

import pytest
from support import SMALL_RUN, trajectories

from mdpo_jax.data import store
from mdpo_jax.data.pairing import shared_turns
from mdpo_jax.exploration import Explore
from mdpo_jax.pipeline import exploring, kept, rollouts, stages
from mdpo_jax.pipeline.context import Context
from mdpo_jax.pipeline.files import stage
from mdpo_jax.recipes import parse
from mdpo_jax.types import Verdict

BUDGET = 40


@pytest.fixture(scope="module")
def context(tmp_path_factory):
    """After a warm-up that kept parameters half-way; every turn asks for the tool."""
    folder = tmp_path_factory.mktemp("run")
    more = ["--config.explore.strategy=checkpoints", "--config.explore.checkpoints=0.34,0.5,1"]
    more += ["--config.rollout.slots=4", "--config.rollout.context=128"]
    more += ["--config.pairs.drop_error_before_answer=false"]  # no action holds code
    config = parse([*SMALL_RUN, *more, f"--config.workdir={folder}"])

    def by_parity(context, gold, trajectory):
        return Verdict("correct" if trajectory.ids.sum() % 2 else "wrong", "parity", "0")

    with pytest.MonkeyPatch.context() as patch, contextlib.closing(Context(config, folder)) as made:
        patch.setattr("mdpo_jax.pipeline.evaluation.verdict", by_parity)
        patch.setattr("mdpo_jax.rollout.engine.wants_tool", lambda text: True)
        stage(folder / "problems", lambda f: stages.prepare_problems(made, f))
        stage(folder / "sft", lambda f: stages.sft(made, f, lambda n, text=None: None))
        yield made


def under(context, **fields):
    """The same run with another strategy."""
    context.config = dataclasses.replace(context.config, explore=Explore(**fields))
    return context


def rollout(context, folder):
    sft = context.directory / "sft"
    told, programs = [], []

    def advance(count, text=None):
        told.append(count)
        programs.append(context.sampler.compilations())

    done = exploring.rollout(
        context, folder, 1, [sft / "params-earlier", sft / "params"],
        advance,
    )  # fmt: skip
    assert (
        len({*programs}) == 1
    )  # all that the rollout needs is compiled before its first trajectory
    return done, [store.graded_from(row) for row in store.read_folder(folder)], told


def files(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.gz")}


def test_the_default_is_the_mixture_as_it_was(context, tmp_path):
    sft = context.directory / "sft"
    under(context)
    done, found, _ = rollout(context, tmp_path / "one")
    sources = [(sft / "params", 2), (sft / "params-earlier", 1)]
    rollouts.rollout(context, tmp_path / "other", 1, sources, lambda n, text=None: None)
    assert files(tmp_path / "one") == files(tmp_path / "other")
    assert sorted(files(tmp_path / "one")) == [
        f"{first:03d}-{start:06d}.jsonl.gz" for first in (0, 2) for start in (0, 2)
    ]
    row = next(store.read_folder(tmp_path / "one"))
    assert not row.keys() & {"parent", "branch"}
    figures = done["exploration"]
    assert figures["strategy"] == "mixture"
    assert figures["tokens_sampled"] == sum(g.trajectory.sampled_tokens for g in found)
    mixed = [
        len({g.verdict.label for g in found if g.trajectory.problem_id == p}) == 2
        for p in {g.trajectory.problem_id for g in found}
    ]
    assert figures["coverage"] == sum(mixed) / 4
    assert figures["answers"] == 1.0  # all say 0
    assert 0 < figures["distance"] <= 1
    assert figures["branched"] == 0


@pytest.mark.parametrize(
    "fields",
    [
        {"strategy": "mixture"},
        {"strategy": "temperatures"},
        {"strategy": "checkpoints", "checkpoints": (0.34, 0.5, 1.0)},
        {"strategy": "branch"},
        {"strategy": "mcts"},
    ],
    ids=lambda fields: fields["strategy"],
)
def test_a_budget_is_kept_and_a_killed_rollout_ends_in_the_same_files(context, tmp_path, fields):
    under(context, **fields, budget_tokens=BUDGET)
    done, found, told = rollout(context, tmp_path / "whole")
    costs = {}
    for trajectory, _ in found:
        costs.setdefault(trajectory.problem_id, []).append(trajectory.sampled_tokens)
    assert len(costs) == 4
    for cost in costs.values():
        assert sum(cost[:-1]) < BUDGET <= sum(cost)
    assert len({g.trajectory.key for g in found}) == len(found) == sum(told) == done["trajectories"]
    assert done["exploration"]["tokens_sampled"] == sum(map(sum, costs.values()))
    whole = files(tmp_path / "whole")
    assert done["compilations_after_warm_up"] == 0
    policies = {g.trajectory.policy for g in found}
    assert len(policies) == {"mixture": 2, "checkpoints": 3}.get(fields["strategy"], 1)
    # Killed behind the first file: what is there is not sampled again.
    first = min(whole)
    (tmp_path / "cut").mkdir()
    shutil.copy(tmp_path / "whole" / first, tmp_path / "cut" / first)
    written = (tmp_path / "cut" / first).stat().st_mtime_ns
    _, _, told = rollout(context, tmp_path / "cut")
    assert files(tmp_path / "cut") == whole
    assert (tmp_path / "cut" / first).stat().st_mtime_ns == written
    assert sum(told) == len(found)


@pytest.mark.parametrize("strategy", ["branch", "mcts", "west"])
def test_pairs_are_the_strategys(context, tmp_path, strategy):
    under(context, strategy=strategy)
    r = context.config.rollout
    context.config = dataclasses.replace(
        context.config, rollout=dataclasses.replace(r, samples=10, chunk_problems=4)
    )
    try:
        done, found, _ = rollout(context, tmp_path / "rollout")
        assert done["trajectories"] == 4 * 11
        summary = stages.build_pairs(context, tmp_path / "pairs", 1)
        stages.build_pairs(under(context), tmp_path / "random", 1)
    finally:
        context.config = dataclasses.replace(context.config, rollout=r)
    pairs = list(map(store.pair_from, store.read_lines(tmp_path / "pairs" / "pairs.jsonl.gz")))
    assert pairs, (summary, done["statuses"])
    assert files(tmp_path / "pairs") != files(tmp_path / "random")
    shared = [shared_turns(p.chosen, p.rejected) for p in pairs]
    assert summary["sibling_pairs"] == sum(s > 0 for s in shared)
    if strategy == "west":
        assert len({g.trajectory.policy for g in found}) == 1
        return
    assert any(shared)
    for pair, turns in zip(pairs, shared, strict=True):
        one, other = pair.chosen, pair.rejected
        start = one.actions[turns].start
        assert one.ids[:start].tolist() == other.ids[:start].tolist()
        assert one.ids[start : start + 40].tolist() != other.ids[start : start + 40].tolist()
    branched = [t for p in pairs for t in (p.chosen, p.rejected) if t.parent is not None]
    assert branched
    assert all(0 < t.branch < t.turns for t in branched)


def test_the_warm_up_keeps_what_takes_part_and_nothing_else(context, tmp_path):
    sft = context.directory / "sft"
    # Two of six steps are 0.34 of them, and three the half.
    assert {p.name for p in sft.glob("params*")} == {
        "params", "params-earlier", "params-0.34", "params-0.5",
    }  # fmt: skip
    under(context, strategy="checkpoints", checkpoints=(0.5, 1.0))
    kept.keeper(context, tmp_path, 0, None)(0, lambda: context.begin())
    assert [p.name for p in tmp_path.glob("params*")] == ["params-0.5"]
    under(context)
    assert exploring.sources(context.config, [sft / "params-earlier", sft / "params"]) == [
        exploring.Source(sft / "params", 2),
        exploring.Source(sft / "params-earlier", 3),
    ]
    kept.keeper(context, tmp_path / "none", 1, None)(1, lambda: context.begin())
    assert not (tmp_path / "none").exists()


def test_an_iterations_training_keeps_them_too(context, tmp_path, monkeypatch):
    def fit(self, params, batches, plan, objective, *, keep, **rest):
        keep(1, lambda: params)
        return params

    monkeypatch.setattr("mdpo_jax.training.trainer.Trainer.fit", fit)
    before, start = context.config, context.directory / "sft" / "params"
    explore = Explore(strategy="checkpoints", checkpoints=(0.25, 1.0))
    context.config = dataclasses.replace(before, method="raft", explore=explore)
    try:
        for name, rows in (("some", trajectories(4)), ("none", ())):
            folder = tmp_path / name
            right = map(store.trajectory_row, rows)
            store.write_lines(folder / "pairs" / "correct.jsonl.gz", right)
            (folder / "train").mkdir()
            done = stages.train(
                context, folder / "train", start, [(start, 1.0)], 0, lambda n, text=None: None
            )
            assert done["steps"] == len(rows) // 4
            assert kept.path(folder / "train", 0.25).is_dir()
            assert kept.path(folder / "train", 1.0) == folder / "train" / "params"
    finally:
        context.config = before
