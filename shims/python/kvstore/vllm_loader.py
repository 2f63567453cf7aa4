"""Weights for vLLM from snapshots: the load format ``kvstore``, and models called ``kvstore://NAME``.

.. code-block:: sh

    export KVSTORE_SNAPSHOTS=s3://bucket/models
    export KVSTORE_SNAPSHOT_CACHE=/dev/shm/kvstore KVSTORE_SNAPSHOT_CACHE_BYTES=64GiB
    vllm serve --load-format kvstore --model kvstore://llama

vLLM calls :func:`register` in each of its processes (entry point ``vllm.general_plugins``). The process that makes the engine's
configuration restores the snapshot, or finds it in the node's cache, and holds it until it ends. vLLM then reads the configuration, the
tokenizer and the weights from verified files, and copies the weights into its own layout.

``--load-format kvstore --model FOLDER --model-loader-extra-config '{"snapshot": "llama"}'`` takes the weights from the snapshot, and all else
from the folder.

A name is looked up once, where the configuration is made: all ranks get the id that it meant then.

With KVSTORE_COMPILE_CACHE, the first process restores compile caches, too (:mod:`kvstore.compiled`), before anything is compiled.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import re
import sys

__all__ = ["asked", "hold", "id_of", "register", "snapshot_of"]

_logger = logging.getLogger("vllm.kvstore")
_FORMAT = "kvstore"
_SCHEME = "kvstore://"
# Snapshots that this process holds, by their names and stores: until it ends.
_held: dict = {}


def _key(snapshot: str, store: str | None = None, cache: str | None = None, cache_bytes: int | str | None = None) -> tuple:
    return snapshot, store, cache, cache_bytes


def _hold(snapshot: str, store: str | None = None, cache: str | None = None, cache_bytes: int | str | None = None):
    from kvstore import Invalid, snapshots, weights

    if (cache is None) != (cache_bytes is None):
        raise Invalid("cache and cache_bytes: set both, or none")
    key = _key(snapshot, store, cache, cache_bytes)
    if key not in _held:
        place = snapshots.Cache(cache, cache_bytes) if cache is not None and cache_bytes is not None else None
        _held[key] = weights.hold(snapshot, store=store, cache=place)
    return _held[key]


def asked(extra: dict) -> dict:
    return {key: extra[key] for key in ("store", "cache", "cache_bytes") if key in extra}


def hold(snapshot: str, **asked):
    """Holds a snapshot until this process ends: the same one for the same name."""
    return _hold(snapshot.removeprefix(_SCHEME), **asked)


def id_of(snapshot: str, extra: dict) -> str:
    """Returns the id that a name meant when this process held it. Raises InvalidWeights if it has not."""
    from kvstore.weights import InvalidWeights

    snapshot = snapshot.removeprefix(_SCHEME)
    if _is_id(snapshot):
        return snapshot
    held = _held.get(_key(snapshot, **asked(extra)))
    if held is None:
        raise InvalidWeights(
            f"the weights come from the snapshot {snapshot!r}, and nothing says which one that was; name it by its id"
        )
    return held.snapshot.id


def _is_id(snapshot: str) -> bool:
    return re.fullmatch("[0-9a-f]{32}", snapshot) is not None


def snapshot_of(load_config, model: str) -> str | None:
    """Returns the id of the snapshot that the weights come from. None: they are in the files of ``model`` itself.

    Raises InvalidWeights if nothing in this process says which snapshot a name meant.
    """
    if str(load_config.load_format) != _FORMAT:
        return None
    extra = load_config.model_loader_extra_config
    told = extra.get("snapshot", model if model.startswith(_SCHEME) else None)
    # A cache has the snapshot in a folder of its id, beside that one's lock.
    if told is None or (os.path.basename(model) == told and os.path.exists(f"{model}.lock")):
        return None
    return id_of(told, extra)


def register() -> None:
    """Registers the load format, and lets ``--model`` be the name of a snapshot. Uses the compile caches that the environment names. May be
    called any number of times."""
    if os.environ.get("KVSTORE_COMPILE_CACHE"):
        _use_compiled()
    from vllm.model_executor import model_loader

    if _FORMAT in model_loader._LOAD_FORMAT_TO_MODEL_LOADER:
        return
    model_loader.register_model_loader(_FORMAT)(_loader())
    # Only the process that makes the configuration has this. The others get a folder from it.
    arguments = sys.modules.get("vllm.engine.arg_utils")
    if arguments is not None:
        _name_models(arguments)


def _use_compiled() -> None:
    from kvstore import compiled

    caches = compiled.from_environment(_logger)
    core = sys.modules.get("vllm.v1.engine.core")
    if caches is None or core is None or os.environ.get("KVSTORE_COMPILE_CACHE_SAVE", "0") in ("", "0"):
        return
    initialize = core.EngineCore._initialize_kv_caches
    if getattr(initialize, "saves_caches", False):
        return

    @functools.wraps(initialize)
    def initialize_and_save(self, *positional, **named):
        # All ranks have compiled and warmed up by its end, and nobody is served yet.
        answer = initialize(self, *positional, **named)
        caches.save_in_background(_logger)
        return answer

    initialize_and_save.saves_caches = True
    core.EngineCore._initialize_kv_caches = initialize_and_save


def _loader() -> type:
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    class SnapshotLoader(DefaultModelLoader):
        """Loads weights from a snapshot's verified files."""

        def __init__(self, load_config):
            extra = dict(load_config.model_loader_extra_config)
            self._snapshot, self._asked = extra.pop("snapshot", None), asked(extra)
            extra = {key: value for key, value in extra.items() if key not in self._asked}
            plain = dataclasses.replace(load_config, load_format="safetensors", model_loader_extra_config=extra)
            super().__init__(plain)

        def _prepare_weights(self, model_name_or_path: str, *arguments, **more):
            snapshot = self._snapshot or model_name_or_path
            if self._snapshot or snapshot.startswith(_SCHEME):
                model_name_or_path = str(hold(snapshot, **self._asked).path)
            return super()._prepare_weights(model_name_or_path, *arguments, **more)

    return SnapshotLoader


def _name_models(arguments) -> None:
    """vLLM has no hook for names of models. So the names are replaced by folders where it makes its configuration of them, and it looks for
    them nowhere before: as those of its own object stores, they are no names of a hub."""
    is_cloud_storage, create = arguments.is_cloud_storage, arguments.EngineArgs.create_engine_config

    @functools.wraps(is_cloud_storage)
    def is_known(model_or_path: str) -> bool:
        return model_or_path.startswith(_SCHEME) or is_cloud_storage(model_or_path)

    @functools.wraps(create)
    def create_engine_config(self, *positional, **named):
        if self.model.startswith(_SCHEME):
            _resolve(self)
        elif str(self.load_format).lower() == _FORMAT and (self.model_loader_extra_config or {}).get("snapshot"):
            _resolve_weights(self)
        _refuse_drafts(self)
        return create(self, *positional, **named)

    arguments.is_cloud_storage = is_known
    arguments.EngineArgs.create_engine_config = create_engine_config


def _refuse_drafts(arguments) -> None:
    """A draft model has the target's load configuration, and would get the target's weights."""
    from kvstore import Invalid

    draft = (getattr(arguments, "speculative_config", None) or {}).get("model")
    if draft and (arguments.model_loader_extra_config or {}).get("snapshot"):
        raise Invalid(
            f"the draft model {draft!r} would be loaded from the target's snapshot: start without speculative_config.model, or with "
            "--model FOLDER, where FOLDER is what kvstore snapshot restore made"
        )


def _resolve(arguments) -> None:
    extra = dict(arguments.model_loader_extra_config or {})
    name = arguments.model
    held = _hold(name.removeprefix(_SCHEME), **asked(extra))
    if held.is_cached:
        # Workers hold it, too; those on another node restore it there.
        arguments.model_loader_extra_config = {**extra, "snapshot": held.snapshot.id}
    folder = str(held.path)
    if arguments.served_model_name is None:
        arguments.served_model_name = [name]
    if arguments.tokenizer == name:
        arguments.tokenizer = folder
    arguments.model = folder


def _resolve_weights(arguments) -> None:
    from kvstore import weights

    extra = dict(arguments.model_loader_extra_config)
    snapshot = extra["snapshot"].removeprefix(_SCHEME)
    if not _is_id(snapshot):
        # None of its files: the processes that load them hold them.
        with weights.hold(snapshot, store=extra.get("store"), cache=False, wanted=[]) as held:
            snapshot = held.snapshot.id
    arguments.model_loader_extra_config = {**extra, "snapshot": snapshot}
