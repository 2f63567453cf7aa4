"""What a forked child becomes: the process that ``python SCRIPT``, ``python -m MODULE`` or ``python -c COMMAND`` would have made."""

from __future__ import annotations

import builtins
import ctypes
import os
import random
import runpy
import signal
import sys
import tempfile
import time
import types
import zipfile
from importlib.machinery import SourceFileLoader

from .wire import Request

__all__ = ["become", "finds_in_folder", "run"]

_PR_SET_PDEATHSIG = 1
_FOLDER = os.path.dirname(__file__)
_first: list = []


def become(request: Request, streams: list[int], environment: dict[str, str], signals: set[int], launcher: int) -> None:
    """Takes over the client's streams, folder and so on, and ``environment``. ``signals``: those that it blocks from then on. Ends if the
    launcher has ended meanwhile."""
    for number in (signal.SIGCHLD, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in request.ignored:
        signal.signal(number, signal.SIG_IGN)
    os.setsid()
    signal.pthread_sigmask(signal.SIG_SETMASK, signals)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != launcher:
        os._exit(128 + signal.SIGTERM)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.umask(request.umask)
    os.environ.clear()
    os.environ.update(environment)
    try:
        os.chdir(request.folder)
    except OSError as error:
        raise SystemExit(f"{request.folder}: {error.strerror}") from None
    _refresh()


def _refresh() -> None:
    """Makes anew what a process makes for itself, and of its environment, while it starts."""
    for stream in (sys.stdout, sys.stderr):
        unbuffered = bool(os.environ.get("PYTHONUNBUFFERED"))
        stream.reconfigure(line_buffering=stream is sys.stderr or os.isatty(stream.fileno()), write_through=unbuffered)
    time.tzset()
    tempfile.tempdir = None
    random.seed()
    if (numpy := sys.modules.get("numpy.random")) is not None:
        numpy.seed()
    if (torch := sys.modules.get("torch")) is not None:
        torch.default_generator.seed()
    if (process := sys.modules.get("multiprocessing.process")) is not None:
        process.current_process().authkey = os.urandom(32)
    _start_openblas()


def _start_openblas() -> None:
    """OpenBLAS starts its threads while it is imported. The launcher keeps it from that; here it gets as many as it would have had."""
    told = next((os.environ[name] for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS") if name in os.environ), "")
    threads = int(told) if told.isdigit() and int(told) else len(os.sched_getaffinity(0))
    with open("/proc/self/maps") as maps:
        libraries = {line.split(maxsplit=5)[5].strip() for line in maps if "openblas" in line}
    for library in libraries:
        for name in ("scipy_openblas_set_num_threads64_", "scipy_openblas_set_num_threads", "openblas_set_num_threads"):
            if (set_threads := getattr(ctypes.CDLL(library), name, None)) is not None:
                set_threads(threads)
                break


def run(request: Request) -> None:
    """Runs the program. Raises SystemExit at its end."""
    main = types.ModuleType("__main__")
    main.__dict__["__builtins__"] = builtins
    # The module that was the main one has code that still runs.
    _first.append(sys.modules["__main__"])
    sys.modules["__main__"] = main
    sys.argv = [{"module": "-m", "command": "-c", "script": request.what}[request.kind], *request.arguments]
    sys.orig_argv = [
        sys.executable,
        *({"module": ["-m"], "command": ["-c"]}.get(request.kind, [])),
        request.what,
        *request.arguments,
    ]
    try:
        {"module": _module, "command": _command, "script": _script}[request.kind](request.what, main)
    except SystemExit:
        raise
    except BaseException as error:
        below = _below(error.__traceback__)
        sys.excepthook(type(error), error.with_traceback(below), below)
        if isinstance(error, KeyboardInterrupt):
            # The interpreter ends by the signal; it has been said why.
            sys.excepthook = lambda *_: None
            raise
        raise SystemExit(1) from None
    raise SystemExit(0)


def _below(traceback):
    """A traceback without the frames above the program's own."""
    ours = lambda frame: frame.f_code.co_filename.startswith(_FOLDER) or "runpy" in frame.f_code.co_filename
    while traceback is not None and ours(traceback.tb_frame):
        traceback = traceback.tb_next
    return traceback


def finds_in_folder() -> bool:
    """Returns whether Python looks for modules beside its program first."""
    return not (getattr(sys.flags, "safe_path", False) or sys.flags.isolated)


def _find_in(folder: str) -> None:
    if finds_in_folder():
        sys.path.insert(0, folder)


def _module(name: str, _main: types.ModuleType) -> None:
    _find_in(os.getcwd())
    runpy._run_module_as_main(name)


def _command(command: str, main: types.ModuleType) -> None:
    _find_in("")
    exec(compile(command, "<string>", "exec"), main.__dict__)


def _script(path: str, main: types.ModuleType) -> None:
    path = os.path.abspath(path)
    if os.path.isdir(path) or zipfile.is_zipfile(path):
        sys.path.insert(0, path)
        return runpy._run_module_as_main("__main__", alter_argv=False)
    try:
        with open(path, "rb") as file:
            source = file.read()
    except OSError as error:
        print(f"{sys.executable}: can't open file {path!r}: [Errno {error.errno}] {error.strerror}", file=sys.stderr)
        raise SystemExit(2) from None
    _find_in(os.path.dirname(os.path.realpath(path)))
    main.__dict__.update(__file__=path, __cached__=None, __loader__=SourceFileLoader("__main__", path))
    exec(compile(source, path, "exec"), main.__dict__)
