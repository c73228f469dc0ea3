/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Whose inode is that? The kernel tells for each descriptor, working directory and mount root which inode it is and where,
 * without asking a daemon (readlink, name_to_handle_at, statx with AT_STATX_DONT_SYNC). The search runs in a child each:
 * it is long with many processes, and may hang on a file system that is none of ours (docs/adr/0006-zygote.md).
 */
#ifndef FUSECR_GUARD_RESOLVE_H
#define FUSECR_GUARD_RESOLVE_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

enum look { LOOK_NODE, LOOK_DESCRIPTOR, LOOK_ROOTS, LOOK_SLEEPERS };

/* A record of the child; the path follows. */
struct seen {
	uint64_t id, generation, ino;
	uint32_t mode;		/* S_IFMT, or 0 */
	uint32_t flags;		/* of open(2) */
	uint8_t is_descriptor, has_path;
	uint8_t deleted;	/* the path has no such entry any more, as far as the kernel knows */
	uint8_t unlinked;	/* and so it is */
};

#define SEEN_MAX (sizeof(struct seen) + 4096)

/*
 * Look for the node @id, at @pid first. True if the search is under way; false if as many as may be are: the end of any of
 * them calls pump_dirty().
 */
bool resolve_start(uint64_t id, uint32_t pid, enum look look);
bool resolve_running(uint64_t id, enum look look);
bool resolve_missed(uint64_t id);	/* all processes were searched lately, in vain */
bool resolve_polls(uint32_t pid);	/* it is our search for sleepers in poll(2) */
long long resolve_due(void);
void resolve_tick(void);
void resolve_end(void);
void resolve_reap(void);		/* of children that have ended, but the sidecar */

/* look.c: the child. Writes records to @out and exits. @userns: a descriptor of the mount's user namespace, -1: our own. */
_Noreturn void look(int out, int userns, unsigned int connection, uint64_t id, uint32_t pid, enum look look);

#endif /* FUSECR_GUARD_RESOLVE_H */
