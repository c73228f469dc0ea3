// SPDX-License-Identifier: GPL-2.0-only
#define _GNU_SOURCE
#include "agentsock.h"

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define FDS_MAX 4	/* more than any message carries; the kernel drops what does not fit */

const char *agent_path(void)
{
	const char *path = getenv("FUSECR_SOCKET");

	return path && *path ? path : FUSECR_SOCKET_DEFAULT;
}

int agent_absent(int error)
{
	/*
	 * ECONNREFUSED: a socket file that an agent left behind. EACCES: a confined or unprivileged CRIU, which is not
	 * one that Incus started.
	 */
	return error == -ENOENT || error == -ENOTDIR || error == -ECONNREFUSED || error == -EACCES;
}

/* Only root may be the agent: its answers add scripts that CRIU runs as root. */
static int check_peer(int sock)
{
	struct ucred peer;
	socklen_t size = sizeof(peer);

	if (getsockopt(sock, SOL_SOCKET, SO_PEERCRED, &peer, &size))
		return -errno;
	return peer.uid == 0 ? 0 : -EPERM;
}

static int connect_socket(int sock, const char *path, int seconds)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX };
	/* unix(7): connect() waits for room in the listener's backlog for as long as SO_SNDTIMEO says */
	struct timeval timeout = { .tv_sec = seconds };

	if (strlen(path) >= sizeof(address.sun_path))
		return -ENAMETOOLONG;
	strcpy(address.sun_path, path);
	if (setsockopt(sock, SOL_SOCKET, SO_SNDTIMEO, &timeout, sizeof(timeout)))
		return -errno;
	while (connect(sock, (struct sockaddr *)&address, sizeof(address))) {
		if (errno != EINTR)
			return errno == EAGAIN ? -ETIMEDOUT : -errno;
	}
	return check_peer(sock);
}

int agent_connect(const char *path, int seconds)
{
	int sock, error;

	sock = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
	if (sock < 0)
		return -errno;
	error = connect_socket(sock, path, seconds);
	if (error) {
		close(sock);
		return error;
	}
	return sock;
}

int agent_send(int sock, const char *message, int fd)
{
	union {
		struct cmsghdr header;
		char bytes[CMSG_SPACE(sizeof(int))];
	} control = { 0 };
	struct iovec text = { .iov_base = (char *)message, .iov_len = strlen(message) };
	struct msghdr msg = { .msg_iov = &text, .msg_iovlen = 1 };

	if (fd >= 0) {
		control.header.cmsg_level = SOL_SOCKET;
		control.header.cmsg_type = SCM_RIGHTS;
		control.header.cmsg_len = CMSG_LEN(sizeof(int));
		memcpy(CMSG_DATA(&control.header), &fd, sizeof(fd));
		msg.msg_control = &control;
		msg.msg_controllen = sizeof(control.bytes);
	}
	while (sendmsg(sock, &msg, MSG_NOSIGNAL) < 0) {
		if (errno != EINTR)
			return errno == EAGAIN ? -ETIMEDOUT : -errno;
	}
	return 0;
}

static long long now_ms(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000LL + now.tv_nsec / 1000000;
}

/* Wait until @sock has a message or is closed. poll() and not SO_RCVTIMEO: signals do not start it anew. */
static int wait_readable(int sock, int seconds)
{
	long long deadline = now_ms() + seconds * 1000LL;
	struct pollfd entry = { .fd = sock, .events = POLLIN };

	for (;;) {
		long long left = deadline - now_ms();
		int n = left > 0 ? poll(&entry, 1, (int)left) : 0;

		if (n > 0)
			return 0;
		if (n == 0)
			return -ETIMEDOUT;
		if (errno != EINTR)
			return -errno;
	}
}

/* Give the first fd in @msg to *@first and close all others. */
static void take_fds(struct msghdr *msg, int *first)
{
	struct cmsghdr *c;

	for (c = CMSG_FIRSTHDR(msg); c; c = CMSG_NXTHDR(msg, c)) {
		size_t n, i;

		if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS)
			continue;
		n = (c->cmsg_len - CMSG_LEN(0)) / sizeof(int);
		for (i = 0; i < n; i++) {
			int fd;

			memcpy(&fd, CMSG_DATA(c) + i * sizeof(fd), sizeof(fd));
			if (first && *first < 0)
				*first = fd;
			else
				close(fd);
		}
	}
}

ssize_t agent_recv(int sock, char *buf, size_t size, int *fd, int seconds)
{
	union {
		struct cmsghdr header;
		char bytes[CMSG_SPACE(FDS_MAX * sizeof(int))];
	} control;
	struct iovec text = { .iov_base = buf, .iov_len = size - 1 };
	struct msghdr msg = { .msg_iov = &text, .msg_iovlen = 1, .msg_control = &control,
			      .msg_controllen = sizeof(control.bytes) };
	ssize_t length;
	int error;

	if (fd)
		*fd = -1;
	buf[0] = '\0';
	error = wait_readable(sock, seconds);
	if (error)
		return error;
	do {
		length = recvmsg(sock, &msg, MSG_CMSG_CLOEXEC | MSG_DONTWAIT);
	} while (length < 0 && errno == EINTR);
	if (length < 0)
		return -errno;
	buf[length] = '\0';
	take_fds(&msg, fd);
	if (!(msg.msg_flags & MSG_TRUNC) && memchr(buf, '\0', length) == NULL)
		return length;
	if (fd && *fd >= 0) {
		close(*fd);
		*fd = -1;
	}
	return -EBADMSG;
}

int parse_number(const char *text, long min, long max, long *value)
{
	const char *digits = text + (*text == '-');
	char *end;
	long number;

	/* strtol() itself would take blanks and a plus sign */
	if (*digits < '0' || *digits > '9')
		return -EINVAL;
	errno = 0;
	number = strtol(text, &end, 10);
	if (errno || *end || number < min || number > max)
		return -EINVAL;
	*value = number;
	return 0;
}
