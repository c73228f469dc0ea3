// SPDX-License-Identifier: GPL-2.0-only
/*
 * CRIU looks at each open file by its path, too (criu/files-reg.c, check_path_remap()), from the root of the task's mount
 * namespace. Below a FUSE mount such a walk sends a LOOKUP for every entry whose validity has run out (by libfuse's
 * default after one second), and the kernel counts each one that is answered. The daemon does not: it stands still, and
 * somebody answers in its place. When it goes on it is told one day to forget more than it ever gave, and libfuse aborts.
 * Nothing takes such a count back, so these paths are not walked. While the daemon ran, the agent wrote down what they are.
 *
 * CRIU also opens mapped files, and files anew whose build id it looks for. The RELEASE of such a file is one that the
 * daemon knows no OPEN of: libfuse aborts. CRIU gets O_PATH descriptors, which are known to the kernel alone: enough to see
 * what the file is. It cannot map them, and notes no build id (get_build_id()).
 *
 * The table: PATHS_MAGIC, then for each path a struct entry and the path's bytes, relative to the root of the mount
 * namespace, without a slash at either end. All in this host's byte order, for it never leaves it.
 */
#define _GNU_SOURCE
#include "paths.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/magic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/vfs.h>
#include <unistd.h>

#include "log.h"
#include "redirect.h"

#define PATHS_MAGIC "fusecr paths 1\n"
#define TABLE_MAX (512u << 20)	/* bytes; the agent writes no more */
#define DEVICES_MAX 64		/* the agent takes no container with more FUSE connections */

/* As the agent packs it: checkpoint/paths.py */
struct entry {
	uint64_t root;		/* mount id of the root of the path's mount namespace */
	uint64_t dev_major, dev_minor, ino, mode, nlink, uid, gid, rdev_major, rdev_minor, size, blksize, blocks;
	uint64_t atime, atime_ns, mtime, mtime_ns, ctime, ctime_ns;
	uint64_t length;	/* of the path, which follows */
};

/* Entries are found by hash: each bucket has the offset of one, and the next free bucket takes the next. */
static unsigned char *table;
static uint32_t *buckets;
static size_t bucket_count;	/* a power of two, more than there are entries */

static dev_t devices[DEVICES_MAX];	/* the file systems that the table is about */
static size_t device_count;

static struct entry entry_at(size_t offset)
{
	struct entry found;

	memcpy(&found, table + offset, sizeof(found));
	return found;
}

static const unsigned char *path_at(size_t offset)
{
	return table + offset + sizeof(struct entry);
}

/* FNV-1a */
static size_t first_bucket(uint64_t root, const unsigned char *path, size_t length)
{
	uint64_t hash = 14695981039346656037ull ^ root;
	size_t i;

	for (i = 0; i < length; i++)
		hash = (hash ^ path[i]) * 1099511628211ull;
	return (hash ^ hash >> 32) & (bucket_count - 1);
}

/* The bucket of a path, an empty one if it is not in the table. */
static size_t bucket_of(uint64_t root, const unsigned char *path, size_t length)
{
	size_t bucket = first_bucket(root, path, length);

	for (; buckets[bucket]; bucket = (bucket + 1) & (bucket_count - 1)) {
		struct entry found = entry_at(buckets[bucket]);

		if (found.root == root && found.length == length && memcmp(path_at(buckets[bucket]), path, length) == 0)
			break;
	}
	return bucket;
}

/* The mount that @dir is on, 0 if the kernel does not tell. Asks no file system. */
static uint64_t mount_id(int dir)
{
	struct statx st;

	if (statx(dir, "", AT_EMPTY_PATH | AT_STATX_DONT_SYNC, STATX_MNT_ID, &st) || !(st.stx_mask & STATX_MNT_ID))
		return 0;
	return st.stx_mnt_id;
}

static void fill_stat(const struct entry *from, struct stat *st)
{
	memset(st, 0, sizeof(*st));
	st->st_dev = makedev(from->dev_major, from->dev_minor);
	st->st_ino = from->ino;
	st->st_mode = from->mode;
	st->st_nlink = from->nlink;
	st->st_uid = from->uid;
	st->st_gid = from->gid;
	st->st_rdev = makedev(from->rdev_major, from->rdev_minor);
	st->st_size = from->size;
	st->st_blksize = from->blksize;
	st->st_blocks = from->blocks;
	st->st_atim = (struct timespec){ from->atime, from->atime_ns };
	st->st_mtim = (struct timespec){ from->mtime, from->mtime_ns };
	st->st_ctim = (struct timespec){ from->ctime, from->ctime_ns };
}

/* CRIU is built with 64-bit offsets: struct stat64 is struct stat on the machines that the plugin is for. */
static int known_fstatat(int dir, const char *path, struct stat *st, int flags)
{
	const char *start = path;
	struct entry found;
	size_t bucket, length;

	while (*start == '/' || (start[0] == '.' && start[1] == '/'))	/* "./mnt/file", as CRIU has them */
		start++;
	length = strlen(start);
	if (dir < 0 || *path == '/' || !length)
		return fstatat(dir, path, st, flags);
	bucket = bucket_of(mount_id(dir), (const unsigned char *)start, length);
	if (!buckets[bucket])
		return fstatat(dir, path, st, flags);
	found = entry_at(buckets[bucket]);
	if (S_ISLNK(found.mode) && !(flags & AT_SYMLINK_NOFOLLOW))
		return fstatat(dir, path, st, flags);
	fill_stat(&found, st);
	return 0;
}

/* ---- Opening ---- */

/* The magic links by which CRIU opens files of others: PROC_SELF's "fd/N", and "START-END" of a task's map_files. */
static bool is_magic_link(const char *path)
{
	static const char hex[] = "0123456789abcdef";
	size_t start = strspn(path, hex);

	if (strncmp(path, "fd/", 3) == 0)
		return path[3] && !path[3 + strspn(path + 3, "0123456789")];
	return start && path[start] == '-' && path[start + 1] && !path[start + 1 + strspn(path + start + 1, hex)];
}

/* True if @fd is a file of one of our FUSE mounts. Sends no request, also not for attributes. */
static bool is_ours(int fd)
{
	struct statx st;
	size_t i;

	if (statx(fd, "", AT_EMPTY_PATH | AT_STATX_DONT_SYNC, 0, &st))
		return false;
	for (i = 0; i < device_count; i++) {
		if (devices[i] == makedev(st.stx_dev_major, st.stx_dev_minor))
			return true;
	}
	return false;
}

static bool is_proc(int dir)
{
	struct statfs fs;

	return fstatfs(dir, &fs) == 0 && fs.f_type == PROC_SUPER_MAGIC;
}

/*
 * As libc's openat(), it passes on the mode, given or not.
 *
 * O_PATH alone outside of /proc is how CRIU tries whether an inotify watch can be restored by its path (criu/fsnotify.c,
 * alloc_openable()). It follows symbolic links, so it does not recognize a watched one (systemd watches /etc/localtime),
 * and its way out, a scan for the inode, compares st_dev with the superblock's number, which differ on btrfs.
 */
static int known_openat(int dir, const char *path, int flags, mode_t mode)
{
	int fd;

	if ((flags & ~O_CLOEXEC) == O_PATH && dir >= 0 && *path != '/' && !is_proc(dir))
		return openat(dir, path, flags | O_NOFOLLOW);
	if (!(flags & O_PATH) && is_magic_link(path)) {
		fd = openat(dir, path, O_PATH | (flags & O_CLOEXEC));
		if (fd >= 0 && is_ours(fd))
			return fd;
		if (fd >= 0)
			close(fd);
	}
	return openat(dir, path, flags, mode);
}

/* ---- The file ---- */

/* Read the whole of @fd. Returns its size, -EFBIG, or -errno; the caller frees *@content. */
static ssize_t read_all(int fd, unsigned char **content)
{
	struct stat st;
	size_t length = 0;
	ssize_t n;

	if (fstat(fd, &st))
		return -errno;
	if (st.st_size < 0 || (uint64_t)st.st_size > TABLE_MAX)
		return -EFBIG;
	*content = malloc(st.st_size + 1);
	if (!*content)
		return -ENOMEM;
	while (length < (size_t)st.st_size) {
		n = read(fd, *content + length, st.st_size - length);
		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			return n < 0 ? -errno : -EIO;
		length += n;
	}
	return length;
}

/* Where the entry after the one at @offset begins, 0 if the one at @offset is damaged. */
static size_t next_entry(size_t offset, size_t size)
{
	struct entry found;

	if (size - offset < sizeof(found))
		return 0;
	found = entry_at(offset);
	if (!found.length || found.length > 2 * PATH_MAX || found.length > size - offset - sizeof(found))
		return 0;
	return offset + sizeof(found) + found.length;
}

static int note_device(dev_t device)
{
	size_t i;

	for (i = 0; i < device_count; i++) {
		if (devices[i] == device)
			return 0;
	}
	if (device_count == DEVICES_MAX)
		return -E2BIG;
	devices[device_count++] = device;
	return 0;
}

/* Returns how many entries the table has, or -errno. */
static ssize_t index_table(size_t size)
{
	size_t start = sizeof(PATHS_MAGIC) - 1, offset, next, count = 0;

	if (size < start || memcmp(table, PATHS_MAGIC, start) != 0)
		return -EBADMSG;
	for (offset = start; offset < size; offset = next, count++) {
		next = next_entry(offset, size);
		if (!next)
			return -EBADMSG;
	}
	for (bucket_count = 16; bucket_count < 2 * count; bucket_count *= 2)
		;
	buckets = calloc(bucket_count, sizeof(*buckets));
	if (!buckets)
		return -ENOMEM;
	for (offset = start; offset < size; offset = next_entry(offset, size)) {
		struct entry found = entry_at(offset);

		if (note_device(makedev(found.dev_major, found.dev_minor)))
			return -E2BIG;
		buckets[bucket_of(found.root, path_at(offset), found.length)] = offset;
	}
	return count;
}

int paths_dump(int dir)
{
	int fd = openat(dir, PATHS_FILE, O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
	ssize_t result;
	int error = fd < 0 ? errno : 0;

	redirect("openat64", known_openat, "a FUSE file would be closed that was never opened; a watched link would be followed");
	if (error == ENOENT)
		return 0;
	result = fd < 0 ? -error : read_all(fd, &table);
	if (fd >= 0)
		close(fd);
	if (result >= 0)
		result = index_table(result);
	if (result >= 0 && unlinkat(dir, PATHS_FILE, 0))
		result = -errno;
	if (result < 0) {
		pr_err("cannot use %s, which the agent has left in the image directory: %s", PATHS_FILE,
		       strerror(-result));
		return -1;
	}
	pr_info("%zd paths below FUSE mounts are known", result);
	redirect("fstatat64", known_fstatat, "a walk below a FUSE mount would be counted by the kernel, and not by its daemon");
	return 0;
}
