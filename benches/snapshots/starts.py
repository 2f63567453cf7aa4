"""Starts of workers by stage: `make bench-starts`. In one run, interleaved, each in a process of its own, from its start on:

- vLLM on the CPU to its first token. Cold: nothing has been compiled, and the weights are not in the page cache. Warm: weights and compile caches come
  from snapshots in the node's cache. Launched: the same, in a worker of a launcher that has imported vLLM.
- a transformers model to its first forward pass, its weights in the node's cache: by Python, and by a launcher that has imported it.
"""

import argparse
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

HERE = pathlib.Path(__file__).parent
sys.path[:0] = [
    str(HERE),
    str(HERE.parent),
    str(HERE.parent.parent / "shims/tests"),
    str(HERE.parent.parent / "shims/tests/engines"),
]

from bench import drop  # noqa: E402

from engine import ENVIRONMENT  # noqa: E402
from figures import Figures  # noqa: E402
from launchers import Launcher  # noqa: E402

# In their order. `start`: until the first line of the program.
STAGES = ("start", "imports", "configuration", "weights", "compile", "token")
MODULES = "vllm,vllm.entrypoints.llm,vllm.v1.engine.llm_engine,vllm.v1.worker.cpu_worker,transformers.models.llama.modeling_llama,kvstore.weights"


class Starts:
    def __init__(self, disk: pathlib.Path, length: int, figures: Figures):
        self.figures, self.disk = figures, disk
        self.folder, self.store = disk / "model", disk / "store"
        self.store.mkdir()
        self.cache = pathlib.Path(tempfile.mkdtemp(dir="/dev/shm", prefix="kvstore-bench-"))
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("TORCH", "TRITON", "VLLM"))},
            **{name: value for name, value in ENVIRONMENT.items() if name != "TORCHDYNAMO_DISABLE"},
            "KVSTORE_SNAPSHOTS": f"file://{self.store}",
            "KVSTORE_SNAPSHOT_CACHE": str(self.cache),
            "KVSTORE_SNAPSHOT_CACHE_BYTES": "16GiB",
            "KVSTORE_COMPILE_CACHE_BASE": str(disk / "node"),
        }
        self.child("make", str(self.folder), str(length))
        self.launcher = Launcher(MODULES, environment=self.environment).wait_ready()

    def close(self) -> None:
        self.launcher.close()
        shutil.rmtree(self.cache, ignore_errors=True)

    def child(self, kind: str, *more: str, launched: bool = False, **environment: str) -> dict:
        words = [__file__, "--child", kind, *more]
        command = self.launcher.command(*words) if launched else [sys.executable, *words]
        start = time.time()
        done = subprocess.run(command, capture_output=True, text=True, env={**self.environment, **environment})
        if done.returncode:
            raise RuntimeError(f"{kind}: {done.stderr[-4000:]}")
        told = json.loads(done.stdout.splitlines()[-1])
        if told:
            # Times since the program's first line, which was at `begun`.
            told["stages"] = {"start": told["begun"] - start, **told["stages"]}
        return told

    def cold(self) -> dict:
        with tempfile.TemporaryDirectory(dir=self.disk) as empty:
            drop(self.folder)
            caches = {name: f"{empty}/{name}" for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "VLLM_CACHE_ROOT")}
            return self.child("vllm", str(self.folder), "auto", **caches)

    def warm(self, **more) -> dict:
        return self.child("vllm", "kvstore://m", "kvstore", KVSTORE_COMPILE_CACHE="c", **more)

    def measure(self, rounds: int) -> None:
        # The first one compiles, and saves. The next one prewarms the node.
        self.warm(KVSTORE_COMPILE_CACHE_SAVE="1")
        self.warm()
        told: dict[str, list[dict]] = {}
        for _ in range(rounds):
            for kind, start in (("cold", self.cold), ("warm", self.warm), ("launched", lambda: self.warm(launched=True))):
                told.setdefault(kind, []).append(start())
            for kind, launched in (("forward", False), ("launched_forward", True)):
                told.setdefault(kind, []).append(self.child("forward", launched=launched))
        for one, other in (("cold", "warm"), ("cold", "launched"), ("forward", "launched_forward")):
            if len({repr(each["answer"]) for each in told[one] + told[other]}) != 1:
                raise RuntimeError(f"{other} answers otherwise than {one}")
        self.tell({kind: [each["stages"] for each in all] for kind, all in told.items()})

    def tell(self, stages: dict[str, list[dict]]) -> None:
        add = self.figures.add
        seconds = lambda kind, names: [sum(each[name] for name in names) for each in stages[kind]]
        ratio = lambda kind, other, names: statistics.median(
            mine / theirs for mine, theirs in zip(seconds(kind, names), seconds(other, names))
        )
        add("warm_of_cold", ratio("warm", "cold", STAGES))
        add("launched_of_cold", ratio("launched", "cold", STAGES))
        add("weights_and_compile_of_cold", ratio("warm", "cold", ("weights", "compile")), "<= 0.2")
        for stage in STAGES:
            add(f"{stage}_of_cold", ratio("warm", "cold", (stage,)))
        add("launched_imports_of_cold", ratio("launched", "cold", ("start", "imports")))
        add("launched_forward_of_forward", ratio("launched_forward", "forward", ("start", "imports", "weights", "token")))
        for kind, all in stages.items():
            for stage in all[0]:
                add(f"{kind}_{stage}_seconds", statistics.median(each[stage] for each in all))
            add(f"{kind}_seconds", statistics.median(seconds(kind, all[0])))


# ---- In a child


def make(folder: str, length: int) -> dict:
    import torch
    import transformers

    import kvstore.snapshots

    layer = dict(hidden_size=2048, intermediate_size=5632, num_attention_heads=16, num_key_value_heads=8, vocab_size=16384)
    per_layer = 2 * (2 * 2048 * 2048 + 2 * 2048 * 1024 + 3 * 2048 * 5632)
    config = transformers.LlamaConfig(**layer, num_hidden_layers=max(1, length // per_layer))
    torch.manual_seed(1)
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    kvstore.snapshots.Store().save(folder, name="m")
    return {}


class Watch:
    """Splits time into stages."""

    def __init__(self):
        self.begun = time.time()
        self.stages: dict[str, float] = {}
        self._last = time.perf_counter()

    def end(self, stage: str) -> None:
        now = time.perf_counter()
        self.stages[stage] = now - self._last
        self._last = now

    def told(self, answer) -> dict:
        return {"begun": self.begun, "stages": self.stages, "answer": answer}


def start_vllm(watch: Watch, model: str, load_format: str) -> dict:
    from vllm import LLM, SamplingParams
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    watch.end("imports")
    load = CPUModelRunner.load_model

    def timed(self, *positional, **named):
        watch.end("configuration")
        load(self, *positional, **named)
        watch.end("weights")

    CPUModelRunner.load_model = timed
    llm = LLM(model, load_format=load_format, max_model_len=512, dtype="bfloat16", skip_tokenizer_init=True)
    watch.end("compile")
    prompt = {"prompt_token_ids": list(range(3, 40))}
    (output,) = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=1, detokenize=False), use_tqdm=False)
    watch.end("token")
    return watch.told(list(output.outputs[0].token_ids))


def forward(watch: Watch) -> dict:
    import torch
    import transformers
    from transformers.models.llama import modeling_llama  # noqa: F401

    import kvstore.weights

    watch.end("imports")
    model = kvstore.weights.load(transformers.AutoModelForCausalLM, "m", dtype="auto")
    watch.end("weights")
    with torch.no_grad():
        logits = model(torch.arange(1, 17)[None]).logits
    watch.end("token")
    return watch.told(logits.double().sum().item())


def child(kind: str, *more: str) -> dict:
    watch = Watch()
    if kind == "make":
        return make(more[0], int(more[1]))
    return start_vllm(watch, *more) if kind == "vllm" else forward(watch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--disk", default=".", help="a folder on a disk (%(default)s)")
    parser.add_argument("--model-bytes", type=int, default=1 << 30, help="bytes of the model, about (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.disk) as disk:
        starts = Starts(pathlib.Path(disk), options.model_bytes, Figures("starts", options.rounds))
        try:
            starts.measure(options.rounds)
        finally:
            starts.close()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(child(*sys.argv[2:])))
    else:
        main()
