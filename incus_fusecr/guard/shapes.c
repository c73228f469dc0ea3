// SPDX-License-Identifier: Apache-2.0
#include "shapes.h"

#include <stddef.h>
#include <stdio.h>

#define FH_READ .has = HAS_FH | HAS_FLAGS, .body_min = sizeof(struct read_in)

static const struct {
	const char *name;
	struct shape shape;
} shapes[FUSE_OPCODES] = {
	[FUSE_LOOKUP] = { "LOOKUP", { .has = REPLY_ENTRY | HAS_NAME } },
	[FUSE_GETATTR] = { "GETATTR", { .has = FH_IF_FLAGGED, .body_min = 16, .fh = 8, .fh_flag = FUSE_GETATTR_FH,
					.ino = ATTR_OUT_INO } },
	[FUSE_SETATTR] = { "SETATTR", { .has = FH_IF_FLAGGED | NEEDS_WRITE, .body_min = 88, .fh = 8, .fh_flag = FATTR_FH,
					.ino = ATTR_OUT_INO } },
	[FUSE_READLINK] = { "READLINK", { 0 } },
	[FUSE_SYMLINK] = { "SYMLINK", { .has = REPLY_ENTRY | HAS_NAME } },
	[FUSE_MKNOD] = { "MKNOD", { .has = REPLY_ENTRY | HAS_NAME, .body_min = 16, .name = 16 } },
	[FUSE_MKDIR] = { "MKDIR", { .has = REPLY_ENTRY | HAS_NAME, .body_min = 8, .name = 8 } },
	[FUSE_UNLINK] = { "UNLINK", { .has = HAS_NAME } },
	[FUSE_RMDIR] = { "RMDIR", { .has = HAS_NAME } },
	[FUSE_RENAME] = { "RENAME", { .has = HAS_NAME | HAS_NODE2, .body_min = 8, .name = 8 } },
	[FUSE_LINK] = { "LINK", { .has = REPLY_ENTRY | HAS_NAME | HAS_NODE2, .body_min = 8, .name = 8 } },
	[FUSE_OPEN] = { "OPEN", { .has = REPLY_OPEN, .body_min = 8 } },
	[FUSE_READ] = { "READ", { FH_READ } },
	[FUSE_WRITE] = { "WRITE", { .has = HAS_FH | HAS_FLAGS | NEEDS_WRITE, .body_min = sizeof(struct read_in) } },
	[FUSE_STATFS] = { "STATFS", { 0 } },
	[FUSE_RELEASE] = { "RELEASE", { .has = HAS_FH | RELEASES, .body_min = 24 } },
	[FUSE_FSYNC] = { "FSYNC", { .has = HAS_FH, .body_min = 16 } },
	[FUSE_SETXATTR] = { "SETXATTR", { .body_min = 8 } },
	[22] = { "GETXATTR", { .body_min = 8 } },
	[23] = { "LISTXATTR", { .body_min = 8 } },
	[FUSE_REMOVEXATTR] = { "REMOVEXATTR", { 0 } },
	[FUSE_FLUSH] = { "FLUSH", { .has = HAS_FH, .body_min = 24 } },
	[FUSE_OPENDIR] = { "OPENDIR", { .has = REPLY_OPEN | IS_DIR, .body_min = 8 } },
	[FUSE_READDIR] = { "READDIR", { .has = HAS_FH | IS_DIR, .body_min = sizeof(struct read_in) } },
	[FUSE_RELEASEDIR] = { "RELEASEDIR", { .has = HAS_FH | IS_DIR | RELEASES, .body_min = 24 } },
	[FUSE_FSYNCDIR] = { "FSYNCDIR", { .has = HAS_FH | IS_DIR, .body_min = 16 } },
	[FUSE_GETLK] = { "GETLK", { .has = HAS_FH, .body_min = 48 } },
	[FUSE_SETLK] = { "SETLK", { .has = HAS_FH, .body_min = 48 } },
	[FUSE_SETLKW] = { "SETLKW", { .has = HAS_FH, .body_min = 48 } },
	[34] = { "ACCESS", { .body_min = 8 } },
	[FUSE_CREATE] = { "CREATE", { .has = REPLY_ENTRY | REPLY_OPEN | HAS_NAME, .body_min = 16, .name = 16 } },
	[37] = { "BMAP", { .body_min = 16 } },
	[FUSE_IOCTL] = { "IOCTL", { .has = HAS_FH, .body_min = 32 } },
	[FUSE_POLL] = { "POLL", { .has = HAS_FH, .body_min = sizeof(struct poll_in) } },
	[FUSE_FALLOCATE] = { "FALLOCATE", { .has = HAS_FH | NEEDS_WRITE, .body_min = 32 } },
	[FUSE_READDIRPLUS] = { "READDIRPLUS", { .has = HAS_FH | IS_DIR, .body_min = sizeof(struct read_in) } },
	[FUSE_RENAME2] = { "RENAME2", { .has = HAS_NAME | HAS_NODE2, .body_min = 16, .name = 16 } },
	[FUSE_LSEEK] = { "LSEEK", { .has = HAS_FH, .body_min = 24 } },
	[FUSE_COPY_FILE_RANGE] = { "COPY_FILE_RANGE", { .has = HAS_FH | HAS_NODE2 | HAS_FH2, .body_min = 56, .node2 = 16,
							.fh2 = 24 } },
	[FUSE_COPY_FILE_RANGE_64] = { "COPY_FILE_RANGE_64", { .has = HAS_FH | HAS_NODE2 | HAS_FH2, .body_min = 56,
							      .node2 = 16, .fh2 = 24 } },
	[50] = { "SYNCFS", { .body_min = 8 } },
	[FUSE_TMPFILE] = { "TMPFILE", { .has = REPLY_ENTRY | REPLY_OPEN, .body_min = 16 } },
	[FUSE_STATX] = { "STATX", { .has = FH_IF_FLAGGED, .body_min = 24, .fh = 8, .fh_flag = FUSE_GETATTR_FH,
				    .ino = STATX_OUT_INO } },
};

const struct shape *shape_of(uint32_t opcode)
{
	if (opcode >= FUSE_OPCODES || !shapes[opcode].name)
		return NULL;
	return &shapes[opcode].shape;
}

const char *opcode_name(uint32_t opcode)
{
	static char number[16];

	if (opcode < FUSE_OPCODES && shapes[opcode].name)
		return shapes[opcode].name;
	snprintf(number, sizeof(number), "%u", opcode);
	return number;
}

const char *body_name(const char *body, uint32_t size, uint32_t offset, uint32_t *length)
{
	const char *end;

	if (offset >= size)
		return NULL;
	end = memchr(body + offset, '\0', size - offset);
	if (!end)
		return NULL;
	*length = end - (body + offset);
	return body + offset;
}
