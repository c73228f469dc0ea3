// SPDX-License-Identifier: Apache-2.0
/*
 * What a daemon says unasked. The kernel carries some of it out under locks that a client may hold while it waits for us
 * (a directory's inode, pages under write-back): those are written to /dev/fuse by a child, which may wait.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "pump.h"
#include "sidecar.h"

#define MESSAGE_MAX 65536	/* STORE may be longer: what is not stored is read later */
#define QUEUE_BYTES (256 << 10)

static int child_socket = -1;

/* The child: it has no fd but these two, and ends with the guard. */
static _Noreturn void write_all(int sock, pid_t guard)
{
	static char message[MESSAGE_MAX];
	const int fds[2] = { pump_options.device.fds[0], sock };
	int low = fds[0] < fds[1] ? fds[0] : fds[1], high = fds[0] < fds[1] ? fds[1] : fds[0];
	ssize_t size;

	if (prctl(PR_SET_PDEATHSIG, SIGKILL) || getppid() != guard)
		_exit(1);
	if (low > 3)
		syscall(SYS_close_range, 3, low - 1, 0);
	if (high > low + 1)
		syscall(SYS_close_range, low + 1, high - 1, 0);
	syscall(SYS_close_range, high + 1, ~0U, 0);
	while ((size = recv(sock, message, sizeof(message), 0)) > 0) {
		if (write(fds[0], message, size) < 0 && errno == ENODEV)
			break;
	}
	_exit(0);
}

static bool have_child(void)
{
	const int size = QUEUE_BYTES;
	pid_t guard = getpid(), pid;
	int pair[2];

	if (child_socket >= 0)
		return true;
	if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair))
		return false;
	setsockopt(pair[0], SOL_SOCKET, SO_SNDBUF, &size, sizeof(size));
	pid = fork();
	if (pid == 0)
		write_all(pair[1], guard);
	close(pair[1]);
	if (pid < 0) {
		close(pair[0]);
		return false;
	}
	child_socket = pair[0];
	return true;
}

static void pass_on(int code, const char *body, size_t size)
{
	struct out_header header = { .len = sizeof(header) + size, .error = code };
	struct iovec parts[2] = { { &header, sizeof(header) }, { (char *)body, size } };
	struct msghdr msg = { .msg_iov = parts, .msg_iovlen = 2 };

	/* lost when the child is stuck: the client sees the change when the daemon's own timeout has passed */
	if (header.len > MESSAGE_MAX || !have_child() || sendmsg(child_socket, &msg, MSG_NOSIGNAL | MSG_DONTWAIT) < 0)
		pump_counts.dropped_notifications++;
}

/* A notification that begins with a node's id, to be sent for each id that the kernel may know the node by. */
struct about {
	int code;
	char *body;
	size_t size;
};

static void pass_on_for(struct node *node, void *data)
{
	struct about *about = data;

	put64(about->body, node->id);
	pass_on(about->code, about->body, about->size);
}

static void deleted(char *body, size_t size)
{
	uint64_t child = get64(body + 8);
	struct node *node = node_of_sid(child, 0);
	struct about about = { FUSE_NOTIFY_DELETE, body, size };

	if (!node)
		return;
	put64(body + 8, node->id);
	nodes_of_sid(get64(body), pass_on_for, &about);
}

/* The kernel believes a length that a notification gives. */
static bool name_fits(const char *body, size_t size, size_t length_at, size_t head)
{
	return size >= head && size - head == (size_t)get32(body + length_at) + 1 && body[size - 1] == '\0';
}

void notify_message(int code, char *body, size_t size)
{
	struct about about = { code, body, size };

	if (!pump_serving())
		return;		/* the daemon lives, and speaks for itself */
	switch (code) {
	case FUSE_NOTIFY_POLL:
		if (size == 8)
			kernel_notify(code, body, size);
		return;
	case FUSE_NOTIFY_INVAL_INODE:
		if (size == 24)
			nodes_of_sid(get64(body), pass_on_for, &about);
		return;
	case FUSE_NOTIFY_INVAL_ENTRY:
		if (name_fits(body, size, 8, 16))
			nodes_of_sid(get64(body), pass_on_for, &about);
		return;
	case FUSE_NOTIFY_DELETE:
		if (name_fits(body, size, 16, 24))
			deleted(body, size);
		return;
	case FUSE_NOTIFY_STORE:
		if (size >= 24 && size - 24 == get32(body + 16))
			nodes_of_sid(get64(body), pass_on_for, &about);
		return;
	}
	/* RETRIEVE would be answered to whoever reads next; the others are not a daemon's to say about our ids */
	pump_counts.dropped_notifications++;
}
