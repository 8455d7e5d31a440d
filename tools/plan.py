"""What a recipe's step needs on chips that are not there: bytes, FLOPs, collectives, time, and fit.

    python tools/plan.py --config=gemma7b --topology=v5e:4x4 [--search] [--json] [--append=FILE]
        [--model=NAME|config.json] [--slices=N] [--config.train.rows=32 ...]
    python tools/plan.py --table=FILE [FILE ...]

The real step is compiled by the chips' own compiler, which takes minutes and one core, with every
setting of the recipe and not one weight; of a method that compares with a reference, without a value
head.  The model's shape: of the recipe's, a table's, or of a folder's config.json.  Batches are full:
every sequence takes a row, every token is scored.
`--search` doubles the rows of a micro-batch while they fit.  `--append` adds the plan to a file,
from which `--table` makes docs/scaling.md.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from plan_chips import GIB, PlanError, Topology, devices, prepare, topology

# A recipe's model -> its row in make_checkpoint's table of released shapes.
MODELS = {
    "gemma7b": "gemma-7b", "codegemma7b": "gemma-7b", "mistral7b": "mistral-7b",
    "gemma2_9b": "gemma2-9b", "gemma2b_colab": "gemma-2b", "llama3_8b": "llama-8b",
    "qwen2_5_math_7b": "qwen2-7b", "gemma3_4b": "gemma3-4b",
}  # fmt: skip


# The compiler's two ways to say that memory ran out; the second counts temporaries alone, and is thus
# a lower bound.
_REFUSAL = r"Used ([\d.]+)G of [\d.]+G hbm|for HLO temporaries \(([\d.]+)G\) exceeds"


def arguments(given: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Of the command line; the second part is the recipe's."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--topology", help="v5e:4x4, v5p-8, h100:8, cpu:4, ...")
    parser.add_argument("--slices", type=int, default=1, help="of that topology, over a network")
    parser.add_argument("--model", help="a config.json or its folder, or a name of the table")
    parser.add_argument("--naive", action="store_true", help="a plain trainer's step instead")
    parser.add_argument("--search", action="store_true", help="the most rows that fit")
    parser.add_argument("--json", action="store_true", help="one line, for machines")
    parser.add_argument("--append", type=Path, help="a file that gets that line too")
    parser.add_argument("--hlo", type=Path, help="where to write the compiled program's text")
    parser.add_argument("--table", type=Path, nargs="+", help="plans' files; prints markdown")
    parser.add_argument("--note", default="", help="a word on this plan, kept with it")
    options, rest = parser.parse_known_args(given)
    if not options.table and not (options.topology and rest):
        parser.error("expected --config=NAME and --topology=NAME, or --table=FILE")
    if options.search and (options.naive or options.hlo):
        parser.error("--search plans several steps of ours; expected neither --naive nor --hlo")
    for path in options.table or ():
        if not path.is_file():
            parser.error(f"--table={path}: not a file; expected one that --append wrote")
    return options, rest


def shape_of(given: str | None, config: Any) -> tuple[str, Any]:
    """The model's name and `ModelConfig`: what was asked for, or the recipe's."""
    from make_checkpoint import SHAPES, model_config

    from mdpo_jax.model.hf_config import from_hf, small_config

    m = config.model
    name = given or ("" if m.path is None else MODELS.get(config.name, ""))
    if name in SHAPES:
        return name, model_config(name)
    if name:
        path = Path(name)
        path = path / "config.json" if path.is_dir() else path
        try:
            return path.parent.name, from_hf(json.loads(path.read_text()))
        except (OSError, ValueError) as error:
            known = ", ".join(SHAPES)
            raise PlanError(
                f"--model={name}: {error}; expected a config.json, or {known}"
            ) from None
    if m.path is not None:
        known = ", ".join(SHAPES)
        raise PlanError(
            f"--config={config.name}: the shape of {m.path} is not known here; expected "
            f"--model=config.json, or one of {known}"
        )
    sizes = (m.hidden_size, m.intermediate_size, m.num_layers, m.num_heads)
    return "fresh", small_config(m.family, m.vocab_size, *sizes, m.num_kv_heads, m.head_dim)


def setup(config: Any, model: Any, wanted: Topology, rows: int | None = None) -> Any:
    """The step's setting; rows and mesh as `pipeline.Context` makes them of the recipe."""
    from plan_step import Setup

    from mdpo_jax.methods import METHODS
    from mdpo_jax.model import sharding

    compared = ("pairs", "unpaired")
    if config.preset.objective not in compared:
        known = ", ".join(name for name, m in METHODS.items() if m.objective in compared)
        raise PlanError(
            f"config.method={config.method}: no preference step; expected one of {known}"
        )
    if config.term_c.kind == "value":
        raise PlanError(
            "config.term_c.kind=value: no value head is planned; expected none or monte_carlo"
        )
    m, found = config.mesh, devices(wanted)
    fsdp = m.fsdp or max(1, len(found) // (m.data * m.tensor))
    used = m.data * fsdp * m.tensor
    if used != len(found):
        raise PlanError(
            f"config.mesh: data {m.data} x fsdp {fsdp} x tensor {m.tensor} = {used} of the "
            f"{len(found)} chips of {wanted.label}; expected all of them"
        )
    mesh = None
    if used > 1:
        try:
            mesh = sharding.make_mesh(m.data, fsdp, m.tensor, devices=found)
        except ValueError as error:  # slices that the mesh does not divide
            raise PlanError(f"--slices={wanted.slices}: config.{error}") from None
    ways = m.data * fsdp
    wide = config.train.rows if rows is None else rows
    wide = -(-wide // ways) * ways
    micros = -(-2 * config.train.batch_pairs // wide)
    return Setup(config, model, tuple(found), mesh, wide, micros)


def compiled(step: Any, naive: bool = False) -> dict[str, Any]:
    """Bytes by the compiler, and its program's text; `refused` where it ran out of memory."""
    import plan_naive
    import plan_step

    started = time.perf_counter()
    try:
        program = (plan_naive if naive else plan_step).lower(step).compile()
    except Exception as error:  # XlaRuntimeError; only one of its many reasons is an answer
        needed = re.search(_REFUSAL, str(error))
        if needed is None:
            raise
        size = float(needed[1] or needed[2])
        return {"refused": size * GIB, "seconds": time.perf_counter() - started}
    found = program.memory_analysis()
    return {
        "arguments": found.argument_size_in_bytes,
        "temporaries": found.temp_size_in_bytes,
        "results": found.output_size_in_bytes - found.alias_size_in_bytes,
        "code": found.generated_code_size_in_bytes,
        "text": program.as_text(),
        "seconds": time.perf_counter() - started,
    }


def plan(step: Any, wanted: Topology, name: str, naive: bool = False) -> tuple[dict[str, Any], str]:
    """The plan of one compiled step as a dict, and the program's text."""
    import jax
    from plan_cost import memory_traffic, sampler, seconds, step_flops
    from plan_hlo import collectives

    from mdpo_jax.model.families import count_params

    c, t, m, chip = step.config, step.config.train, step.model, wanted.chip
    tensor = c.mesh.tensor
    tokens = step.micros * step.rows * t.row_length
    lora = step.adapter is not None
    useful, executed = step_flops(
        m, step.micros * step.rows, t.row_length, c.model.remat, step.adapter,
        reference=step.in_step, point=step.reference_point,
    )  # fmt: skip
    built = compiled(step, naive)
    text = built.pop("text", "")
    compile_seconds = built.pop("seconds")
    peak = built["refused"] if "refused" in built else sum(built.values())
    traffic = collectives(text, step.micros, wanted.chips, wanted.slices) if text else {}
    params, own = count_params(m), wanted.chips
    memory = memory_traffic(m, params, own, tensor, tokens * tensor / own, step.micros, lora)
    times = seconds(chip, executed / own, memory, traffic)
    return {
        "config": c.name, "method": c.method, "reference": t.reference_log_probs,
        "model": name, "params": params, "topology": wanted.name,
        "label": wanted.label, "slices": wanted.slices, "chips": own,
        "mesh": [c.mesh.data, own // (c.mesh.data * tensor), tensor],
        "rows": step.rows, "row_length": t.row_length, "micros": step.micros,
        "pairs": t.batch_pairs, "tokens": tokens, "optimiser": t.optimiser,
        "dtypes": [c.model.dtype, c.model.param_dtype], "remat": c.model.remat,
        "lora": c.lora.rank, "attention": step.forward.attention, "chunk": t.logprob_chunk,
        "bytes": {**built, "peak": peak, "hbm": chip.hbm}, "fits": peak <= chip.hbm,
        "flops": {"useful": useful, "executed": executed},
        "collectives": {kind: {"count": t.count, "sent": t.sent} for kind, t in traffic.items()},
        "seconds": times, "mfu": useful / own / chip.flops / times["step"],
        "memory_traffic": memory, "sampler": sampler(m, params, c.rollout, chip, own),
        "compile_seconds": compile_seconds, "naive": naive, "jax": jax.__version__,
    }, text  # fmt: skip


def searched(config: Any, model: Any, wanted: Topology, name: str) -> list[dict[str, Any]]:
    """Plans of doubled rows until they no longer fit, or hold all pairs of a step."""
    found: list[dict[str, Any]] = []
    rows = config.train.rows
    while True:
        found.append(plan(setup(config, model, wanted, rows), wanted, name)[0])
        rows = 2 * found[-1]["rows"]
        if not found[-1]["fits"] or rows > 2 * config.train.batch_pairs:
            return found


def report(p: dict[str, Any]) -> str:
    """A plan for people."""
    b, s, names = p["bytes"], p["seconds"], ("data", "fsdp", "tensor")
    mesh = " x ".join(f"{n} {size}" for n, size in zip(names, p["mesh"], strict=True))
    kept = f"LoRA of rank {p['lora']}" if p["lora"] else f"all weights by {p['optimiser']}"
    room = b["hbm"] - b["peak"]
    verdict = f"fits, {room / GIB:.2f} to spare" if p["fits"] else f"over by {-room / GIB:.2f}"
    lines = [
        f"{p['config']}: {p['model']}, {p['params'] / 1e9:.2f} B parameters, {kept}, "
        f"{p['dtypes'][0]} over {p['dtypes'][1]}, remat {p['remat']}, {p['attention']} attention",
        f"on        {p['label']}: {p['chips']} chips, mesh {mesh}",
        f"step      {p['pairs']} pairs as {p['micros']} micro-batches of {p['rows']} rows x "
        f"{p['row_length']} tokens",
        "GiB       " + ", ".join(f"{k} {v / GIB:.2f}" for k, v in b.items()) + f": {verdict}",
        f"FLOPs     {p['flops']['useful']:.3e} useful, {p['flops']['executed']:.3e} executed",
        *(f"{kind:<19} x {t['count']:>6}  {t['sent'] / 1e9:9.2f} GB sent a chip"
          for kind, t in sorted(p["collectives"].items())),
        "seconds   " + ", ".join(f"{k} {v:.3f}" for k, v in s.items() if k not in ("bound", "step"))
        + " at published rates",
        f"predicted {s['step']:.2f} s a step, bound by {s['bound']}; MFU {p['mfu']:.0%}",
    ]  # fmt: skip
    a = p["sampler"]
    for tensor, o in a["tensor"].items():
        lines.append(
            f"sampler   rollout.tensor={tensor}: weights {o['weights'] / GIB:.2f}, and a slot's "
            f"cache {a['slot'] / GIB:.2f} over {a['chips']} chips: {o['slots']} slots a process fit "
            f"(the recipe's: {a['slots']})"
        )
    return "\n".join(lines)


def main(given: Sequence[str] | None = None) -> int:
    """Plan and print; 2 for what cannot be planned, 1 for what does not fit."""
    options, rest = arguments(given)
    if options.table:
        from plan_table import table

        print(table(options.table), end="")
        return 0
    try:
        wanted = topology(options.topology, options.slices)
        prepare(wanted)
        from mdpo_jax import recipes
        from mdpo_jax.config import ConfigError

        try:
            config = recipes.parse(rest)
        except ConfigError as error:
            raise PlanError(str(error)) from None
        name, model = shape_of(options.model, config)
        if options.search:
            plans = [{**one, "note": options.note} for one in searched(config, model, wanted, name)]
        else:
            one, text = plan(setup(config, model, wanted), wanted, name, options.naive)
            plans = [{**one, "note": options.note}]
            if options.hlo:
                options.hlo.write_text(text)
    except PlanError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for one in plans:
        print(json.dumps(one) if options.json else report(one), flush=True)
        if options.append:
            with options.append.open("a") as file:
                file.write(json.dumps(one) + "\n")
    return 0 if plans[0]["fits"] else 1


if __name__ == "__main__":
    sys.exit(main())
