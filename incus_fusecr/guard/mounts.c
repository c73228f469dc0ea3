// SPDX-License-Identifier: Apache-2.0
/* Of the child that searches (resolve.h): it allocates without ever freeing. */
#define _GNU_SOURCE
#include "mounts.h"

#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "control.h"
#include "table.h"

static unsigned int connection;
static struct mount *mounts;
static struct table safe_mounts;	/* ids of mounts of procfs and sysfs in the same namespace */
static uint64_t read_last;

void mounts_setup(unsigned int number)
{
	connection = number;
}

bool mounts_cut(char *text, const char *end)
{
	size_t length = strlen(text), less = strlen(end);

	if (length <= less || strcmp(text + length - less, end) != 0)
		return false;
	text[length - less] = '\0';
	return true;
}

static void unescape(char *text)
{
	char *to = text;

	for (; *text; text++) {
		if (text[0] == '\\' && text[1] >= '0' && text[1] <= '3' && text[2] && text[3]) {
			*to++ = (text[1] - '0') * 64 + (text[2] - '0') * 8 + (text[3] - '0');
			text += 3;
		} else {
			*to++ = *text;
		}
	}
	*to = '\0';
}

/* ID PARENT MAJOR:MINOR ROOT POINT ... - TYPE SOURCE OPTIONS */
static void take_mount(char *line)
{
	struct mount *mount;
	char *words[5], *rest = line;
	unsigned int minor, i;

	for (i = 0; i < 5; i++) {
		words[i] = strsep(&rest, " ");
		if (!words[i])
			return;
	}
	if (rest && (strstr(rest, " - proc ") || strstr(rest, " - sysfs "))) {
		table_add(&safe_mounts, must_alloc(sizeof(struct link)), strtoull(words[0], NULL, 10));
		return;
	}
	if (strncmp(words[2], "0:", 2) != 0 || sscanf(words[2] + 2, "%u", &minor) != 1 || minor != connection)
		return;
	mount = must_alloc(sizeof(*mount));
	mount->id = strtoull(words[0], NULL, 10);
	mount->root = strdup(words[3]);
	mount->point = strdup(words[4]);
	unescape(mount->root);
	mounts_cut(mount->root, "//deleted");	/* its name was looked up anew; the mount is as good as before */
	unescape(mount->point);
	mount->next = mounts;
	mounts = mount;
}

uint64_t mounts_namespace(const char *pid)
{
	char path[64];
	struct stat stat_buf;

	snprintf(path, sizeof(path), "/proc/%s/ns/mnt", pid);
	return stat(path, &stat_buf) ? 0 : stat_buf.st_ino;
}

const struct mount *mounts_read(const char *pid)
{
	uint64_t namespace = mounts_namespace(pid);
	char path[64], *line = NULL;
	size_t size = 0;
	FILE *file;

	if (namespace && namespace == read_last)
		return mounts;
	read_last = namespace;
	mounts = NULL;
	memset(&safe_mounts, 0, sizeof(safe_mounts));
	snprintf(path, sizeof(path), "/proc/%s/mountinfo", pid);
	file = fopen(path, "re");
	if (!file)
		return NULL;
	while (getline(&line, &size, file) > 0)
		take_mount(line);
	fclose(file);
	return mounts;
}

bool mount_is_safe(uint64_t id)
{
	return table_find(&safe_mounts, id);
}

/* @path without the directory @point in front, or NULL. */
static const char *below(const char *path, const char *point)
{
	size_t length = strlen(point);

	if (length == 1 && *point == '/')
		return path;
	if (strncmp(path, point, length) != 0 || (path[length] && path[length] != '/'))
		return NULL;
	return path + length;
}

/*
 * From a link in /proc, which begins at the root of the process's mount namespace, to a path from the root of the file
 * system. The points in mountinfo begin at the root of the process.
 */
bool mounts_path(const char *pid, uint64_t mount_id, const char *link, char *path, size_t size)
{
	char root_link[64], root[PATH_MAX], point[2 * PATH_MAX];
	const char *told = detached_root(mount_id), *rest = NULL;
	const struct mount *mount;
	ssize_t length;

	for (mount = mounts_read(pid); mount && mount->id != mount_id; mount = mount->next)
		;
	if (!mount)
		return told && snprintf(path, size, "%s%s", told, *told && !link[1] ? "" : link) < (int)size;
	snprintf(root_link, sizeof(root_link), "/proc/%s/root", pid);
	length = readlink(root_link, root, sizeof(root) - 1);
	if (length > 1) {
		root[length] = '\0';
		snprintf(point, sizeof(point), "%s%s", root, mount->point);
		rest = below(link, point);
	}
	if (!rest)
		rest = below(link, mount->point);
	return rest && snprintf(path, size, "%s%s", mount->root, rest) < (int)size;
}
