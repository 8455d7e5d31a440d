import dataclasses

import pytest

from mdpo_jax.config import ConfigError
from mdpo_jax.methods import METHODS
from mdpo_jax.recipes import (
    describe,
    differences,
    from_dict,
    load_recipe,
    parse,
    recipe_folder,
)

RECIPES = sorted(path.stem for path in recipe_folder().glob("*.py"))


def test_overrides_are_typed_and_nested():
    config = parse(
        ["--config=tiny", "--config.train.eta=0.3", "--config.seed=7", "--config.tool.cache=false",
         "--config.problems.steps=0.5,0.25,0.25", "--config.model.path=none"]
    )  # fmt: skip
    assert (config.train.eta, config.seed, config.tool.cache) == (0.3, 7, False)
    assert config.problems.steps == (0.5, 0.25, 0.25)
    assert config.model.path is None


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--config.train.etaa=1", "unknown field 'etaa' of Train; did you mean 'eta'?"),
        ("--config.trian.eta=1", "unknown field 'trian' of Config; did you mean 'train'?"),
        ("--config.train.eta=abc", "expected float"),
        ("--config.train.eta=nan", "a finite number"),
        ("--config.train.eta=-1", "train.eta=-1.0: expected more than 0"),
        ("--config.seed=1.5", "expected int"),
        ("--config.tool.cache=yes", "expected true or false"),
        ("--config.method=ppo", "expected one of sft, raft, dpo, kto, mdpo, mdpo_fixed_ref, mkto"),
        ("--config.model.chat=vicuna", "expected one of auto, gemma, mistral, mistral-instruct"),
        ("--config.train=1", "train is a section; fields: eta"),
        ("--config.seed.x=1", "seed has no field 'x'"),
        ("--seed=1", "unknown argument; expected --config.FIELD=VALUE"),
        ("--config.rollout.context=8", "at least rollout.trajectory_tokens"),
        ("--config.problems.noise=2", "a number from 0 to 1"),
        ("--config.rollout.top_k=-1", "rollout.top_k=-1: expected at least 0"),
        ("--config.rollout.top_p=0", "rollout.top_p=0.0: expected a number above 0 and at most 1"),
        ("--config.rollout.collect=late", "expected one of fixed, arrival"),
        (
            "--config.explore.strategy=beam",
            "expected one of mixture, temperatures, checkpoints, west",
        ),
        ("--config.explore.budget_tokens=-1", "explore.budget_tokens=-1: expected at least 0"),
        ("--config.explore.temperatures=1,0", "(1.0, 0.0): expected numbers above 0, at least one"),
        ("--config.explore.checkpoints=0.5,0.5", "expected different shares above 0 and at most 1"),
        ("--config.explore.base=1", "explore.base=1.0: expected below 1"),
        ("--config.explore.width=0", "explore.width=0: expected at least 1"),
        ("--config.explore.c_puct=2", "explore.c_puct=2.0 is read by mcts only; expected 1.0"),
    ],
)
def test_a_wrong_override_is_told_in_one_line(argument, message):
    with pytest.raises(ConfigError) as caught:
        parse(["--config=tiny", argument])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("strategy", "fields", "message"),
    [
        ("mcts", ("method=mdpo_fixed_ref",), "the reference is fixed; expected updated"),
        ("mcts", ("train.reference=mixture",), "the reference is mixture; expected updated"),
        ("mcts", ("explore.base=0.3",), "explore.base=0.3 is read by branch only; expected 0.5"),
        ("branch", ("rollout.max_turns=1",), "leaves no state to go on from; expected at least 2"),
        ("branch", ("term_c.kind=value",), "term_c.kind=value learns from the policies' own"),
        ("west", ("method=raft",), "its pairs are not read by method=raft"),
        ("temperatures", ("rollout.temperature=0.7",), "rollout.temperature=0.7 beside explore"),
    ],
)
def test_what_does_not_go_with_a_strategy_is_refused(strategy, fields, message):
    asked = [f"--config.{field}" for field in (f"explore.strategy={strategy}", *fields)]
    with pytest.raises(ConfigError) as caught:
        parse(["--config=tiny", *asked])
    assert str(caught.value).startswith(f"config.explore.strategy={strategy}: ")
    assert message in str(caught.value)
    parse(["--config=tiny", asked[0]])


def test_an_unknown_recipe_suggests_the_nearest():
    with pytest.raises(
        ConfigError, match=r"did you mean 'tiny'\?; known: codegemma7b, .*, tiny, tiny_stochastic$"
    ):
        parse(["--config=tinny"])


def test_the_recipe_is_given_once():
    with pytest.raises(ConfigError, match="given 0 times"):
        parse([])


def test_gemma7b_holds_the_papers_settings():
    c = load_recipe("gemma7b")
    assert (c.rollout.samples, c.rollout.previous_samples, c.rollout.max_turns) == (20, 10, 6)
    assert (c.rollout.turn_tokens, c.rollout.trajectory_tokens) == (512, 2048)
    assert (c.train.eta, c.train.learning_rate, c.train.batch_pairs) == (0.1, 4e-7, 32)
    assert (c.train.warmup_steps, c.train.reference, c.iterations) == (40, "preset", 3)
    assert (c.reference, c.nll_weight) == ("updated", 0)


@pytest.mark.parametrize(
    ("name", "learning_rate", "sft", "raft"),
    [
        ("gemma7b", 4e-7, (5e-6, 0.34), (5e-6, 2)),
        ("codegemma7b", 4e-7, (5e-6, 0.34), (5e-6, 2)),
        ("mistral7b", 2e-7, (1e-5, 0.5), (1e-6, 1)),
        ("gemma2_9b", 2e-7, (5e-6, 0.34), (5e-6, 2)),
    ],
)
def test_the_papers_models_have_the_papers_rates(name, learning_rate, sft, raft):
    c = load_recipe(name)
    assert c.train.learning_rate == learning_rate
    assert (c.sft.learning_rate, c.sft.previous_fraction) == sft
    assert (c.sft.batch, c.sft.warmup_steps) == (64, 100)
    assert (c.raft.learning_rate, c.raft.epochs, c.raft.batch) == (*raft, 32)


def test_the_fingerprint_ignores_the_place_and_sees_the_rest():
    base = parse(["--config=tiny"])
    for place in ("workdir=/x", "profile=steps"):
        assert parse(["--config=tiny", f"--config.{place}"]).fingerprint() == base.fingerprint()
    with pytest.raises(ConfigError, match="profile=all: expected one of none, steps"):
        parse(["--config=tiny", "--config.profile=all"])
    with pytest.raises(ConfigError, match="profile='all': expected none or steps"):
        dataclasses.replace(base, profile="all")
    other = parse(["--config=tiny", "--config.train.eta=0.5"])
    assert other.fingerprint() != base.fingerprint()
    assert differences(base.as_dict(), other.as_dict()) == ["train.eta: 1.0 -> 0.5"]


def on_servers(*fields):
    http = ["--config.rollout.backend=http", "--config.rollout.servers=http://a:1, http://b:2/"]
    return parse(["--config=tiny", *http, *(f"--config.rollout.{f}" for f in fields)])


def test_where_the_servers_are_does_not_decide_the_results():
    base = on_servers()
    assert base.rollout.urls == ("http://a:1", "http://b:2")
    moved = on_servers("servers=https://c", "retries=1", "request_timeout=5", "served_model=m")
    assert moved.fingerprint() == base.fingerprint()
    assert on_servers("server_kind=sglang").fingerprint() != base.fingerprint()


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("servers=", "rollout.servers='': expected comma-separated URLs"),
        ("backend=local", "with rollout.backend=http"),
        ("servers=a:1", "rollout.servers='a:1': expected http://HOST"),
        ("servers=http://a,ftp://b", "rollout.servers='ftp://b': expected http://HOST"),
        ("servers=http://a:x", "rollout.servers='http://a:x'"),
        ("servers=http://u:p@a", "rollout.servers='http://u:p@a'"),
        ("servers=http://a,http://a/", "expected each server once"),
        ("server_kind=tgi", "expected one of vllm, sglang"),
        ("reload_command=restart", "expected a command with {path}"),
        ("request_timeout=0", "rollout.request_timeout=0.0: expected more than 0"),
        ("retries=-1", "rollout.retries=-1: expected at least 0"),
    ],
)
def test_wrong_servers_are_told_in_one_line(field, message):
    with pytest.raises(ConfigError) as caught:
        on_servers(field)
    assert message in str(caught.value)


def test_every_field_is_described():
    rows = {flag: (kind, value) for flag, kind, value in describe(load_recipe("tiny"))}
    assert rows["--config.method"] == (f"one of {', '.join(METHODS)}", "'mdpo'")
    assert rows["--config.model.path"][0] == "str or none"


@pytest.mark.parametrize("name", RECIPES)
def test_a_config_comes_back_from_its_dict(name):
    config = load_recipe(name)
    assert from_dict(config.as_dict()) == config
    with pytest.raises(ConfigError, match="unknown field of Train"):
        from_dict({**config.as_dict(), "train": {"x": 1}})


@pytest.mark.parametrize(
    "argument",
    [
        "sft.batch=0", "rollout.previous_samples=-1", "rollout.block=0", "train.rows=1",
        "train.epochs=0", "raft.batch=0", "pairs.per_problem=0", "problems.per_iteration=0",
        "problems.steps=0,0", "tool.timeout=0", "evaluate.pass_samples=0", "mesh.data=0",
        "model.num_kv_heads=3", "model.head_dim=7", "model.vocab_size=20", "train.beta2=1",
        "sft.previous_fraction=2", "seed=-1", "lora.rank=-1", "lora.alpha=0", "lora.targets=c_attn",
        "train.nll_weight=-1", "train.turn_discount=0", "train.label_smoothing=0.5",
        "train.mixture=2", "train.ema=1", "train.lambda_wrong=0", "train.observation_ce_weight=-1",
        "train.displacement_alarm=-1", "problems.fault=2", "term_c.utility=0",
        "term_c.continuations=0", "term_c.weight=0",
    ],
)  # fmt: skip
def test_a_value_out_of_range_is_named_with_what_is_accepted(argument):
    field, value = argument.split("=")
    with pytest.raises(ConfigError, match=rf"config\.{field}=.*{value.split(',')[0]}.*: expected "):
        parse(["--config=tiny", f"--config.{argument}"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("train.nll_weight=1", "expected none, or method=mdpo_nll"),
        ("method=mdpo_nll train.nll_weight=0", "expected above 0, or method=mdpo"),
        ("method=mdpo_fixed_ref train.reference=updated", "expected fixed, or method=mdpo"),
        ("train.reference=fixed", "method=mdpo_fixed_ref"),
        ("method=mkto train.nll_weight=1", "is read by dpo, mdpo, mdpo_fixed_ref, mdpo_nll only"),
        ("method=mkto train.loss=ipo", "train.loss=ipo is read by dpo, mdpo"),
        ("method=kto train.length_normalised=true", "expected False"),
        ("train.kl=zero", "train.kl=zero is read by kto, mkto only; expected mismatched"),
        ("method=raft train.lambda_wrong=2", "is read by kto, mkto only"),
        ("method=raft train.turn_discount=0.9", "expected none"),
        ("method=sft train.reference_log_probs=in_step", "expected stored"),
        ("method=sft train.observation_ce_weight=1", "is read by raft, dpo, kto"),
        ("method=dpo train.mask=paper", "chooses nothing where everything counts"),
        ("train.mixture=0.1", "needs train.reference=mixture"),
        ("train.loss=hinge train.label_smoothing=0.1", "0 with train.loss=hinge"),
        ("method=dpo term_c.kind=value", "corrects M-DPO"),
        ("method=mkto term_c.kind=monte_carlo", "corrects M-DPO"),
        ("term_c.kind=monte_carlo train.reference=mixture", "samples one policy"),
        ("term_c.kind=value train.mask=template", "with train.mask=template; expected sampled"),
        ("term_c.kind=value train.loss=ipo", "with train.loss=ipo; expected sigmoid or robust"),
        ("term_c.kind=value train.length_normalised=true", "expected false"),
        (
            "term_c.kind=monte_carlo train.turn_discount=1",
            "with train.turn_discount=1.0; expected n",
        ),
        ("train.reference_log_probs=in_step train.reference=mixture", "holds one policy"),
        ("problems.path=x problems.fault=0.1", "0 with problems.path"),
    ],
)
def test_an_inconsistent_combination_is_refused_at_once(overrides, message):
    with pytest.raises(ConfigError) as caught:
        parse(["--config=tiny", *(f"--config.{part}" for part in overrides.split())])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_overrides_are_judged_together_whatever_their_order():
    parts = ["--config.train.kl=zero", "--config.method=mkto"]
    assert parse(["--config=tiny", *parts]) == parse(["--config=tiny", *reversed(parts)])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_method_goes_with_the_recipes_as_they_are(method, recipe):
    config = parse([f"--config={recipe}", f"--config.method={method}"])
    assert config.reference == ("fixed" if method == "mdpo_fixed_ref" else "updated")
    assert config.nll_weight == (method == "mdpo_nll")
    assert config.preset.observations == (method in ("dpo", "kto"))
