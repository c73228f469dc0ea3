/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The FUSE protocol as far as the guard looks into it (names as in linux/fuse.h). Written out here because the headers of
 * the oldest distribution lack what the newest kernel sends.
 */
#ifndef FUSECR_GUARD_WIRE_H
#define FUSECR_GUARD_WIRE_H

#include <stdint.h>
#include <string.h>

#define FUSE_ROOT_ID 1
#define FUSE_UNIQUE_RESEND (1ULL << 63)	/* the daemon had it already, and did not answer */
#define FUSE_INT_REQ_BIT 1ULL
#define FUSE_ERROR_MAX 511		/* the kernel refuses a reply with another one, and goes on waiting */

enum {
	FUSE_LOOKUP = 1,
	FUSE_FORGET = 2,
	FUSE_GETATTR = 3,
	FUSE_SETATTR = 4,
	FUSE_READLINK = 5,
	FUSE_SYMLINK = 6,
	FUSE_MKNOD = 8,
	FUSE_MKDIR = 9,
	FUSE_UNLINK = 10,
	FUSE_RMDIR = 11,
	FUSE_RENAME = 12,
	FUSE_LINK = 13,
	FUSE_OPEN = 14,
	FUSE_READ = 15,
	FUSE_WRITE = 16,
	FUSE_STATFS = 17,
	FUSE_RELEASE = 18,
	FUSE_FSYNC = 20,
	FUSE_SETXATTR = 21,
	FUSE_REMOVEXATTR = 24,
	FUSE_FLUSH = 25,
	FUSE_INIT = 26,
	FUSE_OPENDIR = 27,
	FUSE_READDIR = 28,
	FUSE_RELEASEDIR = 29,
	FUSE_FSYNCDIR = 30,
	FUSE_GETLK = 31,
	FUSE_SETLK = 32,
	FUSE_SETLKW = 33,
	FUSE_CREATE = 35,
	FUSE_INTERRUPT = 36,
	FUSE_DESTROY = 38,
	FUSE_IOCTL = 39,
	FUSE_POLL = 40,
	FUSE_NOTIFY_REPLY = 41,
	FUSE_BATCH_FORGET = 42,
	FUSE_FALLOCATE = 43,
	FUSE_READDIRPLUS = 44,
	FUSE_RENAME2 = 45,
	FUSE_LSEEK = 46,
	FUSE_COPY_FILE_RANGE = 47,
	FUSE_SETUPMAPPING = 48,
	FUSE_REMOVEMAPPING = 49,
	FUSE_TMPFILE = 51,
	FUSE_STATX = 52,
	FUSE_COPY_FILE_RANGE_64 = 53,
	FUSE_OPCODES = 64,
};

enum {
	FUSE_NOTIFY_POLL = 1,
	FUSE_NOTIFY_INVAL_INODE = 2,
	FUSE_NOTIFY_INVAL_ENTRY = 3,
	FUSE_NOTIFY_STORE = 4,
	FUSE_NOTIFY_RETRIEVE = 5,
	FUSE_NOTIFY_DELETE = 6,
	FUSE_NOTIFY_RESEND = 7,		/* Linux 6.9 */
	FUSE_NOTIFY_INC_EPOCH = 8,	/* Linux 6.16 */
};

#define FUSE_GETATTR_FH (1U << 0)
#define FATTR_SIZE (1U << 3)
#define FATTR_FH (1U << 6)
#define FUSE_IOCTL_DIR (1U << 4)
#define FUSE_POLL_SCHEDULE_NOTIFY (1U << 0)
#define FOPEN_NONSEEKABLE (1U << 2)
#define FOPEN_STREAM (1U << 4)

struct in_header {
	uint32_t len, opcode;
	uint64_t unique, nodeid;
	uint32_t uid, gid, pid;
	uint16_t extlen, padding;
};

struct out_header {
	uint32_t len;
	int32_t error;
	uint64_t unique;
};

struct attr {
	uint64_t ino, size, blocks, atime, mtime, ctime;
	uint32_t atimensec, mtimensec, ctimensec, mode, nlink, uid, gid, rdev, blksize, flags;
};

struct entry_out {
	uint64_t nodeid, generation, entry_valid, attr_valid;
	uint32_t entry_valid_nsec, attr_valid_nsec;
	struct attr attr;
};

struct open_in {
	uint32_t flags, open_flags;
};

struct open_out {
	uint64_t fh;
	uint32_t open_flags;
	int32_t backing_id;
};

struct read_in {		/* struct fuse_write_in is laid out alike */
	uint64_t fh, offset;
	uint32_t size, read_flags;
	uint64_t lock_owner;
	uint32_t flags, padding;
};

struct release_in {
	uint64_t fh;
	uint32_t flags, release_flags;
	uint64_t lock_owner;
};

struct getattr_in {
	uint32_t getattr_flags, dummy;
	uint64_t fh;
};

struct create_in {
	uint32_t flags, mode, umask, open_flags;
};

struct poll_in {
	uint64_t fh, kh;
	uint32_t flags, events;
};

struct forget_one {
	uint64_t nodeid, nlookup;
};

struct batch_forget_in {
	uint32_t count, dummy;
};

struct dirent {
	uint64_t ino, off;
	uint32_t namelen, type;
	char name[];
};

#define ATTR_OUT_INO 16		/* offsets of the inode number in struct fuse_attr_out and fuse_statx_out */
#define STATX_OUT_INO 64
#define DIRENT_ALIGN(n) (((n) + 7UL) & ~7UL)

_Static_assert(sizeof(struct in_header) == 40, "fuse_in_header");
_Static_assert(sizeof(struct out_header) == 16, "fuse_out_header");
_Static_assert(sizeof(struct entry_out) == 128, "fuse_entry_out");
_Static_assert(sizeof(struct read_in) == 40, "fuse_read_in");
_Static_assert(sizeof(struct dirent) == 24, "fuse_dirent");

static inline uint64_t get64(const void *at)
{
	uint64_t value;

	memcpy(&value, at, sizeof(value));
	return value;
}

static inline uint32_t get32(const void *at)
{
	uint32_t value;

	memcpy(&value, at, sizeof(value));
	return value;
}

static inline void put64(void *at, uint64_t value)
{
	memcpy(at, &value, sizeof(value));
}

static inline void put32(void *at, uint32_t value)
{
	memcpy(at, &value, sizeof(value));
}

#endif /* FUSECR_GUARD_WIRE_H */
