"""Describes an engine's cache for the store: which bytes make a block, and what must match before a block can be read again."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import logging
import pathlib
import platform
from dataclasses import dataclass

import torch
import vllm
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
)

import kvstore
from kvstore import vllm_loader, weights
from kvstore.weights import configs

from .messages import RankLayout
from .options import Options

__all__ = [
    "Group",
    "describe",
    "groups_of",
    "has_names_of_items",
    "regions_of",
    "shards_of",
    "short_name",
    "split",
    "weights_digest",
]

logger = logging.getLogger("vllm.kvstore")


@dataclass(frozen=True)
class Group:
    """One of the engine's layer groups, whose blocks are stored."""

    # vLLM's number for it.
    number: int
    layers: tuple[str, ...]
    block_tokens: int
    # Tokens that a new one looks back to; 0: all.
    window: int


def groups_of(kv_cache_config) -> tuple[list[Group], str]:
    """Returns the groups that a hit needs, and why they cannot be stored. The reason is empty if they can be stored."""
    ids = getattr(kv_cache_config, "prefix_cacheable_group_ids", range(len(kv_cache_config.kv_cache_groups)))
    groups, refused = [], ""
    for number in ids:
        group = kv_cache_config.kv_cache_groups[number]
        spec = group.kv_cache_spec
        if isinstance(spec, UniformTypeKVCacheSpecs):
            spec = next(iter(spec.kv_cache_specs.values()))
        # Exactly these: what derives from them keeps more, or other things, than its pages.
        is_sliding = type(spec) is SlidingWindowSpec
        if not is_sliding and not isinstance(spec, FullAttentionSpec):
            refused = refused or f"layers of kind {type(spec).__name__} are not supported"
        window = spec.sliding_window if is_sliding else 0
        groups.append(Group(number, tuple(group.layer_names), spec.block_size, window))
    sizes = {group.block_tokens for group in groups}
    if len(sizes) > 1:
        refused = refused or f"the layer groups have blocks of {sorted(sizes)} tokens, and all must have one size"
    return groups, refused or ("" if groups else "the model has no layers that can be cached")


def regions_of(cache: torch.Tensor, blocks: int) -> list[tuple[torch.Tensor, int, int, int]]:
    """Returns the runs of bytes that make up a block's page of one layer: (the whole storage as bytes, offset, stride, bytes).

    ``cache``: dimension 0 counts blocks, or equal parts of blocks. The other dimensions can have any order in memory.
    """
    if cache.shape[0] != blocks:
        if cache.shape[0] % blocks:
            raise ValueError(f"a layer's cache has {cache.shape[0]} blocks, which is not a multiple of the engine's {blocks}")
        cache = cache.unflatten(0, (blocks, -1))
    size = cache.element_size()
    storage = torch.empty(0, dtype=torch.uint8, device=cache.device).set_(cache.untyped_storage())
    inner = sorted((stride, count) for stride, count in zip(cache.stride()[1:], cache.shape[1:]) if count > 1)
    run, outer = 1, []
    for stride, count in inner:
        # What lies directly behind what there is so far makes one run of it.
        if not outer and stride == run:
            run *= count
        else:
            outer.append((stride, count))
    start = cache.storage_offset()
    steps = itertools.product(*([stride * at for at in range(count)] for stride, count in reversed(outer)))
    return [(storage, (start + sum(step)) * size, cache.stride(0) * size, run * size) for step in steps]


def split(cache: torch.Tensor, parts: int) -> list[torch.Tensor]:
    """Splits a layer's cache into ``parts`` equal parts by heads.

    ``cache``: dimension 0 counts blocks, or equal parts of blocks. If there are several parts, dimension 1 counts heads. Raises
    ValueError if the cache cannot be split so.
    """
    if parts == 1:
        return [cache]
    if cache.dim() < 3 or cache.shape[1] % parts:
        raise ValueError(f"tp_shards: a cache of shape {tuple(cache.shape)} cannot be split by heads into {parts} equal parts")
    each = cache.shape[1] // parts
    return [cache[:, at * each : (at + 1) * each] for at in range(parts)]


def shards_of(vllm_config, kv_cache_config, options: Options) -> tuple[int, int, int]:
    """Returns (first shard of this rank, how many it has, how many there are).

    Raises ValueError if ``tp_shards`` is not a multiple of the ranks.
    """
    # Ranks of one replica have the same bytes.
    replicas = getattr(kv_cache_config, "kv_tp_replicas", 1)
    ranks = max(vllm_config.parallel_config.tensor_parallel_size // replicas, 1)
    shards = options.tp_shards or ranks
    if shards % ranks:
        raise ValueError(f"tp_shards: {shards} is not a multiple of {ranks}, the number of ranks that share the heads")
    parts = shards // ranks
    return _tensor_rank() // replicas * parts, parts, shards


def describe(vllm_config, kv_cache_config, options: Options, block_bytes: list[int], caches, shards) -> RankLayout:
    """Describes the layout that this worker stores. ``block_bytes``: the size of each group's block, in the groups' order.
    ``caches``: the caches of one part. ``shards``: see :func:`shards_of`."""
    model, parallel, cache = vllm_config.model_config, vllm_config.parallel_config, vllm_config.cache_config
    groups, refused = groups_of(kv_cache_config)
    parts = getattr(parallel, "decode_context_parallel_size", 1) * getattr(parallel, "prefill_context_parallel_size", 1)
    if parts > 1:
        refused = refused or "context parallelism splits blocks between ranks, which is not supported"
    device = next(iter(caches)).device.type
    told = [
        "vllm block 2",
        f"{device} {vllm.__version__} {_backends(vllm_config, groups)}",
        # The CPU backend orders a block's inside as its kernels of this machine like it.
        *([f"{platform.machine()} {_isa()}"] if device == "cpu" else []),
        f"layout {getattr(kv_cache_config, 'kv_cache_layout', None)}",
        f"cache {cache.cache_dtype}",
        f"pp {_pipeline_rank()}/{parallel.pipeline_parallel_size}",
        *(f"{tuple(tensor.shape[1:])} {_order(tensor)} {tensor.dtype}" for tensor in caches),
        *(f"{group.number} {group.layers} {group.window}" for group in groups),
    ]
    layer_groups = []
    for group, size in zip(groups, block_bytes):
        if size % group.block_tokens:
            refused = refused or f"a block of {size} bytes cannot be divided into {group.block_tokens} equal tokens"
        layer_groups.append(
            kvstore.LayerGroup(
                layers=1,
                planes=1,
                heads=1,
                head_bytes=max(size // group.block_tokens, 1),
                kind="sliding_window" if group.window else "attention",
                window_tokens=group.window,
                order="opaque",
            )
        )
    first, count, total = shards
    try:
        digest = weights_digest(vllm_config, options, says=_tensor_rank() == 0)
    except weights.InvalidWeights as error:
        digest, refused = b"", refused or str(error)
    return RankLayout(
        model=short_name(model),
        weights=digest,
        dtype=str(model.dtype).removeprefix("torch."),
        block_tokens=groups[0].block_tokens if groups else 1,
        groups=tuple(layer_groups),
        shard=(first, total),
        extra=hashlib.blake2b("\n".join(told).encode(), digest_size=32).digest(),
        parts=count,
        refused=refused,
    )


def has_names_of_items(vllm_config) -> bool:
    """Returns whether pictures, clips and sounds are named by their content. If neither of vLLM's own caches needs the hashes,
    vLLM does not compute them and names an item by its request. Another process then has other items under the same names."""
    multimodal = getattr(vllm_config.model_config, "multimodal_config", None)
    return multimodal is None or multimodal.mm_processor_cache_gb > 0 or bool(vllm_config.cache_config.enable_prefix_caching)


def short_name(model) -> str:
    """Returns a readable name for the model. The layout's digest, not this name, distinguishes models."""
    name = model.served_model_name if isinstance(model.served_model_name, str) else model.model
    return name.rstrip("/").rsplit("/", 1)[-1].encode()[-64:].decode(errors="ignore") or "model"


def weights_digest(vllm_config, options, *, says: bool = True) -> bytes:
    """Returns a digest that names the weights: see `kvstore.weights`. ``says``: whether their name is logged. Raises InvalidWeights if
    they come from a snapshot, and nothing says which."""
    model, load = vllm_config.model_config, vllm_config.load_config
    digest = hashlib.blake2b(digest_size=32, person=b"vllm weights")
    load_format = str(getattr(load.load_format, "value", load.load_format))
    digest.update(repr((options.weights_version, model.quantization, load_format == "dummy")).encode())
    overrides = model.hf_overrides or {}
    # What a function makes of the configuration shows in the outcome alone.
    digest.update((repr(sorted(overrides.items())) if isinstance(overrides, dict) else model.hf_config.to_json_string()).encode())
    # A draft model's layers are in the same blocks.
    draft = getattr(vllm_config.speculative_config, "draft_model_config", None)
    if draft is not None and draft.model != model.model:
        told = dict(revision=draft.revision, engine="vllm", load_format=load_format, says=says)
        digest.update(weights.name(draft.model, options.weights_version, logger, **told))
    if load_format == "dummy":
        digest.update(repr((model.model, model.hf_config.to_json_string(), model.seed)).encode())
    else:
        digest.update(_of_files(model, load, load_format, options, says))
    return digest.digest()


def _of_files(model, load, load_format: str, options, says: bool) -> bytes:
    """Returns a name of the files' weights, of the snapshot that they come from, or of the model's name and revision if there are no files
    that can be read."""
    named = getattr(model, "model_weights", None) or model.model
    snapshot = vllm_loader.snapshot_of(load, named)
    folder, why = weights.folder_of(named, model.revision, load.download_dir), ""
    if snapshot is not None:
        if says:
            logger.info("kvstore: the weights of %s are those of the snapshot %s", model.model, snapshot)
        # An id means one content for ever. The configuration is the model's own.
        return repr((snapshot, _configuration(folder, model))).encode()
    try:
        if folder is not None:
            found = weights.read(folder, "vllm", load_format)
            if says:
                found.say(model.model, logger)
            return found.digest
    except weights.ERRORS as error:
        why = str(error)
    if not options.weights_version:
        logger.warning(
            "kvstore: the blocks of %s are named by the model's name and revision %s: %s. Set weights_version if the weights can "
            "change under that name.",
            model.model,
            model.revision,
            why or "its files are not on this machine",
        )
    return repr((model.model, model.revision, model.hf_config.to_json_string())).encode()


def _configuration(folder: pathlib.Path | None, model) -> list[tuple[str, bytes]] | str:
    with contextlib.suppress(OSError):
        if folder is not None and (found := configs.digests(folder)):
            return found
    return model.hf_config.to_json_string()


def _order(cache: torch.Tensor) -> tuple[int, ...]:
    """Returns the dimensions of a block, the slowest in memory first. Strides can depend on the number of blocks, so they are not
    compared. The place of a dimension of size one does not matter."""
    return tuple(sorted((at for at in range(1, cache.dim()) if cache.shape[at] > 1), key=lambda at: -cache.stride(at)))


def _backends(vllm_config, groups: list[Group]) -> list[str]:
    """Returns the attention backends of the groups' layers. Each backend has its own order inside a block."""
    layers = vllm_config.compilation_config.static_forward_context
    backends = (getattr(layers.get(layer), "attn_backend", None) for group in groups for layer in group.layers)
    return sorted({backend.get_name() for backend in backends if backend is not None})


def _isa() -> str:
    return torch.backends.cpu.get_cpu_capability()


def _tensor_rank() -> int:
    from vllm.distributed import get_tensor_model_parallel_rank

    return get_tensor_model_parallel_rank()


def _pipeline_rank() -> int:
    from vllm.distributed import get_pp_group

    return get_pp_group().rank_in_group
