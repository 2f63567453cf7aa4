"""A real daemon for every test."""

import signal

import pytest

import kvstore

from daemon import Daemon

BLOCK_TOKENS = 16

# Below nohup it is ignored, and so it is in every process that a test starts: a test of signals then waited for ever.
signal.signal(signal.SIGHUP, signal.SIG_DFL)


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
