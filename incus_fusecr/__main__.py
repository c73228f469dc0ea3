# SPDX-License-Identifier: Apache-2.0
"""``python -m incus_fusecr``."""

from .cli.main import main

main()
