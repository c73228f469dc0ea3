/* SPDX-License-Identifier: Apache-2.0 */
/* Where in the requests of each opcode, and in the replies to them, ids and handles are. */
#ifndef FUSECR_GUARD_SHAPES_H
#define FUSECR_GUARD_SHAPES_H

#include <stdbool.h>
#include <stdint.h>

#include "wire.h"

enum {
	REPLY_ENTRY = 1 << 0,	/* struct entry_out */
	REPLY_OPEN = 1 << 1,	/* struct open_out, behind the entry if there is one */
	HAS_FH = 1 << 2,	/* at fh */
	FH_IF_FLAGGED = 1 << 3,	/* only if the first word has the bit fh_flag */
	IS_DIR = 1 << 4,	/* of a directory handle */
	HAS_FLAGS = 1 << 5,	/* the file's open flags are in the body (struct read_in) */
	NEEDS_WRITE = 1 << 6,
	HAS_NAME = 1 << 7,
	HAS_NODE2 = 1 << 8,	/* another node's id at node2 */
	HAS_FH2 = 1 << 9,	/* and a handle of it */
	RELEASES = 1 << 10,
};

struct shape {
	uint16_t has;
	uint8_t body_min;	/* bytes before any name */
	uint8_t fh, fh_flag;
	uint8_t name;
	uint8_t node2, fh2;
	uint8_t ino;		/* offset of an inode number in the reply, 0: none */
};

/* NULL: an opcode that a daemon on /dev/fuse is not sent, or that nobody knows. */
const struct shape *shape_of(uint32_t opcode);
const char *opcode_name(uint32_t opcode);

/* The NUL terminated name at @offset of a body, NULL if there is none; its length. */
const char *body_name(const char *body, uint32_t size, uint32_t offset, uint32_t *length);

#endif /* FUSECR_GUARD_SHAPES_H */
