"""transformers over the store, against the model's own tokens."""

import json
import subprocess
import sys
import warnings

import pytest
import torch
import transformers

import kvstore
import kvstore.transformers

from daemon import until

PROMPT = torch.tensor([[3 + (at * at * 31 + at * 17) % 1000 for at in range(300)]])


@pytest.fixture
def load(model):
    return lambda kind="llama", seed=7: transformers.AutoModelForCausalLM.from_pretrained(model(kind, seed)).eval()


def greedy(model, tokens=PROMPT, **more):
    return model.generate(tokens, max_new_tokens=20, do_sample=False, pad_token_id=0, eos_token_id=None, **more)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prefixes_are_reused(load, daemon, kind, dtype):
    model = load(kind).to(dtype)
    expected = greedy(model)
    for reused in (0, 288):
        # Another process would attach in the same way: nothing is remembered but in the store.
        attached = kvstore.transformers.attach(model, daemon.address)
        assert torch.equal(greedy(model), expected)
        assert attached.reused_tokens == reused
        attached.detach()
    # What was generated is a prefix, too.
    attached = kvstore.transformers.attach(model, daemon.address)
    longer = torch.cat([expected, PROMPT[:, :50]], dim=1)
    with_it = greedy(model, longer)
    assert attached.reused_tokens == 288
    attached.detach()
    assert torch.equal(with_it, greedy(model, longer))
    assert "generate" not in model.__dict__


def test_loads_are_real(load, daemon, monkeypatch):
    model = load()
    expected = greedy(model)
    zeros = lambda self, hashes, pages, numbers, **more: self.put_from(
        hashes, [bytes(pages.block_bytes) for _ in numbers], **more
    )
    with monkeypatch.context() as patched:
        patched.setattr(kvstore.Group, "put_pages", zeros)
        attached = kvstore.transformers.attach(model, daemon.address)
        greedy(model)
        attached.detach()
    attached = kvstore.transformers.attach(model, daemon.address)
    assert not torch.equal(greedy(model), expected)
    assert attached.reused_tokens == 288


def test_other_weights_find_nothing(load, daemon):
    attached = kvstore.transformers.attach(load(), daemon.address)
    greedy(attached._model)
    other = load(seed=8)
    expected = greedy(other)
    attached = kvstore.transformers.attach(other, daemon.address)
    assert torch.equal(greedy(other), expected) and attached.reused_tokens == 0
    attached.detach()
    with torch.no_grad():
        other.model.layers[3].mlp.up_proj.weight.mul_(1.01)
    attached = kvstore.transformers.attach(other, daemon.address)
    greedy(other)
    assert attached.reused_tokens == 0


def test_calls_that_cannot_reuse_go_through_untouched(load, daemon):
    model = load()
    batch = torch.cat([PROMPT, PROMPT.flip(1)])
    padded = dict(attention_mask=torch.ones_like(PROMPT).index_fill(1, torch.tensor([0]), 0))
    calls = [(batch, {}), (PROMPT, dict(num_beams=2)), (PROMPT, dict(use_cache=False)), (PROMPT, padded)]
    expected = [greedy(model, tokens, **more) for tokens, more in calls]
    attached = kvstore.transformers.attach(model, daemon.address)
    for (tokens, more), tokens_expected in zip(calls, expected):
        assert torch.equal(greedy(model, tokens, **more), tokens_expected)
    assert attached.stored_blocks == attached.reused_tokens == 0
    output = greedy(model, return_dict_in_generate=True, output_scores=True)
    assert len(output.scores) == 20 and attached.stored_blocks == 9


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_a_cache_of_the_callers_own_goes_through_under_each_name(load, daemon, name):
    """transformers 5.24 calls it "cache". Under that name a caller's cache, with states of other tokens (a soft prompt, an edited
    cache), was stored under the prompt's tokens: a wrong answer for whoever came next."""
    model = load()
    if name == "cache" and kvstore.transformers._CACHE != "cache":
        pytest.skip("transformers before 5.24 knows no argument of this name")

    def own():
        cache = transformers.DynamicCache(config=model.config)
        with torch.no_grad():
            model(PROMPT.flip(1)[:, :250], **{name: cache})
        return cache

    expected, alone = greedy(model, **{name: own()}), greedy(model)
    attached = kvstore.transformers.attach(model, daemon.address)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert torch.equal(greedy(model, **{name: own()}), expected)
    assert attached.stored_blocks == attached.reused_tokens == 0
    assert not [one for one in said if "Both" in str(one.message)], "a second cache was handed in beside it"
    # No cache is no cache, under whatever name.
    assert torch.equal(greedy(model, **{name: None}), alone)
    assert attached.stored_blocks == 9
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        assert torch.equal(greedy(model), alone)
    assert attached.reused_tokens == 288
    output = greedy(model, return_dict_in_generate=True)
    attached.save_state("own", output)
    state = attached.load_state("own").inputs()
    assert kvstore.transformers._CACHE in state and state[kvstore.transformers._CACHE].get_seq_length() == 319


def test_models_that_keep_less_are_refused_by_name(load, daemon):
    with pytest.raises(kvstore.Unsupported, match="SlidingWindow"):
        kvstore.transformers.attach(load("gemma3"), daemon.address)
    with pytest.raises(kvstore.Invalid, match="level"):
        kvstore.transformers.attach(load(), daemon.address, level="everywhere")


def test_a_daemon_that_goes_costs_hits_and_no_tokens(load, daemon):
    model = load()
    expected = greedy(model)
    attached = kvstore.transformers.attach(model, daemon.address)
    greedy(model)
    daemon.kill()
    assert torch.equal(greedy(model), expected)
    before = attached.reused_tokens
    daemon.start()

    def is_reused() -> bool:
        assert torch.equal(greedy(model), expected)
        return attached.reused_tokens >= before + 288

    # The daemon is asked again after a second; the prompt is stored first, and then reused.
    until("the prompt is reused again", is_reused)


OTHER_PROCESS = """
import json, sys, torch, transformers, kvstore.transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
attached = kvstore.transformers.attach(model, sys.argv[2], level="local")
torch.manual_seed(99)
state = attached.load_state("chat")
sampling = dict(do_sample=True, top_k=50, repetition_penalty=1.3, pad_token_id=0, eos_token_id=None)
output = model.generate(**state.inputs(), max_new_tokens=30, **sampling)
print("TOKENS", json.dumps(output[0].tolist()))
"""


def test_a_generation_goes_on_in_another_process_at_the_next_token(load, model, disk_daemon):
    """Sampling, with penalties: the other process says what this one would have said. In between the daemon is killed."""
    this, sampling = load(), dict(do_sample=True, top_k=50, repetition_penalty=1.3, pad_token_id=0, eos_token_id=None)
    attached = kvstore.transformers.attach(this, disk_daemon.address, level="local")
    torch.manual_seed(5)
    output = this.generate(PROMPT, max_new_tokens=23, return_dict_in_generate=True, **sampling)
    attached.save_state("chat", output)
    cache = {kvstore.transformers._CACHE: getattr(output, kvstore.transformers._CACHE)}
    expected = this.generate(output.sequences, **cache, max_new_tokens=30, **sampling)
    disk_daemon.kill()
    disk_daemon.start()
    command = [sys.executable, "-c", OTHER_PROCESS, str(model()), disk_daemon.address]
    said = subprocess.run(command, capture_output=True, text=True, timeout=300)
    line = next((line for line in said.stdout.splitlines() if line.startswith("TOKENS")), None)
    assert line, said.stderr[-3000:]
    assert json.loads(line.removeprefix("TOKENS ")) == expected[0].tolist()
    # The daemon that was killed is asked again after a second.
    until("another name has no state", lambda: attached.load_state("another") is None)
    # A name stands for what was saved last.
    attached.save_state("chat", greedy(this, return_dict_in_generate=True))
    assert len(attached.load_state("chat").tokens) == 320
