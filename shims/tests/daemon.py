"""A real daemon: `KVSTORE_BIN` names its program."""

import os
import pathlib
import subprocess
import time

import kvstore


class Daemon:
    def __init__(self, folder: pathlib.Path, *settings: str):
        self.folder = folder
        self.address = f"unix:{folder}/python.sock"
        self.settings = ("host.bytes=128MiB", "http.address=off", "log.level=error", *settings)
        self.process = None
        self.start()

    def start(self) -> None:
        program = os.environ["KVSTORE_BIN"]
        command = [program, "serve", "--listen", self.address]
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
