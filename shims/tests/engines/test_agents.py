"""Agents that talk to two vLLM servers through the router, with the client that most of them use.

Before each request, the router explains its very bytes: how many tokens the prompt has, and how many of them each worker has. The engine's
answer then says what was so. The router's prompts are right if both agree, and if each conversation stays where its beginning is.
"""

import json
import os
import pathlib
import subprocess
import threading
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import httpx
import openai
import pytest
import tokenizers

import models
import servers
from conversations import ANSWER, CONVERSATIONS, TEMPLATE, Step
from daemon import program
from ports import free_port

ROUTER = program("kvstore-router", "KVSTORE_ROUTER_BIN")
BLOCK_TOKENS = 32
REQUESTS, CONTINUING = 36, 30
# An engine that stalls for some hundred milliseconds, as it does on a busy machine, is thought to be slower for a while. On a quiet one
# all turns stay: the figure says how many did.
STAY_MIN = 20


class Turn(NamedTuple):
    """One request: what the router said of it, and what the engine did."""

    conversation: str
    number: int
    # Which worker answered, and which one did the turn before.
    worker: str
    before: str | None
    # The prompt's tokens: the engine's, how many the router counted, whether it knew them, and how many it has in whole blocks of the same
    # names.
    prompt: list[int]
    explained: int
    known: bool
    same: int
    # Tokens that came from the engine's cache, and those that each worker was believed to have.
    cached: int
    believed: dict[str, int]

    @property
    def name(self) -> str:
        return f"{self.conversation} {self.number}"

    @property
    def is_equal(self) -> bool:
        return self.known and self.explained == len(self.prompt) and self.same == whole_blocks(len(self.prompt))

    @property
    def is_cached_right(self) -> bool:
        more = self.cached - self.believed[self.worker]
        # A first turn goes when another one does. If that one was well ahead of it, their common beginning is there by then.
        return -BLOCK_TOKENS <= more and (more <= BLOCK_TOKENS or self.before is None)

    @property
    def stayed(self) -> bool:
        return self.worker == self.before


def whole_blocks(tokens: int) -> int:
    """Tokens of a prompt that a cache can have: whole blocks, and never the last token."""
    return (tokens - 1) // BLOCK_TOKENS * BLOCK_TOKENS


def post(url: str, body: bytes) -> dict:
    request = urllib.request.Request(url, body, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=200) as answer:
        return json.load(answer)


def warm_up(url: str) -> None:
    """An engine's first prompts take seconds: by them, the router would think it slow for long."""
    for seed in range(3):
        prompt = [7 + (at * at * 31 + seed * 7919) % 1000 for at in range(1000)]
        post(f"{url}/v1/completions", json.dumps(dict(model="tiny", prompt=prompt, max_tokens=8)).encode())


class Fleet:
    """Two servers and a router before them."""

    def __init__(self, folder: pathlib.Path, model: pathlib.Path):
        urls, commands, workers = [], [], []
        for name in ("a", "b"):
            port, events, replay = (free_port() for _ in range(3))
            publish = dict(enable_kv_cache_events=True, publisher="zmq", topic="kv")
            publish |= dict(endpoint=f"tcp://*:{events}", replay_endpoint=f"tcp://*:{replay}")
            command = ["--model", str(model), "--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(port)]
            command += ["--dtype", "float32", "--block-size", str(BLOCK_TOKENS), "--max-model-len", "4096", "--enforce-eager"]
            command += ["--enable-prefix-caching", "--prefix-caching-hash-algo", "sha256_cbor", "--enable-prompt-tokens-details"]
            command += ["--enable-auto-tool-choice", "--tool-call-parser", "hermes", "--kv-events-config", json.dumps(publish)]
            commands.append(command)
            urls.append(f"http://127.0.0.1:{port}")
            local = "tcp://127.0.0.1"
            follow = f"events={local}:{events},replay={local}:{replay},topic=kv"
            # No event says yet how long blocks are, when the first request comes.
            workers += ["--worker", f"id={name},url={urls[-1]},model=tiny,block_tokens={BLOCK_TOKENS},{follow}"]
        log = folder / "servers.log"
        self._servers = servers.start(commands, log)
        self._router = None
        try:
            for url in urls:
                servers.until_it_serves(url, self._servers, log)
            with ThreadPoolExecutor(len(urls)) as pool:
                list(pool.map(warm_up, urls))
            command = [ROUTER, "serve", "--listen", "127.0.0.1:0", "--tokenizer", f"tiny={model}", *workers]
            with open(folder / "router.log", "w") as out:
                self._router = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=out, text=True)
            self.url = self._router.stdout.readline().split()[-1]
            servers.until("the router follows both", self._follows)
        except BaseException:
            self.stop()
            raise

    def _follows(self) -> bool:
        with urllib.request.urlopen(f"{self.url}/workers", timeout=60) as answer:
            return all(worker["up"] and worker["serves"] and not worker["problems"] for worker in json.load(answer))

    def stop(self) -> None:
        if self._router:
            self._router.terminate()
            self._router.wait(60)
        servers.stop(self._servers)

    def explain(self, body: bytes) -> dict:
        return post(f"{self.url}/explain", body)

    def held(self, body: bytes, worker: str) -> int:
        """Tokens of the prompt that the worker's engine has, as the router sees it."""
        return next(row["engine_tokens"] for row in self.explain(body)["workers"] if row["worker"] == worker)


class Conversation:
    """One agent's, with a client of its own."""

    def __init__(self, name: str, steps: list[Step], fleet: Fleet):
        self.name, self._steps, self._fleet = name, iter(steps), fleet
        self._messages: list[dict] = []
        self._answer, self._worker, self._number = "", None, 0
        self._body, self._explained = b"", {}
        self._together: threading.Barrier | None = None
        http = httpx.Client(event_hooks=dict(request=[self._before_it_goes]), timeout=400)
        self._client = openai.OpenAI(base_url=f"{fleet.url}/v1", api_key="none", max_retries=0, http_client=http)

    def close(self) -> None:
        self._client.close()

    def _before_it_goes(self, request: httpx.Request) -> None:
        self._body = request.read()
        self._explained = self._fleet.explain(self._body)
        if self._together:
            self._together.wait(200)

    def turn(self, together: threading.Barrier | None = None) -> Turn:
        """The next request; `together`: it goes when others go."""
        step, self._together = next(self._steps), together
        self._messages += self._said(step.say)
        more = dict(step.more)
        more["extra_body"] = dict(more.get("extra_body", {}), return_token_ids=True)
        asked = dict(model="tiny", messages=self._messages, max_completion_tokens=16, temperature=0) | more
        if step.stream:
            asked |= dict(stream=True, stream_options=dict(include_usage=True))
        raw = self._client.chat.completions.with_raw_response.create(**asked)
        before, self._worker = self._worker, raw.headers["x-kvstore-worker"]
        prompt, tokens, self._answer, usage = (streamed if step.stream else whole)(raw.parse())
        assert (len(prompt), len(tokens)) == (usage.prompt_tokens, usage.completion_tokens)
        self._number += 1
        self._until_its_events_came(prompt + tokens)
        explained = self._explained
        return Turn(
            self.name,
            self._number,
            self._worker,
            before,
            prompt,
            explained["prompt_tokens"],
            explained["tokens_known"],
            min(self._fleet.held(self._body, self._worker), whole_blocks(len(prompt))),
            usage.prompt_tokens_details.cached_tokens,
            {row["worker"]: row["engine_tokens"] + row["fetched_tokens"] for row in explained["workers"]},
        )

    def _said(self, messages: list[dict]) -> list[dict]:
        said = json.dumps(messages).replace(json.dumps(ANSWER), json.dumps(self._answer))
        return json.loads(said)

    def _until_its_events_came(self, tokens: list[int]) -> None:
        """The router is asked by the engine's own tokens: its way to tokens does not matter here."""
        body = json.dumps(dict(model="tiny", prompt=tokens)).encode()
        worker, held = self._worker, whole_blocks(len(tokens))
        servers.until(f"the router knows what {worker} has of {self.name}", lambda: self._fleet.held(body, worker) >= held)


def whole(answer) -> tuple:
    """An answer's prompt and tokens, its text, and its usage."""
    (choice,) = answer.choices
    return answer.prompt_token_ids, choice.token_ids, choice.message.content or "", answer.usage


def streamed(pieces) -> tuple:
    prompt, tokens, text, usage = [], [], "", None
    for piece in pieces:
        prompt = getattr(piece, "prompt_token_ids", None) or prompt
        usage = piece.usage or usage
        for choice in piece.choices:
            tokens += getattr(choice, "token_ids", None) or []
            text += choice.delta.content or ""
    return prompt, tokens, text, usage


@pytest.fixture(scope="module")
def turns(folder, tmp_path_factory):
    """All turns. Conversations begin two at a time, so that both workers get some; then they take turns."""
    model = models.make(folder, "llama", seed=13)
    models.write_tokenizer(
        model,
        TEMPLATE,
        dict(bos_token=None, eos_token="<|end|>", pad_token="<pad>"),
        ["<pad>", "<|begin|>", "<|end|>"],
        ["<think>", "</think>", "<tool_call>", "</tool_call>"],
    )
    fleet = Fleet(tmp_path_factory.mktemp("agents"), model)
    conversations = [Conversation(name, steps, fleet) for name, steps in CONVERSATIONS.items()]
    turns: list[Turn] = []
    try:
        with ThreadPoolExecutor(2) as pool:
            for pair in zip(conversations[::2], conversations[1::2]):
                together = threading.Barrier(len(pair))
                turns += pool.map(lambda conversation, together=together: conversation.turn(together), pair)
        for _ in range(CONTINUING // len(conversations)):
            turns += [conversation.turn() for conversation in conversations]
    finally:
        for conversation in conversations:
            conversation.close()
        fleet.stop()
    show(turns, tokenizers.Tokenizer.from_file(str(model / "tokenizer.json")))
    record(turns)
    return turns


def show(turns: list[Turn], tokenizer: tokenizers.Tokenizer) -> None:
    print(f"\n{'conversation':14}{'turn':>5} {'worker':7}{'tokens':>7}{'said':>7}{'same':>7}{'cached':>7}  believed")
    for turn in turns:
        came = f"{turn.before or ' '}>{turn.worker}"
        figures = "".join(f"{figure:7}" for figure in (len(turn.prompt), turn.explained, turn.same, turn.cached))
        print(f"{turn.conversation:14}{turn.number:5} {came:7}{figures}  {turn.believed}")
        if not turn.is_equal:
            lacking = tokenizer.decode(turn.prompt[turn.same :][:BLOCK_TOKENS], skip_special_tokens=False)
            print(f"  tokens known: {turn.known}; what the router names otherwise begins in {lacking!r}")


def record(turns: list[Turn]) -> None:
    """Writes the figures, where they are wanted."""
    path = os.environ.get("KVSTORE_FIGURES")
    if not path:
        return
    share = lambda count, of: round(count / of, 4)
    figures = {
        "prompts.live_tokens_equal": share(sum(turn.is_equal for turn in turns), REQUESTS),
        "prompts.live_cached_right": share(sum(turn.is_cached_right for turn in turns), REQUESTS),
        "prompts.live_same_worker": share(sum(turn.stayed for turn in turns), CONTINUING),
    }
    pathlib.Path(path).write_text(json.dumps(figures, indent=1) + "\n")


def test_the_router_s_prompts_are_the_engine_s(turns):
    assert len(turns) == REQUESTS
    assert [turn.name for turn in turns if not turn.is_equal] == []


def test_what_is_believed_cached_is_cached(turns):
    assert [turn.name for turn in turns if not turn.is_cached_right] == []
    # Beliefs that say nothing would be right of prompts that nobody has.
    assert all(turn.cached > 512 for turn in turns if turn.stayed)


def test_conversations_stay_where_they_are(turns):
    continuing = [turn for turn in turns if turn.before]
    assert len(continuing) == CONTINUING
    assert {turn.worker for turn in continuing} == {"a", "b"}
    # Each worker has some of every conversation, and the right one more of it.
    assert all(min(turn.believed.values()) > 0 for turn in continuing)
    moved = [turn.name for turn in continuing if not turn.stayed]
    assert len(moved) <= CONTINUING - STAY_MIN, moved
