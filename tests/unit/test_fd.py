# SPDX-License-Identifier: Apache-2.0
"""Descriptors: whose they are, and who does not get them."""

from __future__ import annotations

import os
import socket

from incus_fusecr.linux.fd import receive


def test_what_is_received_no_child_inherits() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        socket.send_fds(ours, [b"two"], [0, 1])
        message, fds = receive(theirs, 100, 4)
        try:
            assert (message, len(fds)) == (b"two", 2)
            assert not any(os.get_inheritable(fd) for fd in fds)
        finally:
            for fd in fds:
                os.close(fd)
        ours.send(b"none")
        assert receive(theirs, 100, 4) == (b"none", [])
