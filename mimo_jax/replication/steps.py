"""The steps of a replication, in order; each takes the kit and gives a record of what it found.

The claim: MiMo-V2.5-Pro-UltraSpeed decodes more than 1,000 tokens per second on one node of eight GPUs, with 6.30
tokens per round on code and 4.29 on agents' work (Xiaomi, 2026-06-08; neither GPU nor context nor prompts are stated).
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import math
import platform
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mimo_jax.checkpoint.convert import verify
from mimo_jax.checkpoint.huggingface import open_checkpoint
from mimo_jax.checkpoint.manifest import MANIFEST
from mimo_jax.cli.memory import total_memory
from mimo_jax.cli.progress import progress
from mimo_jax.config.model import MASTERS
from mimo_jax.decode.sampling import Greedy
from mimo_jax.evaluation import domains
from mimo_jax.generation import generate
from mimo_jax.loading import DRAFTS, Model, load
from mimo_jax.modeling.backbone import Backbone
from mimo_jax.sharding import MeshShape, device_memory, make_mesh
from mimo_jax.weights.params import array_bytes, weights

Record = dict[str, Any]
TOLERANCE = 0.05  # of the largest logit: bfloat16 through many layers, see docs/checked.md
PACKAGES = ("jax", "jaxlib", "flax", "numpy", "jax-cuda13-plugin", "jax-triton", "mimo-ultraspeed-jax")


@dataclasses.dataclass(frozen=True)
class Kit:
    """A checkpoint, the devices that share it, and how much is to be measured."""

    directory: Path
    devices: int = 1
    prompts: int = 8  # of each domain
    tokens: int = 64  # after each prompt
    contexts: tuple[int, ...] = (1024, 8192, 131_072)
    repeats: int = 3

    @functools.cached_property
    def plain(self) -> Model:
        mesh = make_mesh(MeshShape(tensor=self.devices)) if self.devices > 1 else None
        return load(self.directory, draft="none", mesh=mesh)

    @functools.cached_property
    def drafted(self) -> Model:
        return DRAFTS["dflash"](self.plain, self.directory)

    @functools.cached_property
    def domains(self) -> domains.Domains:
        found = domains.read_domains(domains.PROMPTS, self.plain, self.directory)
        return {name: prompts[: self.prompts] for name, prompts in found.items()}


def environment(kit: Kit) -> Record:
    """Devices and versions."""
    devices = jax.devices()
    versions = {dist.name: dist.version for dist in importlib.metadata.distributions() if dist.name in PACKAGES}
    return {
        "device": devices[0].device_kind,
        "backend": jax.default_backend(),
        "devices found": len(devices),
        "devices used": kit.devices,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        **dict(sorted(versions.items())),
    }


def checkpoint(kit: Kit) -> Record:
    """Every byte against the manifest, where there is one; else names, shapes and sizes of all tensors."""
    if (kit.directory / MANIFEST).exists():
        return {"verified": "all files and tensors by SHA-256", **verify(kit.directory)}
    opened = open_checkpoint(kit.directory)
    return {"verified": "names, shapes and sizes of tensors", "layout": opened.describe(), "bytes": opened.nbytes}


def logits(kit: Kit) -> Record:
    """What the step says after a prompt, beside the modules in float32, where they fit into memory."""
    prompt = kit.domains["code"][0]
    needed = array_bytes(weights(kit.plain.config, MASTERS))
    if needed > (most := min(total_memory(), device_memory(make_mesh(MeshShape())) or total_memory())):
        return {"passed": None, "left out": f"in float32 it takes {needed / 1e9:,.0f} GB; {most / 1e9:,.0f} are there"}
    dense = load(kit.directory, layout="dense", draft="none")
    tokens = np.array([prompt], np.int32)
    exact = np.asarray(jax.jit(Backbone(dense.config).apply)({"params": dense.params}, tokens)[0])[0]
    step = kit.plain.decoder.step
    cache = step.init_cache(1, len(prompt) + 8)
    found, _, _ = jax.jit(step)(kit.plain.params, jnp.asarray(tokens), cache, jnp.array([len(prompt)]))
    error = float(np.max(np.abs(np.asarray(found)[0] - exact)) / np.max(np.abs(exact)))
    best = float(np.mean(np.argmax(np.asarray(found)[0], -1) == np.argmax(exact, -1)))
    return {"passed": error <= TOLERANCE, "largest error over largest logit": error, "same best token": best}


def lossless(kit: Kit) -> Record:
    """Greedy texts with the drafter and without: they must be the same, token for token."""
    prompts = [prompt for chosen in kit.domains.values() for prompt in chosen]
    models, same = (kit.plain, kit.drafted), 0
    with progress("drafted beside plain", len(prompts)) as bar:
        for prompt in prompts:
            one, other = (generate(model, prompt, Greedy(), max_tokens=kit.tokens) for model in models)
            same += one.tokens == other.tokens
            bar.advance()
    return {"passed": same == len(prompts), "same texts": same, "of": len(prompts)}


def acceptance(kit: Kit) -> Record:
    """Tokens per round by domain, greedy and at temperature 1, with the target's entropy."""
    # Native code has no logits of a whole text, which the entropy is of: there the modules draft.
    model = load(kit.directory, layout="dense", draft="dflash") if kit.plain.layout == "native" else kit.drafted
    return {"rows": list(domains.study(model, kit.domains, [0.0, 1.0], kit.tokens))}


def speed_by_domain(kit: Kit) -> Record:
    """Tokens per second of one text, plain and drafted in turn."""
    rows = []
    with progress("speed by domain", len(kit.domains)) as bar:
        for name, prompts in kit.domains.items():
            rows.append({"domain": name, **_rates(kit, prompts)})
            bar.advance()
    return {"rows": rows}


def speed_by_context(kit: Kit) -> Record:
    """The same behind long prompts: code, over and over."""
    rows, code = [], [token for prompt in kit.domains["code"] for token in prompt]
    with progress("speed by context", len(kit.contexts)) as bar:
        for length in kit.contexts:
            if length + kit.tokens > kit.plain.config.max_position:
                rows.append({"context": length, "left out": f"the model's is {kit.plain.config.max_position}"})
            else:
                prompt = (code * math.ceil(length / len(code)))[:length]
                rows.append({"context": length, **_rates(kit, [prompt] * kit.repeats)})
            bar.advance()
    return {"rows": rows}


def _rates(kit: Kit, prompts: list[list[int]]) -> Record:
    """Medians over prompts; the first compiles, and is run once more."""
    found: dict[str, list[float]] = {"plain": [], "drafted": []}
    for number, prompt in enumerate([prompts[0], *prompts]):
        for name, model in zip(found, (kit.plain, kit.drafted)):
            result = generate(model, prompt, Greedy(), max_tokens=kit.tokens)
            if number:
                found[name].append(result.timing.tokens_per_second)
    medians = {f"{name}, tokens per second": statistics.median(rates) for name, rates in found.items()}
    spread = {f"{name}, lowest and highest": [min(rates), max(rates)] for name, rates in found.items()}
    return medians | spread


STEPS: dict[str, Callable[[Kit], Record]] = {
    "environment": environment,
    "checkpoint": checkpoint,
    "logits": logits,
    "lossless": lossless,
    "acceptance": acceptance,
    "speed by domain": speed_by_domain,
    "speed by context": speed_by_context,
}


def run_steps(kit: Kit, done: dict[str, Record], save: Callable[[], None]) -> None:
    """Adds to `done` what is not in it yet; `save` is called after every step."""
    for name, step in STEPS.items():
        if name not in done:
            print(f"== {name}", file=sys.stderr, flush=True)
            done[name] = step(kit)
            save()


def claims(steps: dict[str, Record]) -> list[Record]:
    """What was published beside what was measured here; `reached` is None where a step is missing."""
    accepted = {row["domain"]: row for row in steps.get("acceptance", {}).get("rows", []) if not row["temperature"]}
    speeds = {row["domain"]: row for row in steps.get("speed by domain", {}).get("rows", [])}
    measured = [
        ("tokens per second, one text", 1000.0, speeds.get("code", {}).get("drafted, tokens per second")),
        ("tokens per round, code", 6.30, accepted.get("code", {}).get("tokens_per_round")),
        ("tokens per round, calls of tools", 4.29, accepted.get("tools", {}).get("tokens_per_round")),
    ]
    return [
        {"claim": name, "published": least, "measured": value, "reached": None if value is None else value >= least}
        for name, least, value in measured
    ]
