"""SGLang's storage backend, with SGLang's own factory and host pools (on the CPU its engine does not run)."""

import hashlib

import pytest
import torch
from sglang.srt.mem_cache import device_pool_info as device
from sglang.srt.mem_cache.hicache_storage import (
    HiCacheStorageConfig,
    HiCacheStorageExtraInfo,
    PoolHitPolicy,
    PoolName,
    PoolTransfer,
)
from sglang.srt.mem_cache.memory_pool_host import LogicalHostPool
from sglang.srt.mem_cache.pool_host.mamba import MambaPoolHost
from sglang.srt.mem_cache.pool_host.mha import MHATokenToKVPoolHost
from sglang.srt.mem_cache.pool_host.mla import MLATokenToKVPoolHost
from sglang.srt.mem_cache.storage import StorageBackendFactory

from daemon import until

LAYERS, HEADS, DIM, PAGE, PAGES = 3, 4, 16, 8, 16
MHA_LAYOUTS = ["layer_first", "page_first", "page_first_direct", "page_head"]
MLA_LAYOUTS = ["layer_first", "page_first", "page_first_direct"]


def pointers(tensors):
    return torch.tensor([tensor.data_ptr() for tensor in tensors], dtype=torch.uint64)


def sizes(layout):
    return dict(
        layout=layout,
        host_to_device_ratio=2.0,
        host_size=0,
        page_size=PAGE,
        pin_memory=False,
        device_capacity_tokens=64,
        start_layer=0,
        end_layer=LAYERS,
        host_token_capacity=PAGES * PAGE,
    )


def mha(layout="page_first", heads=HEADS):
    keys = tuple(torch.zeros(64, heads, DIM, dtype=torch.bfloat16) for _ in range(LAYERS))
    values = tuple(torch.zeros_like(key) for key in keys)
    buffers = device.KVBuffers(
        k=keys, v=values, k_data_ptrs=pointers(keys), v_data_ptrs=pointers(values), layout=next(iter(device.KVBufferLayout))
    )
    info = device.MHABufferInfo(
        buffers=buffers,
        page_size=PAGE,
        head_num=heads,
        head_dim=DIM,
        v_head_dim=DIM,
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
    )
    return filled(MHATokenToKVPoolHost(info, **sizes(layout)))


def mla(layout="page_first"):
    rows = tuple(torch.zeros(64, 1, 40, dtype=torch.bfloat16) for _ in range(LAYERS))
    info = device.MLABufferInfo(
        buffers=rows,
        data_ptrs=pointers(rows),
        layer_indices=tuple(range(LAYERS)),
        device_layer_num=LAYERS,
        page_size=PAGE,
        kv_lora_rank=32,
        qk_rope_head_dim=8,
        kv_cache_dim=40,
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
    )
    return filled(MLATokenToKVPoolHost(info, target_layer_num=LAYERS, **sizes(layout)))


def mamba():
    info = device.MambaStateBufferInfo(
        temporal=torch.zeros(LAYERS, 16, 2, 8), conv=(torch.zeros(LAYERS, 16, 4, 6, dtype=torch.bfloat16),)
    )
    pool = MambaPoolHost(info, 2.0, 0, device_capacity=16, pin_memory=False, layout="page_first")
    for tensor in (pool.temporal_buffer, *pool.conv_buffer):
        tensor.copy_(torch.randn(tensor.shape))
    return pool


def filled(pool):
    pool.kv_buffer.copy_(torch.randn(pool.kv_buffer.shape))
    return pool


def zero(pool):
    for value in vars(pool).values():
        for tensor in value if isinstance(value, list) else [value]:
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                tensor.zero_()


def make(daemon, pool, is_mla=False, rank=0, ranks=1, zero_copy=1, lcm=None, metrics=False, **settings):
    config = HiCacheStorageConfig(
        tp_rank=rank,
        tp_size=ranks,
        pp_rank=0,
        pp_size=1,
        attn_cp_rank=0,
        attn_cp_size=1,
        is_mla_model=is_mla,
        enable_storage_metrics=metrics,
        is_page_first_layout=pool.layout == "page_first",
        model_name="tiny",
        tp_lcm_size=lcm,
        should_split_heads=bool(lcm and lcm > ranks and not is_mla),
        extra_config={
            "backend_name": "kvstore",
            "module_path": "kvstore.sglang",
            "class_name": "KvStoreHiCache",
            "interface_v1": zero_copy,
            "address": daemon.address,
            "weights_version": "1",
            "deadline": 60.0,
            **settings,
        },
    )
    backend = StorageBackendFactory.create_backend("dynamic", config, pool)
    backend.register_mem_pool_host(pool)
    backend.on_host_pools_registered()
    return backend


def names(count, first=0, salt=b""):
    return [hashlib.sha256(salt + b"page %d" % at).hexdigest() for at in range(first, first + count)]


def slots(pages, tokens=PAGE):
    return torch.cat([torch.arange(page * tokens, (page + 1) * tokens) for page in pages])


def contents(pool, pages, tokens=PAGE):
    return [pool.get_data_page(page * tokens).clone() for page in pages]


def same(first, second):
    return len(first) == len(second) and all(torch.equal(one, two) for one, two in zip(first, second))


@pytest.mark.parametrize("kind, layout", [("mha", name) for name in MHA_LAYOUTS] + [("mla", name) for name in MLA_LAYOUTS])
@pytest.mark.parametrize("plane", ["local", "grpc"])
def test_pages_come_back_in_another_process_pool(daemon, kind, layout, plane):
    pool = {"mha": mha, "mla": mla}[kind](layout)
    writer = make(daemon, pool, is_mla=kind == "mla", plane=plane)
    keys, pages = names(6), [3, 1, 15, 0, 9, 4]
    wanted = contents(pool, pages)
    assert writer.batch_exists(keys) == 0
    assert writer.batch_set_v1(keys, slots(pages)) == [True] * 6
    assert writer.batch_exists(keys + names(2, 50)) == 6

    other = {"mha": mha, "mla": mla}[kind](layout)
    reader, there = make(daemon, other, is_mla=kind == "mla", plane=plane), [2, 7, 5, 11, 14, 6]
    zero(other)
    assert reader.batch_get_v1(keys, slots(there)) == [True] * 6
    assert same(contents(other, there), wanted)
    untouched = [page for page in range(PAGES) if page not in there]
    assert not any(page.any() for page in contents(other, untouched))


def test_hits_are_the_leading_ones(daemon):
    pool = mha()
    backend = make(daemon, pool)
    keys = names(6)
    backend.batch_set_v1(keys[:2] + keys[3:], slots([0, 1, 3, 4, 5]))
    assert backend.batch_exists(keys) == 2
    zero(pool)
    assert backend.batch_get_v1(keys, slots(range(6))) == [True, True] + [False] * 4
    assert not any(page.any() for page in contents(pool, range(2, 6)))
    # With the pages before them named, as SGLang does where it is told to.
    info = HiCacheStorageExtraInfo(prefix_keys=keys[:2])
    assert backend.batch_set_v1(keys[2:3], slots([2]), info) == [True]
    assert backend.batch_exists(keys) == 6


def test_what_does_not_match_misses(daemon):
    make(daemon, mha()).batch_set_v1(names(4), slots(range(4)))
    assert make(daemon, mha()).batch_exists(names(4)) == 4
    assert make(daemon, mha(), weights_version="2").batch_exists(names(4)) == 0
    assert make(daemon, mha(), rank=1, ranks=2).batch_exists(names(4)) == 0
    assert make(daemon, mha("page_first_direct")).batch_exists(names(4)) == 0
    assert make(daemon, mha(heads=2)).batch_exists(names(4)) == 0
    assert make(daemon, mla(), is_mla=True).batch_exists(names(4)) == 0


def test_latent_attention_is_written_once_for_all_ranks(daemon):
    pool, other = mla(), mla()
    assert make(daemon, pool, is_mla=True, rank=0, ranks=4).batch_set_v1(names(4), slots(range(4))) == [True] * 4
    for rank in (1, 3):
        zero(other)
        assert make(daemon, other, is_mla=True, rank=rank, ranks=4).batch_get_v1(names(4), slots(range(4))) == [True] * 4
        assert same(contents(other, range(4)), contents(pool, range(4)))


def test_pages_split_by_heads_serve_other_tensor_parallel_degrees(daemon):
    """tp_lcm_size: one rank's pages are read by two, each its heads; and the other way round."""
    whole = mha("page_head")
    one = make(daemon, whole, lcm=2)
    assert one.batch_set_v1(names(5), slots(range(5))) == [True] * 5
    for rank in range(2):
        half = mha("page_head", heads=HEADS // 2)
        zero(half)
        two = make(daemon, half, rank=rank, ranks=2, lcm=2)
        assert two.batch_exists(names(5)) == 5
        assert two.batch_get_v1(names(5), slots(range(5))) == [True] * 5
        # (2, pages, heads, tokens, layers, dim)
        heads = slice(rank * HEADS // 2, (rank + 1) * HEADS // 2)
        assert torch.equal(half.kv_buffer[:, :5], whole.kv_buffer[:, :5, heads])
        assert two.batch_set_v1(names(3, 20), slots([5, 6, 7])) == [True] * 3
        # With one of the halves missing it is no hit.
        assert one.batch_exists(names(3, 20)) == (3 if rank else 0)


def test_hybrid_models_hit_where_their_state_is_too(daemon):
    pool, states = mha(), mamba()
    backend = make(daemon, pool)
    backend.register_mem_host_pool_v2(states, PoolName.MAMBA)
    keys = names(8)
    # Keys and values of eight pages; the state after pages 3 and 6 alone.
    wanted = contents(pool, range(8)), contents(states, [4, 7], 1)
    assert backend.batch_set_v1(keys, slots(range(8))) == [True] * 8
    saved = backend.batch_set_v2(
        [
            PoolTransfer(PoolName.MAMBA, host_indices=slots([4], 1), keys=keys[2:3]),
        ]
    )
    assert saved == {PoolName.MAMBA: [True]}
    backend.batch_set_v2([PoolTransfer(PoolName.MAMBA, host_indices=slots([7], 1), keys=keys[5:6])])

    def exists(policy, keys_of_transfer):
        transfer = PoolTransfer(PoolName.MAMBA, keys=keys_of_transfer, hit_policy=policy)
        return backend.batch_exists_v2(keys, [transfer])

    found = exists(PoolHitPolicy.TRAILING_PAGES, keys[-1:])
    assert (found.kv_hit_pages, found.restorable_prefix_pages) == (6, [3, 6])
    assert found.extra_pool_hit_pages == {PoolName.KV: 8, PoolName.MAMBA: 6}
    assert exists(PoolHitPolicy.TRAILING_PAGES, keys[-2:]).kv_hit_pages == 0
    assert exists(PoolHitPolicy.ALL_PAGES, None).kv_hit_pages == 0
    with pytest.raises(ValueError, match="block_groups"):
        exists(PoolHitPolicy.BLOCK_GROUPS, None)

    zero(pool)
    zero(states)
    assert backend.batch_get_v1(keys[:6], slots(range(6))) == [True] * 6
    loaded = backend.batch_get_v2([PoolTransfer(PoolName.MAMBA, host_indices=slots([9], 1), keys=keys[5:6])])
    assert loaded == {PoolName.MAMBA: [True]}
    assert same(contents(pool, range(6)), wanted[0][:6])
    assert same(contents(states, [9], 1), wanted[1][1:])


def test_an_anchor_without_memory_leaves_the_answer_to_the_other_pools(daemon):
    anchor, side = LogicalHostPool(PAGES * PAGE, PAGE), mla()
    backend = make(daemon, anchor, is_mla=True)
    backend.register_mem_host_pool_v2(side, PoolName.DEEPSEEK_V4_C4)
    assert backend.batch_exists(names(3)) == 3
    assert backend.batch_set_v1(names(3), slots(range(3))) == [True] * 3
    transfer = PoolTransfer(PoolName.DEEPSEEK_V4_C4, host_indices=slots(range(3)), keys=names(3))
    assert backend.batch_exists_v2(names(3), [transfer]).kv_hit_pages == 0
    backend.batch_set_v2([transfer])
    assert backend.batch_exists_v2(names(3), [transfer]).kv_hit_pages == 3


def test_the_copying_interface(daemon):
    pool = mha("layer_first")
    backend = make(daemon, pool, zero_copy=0)
    pages = contents(pool, range(4))
    assert not backend.exists(names(1)[0])
    assert backend.batch_set(names(4), pages)
    assert backend.exists(names(1)[0]) and backend.batch_exists(names(6)) == 4
    # Another process knows no size yet.
    assert make(daemon, mha("layer_first"), zero_copy=0).batch_exists(names(6)) == 4
    blank = [pool.get_dummy_flat_data_page() for _ in range(6)]
    loaded = backend.batch_get(names(6), blank)
    assert same(loaded[:4], [page.flatten() for page in pages]) and loaded[4:] == [None, None]
    assert backend.get(names(1, 70)[0], blank[0]) is None
    # The two ways do not see each other's pages: they need not be ordered alike.
    assert make(daemon, pool).batch_exists(names(4)) == 0


def test_a_daemon_that_is_away_is_a_miss(daemon):
    pool = mha()
    backend = make(daemon, pool)
    backend.batch_set_v1(names(2), slots([0, 1]))
    daemon.kill()
    assert backend.batch_exists(names(2)) == 0
    assert backend.batch_get_v1(names(2), slots([0, 1])) == [False, False]
    assert backend.batch_set_v1(names(2), slots([0, 1])) == [False, False]
    assert make(daemon, pool).batch_exists(names(2)) == 0
    daemon.start()
    until("the daemon is used again", lambda: all(backend.batch_set_v1(names(2), slots([0, 1]))))
    assert backend.batch_exists(names(2)) == 2


def test_cleared_and_renamed_pages_are_not_found(daemon, monkeypatch):
    from sglang.srt import runtime_context

    backend = make(daemon, mha(), metrics=True)
    backend.batch_set_v1(names(2), slots([0, 1]))
    stats = backend.get_stats()
    assert stats.backup_pgs == [2] and stats.backup_bandwidth[0] > 0 and backend.get_stats().backup_pgs == []
    # What SGLang does when it is given new weights with a version.
    serving = type("Serving", (), {"weight_version": "step 2"})
    monkeypatch.setattr(runtime_context, "get_serving", lambda: serving)
    assert backend.batch_exists(names(2)) == 0
    backend.batch_set_v1(names(1), slots([0]))
    assert backend.batch_exists(names(2)) == 1
    backend.clear()
    assert backend.batch_exists(names(2)) == 0


def test_what_the_server_changes_of_a_model_is_in_the_name(daemon, monkeypatch):
    from sglang.srt import runtime_context

    found = []
    for override in ("{}", '{"rope_theta": 20000.0}', "{}"):
        args = type("Args", (), {"model_path": "tiny", "revision": None, "json_model_override_args": override})
        monkeypatch.setattr(runtime_context, "get_server_args", lambda args=args: args)
        backend = make(daemon, mha())
        found.append(backend.batch_exists(names(1)))
        backend.batch_set_v1(names(1), slots([0]))
    assert found == [0, 0, 1]


@pytest.mark.parametrize(
    "settings, problem",
    [
        (dict(adress="unix:/a"), "unknown keys adress; valid keys are address, deadline"),
        (dict(plane="fast"), "plane: 'fast' is not valid; use auto, local or grpc"),
        (dict(deadline="soon"), "deadline: 'soon' is not valid; use more than 0"),
    ],
)
def test_settings_that_are_wrong_are_named(daemon, settings, problem):
    with pytest.raises(ValueError, match=problem):
        make(daemon, mha(), **settings)


def test_what_is_not_a_pool_or_no_pages_is_refused(daemon):
    backend = make(daemon, mha())
    transfer = PoolTransfer(PoolName.SWA, host_indices=slots([0]), keys=names(1))
    for call in (backend.batch_get_v2, backend.batch_set_v2, lambda transfers: backend.batch_exists_v2(names(1), transfers)):
        with pytest.raises(ValueError, match="pool swa is not registered"):
            call([transfer])
    with pytest.raises(ValueError, match="15 slots were given for 2 pages of 8"):
        backend.batch_set_v1(names(2), slots([0, 1])[:15])
