// SPDX-License-Identifier: GPL-2.0-only
/*
 * Stands for CRIU in test_plugin_compat.py, linked in each way that a program can import getsockopt(): loads the library
 * in argv[1] and calls its compat_dump(). Prints the errno (0: answered) of SO_PASSCRED and SO_KEEPALIVE of an inet
 * socket, and of SO_KEEPALIVE of no socket, before and after, and exits 1 if a protection of its memory has changed.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>

void print_on_level(unsigned int level, const char *format, ...)
{
	va_list args;

	(void)level;
	va_start(args, format);
	vfprintf(stderr, format, args);
	va_end(args);
}

static int ask(int fd, int option)
{
	int value = -1;
	socklen_t size = sizeof(value);

	if (getsockopt(fd, SOL_SOCKET, option, &value, &size))
		return errno;
	return value;
}

/* The lines of the program's own mappings, without the heap. */
static void read_maps(const char *program, char *text, size_t size)
{
	FILE *file = fopen("/proc/self/maps", "r");
	char line[512];

	text[0] = '\0';
	while (file && fgets(line, sizeof(line), file)) {
		if (strstr(line, program) && strlen(text) + strlen(line) < size)
			strcat(text, line);
	}
	if (file)
		fclose(file);
}

int main(int argc, char **argv)
{
	static char before[8192], after[8192];
	int fd = socket(AF_INET, SOCK_DGRAM, 0);
	void *library, (*compat_dump)(void);

	if (argc < 2)
		return 2;
	printf("%d %d %d\n", ask(fd, SO_PASSCRED), ask(fd, SO_KEEPALIVE), ask(-1, SO_PASSCRED));
	library = dlopen(argv[1], RTLD_NOW);
	compat_dump = library ? dlsym(library, "compat_dump") : NULL;
	if (!compat_dump) {
		fprintf(stderr, "%s\n", dlerror());
		return 2;
	}
	read_maps(argv[0], before, sizeof(before));
	compat_dump();
	read_maps(argv[0], after, sizeof(after));
	printf("%d %d %d\n", ask(fd, SO_PASSCRED), ask(fd, SO_KEEPALIVE), ask(-1, SO_PASSCRED));
	return !*before || strcmp(before, after) != 0;
}
