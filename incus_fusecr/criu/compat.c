// SPDX-License-Identifier: GPL-2.0-only
/*
 * Debian 13 has CRIU 4.1.1, which asks the kernel questions that fail here and are not worth failing for:
 *
 * - SO_PASSCRED and SO_PASSSEC of every socket. Since Linux 6.16 ("net: Restrict SO_PASS{CRED,PIDFD,SEC} to
 *   AF_{UNIX,NETLINK,BLUETOOTH}.") others answer EOPNOTSUPP, and no container with a TCP socket can be dumped. CRIU 4.2
 *   asks only sockets that have them. Here the answer is 0, as before 6.16: CRIU's restore then sets neither.
 * - prlimit64() of tasks of other users needs CAP_SYS_RESOURCE, which root lacks in some virtual machines and outer
 *   containers. /proc/PID/limits says the same to everybody. (A restore sets the limits as far as it may and goes on.)
 * - Whether an open file is an ELF file with a build id: CRIU maps its first page. While the daemon of a FUSE file stands
 *   still nobody reads it that page, and CRIU would die of SIGBUS. If it cannot be mapped, CRIU notes the size alone
 *   (criu/files-reg.c, get_build_id()), as with --file-validation filesize, which liblxc does not give.
 *
 * CRIU has no hook for them, so its import of the libc function is redirected: only CRIU's own, not of its libraries,
 * and only where the question was seen to fail.
 */
#define _GNU_SOURCE
#include "compat.h"

#include <errno.h>
#include <linux/capability.h>
#include <linux/magic.h>
#include <linux/sched.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/vfs.h>
#include <unistd.h>

#include "redirect.h"

#define LIMITS_MAX 4096		/* /proc/PID/limits: 17 lines of 79 bytes */

/* ---- SO_PASSCRED, SO_PASSSEC ---- */

static int compat_getsockopt(int fd, int level, int option, void *value, socklen_t *size)
{
	int result = getsockopt(fd, level, option, value, size);

	if (result == 0 || errno != EOPNOTSUPP || level != SOL_SOCKET || *size != sizeof(int))
		return result;
	if (option != SO_PASSCRED && option != SO_PASSSEC)
		return result;
	memset(value, 0, sizeof(int));
	return 0;
}

static bool kernel_restricts_sopass(void)
{
	int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0), value;
	socklen_t size = sizeof(value);
	bool restricts;

	if (fd < 0)	/* a kernel without INET: nothing to dump */
		return false;
	restricts = getsockopt(fd, SOL_SOCKET, SO_PASSCRED, &value, &size) && errno == EOPNOTSUPP;
	close(fd);
	return restricts;
}

/* ---- prlimit64 ---- */

static int parse_limit(const char *text, rlim_t *limit)
{
	char *end;

	if (strcmp(text, "unlimited") == 0) {
		*limit = RLIM_INFINITY;
		return 0;
	}
	errno = 0;
	*limit = strtoull(text, &end, 10);
	return errno || end == text || *end ? -1 : 0;
}

/* Get limit @resource of @pid from /proc/PID/limits: a heading, then a line for each in the order of their numbers. */
static int read_limits(long pid, long resource, struct rlimit64 *limits)
{
	char path[64], text[LIMITS_MAX], soft[32], hard[32], *line = text;
	FILE *file;
	size_t size;

	snprintf(path, sizeof(path), "/proc/%ld/limits", pid);
	file = fopen(path, "re");
	if (!file)
		return -1;
	size = fread(text, 1, sizeof(text) - 1, file);
	fclose(file);
	text[size] = '\0';
	for (; line && resource >= 0; resource--) {
		line = strchr(line, '\n');
		line = line ? line + 1 : NULL;
	}
	/* fs/proc/base.c, proc_pid_limits(): "%-25s %-20s %-20s %-10s" */
	if (!line || strlen(line) < 26 || sscanf(line + 26, "%31s %31s", soft, hard) != 2)
		return -1;
	return parse_limit(soft, &limits->rlim_cur) || parse_limit(hard, &limits->rlim_max) ? -1 : 0;
}

/* CRIU calls prlimit64 by its number. As libc's syscall() does, all six arguments are passed on, given or not. */
static long compat_syscall(long number, long a, long b, long c, long d, long e, long f)
{
	long result = syscall(number, a, b, c, d, e, f);

	if (result != -1 || errno != EPERM || number != SYS_prlimit64 || c || !d)
		return result;
	if (read_limits(a, b, (struct rlimit64 *)d)) {
		errno = EPERM;
		return -1;
	}
	return 0;
}

static bool may_read_limits(void)
{
	struct __user_cap_header_struct header = { .version = _LINUX_CAPABILITY_VERSION_3 };
	struct __user_cap_data_struct data[_LINUX_CAPABILITY_U32S_3] = { 0 };

	if (syscall(SYS_capget, &header, data))
		return true;	/* nothing to go by: leave CRIU alone */
	return data[CAP_TO_INDEX(CAP_SYS_RESOURCE)].effective & CAP_TO_MASK(CAP_SYS_RESOURCE);
}

/* ---- build ids ---- */

static void *compat_mmap64(void *address, size_t length, int protection, int flags, int fd, off64_t offset)
{
	struct statfs fs;

	if (fd >= 0 && protection == PROT_READ && (flags & MAP_TYPE) == MAP_PRIVATE && fstatfs(fd, &fs) == 0 &&
	    fs.f_type == FUSE_SUPER_MAGIC) {
		errno = ENODEV;
		return MAP_FAILED;
	}
	return mmap64(address, length, protection, flags, fd, offset);
}

void compat_dump(void)
{
	redirect("mmap64", compat_mmap64, "nobody reads a FUSE file while its daemon stands still");
	if (kernel_restricts_sopass())
		redirect("getsockopt", compat_getsockopt, "the kernel has no SO_PASSCRED for inet sockets");
	if (!may_read_limits())
		redirect("syscall", compat_syscall, "root lacks CAP_SYS_RESOURCE here to read limits of other users");
}

/*
 * A session whose leader has ended (any daemon that a shell or a forking unit began) is restored with a helper task in the
 * leader's place, a child of pid 1 that shares its fs_struct and its files (criu/pstree.c, init_pstree_helper()). While it
 * does, pid 1 cannot setns() into a mount namespace (fs/namespace.c mntns_install(): fs->users != 1), which it has to for
 * its named unix sockets, and a container with systemd is not restored. The helper needs no working directory of its parent.
 */
static long compat_clone3(long number, long a, long b, long c, long d, long e, long f)
{
	const unsigned long long helper = CLONE_FS | CLONE_FILES;
	struct clone_args *args = (struct clone_args *)a;

	if (number == SYS_clone3 && (args->flags & helper) == helper && !(args->flags & (CLONE_VM | CLONE_THREAD)))
		args->flags &= ~(unsigned long long)CLONE_FS;
	return syscall(number, a, b, c, d, e, f);
}

void compat_restore(void)
{
	redirect("syscall", compat_clone3, "a helper task must not share the working directory of pid 1");
}
