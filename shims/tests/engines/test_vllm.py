"""vLLM over the store. The oracle is always the engine's own tokens without a connector, in a process that stored nothing."""

import shutil
import threading
import time

import pytest

import models
from daemon import Daemon, until

BLOCK = 32


def prompt(tokens: int, seed: int = 1, shared: int = 0) -> list[int]:
    """A prompt; the first `shared` tokens are the same for every seed."""

    def token(at: int, seed: int) -> int:
        return 3 + (at * at * 31 + at * 17 + seed * 7919) % (models.VOCABULARY - 3)

    return [token(at, 0 if at < shared else seed) for at in range(tokens)]


@pytest.fixture(scope="session")
def oracle(zygote, model):
    """What an engine says that knows nothing of the store; each answer is made once."""
    engines, known = {}, {}

    def ask(prompts: list[list[int]], kind: str = "llama", **more) -> list[list[int]]:
        key = (kind, repr(prompts), repr(sorted(more.items())))
        if key not in known:
            if kind not in engines:
                engines.clear()
                arguments = dict(enable_lora=True, max_lora_rank=8, max_loras=2) if kind == "llama" else {}
                engines[kind] = zygote.engine(model(kind), enable_prefix_caching=False, **arguments)
            known[key] = [output.tokens for output in engines[kind].generate(prompts, **more)]
        return known[key]

    yield ask
    for engine in engines.values():
        engine.close()


def tokens(outputs) -> list[list[int]]:
    return [output.tokens for output in outputs]


def whole_blocks(prompts: list[list[int]]) -> int:
    """Blocks that the store has once all prompts are in it."""
    return len({tuple(prompt[: (at + 1) * BLOCK]) for prompt in prompts for at in range(len(prompt) // BLOCK)})


def until_it_saves(engine) -> None:
    """An engine whose daemon was away asks it again after a second: what it computes before that is not saved."""
    end, seed = time.monotonic() + 60, 5000
    before = engine.counts().get("saved_blocks", 0)
    while engine.counts().get("saved_blocks", 0) == before:
        assert time.monotonic() < end, "the daemon is not used again"
        seed += 1
        engine.generate([prompt(100, seed)], max_tokens=1)
        # Nothing waits to be saved any more.
        assert engine.call("reset", connector=False)


def store(zygote, model, address: str, prompts, **more) -> None:
    """An engine that computes the prompts, stores their blocks, and ends."""
    with zygote.engine(model, address, **more) as engine:
        engine.generate(prompts, max_tokens=1)
        engine.until_saved(whole_blocks(prompts))


@pytest.mark.parametrize(
    "kind, settings",
    [
        ("llama", dict(layerwise=True)),
        ("llama", dict(tp_shards=4)),
        ("qwen2", dict(layerwise=True)),
        ("qwen2", dict(layerwise=False)),
    ],
)
def test_a_fresh_process_loads_what_another_stored(zygote, model, daemon, oracle, kind, settings):
    prompts = [prompt(500), prompt(333, seed=2)]
    store(zygote, model(kind), daemon.address, prompts, extra=settings)
    with zygote.engine(model(kind), daemon.address, extra=settings) as engine:
        outputs = engine.generate(prompts)
        counts = engine.counts()
        # An operator sees the same.
        assert engine.call("metric", name="vllm:kvstore_loaded_blocks") == 25
    assert tokens(outputs) == oracle(prompts, kind)
    assert [output.cached for output in outputs] == [480, 320]
    assert counts["loaded_blocks"] == 25 and "failed_loads" not in counts


def test_loads_are_real(zygote, model, daemon, oracle):
    """Zeros in the store give other tokens: what is loaded is what is computed with."""
    prompts = [prompt(500)]
    with zygote.engine(model(), daemon.address) as engine:
        engine.call("zero_saves")
        engine.generate(prompts, max_tokens=1)
        engine.until_saved(whole_blocks(prompts))
    with zygote.engine(model(), daemon.address) as engine:
        outputs = engine.generate(prompts)
    assert outputs[0].cached == 480
    assert tokens(outputs) != oracle(prompts)


@pytest.mark.parametrize("settings", [dict(layerwise=True), dict(layerwise=False), dict(staged=True, layerwise=True)])
def test_loads_that_always_fail_end_in_recomputation(zygote, model, daemon, oracle, settings):
    """A look-up that promises what no load brings would have a request ask for ever. And what a step has computed from blocks
    that did not come is not stored."""
    prompts = [prompt(700), prompt(633, seed=2)]
    store(zygote, model(), daemon.address, [whole[:300] for whole in prompts])
    with zygote.engine(model(), daemon.address, extra=settings) as engine:
        engine.call("break_loads")
        outputs = engine.generate(prompts)
        counts = engine.counts()
        assert tokens(outputs) == oracle(prompts)
        assert counts["failed_loads"] >= 2 and counts.get("loaded_blocks", 0) == 0
        # Later blocks are stored again.
        more = [prompt(400, seed=5)]
        assert tokens(engine.generate(more)) == oracle(more)
        engine.until_saved(whole_blocks(prompts + more) - 2 * 9)
    with zygote.engine(model(), daemon.address) as engine:
        outputs = engine.generate(prompts)
    assert tokens(outputs) == oracle(prompts)
    assert sum(output.cached for output in outputs) >= 1200


def test_other_weights_of_the_same_shape_find_nothing(zygote, model, daemon):
    prompts = [prompt(500)]
    store(zygote, model(), daemon.address, prompts)
    with zygote.engine(model(seed=8), daemon.address) as engine:
        assert engine.generate(prompts)[0].cached == 0


def test_new_weights_are_named_anew(zygote, model, daemon):
    """After an update of the weights (RL), which the files do not show, nothing from before is read."""
    prompts = [prompt(500)]
    with zygote.engine(model(), daemon.address) as engine:
        engine.generate(prompts, max_tokens=1)
        engine.until_saved(15)
        assert engine.call("reset", connector=False)
        assert engine.generate(prompts)[0].cached == 480, "the store still has it"
        assert engine.call("reset", connector=True)
        assert engine.generate(prompts)[0].cached == 0


def test_an_engine_that_is_killed_comes_back_warm(zygote, model, daemon, oracle):
    prompts = [prompt(700, seed) for seed in range(4)]
    engine = zygote.engine(model(), daemon.address)
    engine.generate(prompts[:2], max_tokens=1)
    engine.until_saved(whole_blocks(prompts[:2]))
    engine.start("generate", prompts=prompts, max_tokens=400)
    time.sleep(0.5)
    engine.kill()
    with zygote.engine(model(), daemon.address) as engine:
        outputs = engine.generate(prompts)
    assert tokens(outputs) == oracle(prompts)
    assert all(output.cached >= 672 for output in outputs[:2])


def test_a_daemon_that_is_killed_costs_hits_and_no_tokens(zygote, model, daemon, oracle):
    prompts = [prompt(600, seed, shared=300) for seed in range(6)]
    store(zygote, model(), daemon.address, prompts[:3])
    with zygote.engine(model(), daemon.address) as engine:
        engine.call("build")
        killer = threading.Timer(0.15, daemon.kill)
        killer.start()
        outputs = engine.generate(prompts, max_tokens=60)
        killer.join()
        assert tokens(outputs) == oracle(prompts, max_tokens=60)
        # Away, it costs nothing but hits; back, it is used again.
        others = [prompt(600, seed) for seed in (11, 12)]
        assert tokens(engine.generate(others)) == oracle(others)
        daemon.start()
        until_it_saves(engine)
        more = [prompt(600, seed) for seed in (13, 14)]
        before = engine.counts().get("saved_blocks", 0)
        assert tokens(engine.generate(more)) == oracle(more)
        engine.until_saved(before + whole_blocks(more))
    with zygote.engine(model(), daemon.address) as engine:
        assert all(output.cached == 576 for output in engine.generate(more))


def test_an_engine_starts_without_a_daemon_and_finds_it_later(zygote, model, daemon, oracle):
    prompts = [prompt(500)]
    daemon.kill()
    with zygote.engine(model(), daemon.address) as engine:
        assert tokens(engine.generate(prompts)) == oracle(prompts)
        daemon.start()
        until_it_saves(engine)
        more = [prompt(400, seed=2)]
        before = engine.counts()["saved_blocks"]
        assert tokens(engine.generate(more)) == oracle(more)
        engine.until_saved(before + 12)


def test_more_loads_than_run_at_a_time(zygote, model, daemon, oracle):
    prompts = [prompt(200 + seed, seed) for seed in range(20)]
    store(zygote, model(), daemon.address, prompts)
    with zygote.engine(model(), daemon.address, extra=dict(layerwise=False)) as engine:
        outputs = engine.generate(prompts)
    assert tokens(outputs) == oracle(prompts)
    assert [output.cached for output in outputs] == [192] * 20


def test_settings_that_are_wrong_are_named(zygote, model, daemon):
    for extra, said in [
        (dict(adress="unix:/a"), "unknown keys adress; valid keys are address, deadline"),
        (dict(level="disk"), "level: 'disk' is not valid; use memory or local"),
        (dict(pending_share=2), "pending_share: 2 is not valid; use more than 0"),
    ]:
        with zygote.engine(model(), daemon.address, extra=extra) as engine:
            with pytest.raises(RuntimeError, match=said):
                engine.call("build")


def test_a_daemon_that_hangs_holds_nobody_up_for_long(zygote, model, daemon, oracle):
    import os
    import signal

    prompts = [prompt(500, seed) for seed in range(3)]
    with zygote.engine(model(), daemon.address, extra=dict(deadline=1.0, lookup_deadline=0.2)) as engine:
        engine.generate([prompt(100, 9)], max_tokens=1)
        os.kill(daemon.process.pid, signal.SIGSTOP)
        try:
            begun = time.monotonic()
            outputs = engine.generate(prompts, max_tokens=60)
            # Sixty steps that each waited for the deadline would take twice as long.
            assert time.monotonic() - begun < 30
        finally:
            os.kill(daemon.process.pid, signal.SIGCONT)
    assert tokens(outputs) == oracle(prompts, max_tokens=60)


def test_sixteen_requests_at_once_shared_and_not(zygote, model, daemon, oracle):
    prompts = [prompt(400 + 13 * seed, seed, shared=256) for seed in range(8)]
    prompts += [prompt(300 + 7 * seed, 100 + seed) for seed in range(8)]
    store(zygote, model(), daemon.address, prompts[::2])
    for layerwise in (True, False):
        with zygote.engine(model(), daemon.address, extra=dict(layerwise=layerwise)) as engine:
            outputs = engine.generate(prompts)
        assert tokens(outputs) == oracle(prompts)
        assert sum(output.cached for output in outputs) > 2000


@pytest.mark.parametrize("settings", [dict(layerwise=True), dict(staged=True, layerwise=False)])
def test_requests_that_are_given_up(zygote, model, daemon, oracle, settings):
    """While they load, while they save, before anything: what they held in the engine comes back, and others are not touched."""
    prompts = [prompt(1500, seed=seed) for seed in range(4)]
    others = [prompt(700, seed=9), prompts[1]]
    store(zygote, model(), daemon.address, prompts[:2])
    with zygote.engine(model(), daemon.address, extra=settings) as engine:
        assert tokens(engine.generate(others[:1])) == oracle(others[:1])
        engine.until_saved(whole_blocks(others[:1]))
        free = engine.call("free_blocks")
        for steps in (0, 1, 2, 5):
            engine.call("give_up", prompts=prompts, steps=steps)
            assert tokens(engine.generate(others)) == oracle(others)
        until("what they held came back", lambda: engine.call("free_blocks") == free)


def test_preemption_under_a_tiny_cache(zygote, model, daemon, oracle):
    prompts = [prompt(200 + seed, seed) for seed in range(6)]
    for _ in range(2):
        with zygote.engine(model(), daemon.address, num_gpu_blocks_override=24, max_model_len=512) as engine:
            outputs = engine.generate(prompts, max_tokens=120)
            counts = engine.counts()
            assert engine.call("metric", name="vllm:num_preemptions") > 0
        assert tokens(outputs) == oracle(prompts, max_tokens=120)
    assert counts["loaded_blocks"] >= 6, counts


def test_prompts_that_are_computed_in_chunks(zygote, model, daemon, oracle):
    prompts = [prompt(900, seed) for seed in range(3)]
    arguments = dict(max_num_batched_tokens=128, max_num_seqs=8, enable_chunked_prefill=True)
    store(zygote, model(), daemon.address, prompts[:2], **arguments)
    with zygote.engine(model(), daemon.address, **arguments) as engine:
        outputs = engine.generate(prompts)
    assert tokens(outputs) == oracle(prompts)
    assert [output.cached for output in outputs] == [896, 896, 0]


def test_prefill_and_decode_in_two_processes(zygote, model, daemon, oracle):
    prompts = [prompt(800, seed) for seed in range(3)]
    with (
        zygote.engine(model(), daemon.address, role="kv_producer") as prefill,
        zygote.engine(model(), daemon.address, role="kv_consumer") as decode,
    ):
        decode.call("build")
        for one, expected in zip(prompts, oracle(prompts, max_tokens=20)):
            (output,) = prefill.generate([one], max_tokens=1)
            assert output.handed_over == {"kvstore_blocks": 25}
            # As soon as the prefill worker has answered: the blocks are on their way.
            (output,) = decode.generate([one], max_tokens=20, hand_over=output.handed_over)
            assert output.tokens == expected and output.cached == 768
        (output,) = decode.generate([prompt(400, 50)])
        assert "saved_blocks" not in decode.counts(), "a decode worker stores nothing"


def test_salts_and_adapters_keep_apart(zygote, model, daemon, oracle, folder):
    adapters = [(f"adapter-{at}", at, str(models.make_adapter(folder, f"lora-{at}", at))) for at in (1, 2)]
    # Other weights under the name of the first.
    adapters.append(("adapter-1", 3, str(models.make_adapter(folder, "lora-3", 3))))
    one, arguments = [prompt(500)], dict(enable_lora=True, max_lora_rank=8, max_loras=2)
    with zygote.engine(model(), daemon.address, **arguments) as engine:
        engine.generate(one, max_tokens=1, salt="red")
        engine.generate(one, max_tokens=1, adapter=adapters[0])
        engine.until_saved(30)
    with zygote.engine(model(), daemon.address, **arguments) as engine:
        assert engine.generate(one, max_tokens=1, salt="blue")[0].cached == 0
        assert engine.generate(one, max_tokens=1)[0].cached == 0
        assert engine.generate(one, max_tokens=1, salt="red")[0].cached == 480
        (output,) = engine.generate(one, adapter=adapters[1])
        assert output.cached == 0 and [output.tokens] == oracle(one, adapter=adapters[1])
    with zygote.engine(model(), daemon.address, **arguments) as engine:
        (output,) = engine.generate(one, adapter=adapters[0])
        assert output.cached == 480 and [output.tokens] == oracle(one, adapter=adapters[0])
    with zygote.engine(model(), daemon.address, **arguments) as engine:
        (output,) = engine.generate(one, adapter=adapters[2])
        assert output.cached == 0, "another adapter under a name that is known"


def test_an_adapter_is_known_wherever_it_lies_and_whatever_it_is_called(zygote, model, daemon, oracle, folder, tmp_path):
    """vLLM's own hash holds the adapter's name and path: nodes that keep it elsewhere shared nothing."""
    one, arguments = [prompt(500)], dict(enable_lora=True, max_lora_rank=8, max_loras=2)
    here = models.make_adapter(folder, "lora-1", 1)
    there = shutil.copytree(here, tmp_path / "elsewhere")
    with zygote.engine(model(), daemon.address, **arguments) as engine:
        engine.generate(one, max_tokens=40, adapter=("adapter-1", 1, str(here)))
        engine.until_saved(16)
    with zygote.engine(model(), daemon.address, **arguments) as engine:
        (output,) = engine.generate(one, adapter=("other", 2, str(there)))
        assert output.cached == 480 and [output.tokens] == oracle(one, adapter=("adapter-1", 1, str(here)))
        # Rewritten in place: the engine still has the old one, and its further blocks are nobody's.
        models.make_adapter(tmp_path, "elsewhere", 3)
        longer = [one[0] + prompt(200, seed=5)]
        engine.generate(longer, max_tokens=1, adapter=("other", 2, str(there)))
    with zygote.engine(model(), daemon.address, **arguments) as engine:
        for at, path in ((1, here), (2, there)):
            assert engine.generate(longer, max_tokens=1, adapter=(f"adapter-{at}", at, str(path)))[0].cached == (480, 0)[at - 1]


def test_from_disk_after_a_restart_and_corrupted_blocks_are_recomputed(zygote, model, disk_daemon, oracle):
    prompts = [prompt(1500), prompt(1400, seed=2)]
    store(zygote, model(), disk_daemon.address, prompts, extra=dict(level="local"))
    disk_daemon.kill()
    disk_daemon.start()
    with zygote.engine(model(), disk_daemon.address) as engine:
        outputs = engine.generate(prompts)
        assert [output.cached for output in outputs] == [1472, 1376]
        assert tokens(outputs) == oracle(prompts)
    disk_daemon.kill()
    flipped = flip(disk_daemon.folder / "nvme", every=700_001)
    disk_daemon.start()
    with zygote.engine(model(), disk_daemon.address) as engine:
        outputs = engine.generate(prompts)
    assert flipped >= 5
    assert sum(output.cached for output in outputs) < 1472 + 1376, "corrupted blocks were served"
    assert tokens(outputs) == oracle(prompts)


def flip(folder, every: int) -> int:
    """Flips bits of a data file's content; at how many places."""
    flipped = 0
    for file in folder.rglob("*"):
        if file.is_file() and file.stat().st_size > 8 << 20 and "index" not in str(file.relative_to(folder)):
            with open(file, "r+b") as opened:
                for at in range(every, file.stat().st_size, every):
                    opened.seek(at)
                    byte = opened.read(1)
                    if byte not in (b"", b"\0"):
                        opened.seek(at)
                        opened.write(bytes([byte[0] ^ 0xFF]))
                        flipped += 1
    return flipped


def test_the_engine_in_a_process_of_its_own(zygote, model, daemon, oracle, monkeypatch):
    """vLLM's default: the scheduler and the worker in a child of the front end."""
    prompts = [prompt(500), prompt(333, seed=2)]
    for expected in ([0, 0], [480, 320]):
        with zygote.engine(model(), daemon.address, environment=dict(VLLM_ENABLE_V1_MULTIPROCESSING="1")) as engine:
            outputs = engine.generate(prompts)
            assert tokens(outputs) == oracle(prompts)
            assert [output.cached for output in outputs] == expected
            # The engine's loop goes on while blocks are being saved; then their places are free.
            assert engine.call("reset", connector=False)


@pytest.mark.parametrize("kind", ["mistral", "gemma3"])
def test_layers_that_look_back_a_window(zygote, model, daemon, oracle, kind):
    prompts = [prompt(900), prompt(700, seed=2, shared=512), prompt(150, seed=3)]
    with zygote.engine(model(kind), daemon.address) as engine:
        assert tokens(engine.generate(prompts)) == oracle(prompts, kind)
        # Both kinds of layers of what is still in their windows.
        engine.until_saved(whole_blocks(prompts[:1]))
    with zygote.engine(model(kind), daemon.address) as engine:
        outputs = engine.generate(prompts)
        counts = engine.counts()
    assert tokens(outputs) == oracle(prompts, kind)
    assert outputs[0].cached == 896, outputs
    assert counts.get("failed_loads", 0) == 0


def test_staged_and_direct_engines_read_each_other(zygote, model, daemon, oracle):
    """Blocks are the same, whether they went by way of staging memory or not; nor does it matter how they are brought."""
    prompts = [prompt(900), prompt(700, seed=2)]
    store(zygote, model(), daemon.address, prompts[:1], extra=dict(staged=True))
    store(zygote, model(), daemon.address, prompts[1:])
    for settings in (dict(staged=True, layerwise=False), dict(staged=True, layerwise=True), dict()):
        with zygote.engine(model(), daemon.address, extra=settings) as engine:
            outputs = engine.generate(prompts)
        assert tokens(outputs) == oracle(prompts)
        assert [output.cached for output in outputs] == [896, 672]


def test_another_node_finds_a_prefix_in_the_bucket(zygote, model, oracle, tmp_path):
    """Two daemons that share nothing but a bucket, one after the other. The request waits while the bucket is searched."""
    settings = ("nvme.paths=off", "host.bytes=512MiB", f"object.url=file://{tmp_path}/bucket", "object.upload=all")
    prompts = [prompt(900), prompt(700, seed=2)]
    for node, cached in (("a", None), ("b", [896, 672])):
        (tmp_path / node).mkdir()
        daemon = Daemon(tmp_path / node, *settings)
        try:
            if cached is None:
                store(zygote, model(), daemon.address, prompts)
            else:
                with zygote.engine(model(), daemon.address, extra=dict(search_seconds=60)) as engine:
                    outputs = engine.generate(prompts)
                assert tokens(outputs) == oracle(prompts)
                assert [output.cached for output in outputs] == cached
            # In order: what waits to be uploaded is.
            daemon.stop()
        finally:
            daemon.kill()


def test_a_session_goes_to_the_bucket_when_it_says_so(zygote, model, tmp_path):
    """One of two requests is to outlive the node: its blocks alone are uploaded. Without a bucket it is served all the same."""
    settings = ("nvme.paths=off", "host.bytes=512MiB", f"object.url=file://{tmp_path}/bucket")
    others, session = [prompt(900)], [prompt(700, seed=2)]
    daemon = Daemon(tmp_path, *settings)
    try:
        with zygote.engine(model(), daemon.address) as engine:
            engine.generate(others)
            engine.generate(session, hand_over={"kvstore_upload": True})
            engine.until_saved(896 // 32 + 672 // 32)
        # In order: what waits to be uploaded is.
        daemon.stop()
    finally:
        daemon.kill()
    for node, prompts, cached in (("a", others, 0), ("b", session, 672)):
        (tmp_path / node).mkdir()
        daemon = Daemon(tmp_path / node, *settings)
        try:
            with zygote.engine(model(), daemon.address, extra=dict(search_seconds=60)) as engine:
                assert [output.cached for output in engine.generate(prompts)] == [cached]
        finally:
            daemon.kill()
    (tmp_path / "c").mkdir()
    daemon = Daemon(tmp_path / "c", "nvme.paths=off", "host.bytes=512MiB")
    try:
        with zygote.engine(model(), daemon.address) as engine:
            engine.generate(session, hand_over={"kvstore_upload": True})
            engine.until_saved(672 // 32)
    finally:
        daemon.kill()


def test_tensor_parallel_groups(zygote, model, disk_daemon):
    """Two ranks share a look-up: a hit is as long as both have it. With tp_shards one rank's blocks are read by two, and theirs by
    one; without, they are other blocks. Two ranks' sums are rounded otherwise than one's, so each has its own oracle. A daemon
    that restarted answers for all shards, though one rank's layout was registered again: once in a while it found nothing."""
    daemon = disk_daemon
    first, second = [prompt(500)], [prompt(700, seed=2)]
    pair = dict(tensor_parallel_size=2, environment=dict(VLLM_ENABLE_V1_MULTIPROCESSING="1", VLLM_CPU_OMP_THREADS_BIND="0|1"))
    shards = dict(extra=dict(tp_shards=4, level="local"))
    with zygote.engine(model(), enable_prefix_caching=False, **pair) as engine:
        of_two = [tokens(engine.generate(prompts)) for prompts in (first, second)]
    with zygote.engine(model(), enable_prefix_caching=False) as engine:
        of_one = tokens(engine.generate(second))
    store(zygote, model(), daemon.address, first, **shards)
    with zygote.engine(model(), daemon.address, **shards, **pair) as engine:
        for prompts, expected, cached in ((first, of_two[0], 480), (second, of_two[1], 0), (second, of_two[1], 672)):
            (output,) = engine.generate(prompts)
            assert [output.tokens] == expected and output.cached == cached
            assert engine.call("reset", connector=False)
        daemon.kill()
        daemon.start()
        time.sleep(1.1)
        (output,) = engine.generate(second)
        assert [output.tokens] == of_two[1] and output.cached == 672
    with zygote.engine(model(), daemon.address, **shards) as engine:
        (output,) = engine.generate(second)
        assert output.cached == 672 and [output.tokens] == of_one
    with zygote.engine(model(), daemon.address) as engine:
        assert engine.generate(second)[0].cached == 0, "in one piece they are other blocks"
    with zygote.engine(model(), daemon.address, extra=dict(tp_shards=3)) as engine:
        with pytest.raises(RuntimeError, match="tp_shards: a cache of .* cannot be split by heads into 3"):
            engine.call("build")
