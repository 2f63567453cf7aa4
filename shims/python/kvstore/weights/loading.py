"""Weights from snapshots, without a second copy: verified, then mapped.

::

    model = kvstore.weights.load(transformers.AutoModelForCausalLM, "llama")       # as from_pretrained does

    with torch.device("meta"):
        model = MyModel()
    kvstore.weights.load(model, "mine")                                            # any torch module

    tensors = kvstore.weights.load("model.safetensors", "llama")                   # tensors by name

Without a cache, the files are in sealed memory of this process; it goes with the last tensor. With a cache, the node's processes share one
copy. In both, a model that writes to a weight gets its own copy of that page.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pathlib
import shutil
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from kvstore import Invalid, NotFound
from kvstore.snapshots import Cache, Progress, Snapshot, Store
from kvstore.snapshots.kinds import size

from . import assign, mapped

__all__ = ["Held", "hold", "hold_async", "load", "load_async"]

Tell = Callable[[Progress], Any]
# What is copied at a time where a file is made.
_COPY_BYTES = 16 << 20
# Options of transformers' from_pretrained that mean the same for tensors as for files, and are not the configuration's.
_SAME_OPTIONS = ("attn_implementation", "dtype", "output_loading_info", "torch_dtype")
# What configurations have whose models are made in another way: quantized, with code of their own, of files with names of their own.
_OTHER_MODELS = ("quantization_config", "auto_map", "transformers_weights")


class Held:
    """A snapshot that this process holds, whole and verified. ``snapshot``: what it is. ``path``: a folder with its files, for whoever
    wants paths. Close it, or use it as a context manager: what is mapped stays mapped, and in the cache."""

    def __init__(self, native):
        self._native = native
        self.snapshot = Snapshot(**json.loads(native.describe()))
        folder = native.folder()
        self._memory = {path: (length, descriptor) for path, length, _, descriptor in native.memory()}
        self._leased = dict(native.leased())
        self.is_cached = folder is not None
        self.path = pathlib.Path(folder or tempfile.mkdtemp(prefix="kvstore-"))
        # Not the native object: it goes with the last that has it, and each mapping of a cached file does.
        self._end = weakref.finalize(self, _close, os.getpid(), None if self.is_cached else self.path)
        if self.is_cached:
            self.files = sorted(str(file.relative_to(self.path)) for file in self.path.rglob("*") if file.is_file())
        else:
            self.files = sorted((*self._memory, *self._leased))
            self._link()

    @property
    def has_leased(self) -> bool:
        """Whether there are files whose tensors stay in the daemon's memory."""
        return bool(self._leased)

    def _link(self) -> None:
        for path, (_, descriptor) in self._memory.items():
            link = self.path / path
            link.parent.mkdir(parents=True, exist_ok=True)
            link.unlink(missing_ok=True)
            link.symlink_to(f"/proc/{os.getpid()}/fd/{descriptor}")

    def _copy_leased(self) -> None:
        """Makes files of what the daemon has, in memory of this process: for whoever reads files."""
        for path, length in self._leased.items():
            copy = os.memfd_create(f"kvstore-{os.path.basename(path)}"[:200], os.MFD_CLOEXEC)
            weakref.finalize(self, _close_descriptor, os.getpid(), copy)
            for start in range(0, length, _COPY_BYTES):
                _write_all(copy, self._native.read(path, start, min(start + _COPY_BYTES, length)), start)
            self._memory[path] = (length, copy)
        self._leased.clear()
        self._link()

    def close(self) -> None:
        """Gives back what it holds, but for what is mapped. ``path`` is of no use any more."""
        self._native = None
        self._memory.clear()
        self._end()

    def __enter__(self) -> Held:
        return self

    def __exit__(self, *_exception) -> None:
        self.close()

    def _map(self, path: str):
        length, descriptor = self._memory.get(path, (0, -1))
        # Kept until the file is mapped: given back meanwhile, the descriptor could be another file's.
        native = self._native
        if native is None:
            raise Invalid(f"the snapshot {self.snapshot.id} is closed; hold it again")
        if path not in self.files:
            raise NotFound(f"the snapshot {self.snapshot.id} has no file {path!r}; it has {_some(self.files)}")
        if self.is_cached:
            return mapped.map_path(self.path / path, native)
        if path in self._leased:
            return mapped.Leased(native, path, self._leased[path])
        return mapped.map_file(descriptor, length, None)

    def read(self, path: str) -> bytes:
        """Returns a file's bytes."""
        return bytes(self._map(path)[:])

    def tensors(self, path: str | None = None, *, unknown: str = "refuse") -> dict[str, Any]:
        """Returns tensors by name, mapped: those of a file, of a folder, or, by default, of the files that transformers would load.

        ``unknown``: what becomes of types that this torch does not have: "refuse", or "bytes" for their bytes. Raises Invalid for a tensor
        that two files have, and for tensors of another type, by name.
        """
        if unknown not in ("refuse", "bytes"):
            raise Invalid(f'unknown: {unknown!r} is not valid; use "refuse" or "bytes"')
        found: dict[str, Any] = {}
        origin: dict[str, str] = {}
        for file in self._weights(path):
            for name, tensor in mapped.tensors(file, self._map(file), unknown).items():
                if name in found:
                    raise Invalid(f"the tensor {name!r} is in {origin[name]} and in {file}; name one of them by path")
                found[name], origin[name] = tensor, file
        return found

    def _weights(self, path: str | None) -> list[str]:
        if path in self.files:
            return [path]
        folder = "" if path in (None, "", ".") else f"{path.rstrip('/')}/"
        here = [file for file in self.files if file.startswith(folder) and "/" not in file[len(folder) :]]
        weights = [file for file in here if file.endswith(".safetensors")]
        if not weights:
            raise NotFound(
                f"the snapshot {self.snapshot.id} has no safetensors file in {folder or 'its folder'!r}: {_some(self.files)}"
            )
        if f"{folder}model.safetensors" in weights:
            return [f"{folder}model.safetensors"]
        index = f"{folder}model.safetensors.index.json"
        if index in here:
            return sorted({f"{folder}{file}" for file in json.loads(self.read(index))["weight_map"].values()})
        return weights


def _close(process: int, links: pathlib.Path | None) -> None:
    # A child that was forked has a copy of all this, and its parent still uses the folder.
    if links is not None and process == os.getpid():
        shutil.rmtree(links, ignore_errors=True)


def _close_descriptor(process: int, descriptor: int) -> None:
    if process == os.getpid():
        os.close(descriptor)


def _write_all(descriptor: int, content: bytes, start: int) -> None:
    """Writes all of it: what a short write left out would be zeros, which nobody verifies."""
    left = memoryview(content)
    while left:
        written = os.pwrite(descriptor, left, start)
        left, start = left[written:], start + written


def _some(files: list[str]) -> str:
    return ", ".join(files[:5]) + (f" and {len(files) - 5} more" if len(files) > 5 else "")


def _asked(
    snapshot: str,
    store: Store | str | None,
    cache: Cache | None | bool,
    facts,
    allow,
    check: bool,
    wanted: list[str] | None,
    as_tensors: bool,
) -> tuple[Store, dict]:
    snapshot = snapshot.removeprefix("kvstore://")
    at = store if isinstance(store, Store) else Store(store)
    if cache is True or cache is None:
        own = Cache.default()
        if cache and own is None:
            raise Invalid("cache: KVSTORE_SNAPSHOT_CACHE names none; set it, or give a Cache")
        cache = own
    told = [os.path.abspath(cache.folder), size(cache.bytes)] if cache else None
    if check and not told and not at.daemon:
        raise Invalid(
            "check: there is no cache and no daemon whose content could be checked; what is restored is always verified"
        )
    asked = dict(
        snapshot=snapshot,
        facts=dict(facts or {}),
        allow=list(allow),
        cache=told,
        check=check,
        wanted=wanted,
        as_tensors=as_tensors,
    )
    return at, asked


def hold(
    snapshot: str,
    *,
    store: Store | str | None = None,
    cache: Cache | bool | None = None,
    check: bool = False,
    facts: Mapping[str, str] | None = None,
    allow: Iterable[str] = (),
    progress: Tell | None = None,
    wanted: list[str] | None = None,
    as_tensors: bool = False,
) -> Held:
    """Holds a snapshot: restores and verifies it, unless the cache has it. See :func:`load` for the arguments. ``wanted``: paths of
    files, or of folders with ``/`` at their ends; without a cache, only those are restored. ``as_tensors``: files with tensors need not be
    below ``path``, and are not where this node's daemon has them in its memory: :meth:`Held.tensors` maps them from there."""
    at, asked = _asked(snapshot, store, cache, facts, allow, check, wanted, as_tensors)
    return Held(at._hold(asked, progress))


async def hold_async(
    snapshot: str,
    *,
    store: Store | str | None = None,
    cache: Cache | bool | None = None,
    check: bool = False,
    facts: Mapping[str, str] | None = None,
    allow: Iterable[str] = (),
    progress: Tell | None = None,
    wanted: list[str] | None = None,
    as_tensors: bool = False,
) -> Held:
    """See :func:`hold`. Cancelling it ends the restore."""
    at, asked = _asked(snapshot, store, cache, facts, allow, check, wanted, as_tensors)
    return Held(await at._hold_async(asked, progress))


def load(
    model_or_path,
    snapshot: str,
    *,
    store: Store | str | None = None,
    cache: Cache | bool | None = None,
    check: bool = False,
    facts: Mapping[str, str] | None = None,
    allow: Iterable[str] = (),
    progress: Tell | None = None,
    path: str | None = None,
    strict: bool = True,
    dtype: str = "same",
    unknown: str = "refuse",
    **options,
):
    """Loads weights from a snapshot.

    ``model_or_path``: a torch module, which gets the tensors as its parameters and buffers, and is returned. Or a class with
    ``from_pretrained``, such as ``transformers.AutoModelForCausalLM``; returns what that makes, with ``options`` passed on. Or the path
    of a file or folder in the snapshot; returns its tensors by name. A transformers model maps what this node's daemon has, if its
    options are of the configuration, or are dtype, attn_implementation or output_loading_info; with others, it gets files, copied.

    ``store``: a URL or a store; by default, $KVSTORE_SNAPSHOTS. ``cache``: a node's cache; by default, the one that
    $KVSTORE_SNAPSHOT_CACHE names, or none; False: none. ``check``: verifies again what the cache has. ``facts``, ``allow``: what the
    snapshot must have, and what may differ. ``progress``: is called with a :class:`kvstore.snapshots.Progress` ten times a second.

    For modules: ``path``: where in the snapshot the tensors are. ``strict``: refuses tensors too many or too few. ``dtype``: "same"
    refuses tensors of another type than the module's, "snapshot" takes their type, "module" converts them (a copy of each).
    ``unknown``: see :meth:`Held.tensors`. Tensors that the module ties stay tied.

    Raises Invalid, NotFound, DataLoss, Unavailable or Busy, each naming what is wrong. A module stays as it was if loading fails.
    """
    use = _use(model_or_path, path, strict, dtype, unknown, options)
    held = hold(
        snapshot,
        store=store,
        cache=cache,
        check=check,
        facts=facts,
        allow=allow,
        progress=progress,
        wanted=_wanted(model_or_path),
        as_tensors=_takes_tensors(model_or_path),
    )
    with _closing(held):
        return use(held)


async def load_async(
    model_or_path,
    snapshot: str,
    *,
    store: Store | str | None = None,
    cache: Cache | bool | None = None,
    check: bool = False,
    facts: Mapping[str, str] | None = None,
    allow: Iterable[str] = (),
    progress: Tell | None = None,
    path: str | None = None,
    strict: bool = True,
    dtype: str = "same",
    unknown: str = "refuse",
    **options,
):
    """See :func:`load`. Cancelling it ends the restore; the model is made in another thread once the bytes are there."""
    use = _use(model_or_path, path, strict, dtype, unknown, options)
    held = await hold_async(
        snapshot,
        store=store,
        cache=cache,
        check=check,
        facts=facts,
        allow=allow,
        progress=progress,
        wanted=_wanted(model_or_path),
        as_tensors=_takes_tensors(model_or_path),
    )
    with _closing(held):
        return await asyncio.to_thread(use, held)


@contextlib.contextmanager
def _closing(held: Held) -> Iterator[Held]:
    try:
        yield held
    finally:
        # A cached one goes with the last that was made of it.
        if not held.is_cached:
            held.close()


def _wanted(model_or_path) -> list[str] | None:
    if not isinstance(model_or_path, (str, os.PathLike)) or str(model_or_path) in ("", "."):
        return None
    path = os.fspath(model_or_path).rstrip("/")
    return [path, f"{path}/"]


def _use(model_or_path, path: str | None, strict: bool, dtype: str, unknown: str, options: dict) -> Callable[[Held], Any]:
    """What becomes of a snapshot that is held. Refuses arguments that do not fit before anything is read."""
    if hasattr(model_or_path, "from_pretrained") and isinstance(model_or_path, type):
        return lambda held: _pretrained(model_or_path, held, path, options)
    if options:
        raise Invalid(f"{', '.join(sorted(options))}: only classes with from_pretrained take options of their own")
    if isinstance(model_or_path, (str, os.PathLike)):
        if path is not None:
            raise Invalid("path: give the path as the first argument")
        return lambda held: held.tensors(os.fspath(model_or_path), unknown=unknown)
    assign.check(model_or_path, dtype)
    return lambda held: assign.fill(model_or_path, held.tensors(path, unknown=unknown), strict, dtype)


def _pretrained(cls, held: Held, path: str | None, options: dict):
    folder = held.path / (path or ".")
    if held.has_leased:
        found = _config(cls, folder, options)
        one = _model_class(cls, found[0]) if found else None
        if one is not None:
            return _of_tensors(*one, held, path, folder, found[1])
        held._copy_leased()
    made = cls.from_pretrained(folder, **options)
    model = made[0] if isinstance(made, tuple) else made
    if held.is_cached:
        # The library maps the files itself: the cache keeps them while the model lives.
        weakref.finalize(model, held.close)
    return made


def _takes_tensors(model_or_path) -> bool:
    """Whether tensors are enough. Of classes with ``from_pretrained``, they are for transformers' models, and for what chooses one; all
    others read files."""
    if not isinstance(model_or_path, type):
        return True
    transformers = sys.modules.get("transformers")
    models = getattr(transformers, "PreTrainedModel", None)
    return hasattr(model_or_path, "_model_mapping") or (models is not None and issubclass(model_or_path, models))


def _config(cls, folder: pathlib.Path, options: dict) -> tuple[Any, dict] | None:
    """The configuration that from_pretrained would find, with the options that are meant for it; and those that are left for the model.
    None: it is not sure that tensors would become the same model as files."""
    left = {name: value for name, value in options.items() if name in _SAME_OPTIONS}
    given = {name: value for name, value in options.items() if name not in _SAME_OPTIONS}
    config = given.pop("config", None)
    if config is None:
        config = _found_config(cls, folder, given)
    elif given or isinstance(config, (str, os.PathLike)):
        return None
    is_other = config is None or any(getattr(config, name, None) is not None for name in _OTHER_MODELS)
    return None if is_other or (folder / "adapter_config.json").exists() else (config, left)


def _found_config(cls, folder: pathlib.Path, options: dict):
    """The configuration in a folder, changed by options. None: one of them is no attribute of it, and may mean anything."""
    import transformers

    try:
        told = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return None
    # Before the library looks at it: it would ask for leave to run a model's own code.
    if any(told.get(name) is not None for name in _OTHER_MODELS):
        return None
    kind = getattr(cls, "config_class", None) or transformers.AutoConfig
    config = kind.from_pretrained(folder)
    if not options:
        return config
    if not all(hasattr(config, name) and not callable(getattr(config, name)) for name in options):
        return None
    config, unused = kind.from_pretrained(folder, return_unused_kwargs=True, **options)
    return None if unused.keys() & options.keys() else config


def _model_class(cls, config) -> tuple[type, Any] | None:
    """The class of a model, and the configuration that it takes. None: what chooses one would not choose one of the library's own."""
    mapping = getattr(cls, "_model_mapping", None)
    if mapping is None:
        return cls, config
    if type(config) not in mapping:
        return None
    found = mapping[type(config)]
    if isinstance(found, (tuple, list)):
        named = {one.__name__: one for one in found}
        found = next((named[name] for name in getattr(config, "architectures", None) or () if name in named), found[0])
    text = getattr(config, "sub_configs", {}).get("text_config")
    if text is not None and getattr(found, "config_class", None) is text:
        config = config.get_text_config()
    return None if getattr(config, "quantization_config", None) is not None else (found, config)


def _of_tensors(cls, config, held: Held, path: str | None, folder: pathlib.Path, options: dict):
    """A model whose tensors are mapped from the daemon's memory: there are no files of them."""
    import transformers

    made = cls.from_pretrained(None, config=config, state_dict=held.tensors(path), **options)
    model = made[0] if isinstance(made, tuple) else made
    if (folder / "generation_config.json").exists() and model.can_generate():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    # As from_pretrained leaves it: where it came from.
    model.name_or_path = model.config.name_or_path = str(folder)
    return made
