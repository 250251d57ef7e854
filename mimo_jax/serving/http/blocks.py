"""A reply as a row of blocks: thinking, texts and calls, each whole before the next begins."""

from __future__ import annotations

import dataclasses
import secrets
from typing import Literal, NamedTuple

from mimo_jax.serving.dialect import Part, Piece


@dataclasses.dataclass
class Block:
    """Its text is what was thought or answered or, of a call, the arguments."""

    index: int
    part: Part  # THINKING, ANSWER or, of a call, NAME
    call: int
    name: str  # of the function that is called
    id: str = dataclasses.field(default_factory=lambda: secrets.token_hex(12))
    texts: list[str] = dataclasses.field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(self.texts)


class Change(NamedTuple):
    kind: Literal["begin", "delta", "end"]
    block: Block
    text: str = ""  # of a delta


class Blocks:
    """The blocks of one choice as they grow."""

    def __init__(self) -> None:
        self.all: list[Block] = []

    def add(self, piece: Piece) -> list[Change]:
        changes = []
        if not self._continues(piece):
            name = piece.text if piece.part == Part.NAME else ""
            begun = Block(len(self.all), piece.part, piece.call, name)  # and stays without a text
            changes = [*self.close(), Change("begin", begun)]
            self.all.append(dataclasses.replace(begun, texts=[]))
        if piece.part != Part.NAME:
            self.all[-1].texts.append(piece.text)
            changes.append(Change("delta", self.all[-1], piece.text))
        return changes

    def close(self) -> list[Change]:
        """The last block has ended."""
        return [Change("end", block) for block in self.all[-1:]]

    def _continues(self, piece: Piece) -> bool:
        if not self.all or piece.part == Part.NAME:
            return False
        part = Part.NAME if piece.part == Part.ARGUMENTS else piece.part
        return (part, piece.call) == (self.all[-1].part, self.all[-1].call)
