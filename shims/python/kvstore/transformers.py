"""kvstore under transformers: `generate` reuses prefixes, and a generation continues in another process at the next token.

.. code-block:: python

    model = AutoModelForCausalLM.from_pretrained(...)
    attached = kvstore.transformers.attach(model)
    output = model.generate(input_ids, max_new_tokens=100)      # reads and stores blocks of its prefix
    attached.save_state("chat 7", output)                       # later, anywhere that reaches the daemon:
    state = attached.load_state("chat 7")
    model.generate(**state.inputs(), max_new_tokens=100)

A call for one sequence with a plain growing cache reuses prefixes. Other calls (batches, beams, caches that the caller passes)
run as without kvstore. A miss, a failure or a daemon that is away means that the model computes, as without kvstore.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import struct
import time
from dataclasses import dataclass

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.generation import GenerateDecoderOnlyOutput

import kvstore
from kvstore import weights

__all__ = ["Attached", "State", "attach"]

logger = logging.getLogger("kvstore.transformers")

# A daemon that was away is left alone so long.
AWAY_SECONDS = 1.0
# Of a saved state beside its last, unfinished block: tokens and the generators' states.
STATE_BYTES = 1 << 20
# The same of a long session: two million tokens. Each takes a slot of this size in the daemon's memory, so short ones do not.
LONG_STATE_BYTES = 16 << 20
_STATE_VERSION = 1
# What `generate` calls a cache, in its arguments and its output: "cache" since 5.24. Releases that know a newer name take the
# older ones, too, so a cache of the caller's own can come under each of them.
_CACHE_NAMES = ("cache", "past_key_values", "cache_params")
_FIELDS = getattr(GenerateDecoderOnlyOutput, "__dataclass_fields__", {})
_CACHE = next((name for name in _CACHE_NAMES if name in _FIELDS), "past_key_values")
# Of a configuration, what does not change what is computed.
_SAYS_NOTHING = {"_name_or_path", "name_or_path", "transformers_version", "architectures"}


def attach(
    model,
    address: str | None = None,
    *,
    plane: str = "auto",
    block_tokens: int = 32,
    level: str = "memory",
    weights_version: str = "",
    deadline: float = 10.0,
) -> Attached:
    """Makes `model.generate` reuse prefixes, until :meth:`Attached.detach`.

    ``block_tokens``: tokens of a block; only whole blocks are reused. ``level``: "memory", or "local" (on this node's disk,
    synced, before `generate` returns). ``weights_version``: names weights that have changed since they were loaded, or whose
    files are not on this machine. ``deadline``: seconds after which a call to the daemon is given up.

    Raises Unsupported if the model's layers do not keep every token (sliding windows, states), and Invalid if an argument is
    wrong.

    The weights are hashed here once, at some gigabytes a second. After you train the model further, detach and attach again.
    """
    return Attached(model, address, plane, block_tokens, level, weights_version, deadline)


@dataclass
class State:
    """A generation that can continue. ``tokens``: the prompt and the generated tokens. ``cache``: the cache of all but the last
    token."""

    tokens: list[int]
    cache: DynamicCache
    generators: dict[str, bytes]
    device: torch.device

    def inputs(self, generators: bool = True) -> dict:
        """Returns the arguments from which `generate` continues; pass its other arguments as before. Resets the random generators
        to the saved states, so that sampling continues exactly as it would have, unless `generators` is False."""
        if generators:
            for name, state in self.generators.items():
                saved = torch.frombuffer(bytearray(state), dtype=torch.uint8)
                if name == "cpu":
                    torch.set_rng_state(saved)
                elif torch.cuda.is_available():
                    torch.cuda.set_rng_state(saved, name)
        input_ids = torch.tensor([self.tokens], device=self.device)
        return dict(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), **{_CACHE: self.cache})


class Attached:
    """A model whose `generate` reuses prefixes: see :func:`attach`. ``reused_tokens`` and ``stored_blocks`` count what was
    reused and stored so far."""

    def __init__(self, model, address, plane, block_tokens, level, weights_version, deadline):
        if level not in ("memory", "local"):
            raise kvstore.Invalid(f'level: {level!r} is not valid; use "memory" or "local"')
        if not 1 <= block_tokens <= 4096:
            raise kvstore.Invalid(f"block_tokens: {block_tokens} is not valid; use 1 to 4096")
        config = model.config.get_text_config(decoder=True)
        layers = DynamicCache(config=model.config).layers
        kinds = {type(layer).__name__ for layer in layers if type(layer) is not DynamicLayer}
        if kinds or not layers or model.config.is_encoder_decoder:
            raise kvstore.Unsupported(
                f"the model has layers of kind {', '.join(sorted(kinds)) or 'unknown'}; only layers that keep every token work"
            )
        self._model, self._address, self._plane, self._deadline = model, address, plane, deadline
        self._tokens, self._level = block_tokens, level
        self._layers = len(layers)
        self._heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        self._width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self._dtype = model.dtype
        self._weights = _name_weights(model, weights_version)
        self._group: kvstore.Group | None = None
        self._states: kvstore.Group | None = None
        self._long_states = None
        self._away_until = 0.0
        self._said = False
        self._stored: set[bytes] = set()
        self.reused_tokens = 0
        self.stored_blocks = 0
        self._original = model.generate
        model.generate = self._generate

    def detach(self) -> None:
        """Restores the model's own `generate`."""
        if self._model.__dict__.get("generate") == self._generate:
            del self._model.generate

    # ---------------------------------------------------------------- generate

    def _generate(self, *args, **kwargs):
        tokens = self._eligible(args, kwargs)
        if tokens is None:
            return self._original(*args, **kwargs)
        asked = kwargs.get("return_dict_in_generate")
        config = kwargs.get("generation_config") or self._model.generation_config
        asked = config.return_dict_in_generate if asked is None else asked
        # The last token is computed, whatever is stored: its output is the next one.
        cache = self._load(tokens, (len(tokens) - 1) // self._tokens)
        self.reused_tokens += cache.get_seq_length()
        kwargs = {name: value for name, value in kwargs.items() if name not in _CACHE_NAMES}
        output = self._original(*args, **{**kwargs, _CACHE: cache, "return_dict_in_generate": True})
        self._save(output.sequences[0].tolist(), getattr(output, _CACHE))
        return output if asked else output.sequences

    def _eligible(self, args, kwargs) -> list[int] | None:
        """Returns the tokens of a call that can reuse a prefix, or None."""
        inputs = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids"))
        config = kwargs.get("generation_config") or self._model.generation_config
        mask = kwargs.get("attention_mask")
        own = (*_CACHE_NAMES, "inputs_embeds", "assistant_model", "prompt_lookup_num_tokens", "cache_implementation")
        said = lambda name, default: kwargs.get(name, getattr(config, name, None)) or default
        if (
            not isinstance(inputs, torch.Tensor)
            or inputs.dim() != 2
            or inputs.shape[0] != 1
            or inputs.is_floating_point()
            or len(args) > 1
            or any(kwargs.get(name) is not None for name in own)
            or getattr(config, "cache_implementation", None) is not None
            or kwargs.get("use_cache", getattr(config, "use_cache", True)) is False
            or said("num_beams", 1) != 1
            or said("num_return_sequences", 1) != 1
            or (mask is not None and not bool(mask.all()))
        ):
            return None
        return inputs[0].tolist()

    # ---------------------------------------------------------------- blocks

    @property
    def _block_bytes(self) -> int:
        return self._layers * 2 * self._heads * self._tokens * self._width * self._dtype.itemsize

    def _names(self, tokens: list[int], blocks: int) -> list[bytes]:
        name, names = b"", []
        for at in range(blocks):
            block = tokens[at * self._tokens : (at + 1) * self._tokens]
            name = hashlib.sha256(name + struct.pack(f"<{len(block)}I", *block)).digest()
            names.append(name)
        return names

    def _pages(self, tensors: list[torch.Tensor], blocks: int) -> kvstore.Pages:
        """Returns the pages of contiguous CPU tensors of (1, heads, tokens, width): each layer's keys and values."""
        page = self._tokens * self._width * self._dtype.itemsize
        regions = []
        for tensor in tensors:
            flat = tensor.reshape(-1).view(torch.uint8).numpy()
            row = tensor.shape[2] * self._width * self._dtype.itemsize
            regions += [(flat, head * row, page, page) for head in range(self._heads)]
        return kvstore.Pages(regions, blocks)

    def _load(self, tokens: list[int], blocks: int) -> DynamicCache:
        """Returns the leading blocks that are stored, as a cache. The cache is empty if there are none."""
        cache = DynamicCache(config=self._model.config)
        groups = self._groups() if blocks > 0 else None
        if groups is None:
            return cache
        names = self._names(tokens, blocks)
        with self._failing():
            found = groups[0].lookup(names)
            # What has left the store is stored again.
            self._stored.difference_update(names[found:])
            if found:
                shape = (1, self._heads, found * self._tokens, self._width)
                tensors = [torch.empty(shape, dtype=self._dtype) for _ in range(2 * self._layers)]
                loaded = groups[0].get_pages(names[:found], self._pages(tensors, found), list(range(found)))
                kept = loaded * self._tokens
                for layer in range(self._layers if loaded else 0):
                    keys, values = (tensor[:, :, :kept].to(self._model.device) for tensor in tensors[2 * layer : 2 * layer + 2])
                    cache.update(keys, values, layer)
                self._stored.update(names[:loaded])
        return cache

    def _tensors(self, cache: DynamicCache, blocks: int) -> list[torch.Tensor] | None:
        """Returns keys and values in CPU memory, up to a whole number of blocks, or None if they are not as expected."""
        tensors = []
        for layer in cache.layers:
            for tensor in (layer.keys, layer.values):
                expected = (1, self._heads, self._width)
                if (tensor.shape[0], tensor.shape[1], tensor.shape[3]) != expected or tensor.dtype != self._dtype:
                    logger.warning(
                        "kvstore: a cache of shape %s and dtype %s does not fit the model, so it is not stored",
                        tuple(tensor.shape),
                        tensor.dtype,
                    )
                    return None
                tensors.append(tensor[:, :, : blocks * self._tokens].detach().cpu().contiguous())
        return tensors if len(tensors) == 2 * self._layers else None

    def _save(self, tokens: list[int], cache) -> bool:
        """Stores the whole blocks of a generation that are not known to be stored. Returns True if all of them are stored."""
        if not isinstance(cache, DynamicCache):
            return False
        blocks = min(cache.get_seq_length(), len(tokens)) // self._tokens
        names = self._names(tokens, blocks)
        first = next((at for at, name in enumerate(names) if name not in self._stored), blocks)
        if first == blocks:
            return True
        groups = self._groups()
        tensors = self._tensors(cache, blocks) if groups else None
        if tensors is None:
            return False
        with self._failing():
            parent = names[first - 1] if first else None
            results = groups[0].put_pages(
                names[first:], self._pages(tensors, blocks), list(range(first, blocks)), parent=parent, level=self._level
            )
            kept = [name for name, result in zip(names[first:], results) if result.status not in ("busy", "superseded")]
            self.stored_blocks += sum(result.status == "stored" for result in results)
            if len(self._stored) > 1 << 16:
                self._stored.clear()
            self._stored.update(kept)
            return len(kept) == blocks - first
        return False

    # ---------------------------------------------------------------- states

    def save_state(self, name: str, output) -> None:
        """Stores everything that a generation needs to continue: its tokens, its cache with the last, unfinished block, and the
        states of the random generators. ``output``: the output of `generate(..., return_dict_in_generate=True)` for one sequence.

        Raises kvstore.Error if the state could not be stored, and Invalid if the output cannot be continued.
        """
        cache = getattr(output, _CACHE, None)
        if not isinstance(cache, DynamicCache) or output.sequences.shape[0] != 1:
            raise kvstore.Invalid("output: give the output of generate(..., return_dict_in_generate=True) for one sequence")
        tokens, length = output.sequences[0].tolist(), cache.get_seq_length()
        blocks = length // self._tokens
        groups = self._groups()
        if groups is None:
            raise kvstore.Unavailable("no daemon answered a moment ago; try again in a second")
        # What is on its way out of memory would leave a state without its blocks: all are put again, which costs nothing
        # where they are there.
        self._stored.difference_update(self._names(tokens, blocks))
        if blocks and not self._save(tokens, cache):
            raise kvstore.Busy("the cache could not be stored; try again")
        tail = [
            tensor[:, :, blocks * self._tokens :].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            for layer in cache.layers
            for tensor in (layer.keys, layer.values)
        ]
        generators = {"cpu": torch.get_rng_state().numpy().tobytes()}
        if torch.cuda.is_available():
            generators[str(self._model.device)] = torch.cuda.get_rng_state(self._model.device).numpy().tobytes()
        header = dict(
            version=_STATE_VERSION,
            tokens=tokens,
            length=length,
            tail=[len(part) for part in tail],
            generators={key: value.hex() for key, value in generators.items()},
        )
        encoded = json.dumps(header, separators=(",", ":")).encode()
        state = struct.pack("<Q", len(encoded)) + encoded + b"".join(tail)
        by_size = self._state_groups(groups[1])
        into = next((one for one in by_size if len(state) <= one.block_bytes), None)
        if into is None:
            raise kvstore.Invalid(
                f"output: it has too many tokens: its state of {len(state)} bytes is larger than {by_size[-1].block_bytes}"
            )
        # A name stands for what was saved under it last.
        for one in by_size:
            one.delete([_state_name(name)])
        (result,) = into.put_from([_state_name(name)], [state], level=self._level)
        if result.status not in ("stored", "joined"):
            raise kvstore.Busy(f"the state was not stored ({result.status}); try again")

    def load_state(self, name: str) -> State | None:
        """Returns what :meth:`save_state` stored, in this or another process. Returns None if the state or one of its blocks is
        no longer stored."""
        groups = self._groups()
        if groups is None:
            raise kvstore.Unavailable("no daemon answered a moment ago; try again in a second")
        found = (one.get([_state_name(name)]) for one in self._state_groups(groups[1]))
        state = next((blocks[0] for blocks in found if blocks), None)
        if state is None:
            return None
        (length,) = struct.unpack_from("<Q", state)
        header = json.loads(state[8 : 8 + length])
        if header["version"] != _STATE_VERSION:
            raise kvstore.Unsupported(f"{name}: the state has version {header['version']}; this build reads {_STATE_VERSION}")
        tokens, whole = header["tokens"], header["length"] // self._tokens
        cache = self._load(tokens, whole)
        if cache.get_seq_length() != whole * self._tokens:
            return None
        at, parts = 8 + length, []
        for size in header["tail"]:
            part = torch.frombuffer(bytearray(state[at : at + size]), dtype=torch.uint8) if size else None
            parts.append(part if part is None else part.view(self._dtype).reshape(1, self._heads, -1, self._width))
            at += size
        for layer in range(self._layers):
            keys, values = parts[2 * layer], parts[2 * layer + 1]
            if keys is not None:
                cache.update(keys.to(self._model.device), values.to(self._model.device), layer)
        generators = {key: bytes.fromhex(value) for key, value in header["generators"].items()}
        return State(tokens, cache, generators, self._model.device)

    # ---------------------------------------------------------------- the daemon

    def _groups(self) -> tuple[kvstore.Group, kvstore.Group] | None:
        if self._group is None and time.monotonic() >= self._away_until:
            with self._failing():
                client = kvstore.Client(self._address, plane=self._plane, deadline=self._deadline)
                config = self._model.config
                name = (config.name_or_path.rstrip("/").rsplit("/", 1)[-1] or config.model_type).encode()[-64:]
                common = dict(
                    dtype=str(self._dtype).removeprefix("torch."), block_tokens=self._tokens, weights_digest=self._weights
                )
                blocks = kvstore.LayerGroup(
                    layers=self._layers,
                    planes=2,
                    heads=self._heads,
                    head_bytes=self._width * self._dtype.itemsize,
                    order="layer_plane_head_token",
                )

                def states(room: int) -> kvstore.Group:
                    size = self._block_bytes + room
                    state = kvstore.LayerGroup(layers=1, planes=1, heads=1, head_bytes=size, kind="recurrent_state")
                    return client.register_layout(name, groups=[state], extra=b"transformers state 1", **common).group()

                made = client.register_layout(name, groups=[blocks], extra=b"transformers 1", **common).group()
                self._group, self._states, self._said = made, states(STATE_BYTES), False
                self._long_states = lambda: states(LONG_STATE_BYTES)
        return None if self._group is None or time.monotonic() < self._away_until else (self._group, self._states)

    def _state_groups(self, short: kvstore.Group) -> list[kvstore.Group]:
        """Returns the groups that states are stored in, the one for short ones first."""
        try:
            return [short, self._long_states()]
        except (kvstore.Invalid, kvstore.Busy):
            # The daemon's memory has no room for a slot of that size, or for slots of another size.
            return [short]

    @contextlib.contextmanager
    def _failing(self):
        """Turns failures of the daemon into misses."""
        try:
            yield
        except kvstore.Error as error:
            if isinstance(error, (kvstore.Unavailable, kvstore.DeadlineExceeded)):
                self._away_until = time.monotonic() + AWAY_SECONDS
                self._stored.clear()
            if not self._said:
                self._said = True
                logger.warning("kvstore: %s; the model computes prompts until the daemon answers", error)


def _state_name(name: str) -> bytes:
    return hashlib.sha256(b"kvstore state " + name.encode()).digest()


def _name_weights(model, version: str) -> bytes:
    told = {key: value for key, value in model.config.to_dict().items() if key not in _SAYS_NOTHING}
    kernel = str(getattr(model.config, "_attn_implementation", ""))
    config = json.dumps([version, kernel, told], sort_keys=True, default=str).encode()

    start, tensors = time.monotonic(), model.state_dict()

    def parts():
        yield b"config", config
        # The weights as they are in memory: a file says nothing of what was trained since.
        for name, tensor in sorted(tensors.items()):
            named = repr((name, tuple(tensor.shape), str(tensor.dtype))).encode()
            yield named, memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())

    name = weights.combine(parts())
    size = sum(tensor.nbytes for tensor in tensors.values()) / 1e9
    seconds = time.monotonic() - start
    logger.info("kvstore: the weights are %s: %d tensors, %.3f GB, hashed in %.2f s", name.hex(), len(tensors), size, seconds)
    return name
