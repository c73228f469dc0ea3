# SPDX-License-Identifier: Apache-2.0
"""Carries FUSE mounts of Incus containers through checkpoint and live migration."""

__version__ = "0.1.0"
