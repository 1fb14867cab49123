"""Which network interface leads to another machine.

Gloo, left alone, takes the one that has the address of the host's own name, and on many machines that name means a
loopback address: ranks of other machines then try to reach themselves.
"""

import socket

import psutil


def interface_towards(address: str) -> str | None:
    """Name of the interface by which this machine reaches ``address``; None where it is loopback, or none is known."""
    try:
        family, _, _, _, target = socket.getaddrinfo(address, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(target)  # of a datagram socket: nothing is sent, a route is chosen
            mine = probe.getsockname()[0]
    except OSError:
        return None
    for name, addresses in psutil.net_if_addrs().items():
        if any(mine == own.address.partition("%")[0] for own in addresses):
            return None if name == "lo" else name
    return None
