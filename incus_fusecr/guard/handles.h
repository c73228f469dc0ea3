/* SPDX-License-Identifier: Apache-2.0 */
/* File handles: what the kernel names them and what the sidecar does. */
#ifndef FUSECR_GUARD_HANDLES_H
#define FUSECR_GUARD_HANDLES_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "table.h"

enum handle_state { HANDLE_CLOSED, HANDLE_OPENING, HANDLE_OPEN };

struct handle {
	struct link by_key;
	uint64_t node, fh;	/* together the key: some daemons have one fh for all files */
	uint64_t sfh;		/* the sidecar's */
	uint64_t kh;		/* who to wake in poll(2), 0: nobody */
	enum handle_state state;
	uint32_t flags;		/* open flags, if they are known */
	bool flags_known;
	bool guessed;		/* the flags are our guess: read-only is tried next */
	bool directory;
	bool as_root;		/* tried again with the ids of root: the client has shown its right when it opened */
	bool no_open;		/* the daemon does without OPEN: nothing to release */
	bool fresh;		/* reopened: the daemon has no buffer of what was read so far */
	bool replaying;
	bool doomed;		/* released while it was being opened */
	bool written;
	bool suspect;		/* acknowledged writes may be lost: the next FSYNC has to say so */
	int error;		/* of the last attempt to open it */
	int64_t end;		/* where the replayed read met the end of the file, -1: it did not */
};

size_t handles_count(void);
struct handle *handle_find(uint64_t node, uint64_t fh);

/* One that a predecessor gave out. */
struct handle *handle_learn(uint64_t node, uint64_t fh);

/* One that the sidecar has just opened: gets an fh of ours. */
struct handle *handle_opened(uint64_t node, uint64_t sfh, uint32_t flags, bool directory);
void handle_free(struct handle *handle);

bool handle_writable(const struct handle *handle);

/* The sidecar is another one: everything has to be opened again. @wake is called with each kh that waits. */
void handles_reset(void (*wake)(uint64_t kh));

#endif /* FUSECR_GUARD_HANDLES_H */
