"""What prompts have in common is read once.

A prompt is cut into chunks. A node of the tree is a chunk after those before it: what its tokens left in the caches
that grow, shared by all prompts that begin so. To go on from a node takes the rings, too, as they were at its end: that
makes it a checkpoint. Rings are kept where a prompt ends and where prompts were seen to part, not after every chunk: of
a large model they are as big as thousands of tokens.

Chunks are those that prefill reads anyway, so that a prompt which goes on from a checkpoint runs the same programs on
the same tokens as one that does not. Only where the bits of a token never depend on how tokens are grouped may a node
end inside a chunk.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from mimo_jax.serving import rows
from mimo_jax.serving.rows import Arrays, Axes, Caches


@dataclasses.dataclass(eq=False)
class _Node:
    tokens: tuple[int, ...]  # a chunk, or less
    parent: _Node | None
    piece: Arrays = ()
    rings: Arrays = ()
    children: dict[tuple[int, ...], _Node] = dataclasses.field(default_factory=dict)

    @property
    def bytes(self) -> int:
        return sum(array.nbytes for array in self.piece + self.rings)


@dataclasses.dataclass(frozen=True)
class Found:
    """Caches that have read the first `length` tokens of a prompt. At `worthwhile` lengths others are worth keeping."""

    caches: Caches
    length: int
    worthwhile: frozenset[int]


class PrefixCache:
    """At most `limit` bytes: what was not used for longest goes first. No account sees what another has left.

    One thread uses it.
    """

    def __init__(self, axes: Axes, chunk: int, limit: int) -> None:
        self.axes, self.chunk, self.limit, self.bytes = axes, chunk, limit, 0
        self._roots = dict[str, _Node]()
        self._order = OrderedDict[_Node, None]()  # the longest unused first; a node is used whenever one below it is

    def restore(self, account: str, prompt: Sequence[int], empty: Caches) -> Found:
        """Goes on from the deepest checkpoint, as far as one token is left to be read. `empty` caches are donated."""
        path, known = self._find(account, prompt[:-1])
        caches = empty
        for index, node in enumerate(path):
            caches = rows.put_piece(self.axes, caches, node.piece, np.int32(index * self.chunk))
        if path:
            caches = rows.put_fixed(self.axes, caches, path[-1].rings)
            self._use(path[-1])
        length = sum(len(node.tokens) for node in path)
        last = (len(prompt) - 1) // self.chunk * self.chunk
        return Found(caches, length, frozenset(place for place in (known, last) if place > length))

    def keep(self, account: str, tokens: Sequence[int], caches: Caches) -> None:
        """Makes a checkpoint of caches of one row that have read `tokens`, and nothing after them."""
        node = self._roots.setdefault(account, _Node((), None))
        for start in range(0, len(tokens), self.chunk):
            part = tuple(tokens[start : start + self.chunk])
            if part not in node.children:
                held = rows.piece(self.axes, caches, np.int32(start), self.chunk)
                self._add(_Node(part, node, held))
            node = node.children[part]
        if node.parent and not node.rings:
            node.rings = rows.fixed(self.axes, caches)
            self.bytes += sum(array.nbytes for array in node.rings)
        self._use(node)
        self._evict()

    def _find(self, account: str, tokens: Sequence[int]) -> tuple[list[_Node], int]:
        """The nodes down to the deepest checkpoint of what `tokens` begin with; how many of them whole chunks know."""
        path, found, node = list[_Node](), list[_Node](), self._roots.get(account)
        while node is not None:
            rest = tuple(tokens[len(path) * self.chunk : (len(path) + 1) * self.chunk])
            inside = [
                end for end in node.children.values() if self._is_end(end) and rest[: len(end.tokens)] == end.tokens
            ]
            if inside:
                found = [*path, max(inside, key=lambda end: len(end.tokens))]
            node = node.children.get(rest) if len(rest) == self.chunk else None
            if node is not None:
                path.append(node)
                found = [*path] if node.rings else found
        return found, len(path) * self.chunk

    def _is_end(self, node: _Node) -> bool:
        return len(node.tokens) < self.chunk and bool(node.rings)

    def _add(self, node: _Node) -> None:
        assert node.parent is not None
        node.parent.children[node.tokens] = node
        self._order[node] = None
        self.bytes += node.bytes

    def _use(self, node: _Node) -> None:
        while node.parent is not None:
            self._order.move_to_end(node)
            node = node.parent

    def _evict(self) -> None:
        while self.bytes > self.limit:
            node, _ = self._order.popitem(last=False)  # nothing is below it: that would have been used before it
            assert node.parent is not None
            del node.parent.children[node.tokens]
            self.bytes -= node.bytes
        self._roots = {account: root for account, root in self._roots.items() if root.children}
