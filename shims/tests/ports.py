"""Ports for programs that must be told one."""

import pathlib
import random
import socket

# Below those that the system gives to whoever asks for any: a connection of somebody else could get such a one before the program binds it, and an
# engine takes a minute until then.
_FIRST, _END = 10_000, int(pathlib.Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
_given: set[int] = set()


def free_port() -> int:
    """A port that nobody listens on, and that is given once."""
    while True:
        port = random.randrange(_FIRST, _END) if _END > 2 * _FIRST else 0
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            port = probe.getsockname()[1]
        if port not in _given:
            _given.add(port)
            return port
