# SPDX-License-Identifier: Apache-2.0
"""A lab of real Incus hosts in namespaces of one machine. Standard library only."""
