"""host:port -> the address of this machine from which that one is reached. Nothing is sent."""

import ipaddress
import socket
import sys


def towards(host: str, port: int) -> str:
    """This machine's address on the network that leads to `host`."""
    family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)
        return probe.getsockname()[0]


host, _, port = sys.argv[1].rpartition(":")
host = host.strip("[]")
try:
    found = towards(host, int(port))
    if ipaddress.ip_address(found).is_loopback and not host.startswith(("127.", "::1", "localhost")):
        # This machine's own name, which some systems let stand for loopback: others need its address on the network.
        found = towards("192.0.2.1", int(port))
    print(found)
except (OSError, ValueError) as error:
    sys.exit(f"RDZV_ENDPOINT {sys.argv[1]}: {error}; expected host:port of node 0, as this node can reach it")
