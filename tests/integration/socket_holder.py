# SPDX-License-Identifier: Apache-2.0
"""Sockets of every kind that a container's daemons have, for test_plugin_compat.py; runs inside of the box.

It is a server and, in a child, its client, in a network namespace of their own. Each round trip goes over an established
TCP connection (both ends are in the dumped tree), then UDP, then a unix socket with SO_PASSCRED, and appends its number
to a file: numbers without a gap mean that no connection lost or repeated a byte.
"""

from __future__ import annotations

import array
import os
import signal
import socket
import sys
import time

LOOPBACK = "127.0.0.1"
ROUND = 0.05  # seconds between two round trips


def serve(listener: socket.socket, udp: socket.socket, unix: socket.socket, path: str) -> None:
    connection, _ = listener.accept()
    with open(path, "a", encoding="ascii") as log:
        while number := connection.recv(4):
            connection.sendall(number)
            echo, client = udp.recvfrom(4)
            udp.sendto(echo, client)
            told, ancillary, _, _ = unix.recvmsg(4, socket.CMSG_SPACE(12))
            pid = array.array("i", ancillary[0][2])[0]
            same = number == echo == told
            log.write(f"{int.from_bytes(number, 'big') if same else 'mixed up'} {pid}\n")
            log.flush()


def ask(tcp: socket.socket, udp: socket.socket, unix: socket.socket) -> None:
    number = 0
    while True:
        data = number.to_bytes(4, "big")
        tcp.sendall(data)
        if tcp.recv(4) != data:
            sys.exit("TCP mixed up")
        udp.send(data)
        if udp.recv(4) != data:
            sys.exit("UDP mixed up")
        unix.send(data)
        number += 1
        time.sleep(ROUND)


def main(path: str) -> None:
    listener = socket.create_server((LOOPBACK, 0))
    more = [
        socket.socket(socket.AF_INET6, socket.SOCK_STREAM),
        socket.socket(socket.AF_INET6, socket.SOCK_DGRAM),
        socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0),
        socket.socket(socket.AF_PACKET, socket.SOCK_RAW),
    ]
    more[0].bind(("::1", 0))
    more[0].listen()
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    udp.bind((LOOPBACK, 0))
    told, tell = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    told.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    signal.signal(signal.SIGCHLD, lambda *_: os._exit(1))
    if os.fork() == 0:
        client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        client.connect(udp.getsockname())
        ask(socket.create_connection(listener.getsockname()), client, tell)
    serve(listener, udp, told, path)


if __name__ == "__main__":
    main(sys.argv[1])
