"""A client that other people's generators make, from gRPC's default settings, over a Unix socket. gRPC's C core sends the socket's path
as the authority, and every call failed before it reached the daemon."""

import importlib
import pathlib
import subprocess
import sys

import grpc
import pytest
from grpc_tools import protoc

EXAMPLES = pathlib.Path(__file__).resolve().parents[2] / "examples"
PROTO = EXAMPLES.parent / "proto" / "proto"
FILES = ["kvstore/v1/blocks.proto", "kvstore/v1/admin.proto", "kvstore/v1/events.proto"]
# What a call may answer that came through: the request is empty.
ANSWERS = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.FAILED_PRECONDITION,
}


@pytest.fixture(scope="session")
def stubs(tmp_path_factory):
    """The generated services, apart from the package of the same name."""
    folder = tmp_path_factory.mktemp("generated")
    for at in FILES:
        text = (PROTO / at).read_text().replace('import "kvstore/v1/', 'import "plain/v1/')
        to = folder / at.replace("kvstore/", "plain/")
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_text(text)
    files = [at.replace("kvstore/", "plain/") for at in FILES]
    assert protoc.main(["protoc", f"-I{folder}", f"--python_out={folder}", f"--grpc_python_out={folder}", *files]) == 0
    sys.path.insert(0, str(folder))
    return {name: importlib.import_module(f"plain.v1.{name}_pb2") for name in ("blocks", "admin", "events")}


def test_every_method_answers_over_a_unix_socket(daemon, stubs):
    with grpc.insecure_channel(daemon.address) as channel:
        called = []
        for module in stubs.values():
            for service in module.DESCRIPTOR.services_by_name.values():
                # A drain is the last thing that a daemon does.
                for method in sorted(service.methods, key=lambda method: method.name == "Drain"):
                    called.append(method.name)
                    assert code(channel, service.full_name, method) in ANSWERS, method.full_name
        assert {"RegisterLayout", "Lookup", "Pin", "Put", "Get", "Status", "Watch"} <= set(called)


def code(channel, service, method):
    """How a call with an empty request ends, or begins."""
    kinds = {
        (False, False): "unary_unary",
        (False, True): "unary_stream",
        (True, False): "stream_unary",
    }
    kind = kinds[method.client_streaming, method.server_streaming]
    call = getattr(channel, kind)(f"/{service}/{method.name}", request_serializer=bytes, response_deserializer=bytes)
    request = iter([b""]) if method.client_streaming else b""
    try:
        answer = call(request, timeout=60)
        if method.server_streaming:
            next(answer, None)
            answer.cancel()
        return grpc.StatusCode.OK
    except grpc.RpcError as error:
        return error.code()


def test_the_example_stores_a_block_and_reads_it(daemon):
    command = [sys.executable, EXAMPLES / "plain_grpc.py", daemon.address]
    said = subprocess.run(command, capture_output=True, text=True, timeout=200, check=True).stdout
    assert "put: STORED" in said and "get: HIT" in said and "the same bytes: True" in said, said
