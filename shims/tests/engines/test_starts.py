"""Starts of real engines: with compile caches that another process made, and from a launcher that has imported them."""

import json
import os
import pathlib
import stat
import subprocess
import sys

import pytest

from kvstore.compiled import folders
from kvstore.snapshots import Store

import models
from engine import ENVIRONMENT
from launchers import Launcher

PATIENCE_S = 1200

COMPILES = """
import json, sys, time
import torch
import kvstore.compiled

caches = kvstore.compiled.use("torch")
torch.manual_seed(1)
net = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.GELU(), torch.nn.LayerNorm(64), torch.nn.Softmax(-1))
with torch.no_grad():
    answer = torch.compile(net)(torch.arange(256.0).reshape(4, 64) / 256)
from torch._dynamo.utils import counters
print(json.dumps([dict(counters["inductor"]), answer.double().sum().item(), caches.id, len(caches.new_files())]))
caches.save()
"""


@pytest.fixture
def node(tmp_path):
    """An environment in which each run of the C++ compiler is counted."""
    (tmp_path / "store").mkdir()
    (tmp_path / "bin").mkdir()
    compiler = tmp_path / "bin" / "g++"
    compiler.write_text(
        f'#!/bin/sh\\necho "$@" >> {tmp_path}/compiled\\nexec /usr/bin/g++ "$@"\\n'.encode().decode("unicode_escape")
    )
    compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
    environment = dict(
        os.environ,
        PATH=f"{tmp_path}/bin:{os.environ['PATH']}",
        KVSTORE_SNAPSHOTS=f"file://{tmp_path}/store",
        KVSTORE_COMPILE_CACHE_BASE=str(tmp_path / "node"),
        # A default of torch's own would be shared with other tests.
        TMPDIR=str(tmp_path),
    )
    # SGLang sets some of them while it is imported. CXX would name another compiler than the one that counts; torch takes all of it for
    # one program's name, and fails with "ccache c++".
    for name in (*folders.VARIABLES, "TORCHDYNAMO_DISABLE", "CXX"):
        environment.pop(name, None)
    return tmp_path, environment


def kernels(folder: pathlib.Path) -> int:
    """How often the compiler has compiled a kernel since the last call."""
    log = folder / "compiled"
    lines = log.read_text().splitlines() if log.exists() else []
    log.write_text("")
    # A header may be compiled, too.
    return sum(".cpp" in line or "c++-header" in line for line in lines)


def run(command: list[str], environment: dict) -> subprocess.CompletedProcess:
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr[-6000:]
    return done


@pytest.mark.skipif(not os.path.exists("/usr/bin/g++"), reason="torch.compile needs a C++ compiler")
def test_torch_compiles_nothing_again(node):
    folder, environment = node
    (folder / "compiles.py").write_text(COMPILES)
    first = json.loads(run([sys.executable, str(folder / "compiles.py")], environment).stdout)
    assert kernels(folder) > 0
    second = json.loads(run([sys.executable, str(folder / "compiles.py")], environment).stdout)
    assert kernels(folder) == 0, "a compiler ran"
    assert first[1] == second[1]
    assert first[2] is None and second[2] is not None and second[3] == 0, (first, second)
    assert second[0].get("fxgraph_cache_hit", 0) >= 1 and not second[0].get("fxgraph_cache_miss"), second


VLLM = """
import json, sys
from vllm import LLM, SamplingParams

def main():
    llm = LLM(max_model_len=256, dtype="float32", skip_tokenizer_init=True, **json.loads(sys.argv[1]))
    prompt = {"prompt_token_ids": list(range(3, 40))}
    (output,) = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=8, detokenize=False), use_tqdm=False)
    print(json.dumps([output.outputs[0].token_ids]))

if __name__ == "__main__":
    main()
"""


def tokens(done: subprocess.CompletedProcess) -> list[int]:
    assert done.returncode == 0, done.stderr[-6000:]
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("[[")))[0]


@pytest.mark.skipif(not os.path.exists("/usr/bin/g++"), reason="torch.compile needs a C++ compiler")
def test_vllm_compiles_nothing_again(node, folder):
    """By the environment alone: the plugin restores, and saves once the engine is warm."""
    at, environment = node
    model = models.make(folder, "llama")
    (at / "engine.py").write_text(VLLM)
    own = {name: value for name, value in ENVIRONMENT.items() if name != "TORCHDYNAMO_DISABLE"}
    environment |= dict(own, KVSTORE_COMPILE_CACHE="vllm", VLLM_LOGGING_LEVEL="INFO")
    command = [sys.executable, str(at / "engine.py"), json.dumps(dict(model=str(model)))]
    first = run(command, {**environment, "KVSTORE_COMPILE_CACHE_SAVE": "1"})
    assert kernels(at) > 0
    said = first.stdout + first.stderr
    assert "compiling anew: " in said and "saved as " in said, said[-6000:]
    saved = Store(environment["KVSTORE_SNAPSHOTS"]).inspect("vllm")[0]
    assert saved.facts["vllm"] == "0.32.0" and saved.facts["torch"].startswith("2.13.0")
    second = run(command, environment)
    assert kernels(at) == 0, "a compiler ran"
    assert tokens(second) == tokens(first)
    # The first engine's folder was left where its processes were killed, and the second has removed it.
    assert len([path for path in (at / "node").glob("engine-*") if path.is_dir()]) <= 1


FORWARD = """
import json, os, torch, transformers
torch.manual_seed(7)
config = transformers.LlamaConfig(
    hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4, vocab_size=1024
)
model = transformers.LlamaForCausalLM(config)
with torch.no_grad():
    logits = model(torch.arange(1, 17)[None]).logits
print(json.dumps([logits.double().sum().item(), torch.get_num_threads(), torch.__config__.parallel_info()]))
"""


def test_a_worker_of_a_launcher_computes_as_a_new_process():
    launcher = Launcher("torch,transformers.models.llama.modeling_llama").wait_ready()
    try:
        cold = json.loads(run([sys.executable, "-c", FORWARD], launcher.environment).stdout)
        done = launcher.run("-c", FORWARD)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout) == cold
        drawn = [launcher.run("-c", "import torch; print(torch.rand(4).tolist())").stdout for _ in range(2)]
        assert drawn[0] != drawn[1]
    finally:
        launcher.close()


def test_vllm_in_a_worker_of_a_launcher(folder, tmp_path):
    """Its weights come from a snapshot; the launcher was started before there was one."""
    (tmp_path / "store").mkdir()
    (tmp_path / "engine.py").write_text(VLLM)
    model = models.make(folder, "llama")
    modules = "vllm,vllm.entrypoints.llm,vllm.v1.engine.llm_engine,vllm.v1.worker.cpu_worker"
    launcher = Launcher(modules, environment=ENVIRONMENT).wait_ready()
    try:
        Store(f"file://{tmp_path}/store").save(model, name="llama")
        arguments = dict(model="kvstore://llama", load_format="kvstore", enforce_eager=True)
        command = [str(tmp_path / "engine.py"), json.dumps(arguments)]
        environment = {**launcher.environment, "KVSTORE_SNAPSHOTS": f"file://{tmp_path}/store"}
        wanted = tokens(run([sys.executable, *command], environment))
        more = dict(capture_output=True, text=True, timeout=PATIENCE_S, env=environment)
        for _ in range(2):
            assert tokens(subprocess.run(launcher.command(*command), **more)) == wanted
    finally:
        launcher.close()
