"""What the shims use of vLLM, transformers and torch, for tests of their own classes where none of these is installed."""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from dataclasses import dataclass, field
from types import SimpleNamespace

FAKED = ("vllm", "torch", "transformers")
SHIMS = ("kvstore.vllm", "kvstore.transformers")


@dataclass
class TransferResults:
    finished_recving: set = field(default_factory=set)
    failed_recving: set = field(default_factory=set)


@dataclass
class Stats:
    data: dict = field(default_factory=dict)


def yield_req_data(output):
    """(request, its new blocks by group, whether it was preempted) of each request of a step."""
    for new in output.scheduled_new_reqs:
        yield new.req_id, new.block_ids, False


class DynamicCache:
    """A cache of no tokens."""

    def __init__(self, config=None):
        self.layers = []

    def get_seq_length(self) -> int:
        return 0


class Sequences:
    """One sequence of tokens, as a tensor of two dimensions."""

    def __init__(self, tokens: list[int]):
        self._tokens, self.shape = tokens, (1, len(tokens))

    def __getitem__(self, at: int):
        return SimpleNamespace(tolist=lambda: self._tokens)


_KNOWN = {
    "DynamicCache": DynamicCache,
    "cuda": SimpleNamespace(is_available=lambda: False),
    "get_rng_state": lambda: SimpleNamespace(numpy=lambda: memoryview(b"generator")),
    "KVConnectorTransferResults": TransferResults,
    "KVConnectorStats": Stats,
    "ECConnectorStats": Stats,
    "yield_req_data": yield_req_data,
}


class _Module(types.ModuleType):
    __path__: list = []

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        made = _KNOWN.get(name) or type(name, (), {})
        setattr(self, name, made)
        return made


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        is_faked = name.partition(".")[0] in FAKED
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if is_faked else None

    def create_module(self, spec):
        return _Module(spec.name)

    def exec_module(self, module):
        pass


def install() -> bool:
    """Makes the shims importable. False where a real one is installed: those have tests of their own."""
    if any(importlib.util.find_spec(name) is not None for name in FAKED):
        return False
    sys.meta_path.append(_Finder())
    return True


def uninstall() -> None:
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _Finder)]
    for name in list(sys.modules):
        if name.partition(".")[0] in FAKED or name.startswith(SHIMS):
            del sys.modules[name]


def config(blocks: int, block_tokens: int):
    """(vllm_config, kv_cache_config) of a model with one group of attention layers, on a CPU."""
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    spec = FullAttentionSpec()
    spec.block_size = block_tokens
    group = SimpleNamespace(kv_cache_spec=spec, layer_names=["layer"])
    cache = SimpleNamespace(kv_cache_groups=[group], hash_block_size=block_tokens, num_blocks=blocks)
    engine = SimpleNamespace(
        kv_transfer_config=SimpleNamespace(is_kv_producer=True, is_kv_consumer=True),
        parallel_config=SimpleNamespace(world_size=1, rank=0),
        device_config=SimpleNamespace(device_type="cpu"),
        cache_config=SimpleNamespace(block_size=block_tokens, enable_prefix_caching=True),
        model_config=SimpleNamespace(multimodal_config=None),
    )
    return engine, cache


class Pool:
    """The pool of the engine's blocks; counts references."""

    def __init__(self, blocks: int):
        self.blocks = [SimpleNamespace(number=number, is_null=False) for number in range(blocks)]
        self.held = 0

    def touch(self, blocks) -> None:
        self.held += len(blocks)

    def free_blocks(self, blocks) -> None:
        self.held -= len(blocks)


def request(name: str, hashes: list[bytes], block_tokens: int):
    tokens = len(hashes) * block_tokens
    return SimpleNamespace(
        request_id=name,
        block_hashes=hashes,
        num_tokens=tokens,
        num_prompt_tokens=tokens,
        all_token_ids=range(tokens),
        mm_features=[],
        lora_request=None,
        kv_transfer_params=None,
        skip_reading_prefix_cache=False,
        num_preemptions=0,
    )


def step(request, places: list[int], computed: int):
    """The scheduler's output for a step that computes the rest of a new request."""
    new = SimpleNamespace(req_id=request.request_id, num_computed_tokens=computed, block_ids=[places])
    cached = SimpleNamespace(req_ids=[], num_computed_tokens=[], resumed_req_ids=[])
    return SimpleNamespace(
        scheduled_new_reqs=[new],
        scheduled_cached_reqs=cached,
        num_scheduled_tokens={request.request_id: request.num_tokens - computed},
    )
