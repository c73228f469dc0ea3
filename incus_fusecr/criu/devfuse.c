// SPDX-License-Identifier: GPL-2.0-only
/*
 * The hooks of the plugin: a /dev/fuse fd of a task becomes `fusecr-ID.img` in the image, "CONNECTION FLAGS\n", and comes
 * back from the agent, which has mounted that connection anew.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/utsname.h>
#include <unistd.h>

#include "agentsock.h"
#include "criu_abi.h"
#include "fusecr.h"
#include "log.h"

#define FD_SECONDS 30

/* Documentation/admin-guide/devices.txt: 10 is misc, 229 fuse. */
#define FUSE_DEV makedev(10, 229)
/* What of the flags of a /dev/fuse fd has a meaning there. */
#define FUSE_FD_FLAGS (O_ACCMODE | O_NONBLOCK)

#define UNCONNECTED (-1L)	/* an opened /dev/fuse that was not mounted (yet) */

/* ---- Dump ---- */

static bool is_fuse_dev(int fd)
{
	struct stat st;

	return fstat(fd, &st) == 0 && S_ISCHR(st.st_mode) && st.st_rdev == FUSE_DEV;
}

/* The number behind "fuse_connection:" in fdinfo. Returns 0, -ENOENT without such a line, or -errno. */
static int fdinfo_connection(int fd, long *connection)
{
	static const char key[] = "\nfuse_connection:\t";
	char path[64], info[4096], *value;
	ssize_t size;

	snprintf(path, sizeof(path), "/proc/self/fdinfo/%d", fd);
	size = read_file(AT_FDCWD, path, info, sizeof(info));
	if (size < 0)
		return size;
	value = strstr(info, key);
	if (!value)
		return -ENOENT;
	value += sizeof(key) - 1;
	value[strcspn(value, "\n")] = '\0';
	return parse_number(value, 0, CONNECTION_MAX, connection);
}

/* Since Linux 6.16 ("fs: fuse: add dev id to /dev/fuse fdinfo") fdinfo shows the connection of every mounted fd. */
static bool kernel_shows_connection(void)
{
	struct utsname uts;
	int major, minor;

	if (uname(&uts) || sscanf(uts.release, "%d.%d", &major, &minor) != 2)
		return false;
	return major > 6 || (major == 6 && minor >= 16);
}

/*
 * True if @fd, without a connection in its fdinfo, has none. Older kernels do not show it: fuse_dev_read() there
 * returns EPERM without a connection; with one EINVAL, as one byte is too short for any request, which stays queued.
 * Newer kernels could block in read() (FUSE_DEV_IOC_SYNC_INIT) but do not need it.
 */
static bool is_unconnected(int fd)
{
	char byte;

	if (kernel_shows_connection())
		return true;
	return read(fd, &byte, 1) < 0 && errno == EPERM;
}

static int write_image(int id, long connection, int flags)
{
	char name[32], text[64];
	int fd, length, error = 0;

	snprintf(name, sizeof(name), "fusecr-%x.img", (unsigned int)id);
	length = snprintf(text, sizeof(text), "%ld %d\n", connection, flags);
	fd = openat(criu_get_image_dir(), name, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOFOLLOW, 0600);
	if (fd < 0) {
		error = errno;
	} else {
		ssize_t n = write(fd, text, length);

		if (n != length)
			error = n < 0 ? errno : ENOSPC;
		if (close(fd) && !error)
			error = errno;
	}
	if (error)
		pr_err("cannot write %s to the image directory: %s", name, strerror(error));
	return error ? -1 : 0;
}

int fusecr_dump_file(int fd, int id)
{
	long connection;
	int error, flags;

	if (!is_fuse_dev(fd))
		return -ENOTSUP;
	if (!in_session()) {
		pr_info("a task has /dev/fuse open, and no agent looks after it");
		return -ENOTSUP;
	}
	error = fdinfo_connection(fd, &connection);
	if (error == -ENOENT && is_unconnected(fd)) {
		connection = UNCONNECTED;
	} else if (error == -ENOENT) {
		pr_err("the kernel does not show the connection of a /dev/fuse fd in its fdinfo; Linux 6.16 and later do");
		return -1;
	} else if (error) {
		pr_err("cannot read the connection of /dev/fuse fd %d: %s", fd, strerror(-error));
		return -1;
	}
	flags = fcntl(fd, F_GETFL);
	if (flags < 0) {
		pr_err("cannot read the flags of /dev/fuse fd %d: %s", fd, strerror(errno));
		return -1;
	}
	if (write_image(id, connection, flags & FUSE_FD_FLAGS))
		return -1;
	pr_info("dumped /dev/fuse id %#x connection %ld", (unsigned int)id, connection);
	return 0;
}

/* ---- Restore ---- */

/* Parse what write_image() wrote. The image comes from another host: everything else is refused. */
static int parse_image(char *text, long *connection, int *flags)
{
	char *second = strchr(text, ' '), *newline = strchr(text, '\n');
	long value;

	if (!second || !newline || newline[1])
		return -EINVAL;
	*second++ = '\0';
	*newline = '\0';
	if (parse_number(text, UNCONNECTED, CONNECTION_MAX, connection))
		return -EINVAL;
	if (parse_number(second, 0, FUSE_FD_FLAGS, &value) || (value & ~(long)FUSE_FD_FLAGS))
		return -EINVAL;
	if ((value & O_ACCMODE) == O_ACCMODE)
		return -EINVAL;
	*flags = value;
	return 0;
}

/* Returns 0, -ENOTSUP if the file @id is not ours, or -1 with a line in the log. */
static int read_image(int id, long *connection, int *flags)
{
	char name[32], text[64];
	ssize_t length;

	snprintf(name, sizeof(name), "fusecr-%x.img", (unsigned int)id);
	length = read_file(criu_get_image_dir(), name, text, sizeof(text));
	if (length == -ENOENT)
		return -ENOTSUP;
	if (length < 0) {
		pr_err("cannot read %s from the image directory: %s", name, strerror(-length));
		return -1;
	}
	if (strlen(text) != (size_t)length || parse_image(text, connection, flags)) {
		pr_err("%s in the image directory is damaged: expected 'CONNECTION FLAGS'", name);
		return -1;
	}
	return 0;
}

/*
 * Open /dev/fuse of the container. Its root may have put anything there: no symlink is followed, a fifo does not block,
 * a terminal does not become the controlling one.
 */
static int open_unconnected(int flags)
{
	int fd = open("/dev/fuse", (flags & O_ACCMODE) | O_NONBLOCK | O_NOCTTY | O_NOFOLLOW | O_CLOEXEC);

	if (fd < 0)
		pr_err("cannot open /dev/fuse in the container: %s", strerror(errno));
	return fd;
}

/*
 * Ask the agent over @sock for the /dev/fuse fd of @connection. All restored tasks share that one connection, so each
 * sends a socket of its own to be answered on.
 */
static int request_fd(int sock, long connection)
{
	static char answer[FUSECR_MESSAGE_MAX + 1];
	char question[32];
	int pair[2], error, fd;
	ssize_t length;

	if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair)) {
		pr_err("cannot make a socket pair: %s", strerror(errno));
		return -1;
	}
	snprintf(question, sizeof(question), "fd %ld", connection);
	error = agent_send(sock, question, pair[1]);
	close(pair[1]);
	if (error) {
		pr_err("cannot ask the agent for /dev/fuse of connection %ld: %s", connection, strerror(-error));
		close(pair[0]);
		return -1;
	}
	length = agent_recv(pair[0], answer, sizeof(answer), &fd, FD_SECONDS);
	close(pair[0]);
	if (length > 0 && strcmp(answer, "ok") == 0 && fd >= 0)
		return fd;
	if (fd >= 0)
		close(fd);
	if (length > 0)
		pr_err("the agent gave no /dev/fuse for connection %ld: %s", connection, printable(answer));
	else if (length == 0)
		pr_err("the agent went away when asked for /dev/fuse of connection %ld", connection);
	else
		pr_err("no answer of the agent about /dev/fuse of connection %ld (waited up to %d s): %s", connection,
		       FD_SECONDS, strerror(-length));
	return -1;
}

static int open_connected(long connection)
{
	int sock, fd;

	if (!in_session()) {
		pr_err("the image has /dev/fuse of connection %ld, but no %s: it is not complete", connection, MANIFEST);
		return -1;
	}
	sock = inherit_fd_lookup_id(AGENT_KEY);
	if (sock < 0) {
		pr_err("the agent connection is not in CRIU's fd store");
		return -1;
	}
	fd = request_fd(sock, connection);
	close(sock);
	return fd;
}

/* Give @fd the dumped flags, after a look whether it is what the task had. */
static int check_and_set_flags(int fd, int flags)
{
	int have;

	if (!is_fuse_dev(fd)) {
		pr_err("what came for a /dev/fuse fd is not the device 10:229");
		return -1;
	}
	have = fcntl(fd, F_GETFL);
	if (have < 0 || (have & O_ACCMODE) != (flags & O_ACCMODE)) {
		pr_err("/dev/fuse was opened with mode %d before the dump, and now with mode %d", flags & O_ACCMODE,
		       have < 0 ? have : have & O_ACCMODE);
		return -1;
	}
	if (fcntl(fd, F_SETFL, flags & O_NONBLOCK)) {
		pr_err("cannot set the flags of /dev/fuse: %s", strerror(errno));
		return -1;
	}
	return 0;
}

int fusecr_restore_file(int id)
{
	long connection;
	int error, fd, flags;

	error = read_image(id, &connection, &flags);
	if (error)
		return error;
	fd = connection == UNCONNECTED ? open_unconnected(flags) : open_connected(connection);
	if (fd < 0)
		return -1;
	if (check_and_set_flags(fd, flags)) {
		close(fd);
		return -1;
	}
	pr_info("restored /dev/fuse id %#x connection %ld as fd %d", (unsigned int)id, connection, fd);
	return fd;
}
