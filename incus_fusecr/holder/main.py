# SPDX-License-Identifier: Apache-2.0
"""``python3 -I -S main.py [SOCKET]``: the holder, with no more of Python than it needs."""

import os
import sys


def run() -> None:
    """Its modules are found beside this file, as package ``holder`` (PEP 366), wherever the directory was put."""
    global __package__
    if not __package__:
        sys.path.append(os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
        __package__ = "holder"
    from .server import SOCKET, main

    main(sys.argv[1] if len(sys.argv) > 1 else SOCKET)


if __name__ == "__main__":
    run()
