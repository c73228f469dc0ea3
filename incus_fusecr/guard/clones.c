// SPDX-License-Identifier: Apache-2.0
#define _GNU_SOURCE
#include "clones.h"

#include <dirent.h>
#include <fcntl.h>
#include <linux/kcmp.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "log.h"
#include "table.h"

static struct {
	int pidfd;
	int pid;		/* 0: none, or not visible from our pid namespace */
	uint64_t threads;	/* what they were at the last look */
} daemon_of = { .pidfd = -1 };

/* The number behind "KEY:" in a file of /proc, or -1. */
static long number_in(const char *path, const char *key)
{
	FILE *file = fopen(path, "re");
	size_t length = strlen(key);
	char line[256];
	long number = -1;

	if (!file)
		return -1;
	while (number < 0 && fgets(line, sizeof(line), file)) {
		if (strncmp(line, key, length) == 0 && line[length] == ':')
			number = strtol(line + length + 1, NULL, 10);
	}
	fclose(file);
	return number;
}

void clones_of(int pidfd)
{
	char path[64];
	long pid;

	snprintf(path, sizeof(path), "/proc/self/fdinfo/%d", pidfd);
	pid = number_in(path, "Pid");
	daemon_of.pidfd = pidfd;
	daemon_of.pid = pid > 0 ? (int)pid : 0;
}

/* Call @each for the entries of /proc/PID/@name. Returns how many: 0 when the daemon is about to end. */
static unsigned int each_entry(const char *name, void (*each)(const char *entry, void *data), void *data)
{
	char path[64];
	struct dirent *entry;
	unsigned int count = 0;
	DIR *dir;

	snprintf(path, sizeof(path), "/proc/%d/%s", daemon_of.pid, name);
	dir = opendir(path);
	while (dir && (entry = readdir(dir))) {
		if (entry->d_name[0] == '.')
			continue;
		each(entry->d_name, data);
		count++;
	}
	if (dir)
		closedir(dir);
	return count;
}

static void count_thread(const char *tid, void *data)
{
	uint64_t *threads = data;

	*threads = hash_bytes(*threads, tid, strlen(tid));
}

static bool held(const struct device *device, int fd)
{
	unsigned int i;

	for (i = 0; i < device->fd_count; i++) {
		/* -1: a kernel without kcmp(2), where we would take the same ones again and again */
		if (syscall(SYS_kcmp, getpid(), getpid(), KCMP_FILE, device->fds[i], fd) <= 0)
			return true;
	}
	return false;
}

static void look_at(const char *name, void *data)
{
	struct device *device = data;
	char path[300], link[64];
	ssize_t length;
	int fd;

	snprintf(path, sizeof(path), "/proc/%d/fd/%s", daemon_of.pid, name);
	length = readlink(path, link, sizeof(link) - 1);
	if (length < 5 || device->fd_count == FDS_MAX)
		return;
	link[length] = '\0';
	snprintf(path, sizeof(path), "/proc/%d/fdinfo/%s", daemon_of.pid, name);
	if (strcmp(link + length - 5, "/fuse") != 0 || number_in(path, "fuse_connection") != device->connection)
		return;
	fd = syscall(SYS_pidfd_getfd, daemon_of.pidfd, atoi(name), 0);
	if (fd < 0)
		return;
	/* the daemon may have closed it meanwhile, and opened something else */
	snprintf(path, sizeof(path), "/proc/self/fdinfo/%d", fd);
	if (held(device, fd) || number_in(path, "fuse_connection") != device->connection)
		close(fd);
	else
		device->fds[device->fd_count++] = fd;
}

void clones_look(struct device *device)
{
	uint64_t threads = 0;
	unsigned int before = device->fd_count;

	if (!daemon_of.pid)
		return;
	if (!each_entry("task", count_thread, &threads) || threads == daemon_of.threads)
		return;
	daemon_of.threads = threads;
	each_entry("fd", look_at, device);
	if (device->fd_count > before)
		event("clones fds=%u", device->fd_count);
}
