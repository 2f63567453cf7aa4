"""Encoder outputs over the store, with a model that looks at pictures. The oracle is the engine's own tokens without connectors."""

import pytest
import torch

import kvstore

from models import PICTURE

PROMPT = [5, PICTURE, 9, 10, 11]
QUESTION = dict(prompts=[PROMPT, PROMPT, [7, PICTURE, 6, PICTURE, 3]], pictures=[[1], [2], [1, 3]])


def ask(engine):
    return [output.tokens for output in engine.generate(**QUESTION)]


def encoded(engine) -> int:
    return engine.counts().get("encoded", 0)


def encoder(role, daemon, **settings):
    # A late answer would be a miss, which is not what is tested.
    return dict(role=role, address=daemon.address, deadline=60.0, **settings)


@pytest.fixture(scope="session")
def answer(zygote, model):
    """The tokens of an engine that knows nothing of the store, and how many pictures it encoded."""
    with zygote.engine(model("llava"), max_model_len=1024, enable_prefix_caching=False) as engine:
        return ask(engine), encoded(engine)


def test_a_fresh_process_encodes_nothing(zygote, model, daemon, answer):
    tokens, pictures = answer
    assert pictures == 3
    with zygote.engine(model("llava"), max_model_len=1024, encoder=encoder("ec_both", daemon)) as engine:
        assert ask(engine) == tokens
        assert encoded(engine) == 3
    with zygote.engine(model("llava"), max_model_len=1024, encoder=encoder("ec_both", daemon)) as engine:
        assert ask(engine) == tokens
        assert encoded(engine) == 0
    # Other weights are another encoder.
    with zygote.engine(model("llava", 8), max_model_len=1024, encoder=encoder("ec_both", daemon)) as engine:
        ask(engine)
        assert encoded(engine) == 3


def test_encode_prefill_and_decode_are_three_processes(zygote, model, daemon, answer):
    tokens, _ = answer
    with zygote.engine(model("llava"), max_model_len=1024, encoder=encoder("ec_producer", daemon)) as engine:
        engine.generate(**QUESTION, max_tokens=1)
        assert encoded(engine) == 3
        # What the store has is not encoded twice.
        engine.generate(**QUESTION, max_tokens=1)
        assert encoded(engine) == 3
    consumer = dict(max_model_len=1024, encoder=encoder("ec_consumer", daemon))
    with zygote.engine(model("llava"), daemon.address, role="kv_producer", **consumer) as prefill:
        handed_over = [output.handed_over for output in prefill.generate(**QUESTION, max_tokens=1)]
        assert encoded(prefill) == 0
        prefill.until_saved(1)
    assert all(handed_over)
    with zygote.engine(model("llava"), daemon.address, role="kv_consumer", **consumer) as decode:
        for at, expected in enumerate(tokens):
            one = dict(prompts=QUESTION["prompts"][at : at + 1], pictures=QUESTION["pictures"][at : at + 1])
            (output,) = decode.generate(**one, hand_over=handed_over[at])
            assert output.tokens == expected and output.cached > 0
        assert encoded(decode) == 0


def test_what_is_loaded_is_what_counts(zygote, model, daemon, answer):
    """Outputs that are zeros change the tokens: so loads are real."""
    tokens, _ = answer
    with zygote.engine(model("llava"), max_model_len=1024, encoder=encoder("ec_both", daemon)) as engine:
        engine.call("zero_outputs")
        engine.generate(**QUESTION, max_tokens=1)
    with zygote.engine(model("llava"), max_model_len=1024, encoder=encoder("ec_both", daemon)) as engine:
        assert ask(engine) != tokens
        assert encoded(engine) == 0


def test_without_the_daemon_pictures_are_encoded(zygote, model, daemon, answer):
    tokens, _ = answer
    with zygote.engine(model("llava"), max_model_len=1024, encoder=encoder("ec_both", daemon)) as engine:
        engine.generate(**QUESTION, max_tokens=1)
        daemon.kill()
    with zygote.engine(model("llava"), max_model_len=1024, encoder=encoder("ec_both", daemon)) as engine:
        assert ask(engine) == tokens
        assert encoded(engine) == 3


def test_pictures_that_are_named_by_their_request_are_not_shared(zygote, model, daemon):
    """Where neither of vLLM's own caches needs a picture's hash it makes none: the first picture of every process had one name, and
    another picture's keys and values were read under it."""
    nameless = dict(max_model_len=1024, enable_prefix_caching=False, mm_processor_cache_gb=0)
    question = lambda picture: dict(prompts=[[5, PICTURE, *range(20, 60)]], pictures=[[picture]])
    with zygote.engine(model("llava"), **nameless) as engine:
        expected = [output.tokens for output in engine.generate(**question(2))]
    with zygote.engine(model("llava"), daemon.address, **nameless) as engine:
        engine.generate(**question(1))
        # Text alone is stored as ever.
        engine.generate([list(range(100, 200))])
        engine.until_saved(3)
    with zygote.engine(model("llava"), daemon.address, **nameless) as engine:
        (output,) = engine.generate(**question(2))
        assert [output.tokens] == expected and output.cached == 0
    with zygote.engine(model("llava"), encoder=encoder("ec_both", daemon), **nameless) as engine:
        with pytest.raises(RuntimeError, match="names pictures by their request"):
            engine.call("build")


def test_settings_that_are_wrong_are_named(zygote, model, daemon):
    with zygote.engine(model("llava"), max_model_len=1024, encoder=encoder("ec_both", daemon, speed=1)) as engine:
        with pytest.raises(RuntimeError, match="ec_connector_extra_config: unknown keys speed; valid keys are address"):
            engine.call("build")


# -------------------------------------------------------------------- items by themselves


@pytest.fixture(params=["local", "grpc"])
def items(request, daemon):
    import logging

    from kvstore.store import Store
    from kvstore.vllm.encoder import Items

    return Items(Store(daemon.address, request.param, 10.0, logging.getLogger("test")), "tiny", bytes(32), "test")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("shape", [(1, 1), (577, 96), (3, 40, 33)])
def test_items_keep_their_shape(items, dtype, shape):
    output = torch.randn(shape).to(dtype)
    assert items.get("a") is None and not items.has("a")
    assert items.put("a", output, "memory") and items.put("a", output, "memory")
    assert items.has("a")
    found = items.get("a")
    assert found.dtype == dtype and found.shape == output.shape
    assert torch.equal(found.view(-1).view(torch.uint8), output.view(-1).view(torch.uint8))


def test_a_part_of_a_tensor_is_stored_as_what_it_is(items):
    whole = torch.randn(40, 64)
    assert items.put("part", whole[10:20, ::2], "memory")
    assert torch.equal(items.get("part"), whole[10:20, ::2])


def test_size_classes_waste_little():
    from kvstore.vllm.encoder import size_class

    for length in [*range(1, 5000, 7), 10**6 + 1, 3 * 10**7, 10**9]:
        room = size_class(length)
        assert length <= room <= max(length * 1.126 + 64, 64)
    assert len({size_class(length) for length in range(1, 1 << 20, 11)}) < 200


def test_a_shape_that_makes_no_sense_is_a_miss(items):
    from kvstore.vllm.encoder import SHAPE_BYTES, _hash, _parse_shape

    for told in (b"", b"[]", b'{"dtype": "float32"}', b'{"dtype": "nn", "shape": [2]}', b'{"dtype": "float32", "shape": [0]}'):
        assert _parse_shape(told) is None
    group = items._group(SHAPE_BYTES)
    group.put_from([_hash("b")], [b'{"dtype": "float32", "shape": [1000]}'])
    assert items.get("b") is None
    assert isinstance(group, kvstore.Group)
