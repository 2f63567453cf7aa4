"""The hashes of a request with an adapter, beside a stand-in for vLLM's hasher: they hold the adapter's content, and no path."""

import hashlib
from types import SimpleNamespace

import fakes
import pytest

EACH = 4


@pytest.fixture
def hashes():
    if not fakes.install():
        pytest.skip("vLLM, transformers or torch is installed: see tests/engines")
    from kvstore.vllm.hashes import Hashes

    made = Hashes(SimpleNamespace(), EACH)
    made._hasher = hasher
    yield made
    fakes.uninstall()


def hasher(request) -> list[bytes]:
    """As vLLM's: hashes the blocks that have no hash yet, each with the one before, and with the adapter's name and path."""
    made, last = [], request.block_hashes[-1] if request.block_hashes else b""
    lora = request.lora_request
    for at in range(len(request.block_hashes) * EACH, request.num_tokens - EACH + 1, EACH):
        told = (last, request.all_token_ids[at : at + EACH], lora.lora_name, lora.lora_path)
        last = hashlib.sha256(repr(told).encode()).digest()
        made.append(last)
    return made


class Request:
    def __init__(self, tokens, name: str, path: str, request_id: str = "one"):
        self.request_id, self.block_hashes = request_id, []
        self.lora_request = SimpleNamespace(lora_name=name, lora_path=path)
        self.all_token_ids: list[int] = []
        self.append(tokens)

    def append(self, tokens) -> None:
        self.all_token_ids += tokens
        self.block_hashes += hasher(self)

    @property
    def num_tokens(self) -> int:
        return len(self.all_token_ids)


def test_neither_the_path_nor_the_name_of_an_adapter_counts(hashes):
    one = Request(range(17), "a", "/here")
    other = Request(range(17), "b", "/there", "other")
    assert one.block_hashes != other.block_hashes
    assert hashes.of(one, b"content") == hashes.of(other, b"content") and len(hashes.of(one, b"content")) == 4
    assert hashes.of(one, b"content") != hashes.of(other, b"rewritten")
    assert hashes.of(one, b"") is one.block_hashes


def test_they_grow_with_the_request_and_are_cut_with_it(hashes):
    request = Request(range(17), "a", "/here")
    first = list(hashes.of(request, b"content"))
    request.append(range(20, 40))
    assert hashes.of(request, b"content")[:4] == first and len(hashes.of(request, b"content")) == 9
    # A session goes on with other tokens: its last blocks are others.
    del request.all_token_ids[12:], request.block_hashes[3:]
    request.append(range(50, 80))
    again = list(hashes.of(request, b"content"))
    fresh = hashes.of(Request(request.all_token_ids, "a", "/here", "fresh"), b"content")
    assert again == fresh and again[:3] == first[:3] and again[3] != first[3]
    # Another request under the same number.
    assert hashes.of(Request(range(9), "a", "/here"), b"content") == first[:2]


def test_requests_that_ended_are_forgotten(hashes):
    hashes.of(Request(range(17), "a", "/here"), b"content")
    hashes.forget("one")
    hashes.forget("never seen")
    assert not hashes._renamed
