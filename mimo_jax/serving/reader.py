"""A prompt being read, a chunk at a time, from where the prefix cache leaves off."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from mimo_jax.decode import loop
from mimo_jax.decode.controls import Controls
from mimo_jax.decode.drafter import Weights
from mimo_jax.decode.loop import Decoder, State
from mimo_jax.media.prompt import padded
from mimo_jax.serving.prefix_cache import PrefixCache
from mimo_jax.serving.requests import TokenRequest


class Reader:
    """Reads like `generate` does: the same chunks, the same programs."""

    def __init__(
        self,
        decoder: Decoder,
        weights: Weights,
        capacity: int,
        request: TokenRequest,
        cache: PrefixCache | None = None,
    ) -> None:
        self._decoder, self._cache, self._account = decoder, cache, request.account
        self.prompt, self.length, self._worthwhile = request.prompt, 0, frozenset[int]()
        self._weights, self._known = weights, request.known
        if request.media is not None:
            self._weights = loop.with_media(weights, padded(request.media.rows_RD))
        *caches, self._logits = loop.empty_caches(self._decoder, 1, capacity)
        self._caches = (caches[0], caches[1])
        if cache is not None:
            found = cache.restore(self._account, self._known, self._caches)
            self._caches, self.length, self._worthwhile = found.caches, found.length, found.worthwhile
        self.cached = self.length

    @property
    def left(self) -> int:
        """Tokens to be read."""
        return len(self.prompt) - self.length

    def read(self) -> None:
        """The next chunk. A first one ends where others would, too."""
        buckets = self._decoder.step.prefill_buckets
        count = min(self.left, buckets[-1] - self.length % buckets[-1])
        tokens = np.zeros((1, next(size for size in buckets if size >= count)), np.int32)
        tokens[0, :count] = self.prompt[self.length : self.length + count]
        caches = (*self._caches, self._logits)
        *read, self._logits = loop.read_chunk(self._decoder, self._weights, tokens, np.array([count], np.int32), caches)
        self._caches = tuple(jax.block_until_ready(read))  # else what it takes is part of the decoding after it
        self.length += count
        is_end = not self.left and self._decoder.step.groups_freely  # where the answer to it begins
        if self._cache is not None and (is_end or self.length in self._worthwhile):
            self._cache.keep(self._account, self._known[: self.length], self._caches)

    def start(
        self, seed: int, limit: int, controls: Controls, masks_BW: np.ndarray | None, most_logprobs: int | None
    ) -> State:
        """The state of one row after its first token; of a prompt that was read, any number of rows may start."""
        cache, draft_cache = jax.tree.map(jnp.copy, self._caches)  # a start takes them
        limits, keys = np.array([limit], np.int32), loop.row_keys([seed])
        return loop.start(
            self._decoder, cache, draft_cache, self._logits, limits, keys, controls, masks_BW, most_logprobs
        )
