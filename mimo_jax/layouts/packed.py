"""Weights as files store them: MXFP4 experts and FP8 matrices are multiplied packed, plain arrays stay plain.

Kernels serve where they can: experts by the fastest backend of the device or a named one, FP8 matrices by Triton on
GPUs. Elsewhere the plain references of `pallas_kernels` do.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Array, Float

from mimo_jax.config.model import ModelConfig
from mimo_jax.modeling.experts import EXPERT_AXES
from mimo_jax.modeling.linear import multiply_plain
from mimo_jax.sharding import MESH_AXES, Axes, current_mesh, parameter_axes, spec_of
from mimo_jax.weights import BlockFp8Tensor, MxTensor, Params, dequantize_fp8
from mimo_jax.weights.params import STACKS, is_moe, path_names, with_experts
from pallas_kernels.expert_matmul import HopperExperts, PackedExperts, expert_ffn, ffn_of
from pallas_kernels.fp8_matmul import BLOCK, choose, fp8_matmul

FEW_ROWS = 16  # the sums of 8 rows take an eighth of the bytes of expanded weights; those of 64 rows take as many


def pack(config: ModelConfig, params: Params, backend: str | None = None) -> tuple[ModelConfig, Params]:
    """Parameters of any file format, where they lie; `backend` multiplies MXFP4 experts (None: the fastest)."""

    def ready(path: Any, node: Any) -> Any:
        if is_moe(node):
            return _with_container(node, backend)
        if isinstance(node, BlockFp8Tensor):
            return PackedMatrix(node, parameter_axes(path_names(path)))
        return node

    def is_whole(node: Any) -> bool:
        return is_moe(node) or isinstance(node, BlockFp8Tensor)

    return config, jax.tree_util.tree_map_with_path(ready, params, is_leaf=is_whole)


def packed_experts(node: Params) -> PackedExperts:
    """The three MXFP4 stacks of a layer as kernels take them."""
    return PackedExperts(*((node[name].codes, node[name].scales) for name in STACKS))


def _with_container(node: Params, backend: str | None) -> Params:
    if "experts" in node:  # another layout has been here
        return node
    if isinstance(node["gate"], MxTensor):
        return with_experts(node, PackedStacks(packed_experts(node), backend))
    if isinstance(node["gate"], BlockFp8Tensor):
        return with_experts(node, Fp8Stacks(*(node[name] for name in STACKS)))
    return node


def _named(stacks: Any) -> Any:
    """The three stacks of a container with their axes in place of arrays; codes and scales lie alike."""
    axes = {name: jax.tree.map(lambda _, axes=EXPERT_AXES[name]: axes, getattr(stacks, name)) for name in STACKS}
    return dataclasses.replace(stacks, **axes)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedStacks:
    """MXFP4 experts, and the backend that multiplies them."""

    experts: PackedExperts | HopperExperts
    backend: str | None = dataclasses.field(metadata={"static": True})

    @property
    def count(self) -> int:
        return self.experts.sizes[0]

    def ffn(self, x_TD: Array, ids_TX: Array, weights_TX: Array) -> Array:
        return expert_ffn(x_TD, ids_TX, weights_TX, self.experts, backend=self.backend)

    def axes(self) -> PackedStacks:
        return dataclasses.replace(self, experts=_named(self.experts))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Fp8Stacks:
    """FP8 experts, for which there is no kernel: expanded as they are visited."""

    gate: BlockFp8Tensor
    up: BlockFp8Tensor
    down: BlockFp8Tensor

    @property
    def count(self) -> int:
        return self.gate.shape[0]

    def ffn(self, x_TD: Array, ids_TX: Array, weights_TX: Array) -> Array:
        def read(expert: Array) -> tuple[Array, ...]:
            return tuple(dequantize_fp8(stack[expert], x_TD.dtype) for stack in (self.gate, self.up, self.down))

        return ffn_of(read, self.count, x_TD, ids_TX, weights_TX)

    def axes(self) -> Fp8Stacks:
        return _named(self)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedMatrix:
    """An FP8 matrix, or the chunks of a fused projection, and the axes by which devices share it."""

    tensor: BlockFp8Tensor
    names: Axes = dataclasses.field(metadata={"static": True})

    def axes(self) -> PackedMatrix:
        return jax.tree.map(lambda _: self.names, self)

    def multiply(self, x: Float[Array, "*B I"]) -> Float[Array, "*B *O"]:
        """x W^T in float32: by a kernel where one serves, by sums of blocks for few rows, else expanded."""
        backend = choose(x, self.tensor.codes)
        if backend != "reference" and self._splits_between_blocks():
            return self.multiply_on_each_device(x, backend)
        if self.tensor.shape[-1] % BLOCK == 0 and x.size <= FEW_ROWS * x.shape[-1]:
            return _product(x, self.tensor, "reference")
        return multiply_plain(x, dequantize_fp8(self.tensor, x.dtype))

    def _splits_between_blocks(self) -> bool:
        """Whether columns come in whole blocks, and the mesh, if any, splits rows and columns only between blocks."""
        mesh, whole = current_mesh(), self.tensor.shape
        if mesh is None:
            return whole[-1] % BLOCK == 0
        part = NamedSharding(mesh, spec_of(self.names)).shard_shape(whole)
        return part[-1] % BLOCK == 0 and (part[-2] % BLOCK == 0 or part[-2] == whole[-2])

    def multiply_on_each_device(self, x: Float[Array, "B *T I"], backend: str) -> Float[Array, "B *T *O"]:
        """The product of what each device of the mesh holds; by hand, for the compiler cannot partition a kernel."""
        if current_mesh() is None:
            return _product(x, self.tensor, backend)
        *rows, cols = self.names

        def own(x: Array, tensor: BlockFp8Tensor) -> Array:
            y = _product(x, tensor, backend)
            return jax.lax.psum(y, MESH_AXES[cols]) if cols in MESH_AXES else y

        middle = (None,) * (x.ndim - 2)
        in_specs = (spec_of(("batch", *middle, cols)), spec_of(self.names))
        out_specs = spec_of(("batch", *middle, *rows))
        return jax.shard_map(own, in_specs=in_specs, out_specs=out_specs, check_vma=False)(x, self.tensor)


def _product(x: Float[Array, "*B I"], weights: BlockFp8Tensor, backend: str) -> Float[Array, "*B *O"]:
    codes_JOI, scales_Joi = (
        jnp.asarray(part).reshape(-1, *part.shape[-2:]) for part in (weights.codes, weights.scales)
    )
    y_TJO = fp8_matmul(x.reshape(-1, x.shape[-1]), codes_JOI, scales_Joi, backend=backend)
    return y_TJO.reshape(*x.shape[:-1], *weights.shape[:-1])
