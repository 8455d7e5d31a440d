"""The plan on CPU topologies, and its reading of compiled programs whose answers are known."""

import dataclasses
import json
import os
import re
from pathlib import Path

import bench_pairs
import jax
import jax.numpy as jnp
import numpy as np
import plan
import plan_chips
import plan_cost
import plan_hlo
import plan_table
import pytest
from jax.sharding import PartitionSpec as P

from mdpo_jax.model.families import count_params
from mdpo_jax.model.hf_config import small_config
from mdpo_jax.model.sharding import make_mesh


@pytest.fixture(scope="module", autouse=True)
def _environment():
    """What the tool sets for its compilers is not for the tests that follow."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


DOCS = Path(__file__).parents[2] / "docs"


def _compiled(body, sizes, *shapes):
    """HLO of a shard_map over all four devices."""
    mesh = make_mesh(**sizes)
    spec = P(("data", "fsdp"))
    run = jax.shard_map(body, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.jit(run).lower(*arrays).compile().as_text()


def test_collectives_in_loops_are_counted_once_a_turn():
    def body(x):  # [8, 16] a device, 512 bytes
        def turn(x, _):
            x = jnp.sin(jax.lax.psum(x, ("data", "fsdp")))
            return jax.lax.scan(inner, x, length=5)[0], None

        def inner(x, _):
            return jnp.cos(jax.lax.ppermute(x, "fsdp", [(0, 1), (1, 2), (2, 3), (3, 0)])), None

        return jax.lax.scan(turn, x, length=3)[0]

    found = plan_hlo.collectives(_compiled(body, {"fsdp": 4}, (32, 16)), devices=4)
    assert found["all-reduce"] == (3, 3 * 2 * 512 * 3 / 4, 0)
    assert found["collective-permute"] == (15, 15 * 512, 0)


def test_a_loop_that_data_bounds_takes_the_callers_count():
    def body(x):
        turns = jnp.sum(x).astype(jnp.int32)
        return jax.lax.fori_loop(0, turns, lambda _, y: jax.lax.pmax(y, "fsdp") - 1, x)

    text = _compiled(body, {"fsdp": 4}, (32, 16))
    assert plan_hlo.collectives(text, 7, 4)["all-reduce"].count == 7


def test_what_leaves_a_slice_is_told_apart():
    def body(x):
        inside = jax.lax.psum_scatter(x, "fsdp", tiled=True)  # [4, 16], 256 bytes
        return jax.lax.all_gather(jax.lax.psum(inside, "data"), "fsdp", tiled=True)

    text = _compiled(body, {"data": 2, "fsdp": 2}, (32, 16))
    found = plan_hlo.collectives(text, devices=4, slices=2)
    assert found["reduce-scatter"] == (1, 256, 0)
    assert found["all-reduce"] == (1, 2 * 256 / 2, 256)
    assert found["all-gather"] == (1, 256, 0)


UNROLLED = """HloModule unrolled

%cond (p: (u32[], bf16[8])) -> pred[] {
  %c = u32[]{:T(128)} constant(8), metadata={op_name="x"}
  %p = (u32[], bf16[8]) parameter(0)
  %i = u32[] get-tuple-element(%p), index=0
  ROOT %lt = pred[] compare(%i, %c), direction=LT
}

%body (p.1: (u32[], bf16[8])) -> (u32[], bf16[8]) {
  %p.1 = (u32[], bf16[8]) parameter(0)
  %i.1 = u32[] get-tuple-element(%p.1), index=0
  %two = u32[] constant(2)
  %next = u32[] add(%i.1, %two)
  %x = bf16[8] get-tuple-element(%p.1), index=1
  %s = (bf16[8]{0:S(1)}, bf16[8], u32[]{:S(2)}, u32[]) collective-permute-start(%x), channel_id=1, \
source_target_pairs={{0,1},{1,0}}
  %d = bf16[8] collective-permute-done(%s)
  ROOT %t = (u32[], bf16[8]) tuple(%next, %d)
}

ENTRY %main (a: (u32[], bf16[8])) -> (u32[], bf16[8]) {
  %a = (u32[], bf16[8]) parameter(0)
  ROOT %w = (u32[], bf16[8]) while(%a), condition=%cond, body=%body
}
"""


def test_a_loop_without_a_known_count_is_read_from_its_condition_and_step():
    assert plan_hlo.collectives(UNROLLED, 100, 2) == {"collective-permute": (4, 4 * 16, 0)}


def test_what_slices_send_each_other_is_found_in_a_slices_own_program():
    sends = """  %k = token[] after-all()
  %n = (bf16[8]{0}, u32[], token[]) send(%x, %k), is_host_transfer=true, \
frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime"}
"""
    text = UNROLLED.replace("  %d = bf16", sends + "  %d = bf16")
    found = plan_hlo.collectives(text, devices=4, slices=2)
    assert found["send"] == (4, 4 * 16, 4 * 16)
    assert found["collective-permute"] == (4, 4 * 16, 0)


@pytest.mark.parametrize(
    "spelling",
    [
        "{{0,2},{1,3}}",
        "[2,2]<=[2,2]T(1,0)",
        "mesh['a'=2,'b'=2] {'a'}, ",
    ],
)
def test_groups_are_read_in_every_spelling(spelling):
    found = plan_hlo._groups(f"%x), replica_groups={spelling}, dimensions={{0}}", 4)
    assert found == [[0, 2], [1, 3]]


def test_flops_are_those_of_the_benchmark():
    model = small_config("gemma", 448, 64, 192, 2, 4, 2, 32)
    one = np.zeros(40, np.int32)
    pair = bench_pairs.BenchPair(one[:30], one[:10], one[:10], one[:10], one[:10])
    useful, executed = plan_cost.step_flops(model, 2, 40, "full")
    assert useful == bench_pairs.step_flops(model, [pair], in_step=False)
    assert executed == useful * 4 / 3
    assert plan_cost.step_flops(model, 2, 40, "none") == (useful, useful)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A plan of a small step over four devices, through the command line, from its file."""
    file = tmp_path_factory.mktemp("plan") / "plans.jsonl"
    code = plan.main(
        ["--config=tiny", "--topology=cpu:4", f"--append={file}", "--config.model.remat=full",
         "--config.train.rows=6", "--config.train.batch_pairs=8"]
    )  # fmt: skip
    assert code == 0
    return json.loads(file.read_text())


def test_arguments_are_the_state_and_the_batch(tiny):
    assert (tiny["rows"], tiny["micros"], tiny["mesh"]) == (8, 2, [1, 4, 1])
    state = 12 * tiny["params"] / 4  # float32 parameters and two moments
    tokens = 4 * 7 * 8 * tiny["row_length"] * 4 / 4  # micro-batches, arrays, rows; 4 bytes
    held = tiny["bytes"]["arguments"]
    assert state + tokens < held < 1.1 * (state + tokens)  # norms and what is a pair's: whole
    assert tiny["bytes"]["peak"] > held
    assert tiny["fits"]


def test_every_chip_sends_about_its_part_of_each_pass_over_the_weights(tiny):
    sent = sum(t["sent"] for t in tiny["collectives"].values())
    once = 4 * tiny["params"] * 3 / 4 * tiny["micros"]  # gathered in float32
    assert 2 * once < sent < 6 * once
    assert tiny["seconds"]["step"] > max(tiny["seconds"][k] for k in ("compute", "memory"))


def test_a_plan_is_said_and_tabled(tiny, tmp_path, capsys):
    text = plan.report(tiny)
    assert "4 chips, mesh data 1 x fsdp 4 x tensor 1" in text
    assert "fits" in text
    (tmp_path / "a.jsonl").write_text(json.dumps(tiny) + "\n" + json.dumps(tiny) + "\n")
    assert plan.main(["--table", str(tmp_path / "a.jsonl")]) == 0
    shown = capsys.readouterr().out
    assert shown.count("| tiny | adamw | cpu:4 |") == 1  # alike: the newest


def test_a_reference_in_the_step_and_kto_s_reference_point_are_planned(tmp_path):
    file = tmp_path / "plans.jsonl"
    given = ["--config=tiny", "--topology=cpu:1", f"--append={file}", "--config.train.rows=6"]
    given += ["--config.train.batch_pairs=8"]
    held = "--config.train.reference_log_probs=in_step"
    for more in ([], [held], ["--config.method=mkto"]):
        assert plan.main([*given, *more]) == 0
    stored, in_step, kto = map(json.loads, file.read_text().splitlines())
    bytes_of = [p["bytes"]["arguments"] for p in (stored, in_step, kto)]
    assert bytes_of[1] - bytes_of[0] == 4 * stored["params"]
    assert bytes_of[2] > bytes_of[0]  # the second batch
    useful = [p["flops"]["useful"] for p in (stored, in_step, kto)]
    assert useful[1:] == pytest.approx([useful[0] * 4 / 3] * 2)
    assert len(plan_table.read([file])) == 3


def test_a_search_doubles_the_rows_while_they_fit(monkeypatch):
    from mdpo_jax import recipes

    config = recipes.parse(["--config=tiny", "--config.train.rows=4"])
    wanted = plan_chips.topology("cpu:4")
    name, model = plan.shape_of(None, config)
    monkeypatch.setattr(plan, "plan", lambda s, *_: ({"rows": s.rows, "fits": s.rows < 16}, ""))
    found = plan.searched(config, model, wanted, name)
    assert [p["rows"] for p in found] == [4, 8, 16]
    monkeypatch.setattr(plan, "plan", lambda s, *_: ({"rows": s.rows, "fits": True}, ""))
    assert plan.searched(config, model, wanted, name)[-1]["rows"] == 2 * config.train.batch_pairs


def test_the_documents_tables_are_those_of_its_plans():
    assert plan_table.table([DOCS / "scaling.jsonl"]) in (DOCS / "scaling.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--topology=v9:4x4"], "--topology=v9:4x4: unknown; known: .*v5e-16"),
        (["--topology=v5p:4x4"], "--topology=v5p:4x4: unknown"),
        (["--topology=cpu:4", "--slices=2"], "--slices=2 of cpu:4: expected 1"),
        (["--topology=cpu:4", "--config.nothing=1"], "unknown field 'nothing'"),
        (["--topology=cpu:4", "--config.mesh.fsdp=3"], "= 3 of the 4 chips"),
        (["--topology=cpu:4", "--config.method=raft"], "method=raft: no preference step"),
        (["--topology=cpu:4", "--config.term_c.kind=value"], "term_c.kind=value: no value head"),
        (["--topology=cpu:64"], "has 4 CPU devices"),
        (["--topology=cpu:4", "--model=gemma-3b"], "--model=gemma-3b: .*or gemma-nano"),
        (["--topology=cpu:4", "--config.model.path=a/b"], "the shape of a/b is not known"),
    ],
)
def test_what_cannot_be_planned_is_said(arguments, words, capsys):
    assert plan.main(["--config=tiny", *arguments]) == 2
    assert re.search(words, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--table", "no.jsonl"], "--table=no.jsonl: not a file"),
        (["--config=tiny", "--topology=cpu:4", "--search", "--naive"], "neither --naive nor --hlo"),
    ],
)
def test_what_cannot_be_asked_for_is_said(arguments, words, capsys):
    with pytest.raises(SystemExit):
        plan.main(arguments)
    assert words in capsys.readouterr().err


def test_without_libtpu_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    wanted = plan_chips.topology("v5e-16")
    assert (wanted.name, wanted.chips) == ("v5e:4x4", 16)
    with pytest.raises(plan_chips.PlanError, match=r"pip install 'mdpo_jax\[tpu\]'"):
        plan_chips.devices(wanted)


def test_every_recipe_of_a_hub_model_has_a_shape():
    from mdpo_jax.recipes import load_recipe

    counts = {
        name: round(count_params(plan.shape_of(None, load_recipe(name))[1]) / 1e9, 2)
        for name in plan.MODELS
    }
    assert counts == {
        "gemma7b": 8.54, "codegemma7b": 8.54, "mistral7b": 7.25, "gemma2_9b": 9.24,
        "gemma2b_colab": 2.51, "llama3_8b": 8.03, "qwen2_5_math_7b": 7.62, "gemma3_4b": 3.88,
    }  # fmt: skip


@pytest.mark.slow
def test_our_step_needs_a_third_of_a_plain_trainers():
    """Gemma-2B's shape, 8 x 2048 tokens, all weights, by the CPU's compiler."""
    given = ["--config=gemma2b_colab", "--topology=cpu:1", "--config.lora.rank=0"]
    given += ["--config.model.param_dtype=float32", "--config.train.rows=8"]
    given += ["--config.train.row_length=2048", "--config.train.batch_pairs=4"]
    options, rest = plan.arguments(given)
    from mdpo_jax import recipes

    config, wanted = recipes.parse(rest), plan_chips.topology(options.topology)
    name, model = plan.shape_of(None, config)
    step = plan.setup(config, model, wanted)
    step = dataclasses.replace(step, mesh=None)
    ours, plain = (
        plan.plan(step, wanted, name, naive)[0]["bytes"]["peak"] for naive in (False, True)
    )
    assert ours < plain / 3
