"""Stores a block and reads it back with plain generated gRPC code, without this project's Python package.

Needs a daemon and `pip install grpcio grpcio-tools`. Run it in the repository's root:

    kvstore serve --listen unix:/run/user/1000/kvstore.sock &
    python examples/plain_grpc.py unix:/run/user/1000/kvstore.sock

The address is one of gRPC's: unix:/path or host:port. No channel option is needed. A C++, Java, Go, Ruby or C# client is made
from the same files, in the same way.
"""

import importlib
import pathlib
import sys
import tempfile

import grpc
from grpc_tools import protoc

PROTO = pathlib.Path(__file__).resolve().parent.parent / "proto" / "proto"


def generate(folder: str) -> None:
    """Generates the Python code of the contract into a folder, and makes it importable."""
    files = ["kvstore/v1/blocks.proto", "kvstore/v1/admin.proto", "kvstore/v1/events.proto"]
    arguments = ["protoc", f"-I{PROTO}", f"--python_out={folder}", f"--grpc_python_out={folder}", *files]
    if protoc.main(arguments) != 0:
        raise SystemExit("protoc could not generate the code")
    for package in ("kvstore", "kvstore/v1"):
        (pathlib.Path(folder) / package / "__init__.py").touch()
    sys.path.insert(0, folder)


def main(address: str) -> None:
    with tempfile.TemporaryDirectory() as folder, grpc.insecure_channel(address) as channel:
        generate(folder)
        v1 = importlib.import_module("kvstore.v1.blocks_pb2")
        stubs = importlib.import_module("kvstore.v1.blocks_pb2_grpc")
        blocks, data = stubs.BlocksStub(channel), stubs.BlockDataStub(channel)

        # A layout says what makes two blocks byte-compatible. Here a block has 16 tokens of 256 bytes.
        group = v1.LayerGroup(kind=v1.ATTENTION, layers=1, planes=1, heads=1, head_bytes=256, order=v1.OPAQUE)
        layout = v1.Layout(model=b"plain gRPC", dtype="uint8", block_tokens=16, groups=[group])
        registered = blocks.RegisterLayout(v1.RegisterLayoutRequest(layout=layout))
        digest, length = registered.layout_digest, registered.block_bytes[0]

        name, content = b"a sequence hash", bytes(range(256)) * (length // 256)
        put = [
            v1.PutRequest(open=v1.PutOpen(layout_digest=digest, level=v1.MEMORY)),
            v1.PutRequest(block=v1.PutBlock(sequence_hash=name, length=length)),
            v1.PutRequest(data=content),
        ]
        result = data.Put(iter(put), timeout=10).results[0]
        print("put:", v1.PutStatus.Name(result.status))

        found = blocks.Lookup(v1.LookupRequest(layout_digest=digest, sequence_hashes=[name]), timeout=10)
        print("readable blocks:", found.readable_blocks)

        read = bytearray()
        for part in data.Get(v1.GetRequest(layout_digest=digest, sequence_hashes=[name]), timeout=10):
            if part.WhichOneof("part") == "block":
                print("get:", v1.GetStatus.Name(part.block.status))
            else:
                read += part.data
        print("the same bytes:", read == content)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    main(sys.argv[1])
