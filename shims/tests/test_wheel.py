"""The wheel alone, in an environment with nothing else on its PATH: the module, and both programs."""

import json
import os
import pathlib
import subprocess
import sys
import time
import urllib.request
import venv

import pytest

from ports import free_port

WHEEL = os.environ.get("KVSTORE_WHEEL")
pytestmark = pytest.mark.skipif(not WHEEL, reason="KVSTORE_WHEEL names no wheel: `make test-python` builds one")
# Neither a compiler, nor a shell, nor this environment's own programs.
BARE = {"PATH": ""}


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> pathlib.Path:
    """The folder of programs of an environment into which the wheel was installed, without an index."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, symlinks=True, with_pip=False)
    python = folder / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-index", "--no-deps", WHEEL]
    subprocess.run(install, check=True)
    return folder / "bin"


def answer(url: str, process: subprocess.Popen) -> str:
    """What `url` answers, once the process listens: a minute at most."""
    end = time.monotonic() + 60
    while True:
        try:
            with urllib.request.urlopen(url, timeout=20) as response:
                return response.read().decode()
        except OSError:
            assert process.poll() is None, f"the process ended with {process.returncode}"
            assert time.monotonic() < end, f"{url} does not answer"
            time.sleep(0.01)


def stop(process: subprocess.Popen) -> int:
    process.terminate()
    return process.wait(60)


def test_it_says_which_glibc_it_needs():
    assert "-abi3-manylinux_2_" in pathlib.Path(WHEEL).name


def test_the_programs_need_no_library_that_a_bare_system_lacks(installed):
    """The C++ standard library is in them: RocksDB is C++."""
    for name in ("kvstore", "kvstore-router"):
        program = (installed / name).read_bytes()
        assert program.startswith(b"\x7fELF")
        assert b"libstdc++.so" not in program


def test_the_programs_say_what_they_are(installed):
    for name in ("kvstore", "kvstore-router"):
        version = subprocess.run([installed / name, "--version"], env=BARE, capture_output=True, text=True, check=True)
        assert version.stdout.startswith(f"{name} ")
        usage = subprocess.run([installed / name, "--help"], env=BARE, capture_output=True, text=True, check=True)
        assert "serve" in usage.stdout


def test_the_daemon_serves_the_module_of_the_same_wheel(installed, tmp_path):
    port, address = free_port(), f"unix:{tmp_path}/private/kvstore.sock"
    settings = [
        f"--set={setting}" for setting in (f"http.address=127.0.0.1:{port}", f"nvme.paths={tmp_path}/disk", "nvme.bytes=64MiB")
    ]
    command = [installed / "kvstore", "serve", "--listen", address, "--host-bytes", "32MiB", *settings]
    daemon = subprocess.Popen(command, env=BARE, stdout=subprocess.DEVNULL)
    try:
        answer(f"http://127.0.0.1:{port}/readyz", daemon)
        script = (
            "import kvstore, sys\n"
            "client = kvstore.Client(sys.argv[1])\n"
            "layer = kvstore.LayerGroup(layers=1, heads=1, head_bytes=64)\n"
            "group = client.register_layout('m', dtype='uint8', block_tokens=16, groups=[layer]).group(0)\n"
            "group.put_from([b'k'], [bytes(group.block_bytes)])\n"
            "with group.leases([b'k']) as views:\n"
            "    print(client.is_local, bytes(views[0]) == bytes(group.block_bytes))\n"
        )
        # Isolated: neither this folder nor the environment decides what is imported.
        python = [installed / "python", "-I", "-c", script, address]
        printed = subprocess.run(python, env=BARE, capture_output=True, text=True, check=True)
        assert printed.stdout == "True True\n"
    finally:
        code = stop(daemon)
    assert code == 0


def test_the_router_serves(installed):
    port = free_port()
    worker = "id=a,url=http://127.0.0.1:1,model=m"
    command = [installed / "kvstore-router", "serve", "--listen", f"127.0.0.1:{port}", "--worker", worker]
    router = subprocess.Popen(command, env=BARE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        assert json.loads(answer(f"http://127.0.0.1:{port}/health", router)) == {"status": "ok"}
    finally:
        code = stop(router)
    assert code == 0
