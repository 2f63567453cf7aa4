"""Saves a small model that it makes, restores it without a copy on disk, trains it a little, and saves what changed.

pip install torch transformers and kvstore's wheel, then:
python snapshots.py [STORE]          # default: a folder that is removed at the end; or s3://bucket/prefix
"""

import sys
import tempfile

import torch
import transformers

import kvstore.snapshots
import kvstore.weights


def make() -> transformers.PreTrainedModel:
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=4096,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
    )
    return transformers.LlamaForCausalLM(config).eval()


def say(progress: kvstore.snapshots.Progress) -> None:
    print(f"  {progress.done / 1e6:.0f} of {progress.total / 1e6:.0f} MB, {progress.rate / 1e6:.0f} MB/s")


def main(url: str, cache_folder: str) -> None:
    store = kvstore.snapshots.Store(url)
    prompt = torch.arange(1, 33)[None]
    model = make()
    print("Saving the live model:")
    saved = store.save(model, name="example", facts={"dtype": "float32"}, progress=say)
    print(f"  {saved.id}: {saved.tensors} tensors, {saved.written_bytes / 1e6:.0f} MB written")

    print("Loading it, every byte verified:")
    cache = kvstore.snapshots.Cache(cache_folder, "4GiB")
    loaded = kvstore.weights.load(
        transformers.AutoModelForCausalLM, "example", store=store, cache=cache, facts={"dtype": "float32"}, progress=say
    )
    with torch.no_grad():
        print("  equal bit by bit:", torch.equal(loaded(prompt).logits, model(prompt).logits))
    again = kvstore.weights.load(transformers.AutoModelForCausalLM, "example", store=store, cache=cache)
    print("  again, from the node's cache:", type(again).__name__)

    print("Training its last layer, and saving what changed:")
    with torch.no_grad():
        loaded.model.layers[-1].mlp.down_proj.weight.mul_(1.01)
    second = store.save(loaded, name="example")
    print(f"  {second.written_bytes / 1e6:.1f} MB written, {second.found_bytes / 1e6:.0f} MB were there")
    for one in store.diff(saved.id, second.id).differences:
        print(f"  {one.change}: {one.tensor}")
    store.rm("example")
    print(f"Collecting: {store.gc().gone_bytes / 1e6:.0f} MB freed")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory(dir="/dev/shm") as cache_folder:
        main(sys.argv[1] if len(sys.argv) > 1 else f"file://{folder}", cache_folder)
