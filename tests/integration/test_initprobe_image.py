# SPDX-License-Identifier: Apache-2.0
"""The INIT probe on the daemons of another distribution release (a container image of the lab), in a chroot."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from sandbox import MEMFS, Sandbox
from test_initprobe import NOBODY, SFTP_SERVER, Traced, Unharmed, check, gone_again, living, unharmed

Make = Callable[..., Sandbox]
CACHE = Path("/var/cache/incus-fusecr-lab")
BINDS = ("/dev", "/proc")
__all__ = ["unharmed"]  # the fixture


def newest_image() -> Path | None:
    named = os.environ.get("FUSECR_TEST_IMAGE")
    if named:
        return Path(named)
    found = sorted(CACHE.glob("debian-*.squashfs"), key=lambda path: path.stat().st_mtime)
    return found[-1] if found else None


IMAGE = newest_image()
pytestmark = [
    pytest.mark.requires_root,
    pytest.mark.requires_fuse,
    pytest.mark.requires_command("strace", "nsenter"),
    pytest.mark.skipif(IMAGE is None, reason=f"needs a squashfs of a system with FUSE daemons: {CACHE}/debian-*.squashfs (`lab up`"
                                             " makes one) or FUSECR_TEST_IMAGE"),
]  # fmt: skip


class Image:
    """A sandbox with the image mounted in it; /t is a directory of the test there."""

    def __init__(self, box: Sandbox) -> None:
        self.box = box
        self.root = box.directory / "image"
        self.shared = box.directory / "t"
        for path in (self.root, self.shared, self.shared / "src", self.shared / "mnt"):
            path.mkdir()
        (self.shared / "src" / "file").write_text("text")
        self.mount("-t", "squashfs", "-o", "loop,ro", str(IMAGE), "")
        for name in BINDS:
            self.mount("--rbind", name, name)
        self.mount("--bind", str(self.shared), "/mnt")

    def mount(self, *words: str) -> None:
        *options, where = words
        done = self.box.run(["mount", *options, f"{self.root}{where}"])
        assert done.returncode == 0, done.stderr

    def start(self, *command: str, user: tuple[str, ...] = ()) -> Traced:
        if self.box.run(["chroot", str(self.root), "sh", "-c", f"command -v {command[0]}"]).returncode:
            pytest.skip(f"needs {command[0]} in {IMAGE}")
        inside = ["chroot", str(self.root), "env", "--chdir=/mnt", "PWD=/mnt", *user, *command]
        return Traced(self.box, inside, reader=list(user))


@pytest.fixture
def image(sandbox: Make) -> Image:
    return Image(sandbox())


@pytest.mark.parametrize(
    "command",
    [
        ["bindfs", "-f", "src", "mnt"],
        ["bindfs", "src", "mnt"],
        ["sshfs", "-f", "-o", f"ssh_command=/mnt/ssh,sftp_server={SFTP_SERVER}", "host:/mnt/src", "mnt"],
        ["sshfs", "-o", f"ssh_command=/mnt/ssh,sftp_server={SFTP_SERVER}", "host:/mnt/src", "/mnt/mnt"],
        ["passthrough", "-f", "mnt"],
        ["passthrough_fh", "-f", "mnt"],
        ["passthrough_ll", "-f", "-o", "source=/mnt/src", "mnt"],
        ["passthrough_ll", "-o", "source=/mnt/src,writeback", "mnt"],
        ["python3", "/mnt/memfs.py", "mnt"],
    ],
    ids=lambda command: "-".join(word for word in command if "/" not in word and word not in ("src", "mnt", "-o")),
)
def test_daemon_of_the_image(image: Image, unharmed: Unharmed, command: list[str]) -> None:
    ssh = image.shared / "ssh"
    ssh.write_text(f"#!/bin/sh\nexec {SFTP_SERVER}\n")
    ssh.chmod(0o755)
    shutil.copy(MEMFS, image.shared)
    if "memfs.py" in command[1] and image.box.run(["chroot", str(image.root), "python3", "-c", "import pyfuse3, trio"]).returncode:
        pytest.skip(f"needs the Python module pyfuse3 (package python3-pyfuse3) in {IMAGE}")
    daemon = image.start(*command)
    unharmed(daemon)
    assert os.readlink(f"/proc/{daemon.pid}/root") == str(image.root)
    check(daemon)


@pytest.mark.parametrize("name", ["bindfs", "sshfs", "passthrough_ll"])
def test_daemon_of_a_user_through_the_images_fusermount(image: Image, name: str) -> None:
    ssh = image.shared / "ssh"
    ssh.write_text(f"#!/bin/sh\nexec {SFTP_SERVER}\n")
    ssh.chmod(0o755)
    for path in (image.shared / "src", image.shared / "mnt"):
        os.chown(path, NOBODY, NOBODY)
    words = {
        "bindfs": ["-f", "--no-allow-other", "src", "mnt"],
        "sshfs": ["-o", "ssh_command=/mnt/ssh", "host:/mnt/src", "mnt"],
        "passthrough_ll": ["-f", "-o", "source=/mnt/src", "mnt"],
    }
    user = ("setpriv", "--reuid", str(NOBODY), "--regid", str(NOBODY), "--clear-groups")
    daemon = image.start(name, *words[name], user=user)
    assert os.stat(f"/proc/{daemon.pid}").st_uid == NOBODY
    before = living()
    check(daemon)
    done = image.box.run([*user, "ls", f"{image.root}/mnt/mnt"])
    assert (done.returncode, done.stdout) == (0, "file\n"), done.stderr
    gone_again(before)
