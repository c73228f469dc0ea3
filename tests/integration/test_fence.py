# SPDX-License-Identifier: Apache-2.0
"""Which devices of a host lead into a container, with real network namespaces that have the same numbers inside."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.requires_root, pytest.mark.requires_command("ip", "unshare")]

# In a network namespace of its own, that stands for the host's.
SCRIPT = """
import json, os, subprocess, sys, time
from incus_fusecr.agent.network import Fence
from incus_fusecr.errors import FusecrError
from incus_fusecr.linux import rtnetlink

def ip(*words):
    subprocess.run(["ip", "link", *words], check=True, timeout=20)

def container():
    process = subprocess.Popen(["unshare", "--net", "sleep", "60"])
    while os.readlink(f"/proc/{process.pid}/ns/net") == os.readlink("/proc/self/ns/net"):
        time.sleep(0.01)
    return process

subprocess.run(["mount", "-t", "sysfs", "none", "/sys"], check=True, timeout=20)  # of this network namespace
ours, other = container(), container()
try:
    for name, process in (("v-ours", ours), ("v-other", other)):
        ip("add", name, "type", "veth", "peer", "name", "eth0", "index", "77", "netns", str(process.pid))
        ip("set", name, "up")
    ip("add", "pair", "type", "veth", "peer", "name", "riap", "index", "77")
    ip("add", "below", "type", "bridge")
    subprocess.run(["ip", "link", "add", "link", "riap", "name", "riap.5", "type", "vlan", "id", "5"], timeout=20)
    found = {}
    for name in ("v-ours", "v-other", "below", "riap.5", "pair"):
        if not os.path.exists(f"/sys/class/net/{name}"):
            continue  # a kernel without VLANs
        ip("set", name, "up")
        fence = Fence()
        try:
            fence.plan_source([name], ours.pid)
            found[name] = sorted(fence.doors)
        except FusecrError as error:
            found[name] = error.why
    print(json.dumps(found))
finally:
    for process in (ours, other):
        process.kill()
        process.wait()
"""


def test_only_what_leads_into_the_container_is_shut() -> None:
    done = subprocess.run(
        ["unshare", "--net", "--mount", sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    elsewhere = "is not the other end of one in the container"
    found = json.loads(done.stdout)
    assert found.pop("v-ours") == ["v-ours"] and len(found) >= 3
    assert set(found.values()) == {elsewhere}
