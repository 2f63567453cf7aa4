"""Shows what the names of weights are made of, so that those of two nodes can be compared."""

from __future__ import annotations

import argparse
import json
import sys

from . import ERRORS, Weights, files, folder_of, read, read_adapter

_EPILOG = """\
Nodes share blocks only if their names of the weights are equal. To see where two nodes differ:

  python -m kvstore.weights --tensors /models/llama > "$(hostname).txt"     # on each node
  diff node-1.txt node-2.txt

Engines log the same name when they start. A model's settings (weights_version, quantization, overrides) come on top of it.
"""


def main(arguments: list[str] | None = None) -> int:
    """Runs the command. Returns its exit code."""
    parser = argparse.ArgumentParser(
        "python -m kvstore.weights", description=__doc__, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", help="a model's or an adapter's folder, one file, or a repository in the Hugging Face cache")
    parser.add_argument(
        "--engine", choices=files.ENGINES, default="vllm", help="whose rules say which files are loaded (%(default)s)"
    )
    parser.add_argument("--load-format", default="auto", metavar="FORMAT", help="the engine's setting of that name (%(default)s)")
    parser.add_argument("--revision", help="a repository's revision")
    parser.add_argument("--tensors", action="store_true", help="show each tensor")
    parser.add_argument("--json", action="store_true", help="write JSON")
    told = parser.parse_args(arguments)
    path = folder_of(told.path, told.revision)
    if path is None:
        print(f"{told.path}: it is not on this machine", file=sys.stderr)
        return 1
    is_adapter = files.is_adapter(path)
    try:
        found = read_adapter(path) if is_adapter else read(path, told.engine, told.load_format.lower())
    except ERRORS as error:
        print(error, file=sys.stderr)
        return 1
    print("\n".join(_json(found, told.tensors) if told.json else _text(found, told.tensors)))
    if not told.json:
        print(f"{path}: {found.summary()}", file=sys.stderr)
    return 0


def _text(found: Weights, with_tensors: bool) -> list[str]:
    lines = [f"weights {found.digest.hex()}", *(f"{name} {digest.hex()}" for name, digest in found.configs)]
    for tensor in found.tensors if with_tensors else ():
        # What a file says can hold anything.
        name, dtype = (
            json.dumps(text) if not text.isprintable() or " " in text else text for text in (tensor.name, tensor.dtype)
        )
        shape = "x".join(map(str, tensor.shape)) or "-"
        lines.append(f"{name or '-'} {dtype} {shape} {tensor.bytes} {tensor.digest.hex()}")
    return lines


def _json(found: Weights, with_tensors: bool) -> list[str]:
    told: dict = {
        "weights": found.digest.hex(),
        "tensor_count": len(found.tensors),
        "bytes": found.bytes,
        "files": found.files,
        "configs": {name: digest.hex() for name, digest in found.configs},
    }
    if with_tensors:
        told["tensors"] = [
            {"name": one.name, "dtype": one.dtype, "shape": one.shape, "bytes": one.bytes, "digest": one.digest.hex()}
            for one in found.tensors
        ]
    return [json.dumps(told, indent=1)]


if __name__ == "__main__":
    sys.exit(main())
