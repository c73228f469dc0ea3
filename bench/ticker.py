# SPDX-License-Identifier: Apache-2.0
"""Runs inside the container under test, off its FUSE mounts: notes each time during which it could not run.

One line a gap in the file named on the command line: CLOCK_REALTIME at its begin, its length, in seconds. That clock and no
other: CRIU sets the time namespace so that CLOCK_MONOTONIC goes on where it was dumped, which hides what is measured here.
"""

import sys
import time

PERIOD = 0.002
WORTH_NOTING = 0.02  # seconds; a busy machine's scheduler makes shorter ones

with open(sys.argv[1], "a", buffering=1) as file:
    file.write("# started\n")
    last = time.time()
    while True:
        time.sleep(PERIOD)
        now = time.time()
        if now - last > WORTH_NOTING:
            file.write(f"{last:.6f} {now - last:.6f}\n")
        last = now
