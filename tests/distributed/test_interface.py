"""The interface that leads to an address of this machine is the one that has it."""

import socket

import psutil
import pytest

from recap_ds.distributed.interface import interface_towards

OWN = [
    (name, own.address)
    for name, addresses in psutil.net_if_addrs().items()
    for own in addresses
    if own.family == socket.AF_INET and psutil.net_if_stats()[name].isup
]


@pytest.mark.parametrize(("name", "address"), OWN)
def test_an_address_of_our_own_is_reached_by_its_interface(name, address):
    assert interface_towards(address) == (None if name == "lo" else name)


@pytest.mark.parametrize("address", ["127.0.0.1", "localhost", "no-such-host.invalid"])
def test_loopback_and_the_unknown_name_no_interface(address):
    assert interface_towards(address) is None
