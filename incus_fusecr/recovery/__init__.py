# SPDX-License-Identifier: Apache-2.0
"""Daemons of the host that die or are upgraded while containers use their file systems (docs/adr/0012)."""
