"""Run-time layouts: what a device holds of a model, one file each.

A layout takes parameters as files store them and puts containers in their place. A container multiplies, and names the
axes by which devices share it; modules (`modeling.linear`, `modeling.experts`) and `sharding` ask it and know no
layout.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from mimo_jax.config.drafter import DrafterConfig
from mimo_jax.config.model import ModelConfig
from mimo_jax.errors import UserError
from mimo_jax.layouts import dense, hopper, native, packed
from mimo_jax.weights import Params
from pallas_kernels.devices import on_hopper
from pallas_kernels.expert_matmul import BACKENDS

if TYPE_CHECKING:
    from jax.sharding import Mesh

# Layout -> what it is, in a few words.
LAYOUTS = {
    "packed": "packed, as in the files",
    "hopper": "packed, experts rearranged for the Hopper kernel",
    "persistent": "packed, rearranged for the persistent kernel of Hopper",
    "native": "packed, rearranged for the native step of CPUs",
    "dense": "expanded to float32",
}


def choose(mesh: Mesh | None, backend: str | None) -> str:
    """The layout for JAX's default device, or for a named backend of the experts."""
    if backend is not None and backend not in BACKENDS:
        raise UserError(f"experts: backend {backend!r} is unknown; known: {', '.join(BACKENDS)}")
    if backend == hopper.KERNEL or (backend is None and on_hopper()):
        return "hopper"
    if backend is None and mesh is None and jax.default_backend() == "cpu":
        return "native"
    return "packed"


def for_device(
    config: ModelConfig,
    params: Params,
    mesh: Mesh | None = None,
    layout: str | None = None,
    backend: str | None = None,
    consume: bool = False,
) -> tuple[str, ModelConfig, Params]:
    """The layout's name, and config and parameters ready to run.

    Parameters come as files store them, on the mesh if there is one. Without a name the device decides, or the
    `backend` that is to multiply the experts. `consume` lets the layout free what it was given.
    """
    name = choose(mesh, backend) if layout is None else layout
    if name not in LAYOUTS:
        raise UserError(f"layout {name!r} is unknown; known: {', '.join(LAYOUTS)}")
    if name == "persistent" and mesh is not None:
        raise UserError("layout 'persistent' is for one device; on a mesh 'hopper' serves")
    if name == "hopper" and (reason := hopper.reason_against(config, params, mesh)):
        if layout or backend:
            raise UserError(f"experts: backend {hopper.KERNEL!r} cannot serve this model: {reason}")
        name = "packed"
    if name == "native" and mesh is not None:
        raise UserError("layout 'native' is for one device; on a mesh weights stay packed")
    if name == "native" and (reason := native.reason_against(config)):
        if layout:
            raise UserError(f"layout 'native' cannot serve this model: {reason}")
        print(f"decoding by XLA, several times slower than natively: {reason}", file=sys.stderr)
        name = "dense"
    packers = {
        "packed": partial(packed.pack, backend=backend),
        "persistent": _persistent,
        "hopper": partial(hopper.pack, backend=backend, mesh=mesh, consume=consume),
        "native": native.pack,
        "dense": partial(dense.pack, mesh=mesh),
    }
    return name, *packers[name](config, params)


def _persistent(config: ModelConfig, params: Params) -> tuple[ModelConfig, Params]:
    from mimo_jax.layouts import persistent  # which imports Mosaic, and takes a second for it

    if reason := persistent.reason_against(config, params):
        raise UserError(f"layout 'persistent' cannot serve this model: {reason}")
    return persistent.for_device(config, params)


def abstract(layout: str, config: ModelConfig, params: Params, backend: str | None = None) -> Params:
    """What "packed" or "hopper" makes of a tree of shapes and dtypes, without shardings."""
    pack = {"packed": packed.pack, "hopper": hopper.pack}[layout]
    return jax.eval_shape(lambda tree: pack(config, tree, backend)[1], params)


def drafter_for_device(layout: str, config: DrafterConfig, params: Params) -> Params:
    """A drafter's parameters, which files store plainly, beside a target of this layout; activations as in `config`."""
    if layout == "native":
        return native.pack_drafter(config, params)
    return jax.tree.map(lambda leaf: jnp.asarray(leaf).astype(config.dtype), params)
