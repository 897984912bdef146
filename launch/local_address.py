"""host:port -> the address of this machine from which that one is reached. Nothing is sent."""

import socket
import sys

host, _, port = sys.argv[1].rpartition(":")
try:
    family, kind, _, _, address = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)
        print(probe.getsockname()[0])
except (OSError, ValueError) as error:
    sys.exit(f"RDZV_ENDPOINT {sys.argv[1]}: {error}; expected host:port of node 0, as this node can reach it")
