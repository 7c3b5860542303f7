"""Tests stay on this machine."""

import socket

import pytest


def test_a_connection_beyond_this_machine_is_refused():
    # 192.0.2.0/24 is set aside for documentation: nobody answers there.
    refused = r"connects to 192\.0\.2\.1; tests stay on this machine"
    with socket.socket() as outwards, pytest.raises(RuntimeError, match=refused):
        outwards.connect(("192.0.2.1", 80))


def test_a_connection_to_this_machine_works():
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname(), timeout=5).close()
