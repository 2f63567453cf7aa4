"""Weights for SGLang from snapshots.

.. code-block:: sh

    export KVSTORE_SNAPSHOTS=s3://bucket/models
    python -m sglang.launch_server --model-path FOLDER --load-format private --model-loader-extra-config '{"snapshot": "llama"}'

SGLang has one load format for loaders of others: ``private``, whose class it takes from a module of its own that does not exist. It calls
:func:`register` in each of its processes (entry point ``sglang.srt.plugins``), which puts that module there. The configuration and the tokenizer come
from ``FOLDER``, the weights from verified files.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
import types

from kvstore import Invalid, vllm_loader

__all__ = ["register", "snapshot_of"]

_MODULE = "sglang.private.private_model_loader"
_FORMAT = "private"


def register() -> None:
    """Puts the module there, unless somebody else's is. May be called any number of times. It imports nothing of SGLang: its loader is made when
    it is asked for."""
    if _MODULE in sys.modules or _is_there("sglang.private"):
        return
    module = types.ModuleType(_MODULE, __doc__)
    # Looked up as an attribute, once SGLang makes a loader.
    module.PrivateModelLoader = lambda load_config: _loader()(load_config)
    sys.modules[_MODULE] = module


def _is_there(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ImportError:
        return False


def snapshot_of(load_format: str, extra) -> str | None:
    """Returns the id of the snapshot that this process's weights come from. None: they come from the model's own files.

    Raises InvalidWeights if nothing in this process says which snapshot a name meant.
    """
    extra = _parsed(extra)
    if load_format != _FORMAT or "snapshot" not in extra:
        return None
    return vllm_loader.id_of(extra["snapshot"], extra)


def _parsed(extra) -> dict:
    return json.loads(extra) if isinstance(extra, str) else dict(extra or {})


def _loader() -> type:
    from sglang.srt.configs.load_config import LoadFormat
    from sglang.srt.model_loader.loader import DefaultModelLoader

    class SnapshotLoader(DefaultModelLoader):
        """Loads weights from a snapshot's verified files."""

        def __init__(self, load_config):
            extra = _parsed(load_config.model_loader_extra_config)
            if "snapshot" not in extra:
                raise Invalid('--load-format private: name a snapshot by --model-loader-extra-config \'{"snapshot": "NAME"}\'')
            self._snapshot, self._asked = extra.pop("snapshot"), vllm_loader.asked(extra)
            extra = {key: value for key, value in extra.items() if key not in self._asked}
            plain = dataclasses.replace(load_config, load_format=LoadFormat.SAFETENSORS, model_loader_extra_config=extra)
            super().__init__(plain)

        def _prepare_weights(self, model_name_or_path: str, *arguments, **more):
            _refuse_draft(model_name_or_path)
            held = vllm_loader.hold(self._snapshot, **self._asked)
            return super()._prepare_weights(str(held.path), *arguments, **more)

    return SnapshotLoader


def _refuse_draft(model: str) -> None:
    """A draft model has the target's load format and settings, and would get the target's weights."""
    from sglang.srt.runtime_context import get_server_args

    try:
        served = getattr(get_server_args(), "model_path", None)
    except Exception:  # There is no server.
        served = None
    if served not in (None, model):
        raise Invalid(
            f"the draft model {model!r} would be loaded from the target's snapshot: give --speculative-draft-load-format auto"
        )
