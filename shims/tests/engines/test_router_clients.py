"""Clients that people use, straight to vLLM and through the router: the answers are the same.

The router is told of one server under two addresses, so that it takes it for two engines and asks for token ids, as it does where an
answer could go on elsewhere. Requests are greedy, or have a seed.
"""

import asyncio
import json
import os
import pathlib
import subprocess
import sys
import urllib.request

import agents
import openai
import pydantic
import pytest

import models
from daemon import program
from engine import ENVIRONMENT
from ports import free_port
from servers import until_it_serves

ROUTER = program("kvstore-router", "KVSTORE_ROUTER_BIN")
TEMPLATE = (
    "{% for message in messages %}<s>{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if tools %}tools: {{ tools | tojson }}\n{% endif %}{% if add_generation_prompt %}<s>assistant:{% endif %}"
)
# What differs from one answer to the next, whoever passes it on.
ITS_OWN = {"id", "created", "created_at", "completed_at", "item_id", "call_id", "response_id", "request_id"}

# A model that knows nothing would write white space without end wherever a form lets it.
NO_BLANKS: dict[str, int] = {}


def write_tokenizer(folder: pathlib.Path) -> None:
    settings = dict(bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    vocabulary = models.write_tokenizer(folder, TEMPLATE, settings, ["<pad>", "<s>", "</s>"])
    # As byte-level tokenizers write a space, a line feed, a tab and a carriage return.
    NO_BLANKS.update({str(token): -100 for text, token in vocabulary.items() if set(text) & set("\u0120\u010a\u0109\u010d")})


@pytest.fixture(scope="module")
def urls(folder, tmp_path_factory):
    """Of vLLM's server, and of the router before it."""
    place = tmp_path_factory.mktemp("clients")
    model = models.make(folder, "llama", seed=11)
    write_tokenizer(model)
    port, log = free_port(), place / "server.log"
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--served-model-name", "tiny", "--port", str(port), "--host", "127.0.0.1", "--dtype", "float32"]
    command += ["--block-size", "32", "--max-model-len", "2048", "--enforce-eager", "--enable-prefix-caching"]
    command += ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
    environment = {key: value for key, value in ENVIRONMENT.items() if "MULTIPROCESSING" not in key}
    with open(log, "w") as out:
        server = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, env={**os.environ, **environment}
        )
    router = None
    try:
        direct = f"http://127.0.0.1:{port}"
        until_it_serves(direct, server, log)
        command = [ROUTER, "serve", "--listen", "127.0.0.1:0", "--tokenizer", f"tiny={model}"]
        for name, host in (("a", "127.0.0.1"), ("b", "localhost")):
            command += ["--worker", f"id={name},url=http://{host}:{port},model=tiny,block_tokens=32"]
        router_log = place / "router.log"
        router = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=open(router_log, "w"), text=True)
        through = router.stdout.readline().split()[-1]
        until_it_serves(through, router, router_log)
        yield direct, through
    finally:
        for process in filter(None, (router, server)):
            process.terminate()
            process.wait(60)


def without_its_own(value):
    if isinstance(value, dict):
        return {key: without_its_own(item) for key, item in value.items() if key not in ITS_OWN}
    if isinstance(value, list):
        return [without_its_own(item) for item in value]
    return value


def plain(answer):
    return without_its_own(answer.model_dump())


def joined(pieces) -> dict:
    """A stream, whatever steps it came in: its texts and calls by choice, what ended it, and the fields that its pieces have."""
    texts, ends, fields, usage = {}, {}, set(), None
    for piece in map(plain, pieces):
        fields |= set(piece)
        usage = piece.get("usage") or usage
        for choice in piece["choices"]:
            fields |= set(choice)
            at = choice["index"]
            delta = choice.get("delta") or dict(content=choice.get("text"))
            texts[at] = texts.get(at, "") + (delta.get("content") or "")
            for call in delta.get("tool_calls") or []:
                texts[at] += (call["function"].get("name") or "") + (call["function"].get("arguments") or "")
            ends[at] = choice.get("finish_reason") or ends.get(at)
    return dict(texts=texts, ends=ends, fields=fields, usage=usage)


TOOL = dict(
    type="function",
    function=dict(
        name="look_up",
        description="Looks something up",
        # In an order of its own: sorted, it would be another prompt.
        parameters=dict(
            type="object",
            properties=dict(where=dict(enum=["here", "there"]), deep=dict(type="boolean")),
            required=["where", "deep"],
        ),
    ),
)
SCHEMA = dict(
    type="json_schema",
    json_schema=dict(
        name="verdict",
        schema=dict(
            type="object",
            properties=dict(verdict=dict(enum=["yes", "no"]), certain=dict(type="boolean")),
            required=["verdict", "certain"],
            additionalProperties=False,
        ),
    ),
)
HELLO = [dict(role="system", content="Be brief."), dict(role="user", content="Where do blocks of a prompt go?")]
CHATS = {
    "plain": {},
    "two choices": dict(n=2, temperature=0.7, seed=5),
    "log-probabilities": dict(logprobs=True, top_logprobs=3),
    "a stop": dict(stop=["e"]),
    "a named tool": dict(tools=[TOOL], tool_choice=dict(type="function", function=dict(name="look_up"))),
    "a tool": dict(tools=[TOOL], tool_choice="required"),
    "tools that may be": dict(tools=[TOOL]),
    "a format": dict(response_format=SCHEMA),
    "fields of vLLM's own": dict(extra_body=dict(top_k=5, repetition_penalty=1.1, cache_salt="s", add_generation_prompt=True)),
}


def clients(urls):
    return [openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) for url in urls]


@pytest.mark.parametrize("case", CHATS)
def test_chats_are_answered_alike(urls, case):
    asked = dict(model="tiny", messages=HELLO, max_tokens=40, temperature=0) | CHATS[case]
    direct, through = clients(urls)
    assert plain(through.chat.completions.create(**asked)) == plain(direct.chat.completions.create(**asked))
    asked |= dict(stream=True, stream_options=dict(include_usage=True))
    expected = joined(direct.chat.completions.create(**asked))
    assert expected["usage"] and set(expected["ends"].values()) <= {"length", "stop", "tool_calls"}
    assert joined(through.chat.completions.create(**asked)) == expected


@pytest.mark.parametrize(
    "more",
    [{}, dict(n=2, temperature=0.7, seed=5), dict(logprobs=2), dict(echo=True), dict(prompt=["a", "b"]), dict(prompt=[5, 6, 7])],
)
def test_completions_are_answered_alike(urls, more):
    asked = dict(model="tiny", prompt="A block is", max_tokens=20, temperature=0) | more
    direct, through = clients(urls)
    assert plain(through.completions.create(**asked)) == plain(direct.completions.create(**asked))
    asked |= dict(stream=True, stream_options=dict(include_usage=True))
    assert joined(through.completions.create(**asked)) == joined(direct.completions.create(**asked))


def test_other_routes_are_answered_alike(urls):
    direct, through = clients(urls)
    listed = [{model.id: plain(model)["max_model_len"] for model in client.models.list()} for client in (direct, through)]
    assert listed[0] == listed[1] == {"tiny": 2048}
    asked = dict(model="tiny", input="Where do blocks go?", max_output_tokens=20, temperature=0)
    assert plain(through.responses.create(**asked)) == plain(direct.responses.create(**asked))

    def events(client):
        return [event.type for event in client.responses.create(**asked, stream=True) if "delta" not in event.type]

    assert events(through) == events(direct)
    for client in (direct, through):
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(model="nobody", messages=HELLO)
        # A mistake is the worker's to explain.
        with pytest.raises(openai.BadRequestError) as refused:
            client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=-1)
        assert "max_tokens" in str(refused.value)
    bodies = [post(url, "/tokenize", dict(model="tiny", messages=HELLO, tools=[TOOL])) for url in urls]
    assert bodies[0] == bodies[1] and bodies[0]["count"] > 10


def test_a_prompt_has_the_tokens_that_the_engine_counts(urls):
    direct, through = urls
    for more in (dict(prompt="A block is"), dict(messages=HELLO)):
        explained = post(through, "/explain", dict(model="tiny", **more))
        counted = post(direct, "/tokenize", dict(model="tiny", **more))
        assert explained["prompt_tokens"] == counted["count"], more


def post(url: str, path: str, body: dict) -> dict:
    request = urllib.request.Request(url + path, json.dumps(body).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=200) as answer:
        return json.load(answer)


class Verdict(pydantic.BaseModel):
    verdict: bool
    certain: bool


@agents.function_tool
def look_up(deep: bool, here: bool) -> str:
    """Looks something up."""
    return f"{deep} {here}"


def test_an_agent_gets_the_same_answers(urls):
    """The OpenAI Agents SDK: a tool that must be called, its result, and an answer in a form; whole and in pieces."""
    agents.set_tracing_disabled(True)

    async def run(url: str) -> list:
        client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        model = agents.OpenAIChatCompletionsModel(model="tiny", openai_client=client)
        seen = []
        form = dict(logit_bias=NO_BLANKS)
        # Nor would it ever have called enough.
        once = form | dict(stop=["</tool_call>"], include_stop_str_in_output=True)
        settings = agents.ModelSettings(temperature=0, max_tokens=100, extra_body=once, tool_choice="required")
        caller = agents.Agent(
            name="caller", model=model, tools=[look_up], model_settings=settings, tool_use_behavior="stop_on_first_tool"
        )
        seen.append((await agents.Runner.run(caller, "Look it up.")).final_output)
        streamed = agents.Runner.run_streamed(caller, "Look it up.")
        seen.append([event.type async for event in streamed.stream_events() if event.type != "raw_response_event"])
        seen.append(streamed.final_output)
        settings = agents.ModelSettings(temperature=0, max_tokens=100, extra_body=form)
        judge = agents.Agent(name="judge", model=model, output_type=Verdict, model_settings=settings)
        seen.append((await agents.Runner.run(judge, "Is it so?")).final_output)
        await client.close()
        return seen

    direct, through = (asyncio.run(run(url)) for url in urls)
    assert direct == through
    assert direct[0] in {f"{deep} {here}" for deep in (True, False) for here in (True, False)}
    assert isinstance(direct[-1], Verdict)
