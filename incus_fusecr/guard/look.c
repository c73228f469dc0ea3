// SPDX-License-Identifier: Apache-2.0
/* The child that searches (resolve.h). It may be killed at any moment, and allocates without ever freeing. */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <limits.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "mounts.h"
#include "resolve.h"
#include "table.h"

#ifndef RESOLVE_CACHED
#define RESOLVE_CACHED 0x20
#endif
#ifndef AT_HANDLE_FID
#define AT_HANDLE_FID 0x200
#endif
#define FILEID_INO64_GEN 0x81	/* fs/fuse/inode.c: id (high, low), generation */
#define IN_ROOT 0x10		/* RESOLVE_IN_ROOT */
#define ROOTS_MAX 65536

struct how {
	uint64_t flags, mode, resolve;
};

static int out;
static unsigned int connection;
static uint64_t wanted;
static enum look what;
static bool found;
static struct table roots_seen;

static void report(const struct seen *seen, const char *path)
{
	char record[SEEN_MAX];
	size_t length = path ? strlen(path) : 0;

	if (sizeof(*seen) + length > sizeof(record))
		return;
	memcpy(record, seen, sizeof(*seen));
	if (length)
		memcpy(record + sizeof(*seen), path, length);
	if (send(out, record, sizeof(*seen) + length, MSG_NOSIGNAL) < 0)
		_exit(1);
	if (seen->id == wanted && (what != LOOK_DESCRIPTOR || seen->is_descriptor))
		found = true;
}

/* -- inodes */

/* Device and type, and which mount. Mask 0: anything more is refused to root where the mount is another user's own. */
static bool ours(int dir, const char *path, int flags, struct seen *seen, uint64_t *mount)
{
	struct statx stat;

	if (statx(dir, path, flags | AT_STATX_DONT_SYNC, 0, &stat) || stat.stx_dev_major != 0 ||
	    stat.stx_dev_minor != connection)
		return false;
	seen->mode = stat.stx_mode;
	seen->ino = stat.stx_ino;
	seen->unlinked = stat.stx_mode && stat.stx_nlink == 0;
	*mount = stat.stx_mnt_id;
	return true;
}

static bool identify(int dir, const char *path, int flags, struct seen *seen)
{
	union {
		struct file_handle handle;
		char bytes[sizeof(struct file_handle) + 128];
	} u = { .handle = { .handle_bytes = 128 } };
	uint32_t words[3];
	int mount;

	if (name_to_handle_at(dir, path, &u.handle, &mount, flags)) {
		u.handle.handle_bytes = 128;
		/* since 6.6 for a file system without export support */
		if (errno != EOPNOTSUPP || name_to_handle_at(dir, path, &u.handle, &mount, flags | AT_HANDLE_FID))
			return false;
	}
	if (u.handle.handle_type != FILEID_INO64_GEN || u.handle.handle_bytes != sizeof(words))
		return false;
	memcpy(words, u.handle.f_handle, sizeof(words));
	seen->id = (uint64_t)words[0] << 32 | words[1];
	seen->generation = words[2];
	return true;
}

/* -- processes */

static uint32_t flags_of(const char *pid, const char *fd)
{
	char path[64], line[256];
	unsigned int flags = 0;
	FILE *file;

	snprintf(path, sizeof(path), "/proc/%s/fdinfo/%s", pid, fd);
	file = fopen(path, "re");
	if (!file)
		return 0;
	while (fgets(line, sizeof(line), file) && sscanf(line, "flags: %o", &flags) != 1)
		;
	fclose(file);
	return flags;
}

static void look_at(const char *pid, const char *name, const char *fd)
{
	char path[300], link[PATH_MAX], result[2 * PATH_MAX];
	struct seen seen = { .is_descriptor = fd != NULL };
	uint64_t mount;
	ssize_t length;

	snprintf(path, sizeof(path), "/proc/%s/%s", pid, name);
	if (!ours(AT_FDCWD, path, 0, &seen, &mount) || !identify(AT_FDCWD, path, AT_SYMLINK_FOLLOW, &seen))
		return;
	if (fd)
		seen.flags = flags_of(pid, fd);
	length = readlink(path, link, sizeof(link) - 1);
	if (length > 0) {
		link[length] = '\0';
		seen.deleted = mounts_cut(link, " (deleted)");
		seen.has_path = link[0] == '/' && mounts_path(pid, mount, link, result, sizeof(result));
	}
	report(&seen, seen.has_path ? result : NULL);
}

static void look_at_each(const char *pid, const char *directory, bool descriptors)
{
	char path[64], name[300];
	struct dirent *entry;
	DIR *dir;

	snprintf(path, sizeof(path), "/proc/%s/%s", pid, directory);
	dir = opendir(path);
	if (!dir)
		return;
	while ((entry = readdir(dir))) {
		if (entry->d_name[0] == '.')
			continue;
		snprintf(name, sizeof(name), "%s/%s", directory, entry->d_name);
		look_at(pid, name, descriptors ? entry->d_name : NULL);
	}
	closedir(dir);
}

static void look_into(const char *pid, bool maps)
{
	look_at_each(pid, "fd", true);
	if (what == LOOK_DESCRIPTOR)
		return;
	look_at(pid, "cwd", NULL);
	look_at(pid, "root", NULL);
	if (!maps || found)
		return;
	look_at(pid, "exe", NULL);
	look_at_each(pid, "map_files", false);
}

/* -- mount roots */

/*
 * Name by name: what is in procfs or sysfs has to be looked up with a reference to its name, the cache alone refuses. There
 * nobody has to be asked.
 */
static int open_by_names(int root, const char *point)
{
	struct how cached = { O_PATH | O_NOFOLLOW | O_CLOEXEC, 0, IN_ROOT | RESOLVE_CACHED };
	struct how asking = { O_PATH | O_NOFOLLOW | O_CLOEXEC, 0, IN_ROOT };
	char copy[PATH_MAX], *rest = copy, *name;
	int dir = dup(root), next;
	struct statx stat;

	if (snprintf(copy, sizeof(copy), "%s", point) >= (int)sizeof(copy))
		dir = -1;
	while (dir >= 0 && (name = strsep(&rest, "/"))) {
		if (!*name)
			continue;
		next = syscall(SYS_openat2, dir, name, &cached, sizeof(cached));
		if (next < 0 && errno == EAGAIN && !statx(dir, "", AT_EMPTY_PATH | AT_STATX_DONT_SYNC, 0, &stat) &&
		    mount_is_safe(stat.stx_mnt_id))
			next = syscall(SYS_openat2, dir, name, &asking, sizeof(asking));
		close(dir);
		dir = next;
	}
	return dir;
}

/*
 * Without leaving the cache: nothing on the way is asked, be it a file system of a container that hangs. Mount points are
 * always in the cache.
 */
static void look_at_root(int root, const struct mount *mount)
{
	struct how how = { O_PATH | O_NOFOLLOW | O_CLOEXEC, 0, IN_ROOT | RESOLVE_CACHED };
	struct seen seen = { .has_path = 1 };
	struct link *link;
	uint64_t id;
	int fd, tries;

	id = hash_bytes(0, mount->root, strlen(mount->root));
	if (table_find(&roots_seen, id) || roots_seen.count >= ROOTS_MAX)
		return;
	for (tries = 0, fd = -1; fd < 0 && tries < 3; tries++)
		fd = syscall(SYS_openat2, root, mount->point, &how, sizeof(how));
	if (fd < 0 && errno == EAGAIN)
		fd = open_by_names(root, mount->point);
	if (fd < 0)
		return;
	if (ours(fd, "", AT_EMPTY_PATH, &seen, &id) && id == mount->id && identify(fd, "", AT_EMPTY_PATH, &seen)) {
		link = must_alloc(sizeof(*link));
		table_add(&roots_seen, link, hash_bytes(0, mount->root, strlen(mount->root)));
		report(&seen, mount->root);
	}
	close(fd);
}

static void look_at_roots(const char *pid)
{
	static struct table namespaces;
	struct link *link;
	uint64_t namespace = mounts_namespace(pid);
	char path[64];
	const struct mount *mount;
	int root;

	if (!namespace || table_find(&namespaces, namespace))
		return;
	snprintf(path, sizeof(path), "/proc/%s/root", pid);
	root = open(path, O_PATH | O_DIRECTORY | O_CLOEXEC);
	if (root < 0)
		return;
	for (mount = mounts_read(pid); mount; mount = mount->next)
		look_at_root(root, mount);
	close(root);
	link = must_alloc(sizeof(*link));
	table_add(&namespaces, link, namespace);
}

/* -- sleepers */

/*
 * Whoever sleeps in poll(2) on a handle of the dead daemon waits for a notification with a number of the kernel's that only
 * the daemon knew. A poll of ours on the same open file makes the kernel tell the number in a FUSE_POLL, and whether somebody
 * sleeps (FUSE_POLL_SCHEDULE_NOTIFY); the guard answers that and wakes him (kernel.c). To close our copy is a FUSE_FLUSH.
 */
static void poll_files(const char *pid)
{
	int process = syscall(SYS_pidfd_open, atoi(pid), 0);
	struct pollfd file = { .events = POLLIN | POLLOUT | POLLPRI };
	struct dirent *entry;
	struct seen seen;
	char path[300];
	uint64_t mount;
	DIR *dir;

	snprintf(path, sizeof(path), "/proc/%s/fd", pid);
	dir = process < 0 ? NULL : opendir(path);
	while (dir && (entry = readdir(dir))) {
		snprintf(path, sizeof(path), "/proc/%s/fd/%s", pid, entry->d_name);
		if (entry->d_name[0] == '.' || !ours(AT_FDCWD, path, 0, &seen, &mount) || !S_ISREG(seen.mode))
			continue;
		file.fd = syscall(SYS_pidfd_getfd, process, atoi(entry->d_name), 0);
		if (file.fd < 0)
			continue;
		poll(&file, 1, 0);
		close(file.fd);
	}
	if (dir)
		closedir(dir);
	if (process >= 0)
		close(process);
}

/* -- ancestors */

/*
 * A directory that nobody has open, and that is named by .. from one that somebody has. The kernel keeps the directories above
 * one that is in use, so the cache knows them. In the mount's user namespace (see enter()): others may not walk there.
 */
static void look_above(const char *pid, const char *name)
{
	struct how how = { O_PATH | O_DIRECTORY | O_CLOEXEC, 0, RESOLVE_CACHED };
	char link[64], path[PATH_MAX], result[2 * PATH_MAX], *end;
	struct seen seen = { 0 };
	uint64_t mount, other;
	ssize_t length;
	int dir, up, tries;

	snprintf(link, sizeof(link), "/proc/%s/%s", pid, name);
	dir = open(link, O_PATH | O_DIRECTORY | O_CLOEXEC);
	if (dir < 0)
		return;
	length = readlink(link, path, sizeof(path) - 1);
	if (length > 0 && ours(dir, "", AT_EMPTY_PATH, &seen, &mount)) {
		path[length] = '\0';
		if (!mounts_path(pid, mount, path, result, sizeof(result)))
			length = 0;
	} else {
		length = 0;
	}
	while (length > 0 && !found && (end = strrchr(result, '/')) && end[1]) {
		for (tries = 0, up = -1; up < 0 && tries < 3; tries++)
			up = syscall(SYS_openat2, dir, "..", &how, sizeof(how));
		close(dir);
		dir = up;
		end[end == result] = '\0';
		memset(&seen, 0, sizeof(seen));
		seen.has_path = 1;
		if (dir < 0 || !ours(dir, "", AT_EMPTY_PATH, &seen, &other) || other != mount ||
		    !identify(dir, "", AT_EMPTY_PATH, &seen))
			break;
		report(&seen, result);
	}
	if (dir >= 0)
		close(dir);
}

static void look_above_all(const char *pid)
{
	char path[64], name[300];
	struct dirent *entry;
	DIR *dir;

	look_above(pid, "cwd");
	snprintf(path, sizeof(path), "/proc/%s/fd", pid);
	dir = opendir(path);
	while (dir && !found && (entry = readdir(dir))) {
		if (entry->d_name[0] == '.')
			continue;
		snprintf(name, sizeof(name), "fd/%s", entry->d_name);
		look_above(pid, name);
	}
	if (dir)
		closedir(dir);
}

/*
 * Become root of the user namespace that the mount belongs to: whoever is in none of its namespaces may not walk on it
 * (fs/fuse/dir.c fuse_allow_current_process()), and has no user id that a request could name.
 */
static void enter(int userns)
{
	if (userns < 0 || setns(userns, CLONE_NEWUSER))
		return;
	(void)!setgroups(0, NULL);	/* it may be denied there */
	if (setresgid(0, 0, 0) || setresuid(0, 0, 0))
		_exit(1);
	/* the change has made us dumpable by fs.suid_dumpable at most; nobody there may trace what comes from outside */
	if (prctl(PR_SET_DUMPABLE, 0))
		_exit(1);
}

static void each_process(void (*visit)(const char *pid))
{
	DIR *dir = opendir("/proc");
	struct dirent *entry;

	while (dir && !found && (entry = readdir(dir))) {
		if (entry->d_name[0] >= '1' && entry->d_name[0] <= '9')
			visit(entry->d_name);
	}
	if (dir)
		closedir(dir);
}

static void look_into_other(const char *pid)
{
	look_into(pid, false);
}

_Noreturn void look(int socket, int userns, unsigned int number, uint64_t id, uint32_t pid, enum look kind)
{
	const int keep = 3, second = 4;
	char first[16];

	if (prctl(PR_SET_PDEATHSIG, SIGKILL))
		_exit(1);
	/*
	 * No copy of /dev/fuse in a process that touches files of its connection; and no guard that goes on living in a child
	 * of it that hangs.
	 */
	if (userns >= 0) {
		/* above both places, so that neither is overwritten before it is read */
		userns = fcntl(userns, F_DUPFD, second + 1);
		socket = fcntl(socket, F_DUPFD, second + 1);
	}
	if (dup2(socket, keep) < 0)
		_exit(1);
	if (userns >= 0 && dup2(userns, second) < 0)
		_exit(1);
	syscall(SYS_close_range, keep + 1 + (userns >= 0), ~0U, 0);
	if (userns >= 0)
		userns = second;
	out = keep;
	connection = number;
	mounts_setup(number);
	wanted = id;
	what = kind;
	if (kind == LOOK_SLEEPERS) {
		enter(userns);
		each_process(poll_files);
		_exit(0);
	}
	if (pid && kind != LOOK_ROOTS) {
		snprintf(first, sizeof(first), "%u", pid);
		look_into(first, true);
	}
	if (!found && kind != LOOK_DESCRIPTOR)
		each_process(look_at_roots);
	if (!found && kind != LOOK_ROOTS)
		each_process(look_into_other);
	if (!found && kind == LOOK_NODE) {
		enter(userns);
		each_process(look_above_all);
	}
	_exit(0);
}
