/* SPDX-License-Identifier: Apache-2.0 */
/* The mounts of one connection, in the mount namespace of one process after another. */
#ifndef FUSECR_GUARD_MOUNTS_H
#define FUSECR_GUARD_MOUNTS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* A mount of the connection in the mount namespace that was read last. */
struct mount {
	struct mount *next;
	uint64_t id;
	char *root, *point;
};

void mounts_setup(unsigned int connection);
uint64_t mounts_namespace(const char *pid);		/* 0: it has ended */
const struct mount *mounts_read(const char *pid);	/* the first; NULL: there is none */
bool mount_is_safe(uint64_t id);			/* of procfs or sysfs, in the namespace that was read last */
bool mounts_path(const char *pid, uint64_t mount_id, const char *link, char *path, size_t size);
bool mounts_cut(char *text, const char *end);		/* whether it ended so */

#endif /* FUSECR_GUARD_MOUNTS_H */
