"""A launcher in a process of its own, and its clients."""

import os
import pathlib
import subprocess
import sys
import tempfile
import time

MODULE = [sys.executable, "-m", "kvstore.launcher"]
# For whatever a busy machine takes.
PATIENCE_S = 120


def until(condition, what: str):
    """Waits until a condition holds, and returns what it returned."""
    end = time.monotonic() + PATIENCE_S
    while not (value := condition()):
        assert time.monotonic() < end, f"{what}: not within {PATIENCE_S} s"
        time.sleep(0.02)
    return value


def is_alive(pid: int) -> bool:
    try:
        state = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


class Launcher:
    def __init__(self, imports: str, *arguments: str, environment: dict | None = None):
        # A socket's path is short.
        self._folder = tempfile.TemporaryDirectory(prefix="kvl-")
        self.socket = f"{self._folder.name}/s"
        self.environment = {**os.environ, **(environment or {})}
        self._log = open(f"{self._folder.name}/log", "w")
        command = [*MODULE, "serve", "--socket", self.socket, "--import", imports, *arguments]
        self.process = subprocess.Popen(command, stderr=self._log, stdin=subprocess.DEVNULL, env=self.environment)

    @property
    def log(self) -> str:
        return pathlib.Path(self._log.name).read_text()

    def wait_ready(self, times: int = 1) -> "Launcher":
        def is_ready() -> bool:
            assert self.process.poll() is None, self.log
            return self.log.count("ready at") >= times

        until(is_ready, "the imports")
        return self

    def template(self) -> int:
        """The process that forks."""
        children = pathlib.Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return int(children[-1])

    def command(self, *program: str, options: tuple[str, ...] = ()) -> list[str]:
        return [*MODULE, "run", "--socket", self.socket, *options, "--", *map(str, program)]

    def start(self, *program: str, options: tuple[str, ...] = (), environment: dict | None = None, **more) -> subprocess.Popen:
        everything = {**self.environment, **(environment or {})}
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1)
        return subprocess.Popen(self.command(*program, options=options), env=everything, **{**pipes, **more})

    def run(self, *program: str, given: str = "", **more) -> subprocess.CompletedProcess:
        process = self.start(*program, **more)
        out, err = process.communicate(given, timeout=PATIENCE_S)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait(PATIENCE_S)
        self._log.close()
        self._folder.cleanup()
