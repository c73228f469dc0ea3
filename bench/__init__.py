# SPDX-License-Identifier: Apache-2.0
"""How long a container stands still: ``python3 -m bench`` on a lab."""
