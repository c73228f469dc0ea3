// SPDX-License-Identifier: GPL-2.0-only
/*
 * Holds /dev/fuse fds for test_plugin.py: fd 10 is connected (mounted and at once unmounted again, so that nothing ever
 * waits for an answer on it; the connection stays in its fdinfo), fd 11 was only opened. With a second argument fd 12
 * is a file that neither CRIU nor the plugin can dump. Then it sleeps.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <sys/mount.h>
#include <sys/syscall.h>
#include <unistd.h>

static int fail(const char *what)
{
	perror(what);
	return 1;
}

int main(int argc, char **argv)
{
	char options[80];
	int fd = open("/dev/fuse", O_RDWR | O_CLOEXEC);

	if (argc < 2)
		return 2;
	if (fd < 0 || dup2(fd, 10) < 0 || close(fd))
		return fail("open /dev/fuse");
	snprintf(options, sizeof(options), "fd=10,rootmode=40000,user_id=0,group_id=0");
	if (mount("fusecr-test", argv[1], "fuse", MS_NOSUID | MS_NODEV, options))
		return fail("mount");
	if (umount2(argv[1], MNT_DETACH))
		return fail("umount");
	fd = open("/dev/fuse", O_RDWR | O_NONBLOCK | O_CLOEXEC);
	if (fd < 0 || dup2(fd, 11) < 0 || close(fd))
		return fail("open /dev/fuse");
	if (argc == 3) {
		fd = syscall(SYS_fsopen, "tmpfs", 0);
		if (fd < 0 || dup2(fd, 12) < 0 || close(fd))
			return fail("fsopen");
	}
	for (;;)
		pause();
}
