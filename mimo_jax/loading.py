"""`load`: a checkpoint directory of either kind becomes a model that is ready to generate."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from mimo_jax import layouts
from mimo_jax.checkpoint.audio_tokenizer import FOLDER as AUDIO_TOKENIZER
from mimo_jax.checkpoint.audio_tokenizer import has_audio_tokenizer, read_audio_tokenizer
from mimo_jax.checkpoint.files.tensorfile import load_json, read_bytes
from mimo_jax.checkpoint.huggingface import read_hf_config
from mimo_jax.checkpoint.manifest import verify_directory
from mimo_jax.checkpoint.read import read
from mimo_jax.config.drafter import DrafterConfig
from mimo_jax.config.model import MASTERS, MESH_BLOCK, ModelConfig
from mimo_jax.decode.drafter import PLAIN, Drafter, Weights
from mimo_jax.decode.loop import Decoder
from mimo_jax.decode.sampling import Greedy, Strategy, strategy_of
from mimo_jax.decode.step import FlaxStep, FusedStep
from mimo_jax.drafters.dflash import DFlashDrafter
from mimo_jax.drafters.fused_dflash import FusedDFlashDrafter
from mimo_jax.drafters.mtp import MtpDrafter
from mimo_jax.drafters.prompt_lookup import PromptLookupDrafter
from mimo_jax.errors import UserError, check_real
from mimo_jax.media.towers import Towers
from mimo_jax.sharding import check_fits, parameter_sharding, place
from mimo_jax.tokenizer import Tokenizer
from mimo_jax.weights import Params
from mimo_jax.weights.towers import TOWERS

_MAX_JSON_BYTES = 4_000_000
GENERATION_CONFIG = "generation_config.json"
BUNDLED = Path(__file__).parent / "assets" / "mimo-tiny"


@dataclasses.dataclass(frozen=True)
class Model:
    """Parameters with what is needed to use them: `decoder` runs `weights`; `stop_ids` end a text."""

    config: ModelConfig
    params: Params
    tokenizer: Tokenizer
    stop_ids: tuple[int, ...] = ()
    strategy: Strategy = Greedy()  # where a request names none
    layout: str = "dense"  # of `layouts.LAYOUTS`, that `params` are in
    drafter: Drafter = PLAIN
    draft_params: Params = dataclasses.field(default_factory=dict)
    towers: Towers | None = None  # in front of the text model
    rule: str = "block"  # that verifies sampled drafts, see `decode.verify.RULES`
    mesh: Mesh | None = None  # that `params` lie on; None: one device

    @property
    def decoder(self) -> Decoder:
        aux_layers = self.drafter.aux_layers
        if self.layout == "native":
            return Decoder(FusedStep(self.config, aux_layers), self.drafter, self.rule)
        if self.layout == "persistent":
            from mimo_jax.decode import persistent_step  # which imports Mosaic, and takes a second for it

            return Decoder(persistent_step.step_of(self.config, self.params, aux_layers), self.drafter, self.rule)
        return Decoder(FlaxStep(self.config, aux_layers, self.mesh), self.drafter, self.rule)

    @property
    def weights(self) -> Weights:
        return Weights(self.params, self.draft_params)


def load(
    directory: str | Path = BUNDLED,
    layout: str | None = None,
    draft: str | None = None,
    mesh: Mesh | None = None,
    backend: str | None = None,
    generation_config: bool = True,
    verify: bool = False,
    confidence: float | None = None,
) -> Model:
    """Reads a Hugging Face or an Orbax checkpoint directory, or a model that `find` knows by name.

    `layout` names what the device holds (`layouts.LAYOUTS`); by default the device decides, and weights stay packed
    into the kernels. `draft` names what drafts (`DRAFTS`); it never changes the distribution of what is generated. By
    default it is the drafter in the folder `dflash/`, if there is one, except beside the native step of a CPU, where a
    block costs more than it saves, and what was measured to pay with a model that has a name: what pays on a machine,
    `scripts/benchmark.py draft` measures. `confidence` is how far it must trust what it proposes
    (`with_confidence`). On a `mesh`
    (`sharding.make_mesh`) every device gets its own part of the weights. `backend` names what multiplies packed experts
    (`pallas_kernels.expert_matmul.BACKENDS`); by default that is the fastest that the device runs. What the
    checkpoint's `generation_config.json` says of sampling is the model's default strategy; without `generation_config`
    that is greedy. `verify` first reads every file and compares it with the manifest that conversions and exports
    write.
    """
    given, directory = directory, find(directory)
    if draft is not None and draft not in DRAFTS:
        raise UserError(f"draft {draft!r} is unknown; known: {', '.join(DRAFTS)}")
    if verify:
        verify_directory(directory)
    tokenizer = Tokenizer.load(directory / "tokenizer.json")
    if mesh is not None:
        check_fits(*read_hf_config(directory), mesh)
    found = read(directory, partial(parameter_sharding, mesh=mesh) if mesh is not None else None)
    if draft == "mtp" and layout is None and layouts.choose(mesh, backend) == "native":
        layout = "dense"  # the native step leaves MTP layers out
    own = {name: found.params[name] for name in TOWERS if name in found.params}
    text = {name: held for name, held in found.params.items() if name not in TOWERS}
    name, config, params = layouts.for_device(found.config, text, mesh, layout, backend, consume=True)
    towers = _towers(config, own, directory) if own else None
    values = _generation_config(directory)
    strategy = strategy_of(values, f"{directory / GENERATION_CONFIG}") if generation_config else Greedy()
    stop_ids = _stop_ids(values, config, directory)
    model = Model(config, params, tokenizer, stop_ids, strategy, name, towers=towers, mesh=mesh)
    if draft is None:
        draft = _usual_draft(given, name, directory)
    model = DRAFTS[draft](model, directory)
    return model if confidence is None else with_confidence(model, confidence)


def _towers(config: ModelConfig, params: Params, directory: Path) -> Towers:
    """With activations of the text model's dtype."""
    hears = config.audio is not None and has_audio_tokenizer(directory)
    return Towers(config, params, read_audio_tokenizer(directory / AUDIO_TOKENIZER) if hears else None)


def _usual_draft(given: str | Path, layout: str, directory: Path) -> str:
    from mimo_jax.checkpoint.dflash import has_drafter

    if not Path(given).is_dir():
        from mimo_jax.named import NAMED

        return NAMED[str(given)].draft
    return "dflash" if layout != "native" and has_drafter(directory) else "none"


def find(model: str | Path = BUNDLED) -> Path:
    """The checkpoint directory `model`; or of a model that has a name (`named`), converted where it has not
    been yet.
    """
    if Path(model).is_dir():
        return Path(model)
    from mimo_jax.named import NAMED, directory_of  # which can convert, and imports what that needs

    if str(model) in NAMED:
        return directory_of(str(model))
    raise UserError(f"{model}: not found; expected a checkpoint directory, or one of {', '.join(NAMED)}")


def _generation_config(directory: Path) -> dict[str, Any]:
    path = directory / GENERATION_CONFIG
    return load_json(read_bytes(path, _MAX_JSON_BYTES), str(path)) if path.exists() else {}


def _stop_ids(values: dict[str, Any], config: ModelConfig, directory: Path) -> tuple[int, ...]:
    found = values.get("eos_token_id")
    found = config.eos_token_id if found is None else found
    stop_ids = list(found) if isinstance(found, list | tuple) else [] if found is None else [found]
    if not all(type(token) is int and 0 <= token < config.vocab_size for token in stop_ids):
        raise UserError(f"{directory}: eos_token_id={stop_ids} must be token ids below {config.vocab_size}")
    return tuple(stop_ids)


def load_drafter(
    target: ModelConfig, directory: Path, layout: str = "dense", extras: bool = True
) -> tuple[DrafterConfig, Params]:
    """The drafter of a `dflash/` folder, which must fit the target, in the target's dtype and layout.

    Without `extras` it is what other engines read of it.
    """
    from mimo_jax.checkpoint.dflash import read_drafter

    config, params = read_drafter(directory, extras)
    config.check_fits(target)
    config = dataclasses.replace(config, dtype=target.dtype)
    return config, layouts.drafter_for_device(layout, config, params)


def with_drafter(
    model: Model, directory: Path, kind: Callable[[DrafterConfig], Drafter] = DFlashDrafter, extras: bool = True
) -> Model:
    """`model` drafting with the drafter of a `dflash/` folder; without `extras`, with what other engines read of it."""
    if model.layout == "native" and kind is not DFlashDrafter:
        raise UserError("drafter: the native step knows only blocks; load the model with layout='dense'")
    config, params = load_drafter(model.config, directory, model.layout, extras)
    if model.mesh is not None and config.block_size > MESH_BLOCK:
        raise UserError(f"drafter: block_size={config.block_size}; on a mesh blocks have at most {MESH_BLOCK} tokens")
    drafter = FusedDFlashDrafter(config, model.config) if model.layout == "native" else kind(config)
    return dataclasses.replace(model, drafter=drafter, draft_params=place(params, model.mesh))


def with_confidence(model: Model, confidence: float) -> Model:
    """`model` ending blocks where its drafter holds all up to there likely to less than this degree; 0: never."""
    check_real("draft", 0, 1, confidence=confidence)
    if not isinstance(model.drafter, DFlashDrafter | MtpDrafter):
        raise UserError(f"draft: confidence={confidence}, but only mtp and dflash know how likely their drafts are")
    return dataclasses.replace(model, drafter=dataclasses.replace(model.drafter, confidence=confidence))


def _with_lookup(model: Model, directory: Path) -> Model:
    return dataclasses.replace(model, drafter=PromptLookupDrafter())


def _with_mtp(model: Model, directory: Path) -> Model:
    if not model.config.mtp_layers:
        raise UserError(f"draft 'mtp': {directory} has no MTP layer")
    if model.layout == "native":
        raise UserError("draft 'mtp': the native step has no MTP layers; load the model with layout='dense'")
    return dataclasses.replace(model, drafter=MtpDrafter(model.config))


def _with_dflash(model: Model, directory: Path) -> Model:
    from mimo_jax.checkpoint.dflash import FOLDER, has_drafter

    if not has_drafter(directory):
        raise UserError(f"draft 'dflash': {directory} has no folder {FOLDER}/ with a drafter")
    return with_drafter(model, directory / FOLDER)


# What drafts for a model that has been loaded from a directory.
DRAFTS: dict[str, Callable[[Model, Path], Model]] = {
    "none": lambda model, directory: model,
    "lookup": _with_lookup,
    "mtp": _with_mtp,
    "dflash": _with_dflash,
}


def load_dense(directory: Path, dtype: str = "float32", mesh: Mesh | None = None) -> Model:
    """A checkpoint as training wants it: plain float32 arrays, activations of `dtype`."""
    model = load(directory, layout="dense", draft="none")
    if mesh is not None:
        check_fits(model.config, MASTERS, mesh)
    config = dataclasses.replace(model.config, dtype=dtype)
    return dataclasses.replace(model, config=config, params=place(model.params, mesh), mesh=mesh)
