"""Two vLLM servers over one daemon, behind the router: a conversation stays where its prefix is, and an answer outlives its worker."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time
import urllib.request

import pytest

import models
from daemon import Daemon, program
from engine import ENVIRONMENT
from ports import free_port
from servers import until

# The servers' answers get no longer than 100 tokens while this file is there (gate.py).
GATE = "gate"
ROUTER = program("kvstore-router", "KVSTORE_ROUTER_BIN")


def get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=60) as answer:
        return answer.read().decode()


def post(url: str, body: dict):
    request = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})
    return urllib.request.urlopen(request, timeout=400)


class Server:
    """vLLM's OpenAI server, with the connector and KV events."""

    def __init__(self, name: str, model: pathlib.Path, store: str, folder: pathlib.Path):
        self.name, self.url = name, f"http://127.0.0.1:{free_port()}"
        self.events, self.replay = (f"tcp://127.0.0.1:{free_port()}" for _ in range(2))
        # A PUB socket of vLLM binds where the host is a star, and connects otherwise.
        bound = [endpoint.replace("127.0.0.1", "*") for endpoint in (self.events, self.replay)]
        events = dict(enable_kv_cache_events=True, publisher="zmq", endpoint=bound[0], replay_endpoint=bound[1], topic="kv")
        connector = dict(
            kv_connector="KvStoreConnector",
            kv_connector_module_path="kvstore.vllm",
            kv_role="kv_both",
            kv_load_failure_policy="recompute",
            kv_connector_extra_config=dict(address=store, lookup_deadline=5.0),
        )
        command = [
            sys.executable,
            "-m",
            "vllm.entrypoints.openai.api_server",
            "--model",
            str(model),
            "--served-model-name",
            "tiny",
        ]
        command += ["--port", self.url.rsplit(":", 1)[1], "--host", "127.0.0.1", "--dtype", "float32", "--block-size", "32"]
        command += ["--max-model-len", "2048", "--enforce-eager", "--skip-tokenizer-init", "--enable-prefix-caching"]
        command += ["--logits-processors", "gate:Gate"]
        command += ["--prefix-caching-hash-algo", "sha256_cbor", "--kv-events-config", json.dumps(events)]
        command += ["--kv-transfer-config", json.dumps(connector)]
        self.log = folder / f"server-{name}.log"
        environment = {key: value for key, value in {**os.environ, **ENVIRONMENT}.items() if "MULTIPROCESSING" not in key}
        environment |= {"PYTHONPATH": str(pathlib.Path(__file__).parent), "KVSTORE_TEST_GATE": str(folder / GATE)}
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=open(self.log, "w"),
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )

    def until_it_serves(self) -> None:
        until = time.monotonic() + 400
        while True:
            assert self.process.poll() is None, self.log.read_text()[-4000:]
            assert time.monotonic() < until, self.log.read_text()[-4000:]
            try:
                get(f"{self.url}/health")
                return
            except OSError:
                time.sleep(0.5)

    def kill(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def metric(self, name: str) -> float:
        lines = (line for line in get(f"{self.url}/metrics").splitlines() if line.startswith(name))
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


class Router:
    def __init__(self, servers: list[Server], store: str, folder: pathlib.Path):
        command = [ROUTER, "serve", "--listen", "127.0.0.1:0"]
        for server in servers:
            worker = f"id={server.name},url={server.url},model=tiny,events={server.events},replay={server.replay},topic=kv,node={store}"
            command += ["--worker", worker]
        self.log = open(folder / "router.log", "w")
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self.log, text=True)
        self.url = self.process.stdout.readline().split()[-1]

    def explain(self, prompt: list[int]) -> dict[str, dict]:
        """What it thinks of each worker."""
        with post(f"{self.url}/explain", dict(model="tiny", prompt=prompt)) as answer:
            return {worker["worker"]: worker for worker in json.load(answer)["workers"]}

    def complete(self, prompt: list[int], max_tokens: int) -> tuple[str, list[int]]:
        body = dict(model="tiny", prompt=prompt, max_tokens=max_tokens, temperature=0, ignore_eos=True, return_token_ids=True)
        with post(f"{self.url}/v1/completions", body) as answer:
            return answer.headers["x-kvstore-worker"], json.load(answer)["choices"][0]["token_ids"]

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(60)


@pytest.fixture(scope="module")
def fleet(folder, tmp_path_factory):
    place = tmp_path_factory.mktemp("router")
    daemon = Daemon(place, "nvme.paths=off", "host.bytes=512MiB")
    servers = [Server(name, models.make(folder, "llama"), daemon.address, place) for name in ("a", "b")]
    for server in servers:
        server.until_it_serves()
    router = Router(servers, daemon.address, place)
    yield router, {server.name: server for server in servers}, place / GATE
    router.stop()
    for server in servers:
        server.kill()
    daemon.kill()


def prompt(tokens: int, seed: int) -> list[int]:
    return [3 + (at * at * 31 + at * 17 + seed * 7919) % (models.VOCABULARY - 3) for at in range(tokens)]


def test_a_conversation_s_second_turn_goes_to_the_worker_that_holds_it(fleet):
    router, servers, _ = fleet
    conversations, holders = [], []
    for seed in range(6):
        first = prompt(700, seed)
        worker, answer = router.complete(first, 40)
        conversations.append(first + answer)
        holders.append(worker)
    assert set(holders) == set(servers), "new conversations spread"
    stayed = 0
    for conversation, holder in zip(conversations, holders):

        def known(worker: str, where: str, conversation=conversation) -> int:
            return router.explain(conversation)[worker][where]

        # All whole blocks but the last, whose final token's keys are not computed.
        held = (len(conversation) - 1) // 32 * 32
        until("its events came", lambda known=known, holder=holder, held=held: known(holder, "engine_tokens") >= held)
        # The store's daemon has it for both.
        other = next(name for name in servers if name != holder)
        until("the store has it", lambda known=known, other=other: known(other, "fetched_tokens") >= 640)
        second = conversation + prompt(60, 99)
        expected = {name: worker["expected_seconds"] for name, worker in router.explain(second).items()}
        worker, _ = router.complete(second, 8)
        stayed += worker == holder
        # An engine that stood still, as it does on a busy machine, is thought to be slower for a while.
        assert worker == holder or expected[worker] < expected[holder], expected
    assert stayed >= len(conversations) // 2


def test_an_answer_goes_on_at_the_other_worker_when_its_own_is_killed(fleet):
    router, servers, gate = fleet
    asked = prompt(600, 77)
    body = dict(model="tiny", prompt=asked, max_tokens=600, temperature=0, ignore_eos=True, return_token_ids=True)
    # What an engine says that is left alone.
    with post(f"{servers['a'].url}/v1/completions", body) as answer:
        oracle = json.load(answer)["choices"][0]["token_ids"]
    assert len(oracle) == 600
    hits = {name: server.metric("vllm:external_prefix_cache_hits_total") for name, server in servers.items()}
    # On a busy machine an engine runs far ahead of the process before it that answers in its name: all could be said before the kill.
    gate.touch()
    stream = post(f"{router.url}/v1/completions", dict(body, stream=True, stream_options=dict(include_usage=True)))
    holder = stream.headers["x-kvstore-worker"]
    tokens, killed, usage, ended = [], False, None, False
    for line in stream:
        data = line.decode().strip().removeprefix("data: ")
        if not data:
            continue
        if data == "[DONE]":
            ended = True
            break
        piece = json.loads(data)
        assert "error" not in piece, piece
        usage = piece.get("usage") or usage
        for choice in piece["choices"]:
            tokens += choice.get("token_ids") or []
        if len(tokens) >= 50 and not killed:
            servers[holder].kill()
            killed = True
            gate.unlink()
    assert killed and ended
    assert tokens == oracle
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (600, 600)
    counted = [line for line in get(f"{router.url}/metrics").splitlines() if line.startswith("kvstore_router_resumed_total")]
    assert counted == ["kvstore_router_resumed_total 1"]
    if holder != "a":
        return
    # The other had never seen the prompt: it found it in the store.
    assert servers["b"].metric("vllm:external_prefix_cache_hits_total") - hits["b"] >= 576


def test_what_is_left_goes_on_serving(fleet):
    router, servers, _ = fleet
    alive = next(name for name, server in servers.items() if server.process.poll() is None)
    for seed in range(3):
        worker, tokens = router.complete(prompt(100, 200 + seed), 4)
        assert (worker, len(tokens)) == (alive, 4)
