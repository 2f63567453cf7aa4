"""Generations that outlive their process: whatever ends it, the tokens are those of a run that nothing ended."""

import json
import pathlib
import random
import signal
import subprocess
import sys

import pytest
import torch
import transformers

import kvstore
import kvstore.sessions
from kvstore.sessions import Append, Sampler, Step, Store, Worker

from models import write_tokenizer

PROMPT = [3 + (at * at * 31 + at * 17) % 1000 for at in range(300)]
GREEDY = dict(max_new_tokens=40, do_sample=False, repetition_penalty=1.2, pad_token_id=0, eos_token_id=None)
SAMPLED = dict(max_new_tokens=40, do_sample=True, top_k=50, repetition_penalty=1.3, pad_token_id=0, eos_token_id=None)
KILLS = 20


@pytest.fixture
def load(model):
    return lambda kind="llama", seed=7: transformers.AutoModelForCausalLM.from_pretrained(model(kind, seed)).eval()


@pytest.fixture
def store(tmp_path) -> Store:
    (tmp_path / "bucket").mkdir()
    return Store(f"file://{tmp_path}/bucket")


def whole(model, **arguments) -> list[int]:
    """What `generate` of transformers says, greedily."""
    return model.generate(torch.tensor([PROMPT]), **arguments)[0].tolist()


# ---------------------------------------------------------------- one process


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_are_those_of_transformers_and_durable_when_they_come(load, store, kind, dtype):
    model = load(kind).to(dtype)
    expected, seen = whole(model, **GREEDY)[len(PROMPT) :], []
    answer = Worker(model, store).generate(PROMPT, session="chat", every=8, **GREEDY)
    for tokens in answer:
        seen += tokens
        durable = store.inspect("chat").session
        assert len(tokens) <= 8 and durable.generated[: len(seen)] == seen
        assert durable.valid_tokens == durable.tokens - 1 and durable.delivered <= len(seen)
    assert seen == answer.tokens == expected and answer.prefilled == 0
    assert store.inspect("chat").ends == "closed"
    with pytest.raises(kvstore.NotFound, match="closed"):
        kvstore.sessions.resume(model, session="chat", store=store)


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma3"])
@pytest.mark.parametrize("arguments", [GREEDY, SAMPLED])
def test_a_session_goes_on_wherever_it_was_left(load, store, kind, arguments):
    """Left after each group in turn, from worker to worker: nothing is prefilled, and every token is as it would have been."""
    model = load(kind)
    more = dict(seed=5, every=7, **arguments)
    expected = Worker(model, store).generate(PROMPT, session="whole", **more).ids()
    worker, seen = Worker(model, store), []
    with worker.generate(PROMPT, session="parts", **more) as answer:
        seen += next(answer)
    while True:
        worker = Worker(model, store)
        with worker.resume("parts", every=7, have=len(seen)) as answer:
            assert answer.start == len(seen)
            group = next(answer, None)
            if group is None:
                break
            seen += group
            # What is durable already is told before anything is computed.
            if (group := next(answer, None)) is not None:
                seen += group
            assert answer.prefilled == 0
    assert PROMPT + seen == expected and len(seen) == 40


def test_what_is_stored_is_what_is_used(load, store):
    """Other KV under the same ids gives other tokens: a resume that computed everything again would pass every other test."""
    model = load()
    expected = whole(model, **GREEDY)[len(PROMPT) :]
    answer = Worker(model, store).generate(PROMPT, session="chat", **GREEDY)
    seen = next(answer) + next(answer)
    writer = store.begin()
    session = writer.claim("chat").session
    pieces = [kvstore.sessions.Piece(piece.start, piece.tokens, bytes(len(piece.data)), piece.group) for piece in session.pieces]
    (put,) = writer.append(Step("chat", Append(session.tokens, [], len(seen), session.valid_tokens, pieces=pieces)))
    assert put.valid_tokens == session.tokens - 1
    assert kvstore.sessions.resume(model, session="chat", store=store).ids()[len(PROMPT) :] != expected


def test_kv_that_is_not_durable_is_computed_again_and_reported(load, store):
    model = load("gemma3")
    expected = Worker(model, store).generate(PROMPT, session="whole", seed=5, **SAMPLED).ids()
    for session, valid, due in (("tail", len(PROMPT) + 3, 5), ("prompt", 100, len(PROMPT) + 8)):
        answer = Worker(model, store).generate(PROMPT, session=session, seed=5, every=8, **SAMPLED)
        next(answer), next(answer)
        writer = store.begin()
        found = writer.claim(session).session
        del answer
        writer.append(Step(session, Append(found.tokens, [], found.delivered, valid)))
        due = found.tokens - 1 - (valid if valid > len(PROMPT) else 0)
        answer = Worker(model, store).resume(session)
        assert answer.ids() == expected and answer.prefilled == due


def test_several_sessions_of_one_writer_and_one_that_is_claimed_away(load, store):
    model = load()
    arguments = {name: dict(SAMPLED, seed=at, every=4) for at, name in enumerate("abc")}
    alone = {name: Worker(model, store).generate(PROMPT, session=f"alone-{name}", **arguments[name]).ids() for name in "abc"}
    worker = Worker(model, store)
    answers = {name: worker.generate(PROMPT, session=name, **arguments[name]) for name in "abc"}
    for _ in range(3):
        assert all(next(answer) for answer in answers.values())
    # Another one takes "a": the worker's log is sealed. It takes back the others, and only those.
    other = Worker(model, store).resume("a")
    assert other.ids() == alone["a"]
    with pytest.raises((kvstore.Fenced, kvstore.NotFound)):
        answers["a"].ids()
    for name in "bc":
        assert answers[name].ids() == alone[name]
        assert store.inspect(name).ends == "closed"


def test_a_log_that_is_full_is_followed_by_another(load, store, monkeypatch):
    model = load()
    expected = Worker(model, store).generate(PROMPT, session="whole", seed=1, **SAMPLED).ids()
    due = iter([False, False, False, True, True] + [False] * 1000)
    monkeypatch.setattr(kvstore.sessions.Writer, "is_due", property(lambda self: next(due)))
    assert Worker(model, store).generate(PROMPT, session="chat", seed=1, every=4, **SAMPLED).ids() == expected


# ---------------------------------------------------------------- what is refused


def test_what_cannot_be_exact_is_refused_by_name(load, store):
    model = load()
    worker = Worker(model, store)
    refused = [
        (dict(num_beams=2), "num_beams"),
        (dict(assistant_model=model), "assistant_model"),
        (dict(prompt_lookup_num_tokens=3), "assisted"),
        (dict(num_return_sequences=2, do_sample=True), "num_return_sequences"),
        (dict(cache_implementation="static"), "cache_implementation"),
        (dict(past_key_values=transformers.DynamicCache()), "past_key_values"),
        (dict(use_cache=False), "use_cache"),
        (dict(max_time=3.0), "max_time"),
        (dict(guidance_scale=2.0), "guidance_scale"),
        (dict(logits_processor=[print]), "logits_processor"),
        (dict(streamer=object()), "streamer"),
        (dict(attention_mask=torch.zeros(1, len(PROMPT))), "attention_mask"),
    ]
    for arguments, name in refused:
        with pytest.raises(kvstore.Unsupported, match=name):
            worker.generate(PROMPT, session="refused", **{"max_new_tokens": 4, **arguments})
    with pytest.raises(kvstore.Invalid, match="tokenizer"):
        worker.generate(PROMPT, session="refused", stop_strings=["x"])
    for ids in ([], [[1, 2], [3, 4]]):
        with pytest.raises((kvstore.Invalid, TypeError, ValueError)):
            worker.generate(torch.tensor(ids), session="refused")
    with pytest.raises(kvstore.NotFound):
        worker.resume("refused")
    assert store.ls() == []


def test_another_model_is_refused_by_name_and_the_owner_goes_on(load, store):
    model = load()
    answer = Worker(model, store).generate(PROMPT, session="chat", **GREEDY)
    next(answer)
    other = load()
    with torch.no_grad():
        other.model.layers[3].mlp.up_proj.weight.mul_(1.01)
    with pytest.raises(kvstore.Invalid, match="weights was"):
        kvstore.sessions.resume(other, session="chat", store=store)
    with pytest.raises(kvstore.Invalid, match="dtype was 'float32' and is 'bfloat16'"):
        kvstore.sessions.resume(load().to(torch.bfloat16), session="chat", store=store)
    with pytest.raises(kvstore.Invalid, match="config was .*; model was 'LlamaForCausalLM'"):
        kvstore.sessions.resume(load("qwen2"), session="chat", store=store)
    changed = load()
    changed.generation_config.repetition_penalty = 1.9
    changed.generation_config.no_repeat_ngram_size = 2
    with pytest.raises(kvstore.Invalid, match="no_repeat_ngram_size: it was .* for this session, and is 2 here"):
        kvstore.sessions.resume(changed, session="chat", store=store)
    assert answer.ids() == whole(model, **GREEDY)


def test_a_sampler_that_was_tampered_with_is_refused(load, store):
    model = load()
    for at, sampler in enumerate((Sampler(counter=3), Sampler(budget=99))):
        answer = Worker(model, store).generate(PROMPT, session=f"chat-{at}", seed=5, **SAMPLED)
        next(answer), next(answer)
        writer = store.begin()
        found = writer.claim(f"chat-{at}").session
        writer.append(Step(f"chat-{at}", Append(found.tokens, [], found.delivered, found.valid_tokens, sampler)))
        with pytest.raises(kvstore.DataLoss, match="the sampler"):
            kvstore.sessions.resume(model, session=f"chat-{at}", store=store)
    seeds = [Worker(model, store).generate(PROMPT, session=f"seed-{seed}", seed=seed, **SAMPLED).ids() for seed in (5, 6)]
    assert seeds[0] != seeds[1]


def test_a_flipped_bit_is_refused(load, store, tmp_path):
    model = load()
    worker = Worker(model, store)
    answer = worker.generate(PROMPT, session="chat", every=4, **GREEDY)
    seen = [token for _ in range(4) for token in next(answer)]
    chance = random.Random(3)
    log = tmp_path / "bucket" / "sessions" / "v1" / "logs" / store.inspect("chat").listed.holder.log
    for entry in sorted(log.iterdir())[1:5]:
        before = entry.read_bytes()
        for _ in range(3):
            data = bytearray(before)
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
            entry.write_bytes(data)
            try:
                resumed = kvstore.sessions.resume(model, session="chat", store=store)
            except kvstore.DataLoss:
                pass
            else:
                # Nothing that the session needs: a record that newer ones replace, say.
                assert resumed.ids() == whole(model, **GREEDY)
                return
            finally:
                entry.write_bytes(before)
    assert kvstore.sessions.resume(model, session="chat", store=store, have=0).ids()[len(PROMPT) :][: len(seen)] == seen


# ---------------------------------------------------------------- kill -9

CHILD = """
import json, sys, transformers, kvstore.sessions
asked = json.loads(sys.argv[1])
model = transformers.AutoModelForCausalLM.from_pretrained(asked["model"]).eval()
tokenizer = None
if asked["words"]:
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=asked["words"])
worker = kvstore.sessions.Worker(model, asked["store"])
print("READY", flush=True)
for line in sys.stdin:
    session, have, prompt, arguments = json.loads(line)
    try:
        answer = worker.resume(session, every=4, have=have, tokenizer=tokenizer)
    except kvstore.NotFound as error:
        if "generate again" not in str(error) and "no session" not in str(error):
            raise
        answer = worker.generate(prompt, session=session, every=4, tokenizer=tokenizer, **arguments)
    for tokens in answer:
        print("TOKENS", json.dumps([answer.start, answer.prefilled, tokens]), flush=True)
    print("END", flush=True)
"""


class Child:
    """A process with the model, that generates or resumes what it is told to."""

    def __init__(self, model: pathlib.Path, store: str, words: str | None = None):
        asked = json.dumps(dict(model=str(model), store=store, words=words))
        command = [sys.executable, "-c", CHILD, asked]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, *asked) -> None:
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()

    def lines(self):
        for line in self.process.stdout:
            kind, _, rest = line.strip().partition(" ")
            yield kind, json.loads(rest) if rest else None

    def kill(self) -> list:
        """Ends it with SIGKILL, and returns the lines that it had still said."""
        self.process.send_signal(signal.SIGKILL)
        rest = list(self.lines())
        self.process.wait(60)
        self.process.stdout.close()
        self.process.stdin.close()
        return rest


def told(seen: list[int], message, first: bool) -> None:
    """What a client makes of a line: the tokens that it has not yet."""
    _start, prefilled, tokens = message
    assert prefilled in (None, 0), "nothing is computed again behind an acknowledged append"
    seen += tokens


@pytest.mark.parametrize(
    "kind,arguments,kills", [("llama", GREEDY, KILLS // 4), ("llama", SAMPLED, KILLS // 4), ("gemma3", SAMPLED, KILLS // 2)]
)
def test_whatever_is_killed_goes_on_in_another_process(load, model, store, kind, arguments, kills):
    """One process after the other is killed at a random token; each next one has nothing but the bucket. In all, KILLS kills."""
    chance = random.Random(f"{kind}{arguments['do_sample']}")
    expected = Worker(load(kind), store).generate(PROMPT, session="whole", seed=11, **arguments).ids()[len(PROMPT) :]
    asked, seen, left, run = dict(arguments, seed=11), [], kills, 0
    child = spare = Child(model(kind), store.url)
    while True:
        spare = Child(model(kind), store.url) if left else None
        child.ask(f"chat-{run}", len(seen), PROMPT, asked)
        until, ended = chance.randrange(1, 4) if left else None, False
        lines = child.lines()
        groups = 0
        for what, message in lines:
            if what == "TOKENS":
                told(seen, message, not groups)
                groups += 1
            if ended := what == "END":
                break
            if until is not None and groups >= until:
                break
        for what, message in child.kill():
            if what == "TOKENS":
                told(seen, message, False)
            ended |= what == "END"
        left -= 1
        assert seen == expected[: len(seen)]
        if ended and left <= 0:
            break
        if ended:
            assert seen == expected
            seen, run = [], run + 1
        left = max(left, 0)
        child = spare or Child(model(kind), store.url)
    assert seen == expected
    if spare:
        spare.kill()


@pytest.fixture
def words(tmp_path) -> str:
    """The file of a tokenizer."""
    write_tokenizer(tmp_path, "", {}, ["<pad>"])
    return str(tmp_path / "tokenizer.json")


def spanning(tokenizer, tokens: list[int], from_token: int) -> tuple[int, str]:
    """A stop string that begins within a token and ends within the second next one, and where: of the tokens that are plain text."""
    texts = [tokenizer.decode([token]) for token in tokens]
    for at in range(from_token, len(tokens) - 2):
        parts = texts[at : at + 3]
        if all(part.isascii() and len(part) > 1 for part in parts):
            return at, parts[0][-1] + parts[1] + parts[2][:-1]
    raise AssertionError(f"no three tokens in a row are plain text: {texts}")


def test_a_stop_string_that_spans_a_kill_stops_there(load, model, store, words):
    """A process is killed before the stop string is whole, and another one says the rest of it."""
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=words)
    at, stop = spanning(tokenizer, whole(load(), **GREEDY)[len(PROMPT) :], 2)
    arguments = dict(GREEDY, stop_strings=[stop])
    until = whole(load(), **arguments, tokenizer=tokenizer)[len(PROMPT) :]
    assert len(until) <= at + 3
    child = Child(model(), store.url, words)
    child.ask("chat", 0, PROMPT, arguments)
    next(message for what, message in child.lines() if what == "TOKENS")
    child.kill()
    if store.inspect("chat").ends != "closed":
        with pytest.raises(kvstore.Invalid, match="tokenizer"):
            kvstore.sessions.resume(load(), session="chat", store=store)
        answer = kvstore.sessions.resume(load(), session="chat", store=store, have=0, every=1, tokenizer=tokenizer)
        assert answer.ids()[len(PROMPT) :] == until and answer.prefilled == 0


def test_a_break_at_each_token_of_a_stop_string(load, store, words):
    """The same without chance: the session is left before, within and behind the stop string."""
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=words)
    model = load()
    at, stop = spanning(tokenizer, whole(model, **GREEDY)[len(PROMPT) :], 6)
    arguments = dict(GREEDY, stop_strings=[stop])
    until, resumed = whole(model, **arguments, tokenizer=tokenizer), 0
    assert len(until) <= len(PROMPT) + at + 3
    for left in range(len(until) - len(PROMPT) - 4, len(until) - len(PROMPT) + 1):
        worker = Worker(model, store)
        with worker.generate(PROMPT, session=f"chat-{left}", every=1, tokenizer=tokenizer, **arguments) as answer:
            for _ in range(left):
                next(answer, None)
        if store.inspect(f"chat-{left}").ends != "closed":
            answer = kvstore.sessions.resume(model, session=f"chat-{left}", store=store, tokenizer=tokenizer)
            assert answer.ids() == until and answer.prefilled == 0
            resumed += 1
    assert resumed >= 3


def test_lengths_count_from_the_prompt(load, store):
    """Minimum and maximum, with an end-of-sequence token that the minimum holds back: both sides of the break count the same."""
    model = load()
    plain = whole(model, **GREEDY)[len(PROMPT) :]
    arguments = dict(
        GREEDY, eos_token_id=plain[3], min_new_tokens=12, max_new_tokens=30, exponential_decay_length_penalty=(5, 1.01)
    )
    expected = whole(model, **arguments)
    with Worker(model, store).generate(PROMPT, session="chat", every=3, **arguments) as answer:
        next(answer), next(answer), next(answer)
    assert kvstore.sessions.resume(model, session="chat", store=store).ids() == expected


def test_a_zombie_is_refused_after_a_claim(load, store):
    model = load()
    zombie = Worker(model, store).generate(PROMPT, session="chat", every=4, **GREEDY)
    seen = next(zombie)
    other = Worker(model, store).resume("chat", have=len(seen))
    rest = next(other)
    with pytest.raises(kvstore.Fenced):
        for _ in zombie:
            pass
    assert PROMPT + seen + rest + [token for tokens in other for token in tokens] == whole(model, **GREEDY)
