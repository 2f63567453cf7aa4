"""A real daemon: the one that the wheel installed, or the program that `KVSTORE_BIN` names."""

import os
import pathlib
import subprocess
import sys
import time

import kvstore

# What is bound to happen is waited for so long: on a busy machine it takes its time, and who does not wait in vain loses nothing.
PATIENCE_SECONDS = 60.0


def until(what: str, reached, seconds: float = PATIENCE_SECONDS):
    """Waits until `reached()` says something, and returns that. A daemon that is not there yet is asked again."""
    end = time.monotonic() + seconds
    while True:
        try:
            if found := reached():
                return found
        except kvstore.Unavailable:
            pass
        assert time.monotonic() < end, what
        time.sleep(0.02)


def program(name: str, variable: str) -> str:
    """The path of a program of this environment, unless the environment variable names another one."""
    return os.environ.get(variable) or str(pathlib.Path(sys.prefix) / "bin" / name)


class Daemon:
    def __init__(self, folder: pathlib.Path, *settings: str):
        self.folder = folder
        self.address = f"unix:{folder}/python.sock"
        self.settings = ("host.bytes=128MiB", "http.address=off", "log.level=error", *settings)
        self.process = None
        self.start()

    def start(self) -> None:
        command = [program("kvstore", "KVSTORE_BIN"), "serve", "--listen", self.address]
        for setting in self.settings:
            command += ["--set", setting]
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        end = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                kvstore.Client(self.address)
                return
            except kvstore.Unavailable:
                assert self.process.poll() is None, "the daemon ended at once"
                assert time.monotonic() < end, f"the daemon did not answer within {PATIENCE_SECONDS} s"
                time.sleep(0.01)

    def stop(self) -> None:
        """Ends it in order: what waits to be uploaded is."""
        self.process.terminate()
        assert self.process.wait(PATIENCE_SECONDS) == 0

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
