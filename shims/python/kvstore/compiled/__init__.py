"""Compile caches: what torch.compile, Triton, vLLM, FlashInfer and DeepGEMM have compiled, saved once an engine is warm, and there before the
next one starts.

::

    caches = kvstore.compiled.use("llama-compiled")      # before anything is compiled
    ...                                                  # compile, warm up
    caches.save()                                        # now the next process finds it

``use`` makes a private folder, restores the snapshot of that name into it, and sets the variables by which compilers find it. The folder goes
when the process ends. Without a snapshot of that name, or if its facts do not fit, the folder is empty, and the process compiles as it
would without kvstore. With vLLM, setting KVSTORE_COMPILE_CACHE is enough.

Compile caches are code, and pickles that make objects when they are read: whoever can write to the store runs code in the engine. So
they come from the store that you name and from nowhere else, every byte verified against its digest, and lie where only this user can write.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import pathlib
import shutil
import tempfile
import threading
from collections.abc import Iterable, Mapping

from kvstore import Error, Invalid, NotFound
from kvstore.snapshots import Cache, Snapshot, Store

from . import facts as known
from . import folders

__all__ = ["Caches", "from_environment", "use"]

_logger = logging.getLogger("kvstore.compiled")
# Of the node's own cache, where $KVSTORE_SNAPSHOT_CACHE names none: some engines' caches, each of some hundred MB.
_CACHE_BYTES = "16GiB"
_used: Caches | None = None
_lock = threading.Lock()


class Caches:
    """The compile caches that this process uses. ``name``: of the snapshot. ``id``: of the one that was restored; None: none was, and
    ``why`` says why. ``path``: the private folder."""

    def __init__(self, folder: folders.Folder, is_first: bool = False):
        # Whether this process has made the folder, or was started by one that has.
        self._folder, self.path, self.is_first = folder, folder.path, is_first
        told = folder.told
        self.name: str = told["name"]
        self.id: str | None = told["id"]
        self.why: str = told["why"]

    def __repr__(self) -> str:
        return f"kvstore.compiled.Caches({self.name!r}, id={self.id!r}, path={str(self.path)!r})"

    def new_files(self) -> list[str]:
        """Returns what has been compiled, or has changed, since ``use``."""
        before = self._folder.told["files"]
        return [path for path, seen in folders.list_files(self.path).items() if before.get(path) != list(seen)]

    def save(self, *, name: str | None = None, facts: Mapping[str, str] | None = None) -> Snapshot | None:
        """Saves the caches, as they are now. Returns None if there is nothing new. ``name``: instead of that of ``use``. ``facts``: more of
        them, which ``use`` may ask for.

        Nothing should be compiled meanwhile: a file that changes is left out. Raises Invalid for a folder that does not say which facts its
        code is for.
        """
        if not self.new_files() and name in (None, self.name) and not facts:
            return None
        files = folders.list_files(self.path)
        told = self._folder.told
        saved = _save(self.path, files, name or self.name, told["store"], {**told["facts"], **(facts or {}), **self._here()})
        if name in (None, self.name):
            self._folder.tell({"files": files})
        return saved

    def _here(self) -> dict[str, str]:
        """The facts of the process that made the folder: its code is for them, whoever saves it."""
        here = self._folder.told.get("here")
        if not isinstance(here, dict) or here.get("kind") != known.KIND:
            raise Invalid(
                f"the lock file of {self.path} does not say what the engine's facts are: another version of kvstore made it; "
                "start the engine again with this one"
            )
        return here

    def save_in_background(self, logger: logging.Logger = _logger) -> threading.Thread:
        """Saves in another thread, which logs what becomes of it. The process does not end before it has."""

        def save() -> None:
            try:
                saved = self.save()
                what = f"saved as {saved.id}: {saved.files} files, {saved.bytes / 1e6:.1f} MB" if saved else "nothing new to save"
                logger.info("kvstore: compile caches %s: %s", self.name, what)
            except (Error, OSError) as error:
                logger.warning("kvstore: the compile caches %s were not saved: %s", self.name, error)

        thread = threading.Thread(target=save, name="kvstore-compiled")
        thread.start()
        return thread


def use(
    name: str,
    *,
    store: str | None = None,
    cache: Cache | None = None,
    facts: Mapping[str, str] | None = None,
    allow: Iterable[str] = (),
    strict: bool = False,
) -> Caches:
    """Uses compile caches, from here on and in all processes that this one starts. Call it before anything is compiled.

    ``store``: a URL; by default, $KVSTORE_SNAPSHOTS. ``cache``: a node's cache, in which the processes of a node share what one of them restored;
    by default, that of $KVSTORE_SNAPSHOT_CACHE, or one in this user's cache. ``facts``: what the snapshot must have besides those of this node
    (:func:`kvstore.compiled.facts.here`). ``allow``: names of facts that may differ. ``strict``: raises NotFound or Invalid where the
    folder would stay empty.

    A process uses one name: asked again, it returns the same. Raises Invalid if a compiler's folder is set already.
    """
    global _used
    with _lock:
        if _used is not None and os.environ.get("KVSTORE_COMPILE_CACHE_FOLDER") == str(_used.path):
            return _same(_used, name)
        if (entered := folders.Folder.entered()) is not None:
            # Of the process that started this one.
            _used = Caches(entered)
            return _same(_used, name)
        _refuse_other_folders()
        url = Store(store).url
        here, asked = known.here(), dict(facts or {})
        # With what this process is: whoever saves the folder for it may be in another environment.
        told = {"name": name, "store": url, "id": None, "why": "", "files": {}, "facts": asked, "here": here}
        folder = folders.make(told)
        try:
            restored = _restore(folder.path, name, url, cache, {**here, **asked}, tuple(allow), strict)
        except BaseException:
            folder.close()
            raise
        folder.tell(restored)
        folder.enter()
        atexit.register(folder.close)
        _used = Caches(folder, is_first=True)
        return _used


def from_environment(logger: logging.Logger = _logger) -> Caches | None:
    """Uses the caches that $KVSTORE_COMPILE_CACHE names, and logs what it finds. $KVSTORE_COMPILE_CACHE_ALLOW: names of facts that may differ, with
    commas between them. Returns None if none are named, or if something is wrong: the engine then starts without."""
    if not (name := os.environ.get("KVSTORE_COMPILE_CACHE")):
        return None
    was_used = _used is not None
    try:
        caches = use(name, allow=[one for one in os.environ.get("KVSTORE_COMPILE_CACHE_ALLOW", "").split(",") if one])
    except (Error, OSError) as error:
        logger.warning("kvstore: starting without the compile caches %s: %s", name, error)
        return None
    if caches.is_first and not was_used:
        if caches.id:
            logger.info("kvstore: compile caches %s restored from %s", name, caches.id)
        else:
            logger.warning("kvstore: compiling anew: %s", caches.why)
    return caches


def _same(used: Caches, name: str) -> Caches:
    if used.name != name:
        raise Invalid(f"this process uses the compile caches {used.name!r} already, and {name!r} is asked for")
    return used


def _refuse_other_folders() -> None:
    """Torch names its own default, too, once it has been asked."""
    user = pathlib.Path(tempfile.gettempdir()).glob("torchinductor_*")
    defaults = {str(path) for path in user}
    set_already = [name for name in folders.VARIABLES if os.environ.get(name) and os.environ[name] not in defaults]
    if set_already:
        raise Invalid(f"{', '.join(set_already)}: set already; unset them where kvstore is to keep compile caches")


def _restore(
    to: pathlib.Path, name: str, url: str, cache: Cache | None, facts: Mapping[str, str], allow: tuple[str, ...], strict: bool
) -> dict:
    """Restores a snapshot into a private folder. Returns what is told of it."""
    from kvstore import weights

    try:
        found, _ = Store(url).inspect(name)
        _refuse_unfit(found, facts, allow)
    except (NotFound, Invalid) as error:
        if strict:
            raise
        return {"why": str(error)}
    place = cache or Cache.default() or Cache(folders.base() / "restored", _CACHE_BYTES)
    with weights.hold(found.id, store=url, cache=place) as held:
        folders.copy_tree(held.path, to, _times(held))
    return {"id": found.id, "files": folders.list_files(to)}


def _times(held) -> dict[str, int]:
    try:
        told = json.loads(held.read(folders.TIMES))
        if not isinstance(told, dict):
            raise ValueError("no times by path")
        times = {path: told[path] for path in held.files if path in told}
    except (ValueError, RecursionError) as error:
        raise Invalid(f"{folders.TIMES} of {held.snapshot.id} cannot be read: {error}") from None
    if not all(type(time) is int and 0 <= time < 1 << 63 for time in times.values()):
        raise Invalid(f"{folders.TIMES} of {held.snapshot.id} has a time that is none")
    return times


def _refuse_unfit(found: Snapshot, facts: Mapping[str, str], allow: tuple[str, ...]) -> None:
    if found.facts.get("kind") != known.KIND:
        raise Invalid(f"the snapshot {found.id} holds no compile caches")
    unfit = known.differences(found.facts, facts, allow)
    if unfit:
        why = "; ".join(f"its {name} {reason}" for name, reason in unfit.items())
        raise Invalid(f"the compile caches of {found.id} do not fit: {why}; allow={','.join(unfit)} takes them nevertheless")


def _save(path: pathlib.Path, files: dict, name: str, url: str, facts: Mapping[str, str]) -> Snapshot:
    # Not among what is kept; it goes with the folder if this process is killed.
    staged = pathlib.Path(tempfile.mkdtemp(prefix=".tmp-saving-", dir=path))
    try:
        times = {file: time for file, (_, time) in files.items()}
        folders.copy_tree(path, staged, times)
        kept = {file: time for file, time in times.items() if (staged / file).exists()}
        (staged / folders.TIMES).write_text(json.dumps(kept, sort_keys=True))
        return Store(url).save(staged, name=name, facts=dict(facts))
    finally:
        shutil.rmtree(staged, ignore_errors=True)
