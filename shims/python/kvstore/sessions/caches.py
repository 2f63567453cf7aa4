"""A transformers cache as pieces of KV, and back: bit for bit.

Layers that look back equally far are a group. A piece has, for each layer of its group, keys and then values, each of heads, tokens and
width. Layers with a window keep only the last tokens: a piece holds as many of its last tokens as its bytes say, and none before them
was needed any more when it was written.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

import kvstore

from .kinds import Piece

__all__ = ["Kv", "groups_of"]

# Of a piece, at most: the store's own bound.
_PIECE_BYTES = 8 << 20
# Of the pieces of one step: a commit has 64 MiB, and other sessions' steps go with it.
_STEP_BYTES = 16 << 20


def groups_of(model) -> list[tuple[int | None, list[int]]]:
    """Returns the groups of a model's layers: how many tokens they look back (None: all), and which they are.

    Raises Unsupported, naming them, for layers that keep anything else."""
    if model.config.is_encoder_decoder or model.config.get_text_config(decoder=True) is not model.config:
        raise kvstore.Unsupported(f"{type(model).__name__}: only models of text, with a decoder alone, keep sessions")
    groups: dict[int | None, list[int]] = {}
    for at, layer in enumerate(DynamicCache(config=model.config).layers):
        if type(layer) is DynamicLayer:
            groups.setdefault(None, []).append(at)
        elif type(layer) is DynamicSlidingWindowLayer and layer.sliding_window > 1:
            groups.setdefault(layer.sliding_window, []).append(at)
        else:
            raise kvstore.Unsupported(
                f"the model has layers of kind {type(layer).__name__}; sessions keep those that keep every token, and sliding windows"
            )
    if not groups:
        raise kvstore.Unsupported(f"{type(model).__name__} does not say which layers it has")
    return list(groups.items())


@dataclass(frozen=True)
class _Row:
    """A layer's KV of one token."""

    heads: int
    key_width: int
    value_width: int


class Kv:
    """The cache of one session, and how much of it went to its log."""

    def __init__(self, model):
        self._groups = groups_of(model)
        self._config = model.config
        self._device = model.device
        self.cache = DynamicCache(config=model.config)
        self._ends = [0] * len(self._groups)
        self._rows: list[_Row] = []
        self._dtype: torch.dtype = model.dtype

    @property
    def groups(self) -> int:
        """How many groups its layers are."""
        return len(self._groups)

    @property
    def tokens(self) -> int:
        """Tokens whose KV the cache has."""
        return self.cache.get_seq_length()

    @property
    def sent(self) -> int:
        """Tokens whose KV went to the log, or is about to."""
        return min(self._ends)

    def layout(self) -> str:
        """Returns how the pieces are made, as a text: of the layers as they are after the first tokens."""
        self._look()
        runs: list[list[int]] = []
        for row in self._rows:
            if runs and runs[-1][1:] == [row.heads, row.key_width, row.value_width]:
                runs[-1][0] += 1
            else:
                runs.append([1, row.heads, row.key_width, row.value_width])
        windows = [window for window, _ in self._groups]
        return json.dumps(dict(dtype=str(self._dtype).removeprefix("torch."), windows=windows, layers=runs))

    def _look(self) -> None:
        if self._rows:
            return
        layers = self.cache.layers
        self._dtype = layers[0].keys.dtype
        if any(tensor.dtype != self._dtype for layer in layers for tensor in (layer.keys, layer.values)):
            raise kvstore.Unsupported("the model's layers have KV of different types")
        self._rows = [_Row(layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3]) for layer in layers]

    def _token_bytes(self, group: int) -> int:
        rows = (self._rows[at] for at in self._groups[group][1])
        return sum(row.heads * (row.key_width + row.value_width) for row in rows) * self._dtype.itemsize

    # ---------------------------------------------------------------- to a log

    def went(self, tokens: int) -> None:
        """Says that the log has the KV of so many tokens: what is behind them goes again."""
        self._ends = [tokens] * len(self._ends)

    def steps(self) -> Iterator[tuple[list[Piece], int]]:
        """Yields the pieces that the log lacks, as many at a time as fit into one step, and with each how many tokens' KV the log has
        then. At least one."""
        self._look()
        tokens, most = self.tokens, _PIECE_BYTES // sum(self._token_bytes(group) for group in range(self.groups))
        if most == 0:
            raise kvstore.Unsupported(f"the KV of one token has more than {_PIECE_BYTES} bytes")
        pieces: list[Piece] = []
        size = 0
        while self.sent < tokens:
            end = min(tokens, max(self.sent, self._first()) + most)
            for group in range(self.groups):
                if self._ends[group] < end:
                    pieces.append(self._piece(group, end))
                    size += pieces[-1].data.nbytes
            if size > _STEP_BYTES - _PIECE_BYTES and self.sent < tokens:
                yield pieces, self.sent
                pieces, size = [], 0
        yield pieces, self.sent

    def _first(self) -> int:
        """The first token that any layer still keeps."""
        return self.tokens - max(layer.keys.shape[2] for layer in self.cache.layers)

    def _piece(self, group: int, end: int) -> Piece:
        """KV of a group from where the log's ends. Where a window has passed over all of it, one token stands for the rest: the piece
        must have bytes, and what they are nobody reads."""
        start, parts = self._ends[group], []
        for at in self._groups[group][1]:
            for tensor in (self.cache.layers[at].keys, self.cache.layers[at].values):
                before = self.tokens - tensor.shape[2]
                first, last = max(start - before, 0), end - before
                part = tensor[0, :, first:last] if last > first else tensor[0, :, :1]
                parts.append(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        self._ends[group] = end
        return Piece(start, end - start, numpy.concatenate(parts), group)

    # ---------------------------------------------------------------- from a log

    def restore(self, layout: str, pieces: Sequence[Piece], tokens: int) -> None:
        """Fills the cache with the KV of the first ``tokens`` tokens. Raises DataLoss if the pieces do not hold it."""
        made = json.loads(layout)
        self._dtype = getattr(torch, made["dtype"])
        self._rows = [_Row(*row) for count, *row in made["layers"] for _ in range(count)]
        if made["windows"] != [window for window, _ in self._groups] or len(self._rows) != len(self.cache.layers):
            raise kvstore.Invalid("the session's KV is of layers that this model has not")
        for group, (window, layers) in enumerate(self._groups):
            own = sorted((piece for piece in pieces if piece.group == group), key=lambda piece: piece.start)
            self._restore_group(group, own, tokens, tokens if window is None else min(tokens, window - 1))
            for at in layers:
                if window is not None:
                    self.cache.layers[at].cumulative_length = tokens
        self.went(tokens)

    def _restore_group(self, group: int, pieces: list[Piece], tokens: int, kept: int) -> None:
        size = self._token_bytes(group)
        parts: dict[int, tuple[list, list]] = {at: ([], []) for at in self._groups[group][1]}
        at_token = tokens - kept
        for number, piece in enumerate(pieces):
            # A piece that comes behind another, and begins within it, is in force from there on.
            behind = pieces[number + 1].start if number + 1 < len(pieces) else tokens
            end, whole = min(piece.start + piece.tokens, behind, tokens), piece.start + piece.tokens
            held, odd = divmod(len(piece.data), size)
            first = whole - held
            if odd:
                raise kvstore.DataLoss(f"a piece of {len(piece.data)} bytes does not hold whole tokens of {size} bytes")
            if end <= at_token:
                continue
            if first > at_token:
                break
            for at, keys, values in self._split(group, piece.data, held):
                parts[at][0].append(keys[:, at_token - first : end - first])
                parts[at][1].append(values[:, at_token - first : end - first])
            at_token = end
        if at_token != tokens:
            raise kvstore.DataLoss(f"the session's pieces do not hold the KV of token {at_token}")
        for at, (keys, values) in parts.items():
            both = (torch.cat(part, dim=1).unsqueeze(0).to(self._device) for part in (keys, values))
            self.cache.update(*both, at)

    def _split(self, group: int, data: bytes, held: int) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        flat, at_value = torch.frombuffer(bytearray(data), dtype=self._dtype), 0
        for at in self._groups[group][1]:
            row, both = self._rows[at], []
            for width in (row.key_width, row.value_width):
                size = row.heads * held * width
                both.append(flat[at_value : at_value + size].reshape(row.heads, held, width))
                at_value += size
            yield at, both[0], both[1]
