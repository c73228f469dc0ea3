// SPDX-License-Identifier: GPL-2.0-only
/*
 * Stands for CRIU in test_plugin_paths.py: loads the library in argv[1], hands it the image directory argv[2], and looks at
 * paths below the directory argv[3] as CRIU does. Prints the result of paths_dump(), then a line for each of the other
 * arguments, once with the redirected imports and once after redirect_undo():
 *   "PATH: ERRNO", or "PATH: DEV INO MODE NLINK UID GID RDEV SIZE BLKSIZE BLOCKS ATIME MTIME CTIME", and for argv[3] itself,
 *   opened by its magic link, whether that is an O_PATH descriptor.
 */
#define _GNU_SOURCE
#define _FILE_OFFSET_BITS 64
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <sys/stat.h>
#include <unistd.h>

void print_on_level(unsigned int level, const char *format, ...)
{
	va_list args;

	(void)level;
	va_start(args, format);
	vfprintf(stderr, format, args);
	va_end(args);
}

static void look(int root, const char *path)
{
	struct stat st;

	printf("%s: ", path);
	if (fstatat(root, path, &st, 0)) {
		printf("%d\n", errno);
		return;
	}
	printf("%lu %lu %o %lu %u %u %lu %ld %ld %ld %ld.%09ld %ld.%09ld %ld.%09ld\n", st.st_dev, st.st_ino, st.st_mode,
	       (unsigned long)st.st_nlink, st.st_uid, st.st_gid, st.st_rdev, st.st_size, (long)st.st_blksize, st.st_blocks,
	       st.st_atim.tv_sec, st.st_atim.tv_nsec, st.st_mtim.tv_sec, st.st_mtim.tv_nsec, st.st_ctim.tv_sec,
	       st.st_ctim.tv_nsec);
}

static void reopen(int fd)
{
	int self = open("/proc/self", O_PATH), again;
	char link[32];

	snprintf(link, sizeof(link), "fd/%d", fd);
	again = openat(self, link, O_RDONLY);
	printf("path only: %d\n", again < 0 ? -errno : !!(fcntl(again, F_GETFL) & O_PATH));
	close(again);
	close(self);
}

static void look_at_all(int root, char **paths)
{
	for (; *paths; paths++)
		look(root, *paths);
	reopen(root);
}

int main(int argc, char **argv)
{
	int (*paths_dump)(int), root;
	void (*redirect_undo)(void), *library;

	if (argc < 4)
		return 2;
	library = dlopen(argv[1], RTLD_NOW);
	paths_dump = library ? dlsym(library, "paths_dump") : NULL;
	redirect_undo = library ? dlsym(library, "redirect_undo") : NULL;
	root = open(argv[3], O_RDONLY | O_DIRECTORY);
	if (!paths_dump || !redirect_undo || root < 0) {
		fprintf(stderr, "%s\n", dlerror());
		return 2;
	}
	printf("%d\n", paths_dump(open(argv[2], O_RDONLY | O_DIRECTORY)));
	look_at_all(root, argv + 4);
	redirect_undo();
	dlclose(library);
	look_at_all(root, argv + 4);
	return 0;
}
