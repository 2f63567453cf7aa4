"""A real daemon for every test: `KVSTORE_BIN` names its program."""

import os
import pathlib
import subprocess
import time

import pytest

import kvstore

BLOCK_TOKENS = 16


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
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
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


@pytest.fixture
def daemon(tmp_path):
    daemon = Daemon(tmp_path, "nvme.paths=off")
    yield daemon
    daemon.kill()


@pytest.fixture
def disk_daemon(tmp_path):
    daemon = Daemon(tmp_path, f"nvme.paths={tmp_path}/nvme", "nvme.bytes=256MiB", "host.bytes=16MiB")
    yield daemon
    daemon.kill()


def register(client: kvstore.Client, block_bytes: int, model: str = "python") -> kvstore.Group:
    group = kvstore.LayerGroup(layers=1, planes=1, heads=1, head_bytes=block_bytes // BLOCK_TOKENS)
    return client.register_layout(model, dtype="uint8", block_tokens=BLOCK_TOKENS, groups=[group]).group()


@pytest.fixture(params=["local", "grpc"])
def group(request, daemon):
    client = kvstore.Client(daemon.address, plane=request.param)
    assert client.is_local == (request.param == "local")
    return register(client, 64 * 1024)
