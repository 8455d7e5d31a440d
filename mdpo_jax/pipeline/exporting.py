"""From a run, a step of one, or any model that we read, to a Hugging Face folder."""

from __future__ import annotations

import dataclasses
import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp

from mdpo_jax import hosts, recipes
from mdpo_jax.config import Config, ConfigError, Mesh
from mdpo_jax.model import gemma_flax, hub, lora, sharding, weights
from mdpo_jax.model.families import ModelConfig, nest, weight_map
from mdpo_jax.model.policy import DTYPES, Policy, describe_policy, with_params
from mdpo_jax.pipeline import files, stages
from mdpo_jax.pipeline.context import Context
from mdpo_jax.pipeline.parameters import Adapters
from mdpo_jax.reporting.card import Card, legal_files, model_card
from mdpo_jax.training import checkpoint

# Copied as they are: writing them anew may change spellings that other readers depend on.
TOKENIZER_COPIES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "chat_template.jinja", "chat_template.json", "vocab.json", "merges.txt",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Step:
    """Parameters inside a run: `folder` holds them, `run` is the run's directory."""

    run: Path
    folder: Path

    @property
    def label(self) -> str:
        return str(self.folder.relative_to(self.run))

    @property
    def iteration(self) -> int:
        """0 for SFT."""
        head = self.folder.relative_to(self.run).parts[0]
        return int(head.removeprefix("iteration-")) if head.startswith("iteration-") else 0


Form = Literal["merged", "peft"]


def export(
    source: str,
    out: Path,
    iteration: int | None = None,
    dtype: str | None = None,
    form: Form | None = None,
) -> str:
    """Exports what `source` names; one line about what it was.

    source: a run's directory, a folder of parameters inside one, a model's folder, or a hub id.
    iteration: of a run, None for the chosen one.  dtype: None for what is stored.  form: of a LoRA
    run, None for merged.
    Raises ConfigError, CheckpointError, FileNotFoundError and FileExistsError, each in one line.
    """
    if out.exists():
        raise FileExistsError(f"{out}: exists already; expected a new folder")
    if form is not None:
        _check_adapter(source)
    step = find_step(source, iteration)
    if step is not None and form == "peft":
        export_adapter(step, out, dtype)
        return f"{step.label} of {step.run}"
    if step is not None:
        export_step(step, out, dtype)
        return f"{step.label} of {step.run}"
    export_model(source, out, dtype)
    return source


def _check_adapter(source: str) -> None:
    """ConfigError unless `source` is of a LoRA run."""
    path = Path(source).expanduser().absolute()
    run = next((p for p in (path, *path.parents) if is_run(p)), None)
    if run is None or not files.read_config(run).lora.rank:
        why = "is not of a run" if run is None else "config.lora.rank=0, every weight was trained"
        raise ConfigError(
            f"--checkpoint={source}: {why}; expected a LoRA run for --merge-lora and --peft"
        )


def find_step(source: str, iteration: int | None = None) -> Step | None:
    """The parameters that `source` means inside a run; None if it is a model of its own.

    Raises ConfigError for an iteration that is not there, or of what has none.
    """
    path = Path(source).expanduser()
    if is_run(path):
        return _step_of_run(path, iteration)
    if iteration is not None:
        raise ConfigError(f"--iteration={iteration}: {source} is not a run directory")
    run = next((p for p in path.absolute().parents if is_run(p)), None)
    if run is None or not path.is_dir() or (path / "config.json").exists():
        return None
    names = (stages.PARAMS, f"train/{stages.PARAMS}")
    for folder in (path, *(path / name for name in names)):
        if folder.name in (stages.PARAMS, stages.EARLIER) and folder.is_dir():
            return Step(run, folder.absolute())
    raise ConfigError(f"{path}: no parameters here; expected {' or '.join(names)} in it")


def _step_of_run(run: Path, iteration: int | None) -> Step:
    if iteration is None:
        results = run / "results.json"
        if not results.exists():
            raise ConfigError(
                f"--checkpoint={run}: has no results.json, so no iteration is "
                "chosen yet; expected a finished run, or --iteration"
            )
        iteration = files.read_json(results)["chosen_iteration"]
    stage = "sft" if iteration == 0 else f"iteration-{iteration}/train"
    folder = run.absolute() / stage / stages.PARAMS
    if not folder.is_dir():
        raise ConfigError(
            f"--iteration={iteration}: {run / stage} has no parameters; expected 0 (SFT) to "
            f"{files.read_config(run).last_iteration} of a run that got so far"
        )
    return Step(run.absolute(), folder)


def is_run(path: Path) -> bool:
    """A run's config.json has sections of ours; a model's has none of them."""
    try:
        fields = files.read_json(path / "config.json")
    except (OSError, ValueError):
        return False
    return isinstance(fields, dict) and {"method", "iterations", "train"} <= fields.keys()


def export_step(step: Step, out: Path, dtype: str | None = None) -> Path:
    """Writes a run's parameters, beside them what its base has, and a card."""
    config = files.read_config(step.run)
    base = config.model.path or step.run / "start" / "model"
    described = describe_policy(base)
    if config.lora.rank:
        context = _context(config, step.run)
        params = context.policy(context.load(step.folder)).params
    else:
        like = _abstract(described.config, config.model.param_dtype)
        params = checkpoint.load_params(step.folder, like)
    policy = dataclasses.replace(described, params=params)
    source = described.source if config.model.path else None
    text = model_card(_run_card(config, step, source))
    return policy.save(out, dtype, _also(described, text))


def export_adapter(step: Step, out: Path, dtype: str | None = None) -> Path:
    """A PEFT folder that names its base: `model.path`, or `RUN/base`, a fresh model's warm-up.

    Raises ConfigError for the base itself, and for a dtype: an adapter is kept as float32.
    """
    if dtype is not None:
        raise ConfigError(f"--dtype={dtype}: an adapter is kept as float32; leave it out")
    context = _context(files.read_config(step.run), step.run)
    kept = context.parameters
    assert isinstance(kept, Adapters)
    if not kept.source and step.folder == kept.warm.absolute():
        raise ConfigError(
            f"{step.folder}: is the base of the run's adapters; expected an iteration from 1"
        )
    adapters, base = kept.trainable(step.folder)
    folder = Path(kept.source).expanduser() if kept.source else step.run / "base"
    if not folder.exists() and not kept.source:
        context.policy(base).save(folder)
    named, revision = str(folder.absolute()), None
    if not folder.exists():
        named, revision = hub.split_id(str(kept.source)) or (str(kept.source), None)
    return lora.write_peft(out, adapters, kept.config, kept.adapter, named, revision)


def _context(config: Config, run: Path) -> Context:
    """On the devices at hand, which need not be those of the training."""
    return Context(dataclasses.replace(config, mesh=Mesh()), run)


def export_model(source: str, out: Path, dtype: str | None = None) -> Path:
    """Writes a model as it is: equal weights, each tensor's type kept unless `dtype` is given."""
    try:
        described = describe_policy(source)
    except (ValueError, FileNotFoundError) as error:
        if (Path(source) / "config.json").exists() or not Path(source).is_dir():
            raise
        raise ConfigError(f"{error}; {source} is not a run directory either") from None
    kinds = dtype or _stored(described)
    # float32 holds bfloat16 and float16 exactly.
    held = kinds if isinstance(kinds, str) else "float32"
    policy = with_params(described, held, _mesh())
    where = hub.split_id(source) if not Path(source).is_dir() else None
    base = where[0] if where else None
    summary = f"The weights of {base or 'a local model'}, written by mdpo_jax" + (
        f" as {dtype}." if dtype else ", unchanged."
    )
    card = Card(title=out.name, summary=summary, source=described.source, base=base)
    return policy.save(out, kinds, _also(described, model_card(card)))


def _stored(described: Policy) -> str | Mapping[str, Any]:
    """The type of all weights, or of each where they differ."""
    folder = described.source
    assert folder is not None
    if gemma_flax.weights_folder(folder) is not None:
        return gemma_flax.stored_dtype(folder)
    stored = weights.stored_dtypes(folder)
    names = {name for w in weight_map(described.config) for name in w.names(described.config)}
    kinds = {str(stored[name]) for name in names & stored.keys()}
    if "float64" in kinds:
        raise ConfigError(f"{folder}: stored as float64; expected --dtype with one of {DTYPES}")
    return kinds.pop() if len(kinds) == 1 else stored


def _mesh() -> jax.sharding.Mesh | None:
    """All devices: an export computes nothing, it only has to fit."""
    count = len(jax.devices())
    return sharding.make_mesh(fsdp=count) if count > 1 else None


def _abstract(config: ModelConfig, dtype: str) -> dict[str, Any]:
    mesh, kind = _mesh(), jnp.dtype(dtype)
    return nest(
        {
            w.path: jax.ShapeDtypeStruct(
                w.shape(config),
                kind,
                sharding=weights.place(w.logical_axes, w.shape(config), mesh),
            )
            for w in weight_map(config)
        }
    )


def _also(described: Policy, card: str) -> dict[str, str | Path]:
    """Files beside config and weights: the card, licences, and the tokenizer's as they are."""
    folder = described.source
    assert folder is not None
    kept = {name: folder / name for name in TOKENIZER_COPIES if (folder / name).is_file()}
    return {**kept, **legal_files(folder), "README.md": card}


def _run_card(config: Config, step: Step, source: Path | None) -> Card:
    results = step.run / "results.json"
    rows = files.read_json(results)["rows"] if results.exists() else []
    named = hub.split_id(config.model.path) if config.model.path else None
    base = named[0] if named and not Path(config.model.path or "").is_dir() else None
    what = f"iteration {step.iteration} of {config.method}" if step.iteration else "the SFT policy"
    return Card(
        title=f"{config.name}, {what}",
        summary=(
            f"A model of multi-turn, tool-integrated math: {what} of the recipe `{config.name}` "
            f"(seed {config.seed}), trained with mdpo_jax."
        ),
        source=source,
        base=base,
        recipe=[(flag.removeprefix("--config."), value) for flag, value in _settings(config)],
        rows=[row for row in rows if row["iteration"] in (0, step.iteration)],
        command=_command(config),
    )


def _settings(config: Config) -> list[tuple[str, str]]:
    """(flag, value) of every field but the run's place; of a local path only its last part."""
    out = []
    for flag, _, value in recipes.describe(config):
        local = value.strip("'").startswith(("/", "~", "."))
        out.append((flag, repr(Path(value.strip("'")).name) if local else value))
    return [(flag, value) for flag, value in out if flag != "--config.workdir"]


def _command(config: Config) -> str:
    """What makes the run anew: its recipe and the fields in which it differs from it."""
    name = config.name.removesuffix("-smoke")
    smoke = ["--smoke"] if name != config.name else []
    try:
        usual = dict(_settings(recipes.parse([f"--config={name}", *smoke])))
    except ConfigError:
        usual = {}
    flags = [
        shlex.quote(f"{flag}={_flag_value(value)}")
        for flag, value in _settings(config)
        if flag != "--config.name" and usual and usual.get(flag) != value
    ]
    return " ".join(["python -m mdpo_jax.train", f"--config={name}", *smoke, *flags])


def _flag_value(value: str) -> str:
    """As the command line takes it: `(1.0, 2.0)` is `1.0,2.0`."""
    return value.strip("()'").rstrip(",").replace(", ", ",").replace("None", "none")


def export_chosen(config: Config, results: dict[str, Any]) -> Path:
    """The chosen checkpoint in `DIR/export`, made once."""
    out = config.directory / "export"
    if hosts.by_first(lambda: not out.exists()):
        if hosts.first():
            shutil.rmtree(out.with_name("export.partial"), ignore_errors=True)
        export_step(_step_of_run(config.directory, results["chosen_iteration"]), out)
    return out
