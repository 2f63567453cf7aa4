"""What names a model's weights: a fingerprint that differs where any tensor differs, without reading all of them.

Blocks are reused between processes and nodes; a block of other weights would be wrong tokens. A model's name does not tell
(a folder is trained further, a name is pushed again), and hashing hundreds of gigabytes takes minutes. Training changes
whole tensors: of each tensor its name, type, shape and three short samples are taken.
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib

__all__ = ["fingerprint", "folder_of"]

# Bytes of a sample, and samples a tensor: its beginning, its middle, its end.
_SAMPLE = 64
# Samples of a file that does not say where its tensors are.
_SAMPLES = 256
# Headers of safetensors files are not believed beyond this.
_HEADER_MAX = 256 << 20
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".npz")
_CONFIGS = ("config.json", "adapter_config.json", "hf_quant_config.json", "quantize_config.json")


def folder_of(model: str, revision: str | None = None, cache: str | None = None) -> pathlib.Path | None:
    """The folder or file of a model's weights: a path, or a repository's snapshot in the Hugging Face cache. Never downloads."""
    path = pathlib.Path(model)
    if path.exists():
        return path
    try:
        from huggingface_hub import snapshot_download

        return pathlib.Path(snapshot_download(model, revision=revision, cache_dir=cache, local_files_only=True))
    except Exception:  # Not installed, not a repository's name, or not in the cache: all mean that there is none.
        return None


def fingerprint(path: str | os.PathLike) -> bytes:
    """32 bytes that name the weights in a folder, or in one file.

    Raises FileNotFoundError where there are none, OSError where they cannot be read.
    """
    path = pathlib.Path(path)
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.suffix in _WEIGHTS)
    if not files:
        raise FileNotFoundError(f"{path}: no weights ({', '.join(_WEIGHTS)})")
    digest = hashlib.blake2b(digest_size=32, person=b"kvstore weights")
    configs = [] if path.is_file() else [path / name for name in _CONFIGS if (path / name).is_file()]
    for file in configs:
        _field(digest, file.name.encode())
        _field(digest, file.read_bytes())
    for file in files:
        with open(file, "rb", buffering=0) as opened:
            size = os.fstat(opened.fileno()).st_size
            _field(digest, b"%d" % size)
            if file.suffix != ".safetensors" or not _sample_tensors(digest, opened.fileno(), size):
                _sample(digest, opened.fileno(), 0, size, _SAMPLES)
    return digest.digest()


def _field(digest, content: bytes) -> None:
    digest.update(len(content).to_bytes(8, "little"))
    digest.update(content)


def _sample(digest, file: int, start: int, end: int, samples: int) -> None:
    last = max(end - start - _SAMPLE, 0)
    for at in range(samples):
        offset = start + last * at // max(samples - 1, 1)
        _field(digest, os.pread(file, min(_SAMPLE, end - offset), offset))


def _sample_tensors(digest, file: int, size: int) -> bool:
    """False where the file is not what its name says."""
    length = int.from_bytes(os.pread(file, 8, 0), "little")
    if not 0 < length <= min(size - 8, _HEADER_MAX):
        return False
    try:
        header = json.loads(os.pread(file, length, 8))
        tensors = [(name, *tensor["data_offsets"]) for name, tensor in sorted(header.items()) if name != "__metadata__"]
    except (ValueError, KeyError, TypeError, AttributeError):
        return False
    _field(digest, json.dumps(header, sort_keys=True).encode())
    for name, start, end in tensors:
        if not (isinstance(start, int) and isinstance(end, int) and 0 <= start <= end <= size - 8 - length):
            return False
        _field(digest, str(name).encode())
        _sample(digest, file, 8 + length + start, 8 + length + end, 3)
    return True
