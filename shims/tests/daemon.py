"""A real daemon: the one that the wheel installed, or the program that `KVSTORE_BIN` names."""

import os
import pathlib
import subprocess
import sys
import time

import kvstore


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
        for _ in range(3000):
            try:
                kvstore.Client(self.address)
                return
            except kvstore.Unavailable:
                assert self.process.poll() is None, "the daemon ended at once"
                time.sleep(0.01)
        raise AssertionError("the daemon did not answer within 30 s")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
