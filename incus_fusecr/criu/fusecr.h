/* SPDX-License-Identifier: GPL-2.0-only */
/* What the parts of the plugin share: fusecr.c (init, exit, the talk with the agent) and devfuse.c (the hooks). */
#ifndef FUSECR_H
#define FUSECR_H

#include <stdbool.h>
#include <stddef.h>
#include <sys/types.h>

#define AGENT_KEY "fusecr-agent"	/* of the agent connection in CRIU's fd store */
#define MANIFEST "fusecr.json"
#define CONNECTION_MAX 0x7fffffffL

/* True if the agent has answered "ok" at init. */
bool in_session(void);

/* What the agent sent, for the log: one line, without control characters, of limited length. Changes @text. */
const char *printable(char *text);

/* Read the file @path into @buf, NUL terminated. Returns the length, -E2BIG if it does not fit, or -errno. */
ssize_t read_file(int dir, const char *path, char *buf, size_t size);

/* CRIU's hooks for the file of a /dev/fuse fd. Return 0 or the fd, -ENOTSUP if it is not one, or -1 after a log line. */
int fusecr_dump_file(int fd, int id);
int fusecr_restore_file(int id);

#endif /* FUSECR_H */
