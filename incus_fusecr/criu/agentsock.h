/* SPDX-License-Identifier: GPL-2.0-only */
/* The socket of the incus-fusecr agent: one datagram a message, text, fds by SCM_RIGHTS, every wait bounded. */
#ifndef FUSECR_AGENTSOCK_H
#define FUSECR_AGENTSOCK_H

#include <stddef.h>
#include <sys/types.h>

#define FUSECR_SOCKET_DEFAULT "/run/incus-fusecr/agent.sock"
#define FUSECR_MESSAGE_MAX 65536	/* bytes of one message */

/* $FUSECR_SOCKET or the default. */
const char *agent_path(void);

/*
 * Connect to the agent; connecting and later sends give up after @seconds. Returns the (close-on-exec) socket or
 * -errno; -EPERM if whoever listens there is not root.
 */
int agent_connect(const char *path, int seconds);

/* True if @error (a negative errno of agent_connect) means that no agent runs here, or none for this caller. */
int agent_absent(int error);

/* Send @message, and @fd with it unless it is negative. Returns 0 or -errno. */
int agent_send(int sock, const char *message, int fd);

/*
 * Receive one message of at most @size - 1 bytes into @buf, NUL terminated, waiting at most @seconds. The first fd that
 * came with it goes to *@fd (-1: none) and is closed if @fd is NULL; further ones are closed. Returns its length, 0
 * when the peer closed the connection, -ETIMEDOUT, -EBADMSG (too long or with a NUL byte) or another -errno.
 */
ssize_t agent_recv(int sock, char *buf, size_t size, int *fd, int seconds);

/* Parse all of @text as a decimal number in [@min, @max], no sign but '-', no blanks. Returns 0 or -EINVAL. */
int parse_number(const char *text, long min, long max, long *value);

#endif /* FUSECR_AGENTSOCK_H */
