"""Real engines over a real daemon: see engine.py."""

import pathlib
import sys

import pytest

sys.path[:0] = [str(pathlib.Path(__file__).parent), str(pathlib.Path(__file__).parent.parent)]

import models  # noqa: E402
from daemon import Daemon  # noqa: E402
from engine import Zygote  # noqa: E402


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("engines")


@pytest.fixture(scope="session")
def zygote(folder):
    zygote = Zygote(folder)
    yield zygote
    zygote.close()


@pytest.fixture(scope="session")
def model(folder):
    return lambda kind="llama", seed=7: models.make(folder, kind, seed)


@pytest.fixture
def daemon(tmp_path):
    daemon = Daemon(tmp_path, "nvme.paths=off", "host.bytes=512MiB")
    yield daemon
    daemon.kill()


@pytest.fixture
def disk_daemon(tmp_path):
    daemon = Daemon(tmp_path, f"nvme.paths={tmp_path}/nvme", "nvme.bytes=512MiB", "host.bytes=512MiB")
    yield daemon
    daemon.kill()
