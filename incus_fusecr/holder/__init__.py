# SPDX-License-Identifier: Apache-2.0
"""The process that holds /dev/fuse fds, whoever else dies (docs/adr/0011, 0012).

``main.py`` and what it imports is the standard library and this directory only: a copy of the directory is a whole holder.
``client.py`` is for the agent and is no part of the process.
"""
