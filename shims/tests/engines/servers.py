"""vLLM's OpenAI servers, several of them from one process that has imported vLLM: the import takes longer than all else.

Run as a program: its one argument is a list of lists, the arguments of each server. It ends when they have.
"""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time
import urllib.request

from engine import ENVIRONMENT


def until(what: str, reached, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < end, what
        time.sleep(0.05)


def until_it_serves(url: str, process: subprocess.Popen, log: pathlib.Path, seconds: float = 400.0) -> None:
    end = time.monotonic() + seconds
    while True:
        assert process.poll() is None and time.monotonic() < end, log.read_text()[-4000:]
        try:
            urllib.request.urlopen(f"{url}/health", timeout=10)
            return
        except OSError:
            time.sleep(0.2)


def start(commands: list[list[str]], log: pathlib.Path) -> subprocess.Popen:
    """The servers with these arguments, in a group of processes of their own; `stop` ends it."""
    environment = {key: value for key, value in {**os.environ, **ENVIRONMENT}.items() if "MULTIPROCESSING" not in key}
    with open(log, "w") as out:
        return subprocess.Popen(
            [sys.executable, __file__, json.dumps(commands)],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )


def stop(process: subprocess.Popen) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def main() -> None:
    import vllm.v1.engine.async_llm  # noqa: F401
    import vllm.v1.engine.core  # noqa: F401
    import vllm.v1.worker.cpu_worker  # noqa: F401
    from vllm.entrypoints.launchers.api_server.entry import main as serve

    for arguments in json.loads(sys.argv[1]):
        if os.fork() == 0:
            sys.argv = ["server", *arguments]
            try:
                serve()
            finally:
                os._exit(1)
    # One that ends early ends the others: nobody waits for it in vain.
    os.wait()
    os.killpg(os.getpgid(0), signal.SIGKILL)


if __name__ == "__main__":
    main()
