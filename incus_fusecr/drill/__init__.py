# SPDX-License-Identifier: Apache-2.0
"""Crash recovery tried on the kernel at hand, with a file system of its own: nothing of the host is touched."""
