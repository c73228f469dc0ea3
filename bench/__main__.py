# SPDX-License-Identifier: Apache-2.0
import sys

from . import migrate, recovery

if sys.argv[1:2] == ["recovery"]:
    sys.exit(recovery.main(sys.argv[2:]))
sys.exit(migrate.main(sys.argv[1:]))
