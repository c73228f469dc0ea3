/* SPDX-License-Identifier: Apache-2.0
 *
 * fsclient.py for containers without Python: the same arguments, files, checks and report (described there), of
 * the modes reader, writer, append, dirs, cwd and idle.
 *
 *	gcc -O2 -Wall -Wextra -static -o fsclient fsclient.c fsclient-lib.c
 */
#define _GNU_SOURCE
#include "fsclient.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096
#define SLOTS 64
#define PAUSE_AFTER_FAILURE 0.05 /* seconds */

/* -- reader: one fd, sequential; the position is the kernel's */

static int fd = -1;
static off_t at;
static long passes;

static bool reader_setup(void)
{
	if (known_file("content", opt.size, 0))
		return false;
	fd = open(path_of("content"), O_RDONLY | O_CLOEXEC);
	return fd >= 0;
}

static bool rewind_fd(void)
{
	at = lseek(fd, 0, SEEK_SET);
	return at == 0 || bad_errno("lseek", "content");
}

static bool reader_round(void)
{
	char found[CHUNK], wanted[CHUNK];
	long length = opt.size - at < CHUNK ? opt.size - at : CHUNK;

	pattern(wanted, at, length, 0);
	if (!same(found, read(fd, found, CHUNK), wanted, length, "content"))
		return false;
	at += length;
	if (!at_position(fd, at, "content"))
		return false;
	ok();
	if (at < opt.size)
		return true;
	if (read(fd, found, 1) != 0)
		return bad("no end of file at the end");
	if (++passes % 2)
		posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED); /* the next pass asks the daemon */
	return rewind_fd();
}

/* -- writer: slots, written by pwrite and write, others read back */

static long generation[SLOTS];

static void slot_content(char *to, long slot)
{
	char record[32];

	snprintf(record, sizeof record, "%04ld %010ld\n", slot, generation[slot]);
	for (int i = 0; i < PAGE; i += RECORD)
		memcpy(to + i, record, RECORD);
}

static bool writer_setup(void)
{
	char page[PAGE];

	fd = open(path_of("slots"), O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
	for (long slot = 0; fd >= 0 && slot < SLOTS; slot++) {
		slot_content(page, slot);
		if (pwrite(fd, page, PAGE, slot * PAGE) != PAGE)
			return false;
	}
	return fd >= 0;
}

static bool writer_round(void)
{
	long slot = round_no * 7 % SLOTS, other = (round_no * 13 + 5) % SLOTS, before = generation[slot];
	char page[PAGE], found[PAGE], where[32];
	ssize_t written;

	generation[slot] = round_no + 1;
	slot_content(page, slot);
	if (round_no % 2) {
		written = pwrite(fd, page, PAGE, slot * PAGE);
	} else {
		lseek(fd, slot * PAGE, SEEK_SET);
		written = write(fd, page, PAGE);
	}
	if (written < 0) {
		generation[slot] = before;
		return bad_errno("write", "slots");
	}
	if (written != PAGE)
		return bad("short write of %ld bytes to slot %ld", (long)written, slot);
	if (!(round_no % 2) && !at_position(fd, (slot + 1) * PAGE, "slots"))
		return false;
	ok();
	if (round_no % 64 == 63) {
		if (fsync(fd))
			return bad_errno("fsync", "slots");
		ok();
	}
	if (round_no % 4 == 0)
		posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
	slot_content(page, other);
	snprintf(where, sizeof where, "slot %ld", other);
	if (!same(found, pread(fd, found, PAGE, other * PAGE), page, PAGE, where))
		return false;
	ok();
	return true;
}

/* -- append: numbered lines with a CRC-32, as check.py reads them */

static bool append_setup(void)
{
	append_lines = 0;
	fd = open(path_of("log"), O_WRONLY | O_APPEND | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
	return fd >= 0;
}

static bool append_round(void)
{
	char line[64];
	int length = snprintf(line, sizeof line, "%012ld %017.6f", append_lines, now(CLOCK_REALTIME));
	ssize_t written;

	length += snprintf(line + length, sizeof line - length, " %08x\n", crc32(line, length));
	written = write(fd, line, length);
	if (written < 0)
		return bad_errno("write", "log");
	if (written != length)
		return bad("short write of %ld bytes in line %ld", (long)written, append_lines);
	at += written;
	append_lines++;
	if (!at_position(fd, at, "log"))
		return false;
	ok();
	return true;
}

static bool append_resync(void)
{
	struct stat st;

	if (fstat(fd, &st))
		return bad_errno("fstat", "log");
	at = st.st_size;
	return true;
}

/* -- dirs: an open directory, entries that come, are renamed and go */

static const char *const names[] = { "a", "b with space", "e.txt" };
#define NAMES (int)(sizeof names / sizeof *names)
static bool rewinds;

static int list(int directory, const char *also, bool *has, int *others)
{
	DIR *dir = fdopendir(dup(directory));
	struct dirent *entry;
	int count = 0;

	if (!dir)
		return -1;
	*has = false;
	*others = 0;
	rewinddir(dir);
	while ((entry = readdir(dir))) {
		bool known = !strcmp(entry->d_name, ".") || !strcmp(entry->d_name, "..") ||
			     !strncmp(entry->d_name, ".fuse_hidden", 12); /* fsclient.py: class Dirs */

		for (int i = 0; !known && i < NAMES; i++)
			if (!strcmp(entry->d_name, names[i])) {
				known = true;
				count++;
			}
		if (!known && !strcmp(entry->d_name, also))
			*has = true;
		else if (!known)
			++*others;
	}
	closedir(dir);
	return count;
}

static bool listing(const char *also)
{
	int directory = rewinds ? fd : openat(fd, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC), others, count;
	bool has;

	if (directory < 0)
		return bad_errno("open", "directory");
	count = list(directory, also, &has, &others);
	if (directory != fd)
		close(directory);
	if (count < 0)
		return bad_errno("readdir", "directory");
	if (count != NAMES || has != !!*also || others)
		return bad("listing: %d of %d names, '%s' %s, %d unknown", count, NAMES, also,
			   has ? "there" : "not there", others);
	ok();
	return true;
}

static bool dirs_setup(void)
{
	bool has;
	int others;

	for (int i = 0; i < NAMES; i++)
		if (known_file(names[i], RECORD, 0))
			return false;
	fd = open(opt.place, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (fd < 0 || list(fd, "probe", &has, &others) < 0 || known_file("probe", RECORD, 0))
		return false;
	rewinds = list(fd, "probe", &has, &others) >= 0 && has;
	return !unlink(path_of("probe"));
}

static bool dirs_round(void)
{
	char name[32], renamed[32];

	snprintf(name, sizeof name, "new-%ld", round_no);
	snprintf(renamed, sizeof renamed, "renamed-%ld", round_no);
	if (known_file(name, RECORD, 0))
		return bad_errno("create", name);
	if (!listing(name))
		return false;
	if (renameat(AT_FDCWD, path_of(name), fd, renamed))
		return bad_errno("rename", name);
	if (!listing(renamed))
		return false;
	if (unlinkat(fd, renamed, 0))
		return bad_errno("unlink", renamed);
	if (mkdirat(fd, name, 0700))
		return bad_errno("mkdir", name);
	if (!listing(name))
		return false;
	if (rmdir(path_of(name)))
		return bad_errno("rmdir", name);
	return listing("");
}

static bool dirs_resync(void)
{
	char name[32];

	snprintf(name, sizeof name, "new-%ld", round_no - 1);
	if (unlinkat(fd, name, 0))
		unlinkat(fd, name, AT_REMOVEDIR);
	snprintf(name, sizeof name, "renamed-%ld", round_no - 1);
	unlinkat(fd, name, 0);
	return true;
}

/* -- cwd: getcwd, /proc/self/cwd, relative paths */

static char inner[PATH_MAX];

static bool cwd_setup(void)
{
	if (mkdir(path_of("inner"), 0700) && errno != EEXIST)
		return false;
	if (known_file("up", 64, 1) || known_file("inner/here", 128, 2))
		return false;
	return !chdir(path_of("inner")) && realpath(".", inner);
}

static bool content_is(const char *path, long size, int tag)
{
	char found[CHUNK], wanted[CHUNK];
	int file = open(path, O_RDONLY | O_CLOEXEC);
	bool good;

	if (file < 0)
		return bad_errno("open", path);
	pattern(wanted, 0, size, tag);
	good = same(found, read(file, found, sizeof found), wanted, size, path);
	close(file);
	if (good)
		ok();
	return good;
}

static bool link_is(const char *link, const char *wanted)
{
	char found[PATH_MAX];
	ssize_t length = readlink(link, found, sizeof found - 1);

	if (length < 0)
		return bad_errno("readlink", link);
	found[length] = 0;
	return !strcmp(found, wanted) || bad("%s is %.150s instead of %.150s", link, found, wanted);
}

static bool cwd_round(void)
{
	char found[PATH_MAX];

	if (!getcwd(found, sizeof found))
		return bad_errno("getcwd", "");
	if (strcmp(found, inner))
		return bad("getcwd is %.150s instead of %.150s", found, inner);
	if (!link_is("/proc/self/cwd", inner))
		return false;
	ok();
	return content_is("here", 128, 2) && content_is("../up", 64, 1);
}

/* -- idle: open files of which nothing may change */

#define HELD 4
static struct held {
	int fd, flags, tag;
	off_t position;
	char path[PATH_MAX];
} held[HELD];

static bool idle_setup(void)
{
	static const int flags[HELD] = { O_RDONLY, O_RDWR, O_WRONLY | O_APPEND, O_RDONLY };

	for (int i = 0; i < HELD; i++) {
		struct held *h = &held[i];
		char name[16];

		h->tag = i % 3;
		snprintf(name, sizeof name, "held-%d", h->tag);
		if (known_file(name, 1024 * (h->tag + 1), h->tag))
			return false;
		h->fd = open(path_of(name), flags[i] | O_CLOEXEC);
		if (h->fd < 0 || !realpath(path_of(name), h->path))
			return false;
		h->flags = fcntl(h->fd, F_GETFL);
		h->position = lseek(h->fd, RECORD * (i + 1), SEEK_SET);
	}
	return true;
}

static bool idle_round(void)
{
	for (struct held *h = held; h < held + HELD; h++) {
		char link[32], found[CHUNK], wanted[CHUNK];
		long size = 1024 * (h->tag + 1);

		snprintf(link, sizeof link, "/proc/self/fd/%d", h->fd);
		if (!link_is(link, h->path) || !at_position(h->fd, h->position, h->path))
			return false;
		if (fcntl(h->fd, F_GETFL) != h->flags)
			return bad("%s: flags %#o instead of %#o", h->path, fcntl(h->fd, F_GETFL), h->flags);
		if ((h->flags & O_ACCMODE) != O_WRONLY) {
			posix_fadvise(h->fd, 0, 0, POSIX_FADV_DONTNEED);
			pattern(wanted, 0, size, h->tag);
			if (!same(found, pread(h->fd, found, sizeof found, 0), wanted, size, h->path))
				return false;
		}
		ok();
	}
	return true;
}

static bool nothing(void)
{
	return true;
}

static const struct mode {
	const char *name;
	double pace; /* seconds */
	bool (*setup)(void), (*round)(void), (*resync)(void);
} modes[] = {
	{ "reader", 0.01, reader_setup, reader_round, rewind_fd },
	{ "writer", 0.01, writer_setup, writer_round, nothing },
	{ "append", 0.004, append_setup, append_round, append_resync },
	{ "dirs", 0.01, dirs_setup, dirs_round, dirs_resync },
	{ "cwd", 0.01, cwd_setup, cwd_round, nothing },
	{ "idle", 1, idle_setup, idle_round, nothing },
};

static volatile sig_atomic_t stopped;

static void stop(int number)
{
	(void)number;
	stopped = 1;
}

static void usage(void)
{
	fputs("Usage: fsclient MODE DIR REPORT [--name N] [--pace-ms X] [--stall-ms X] [--size B] [--duration S] "
	      "[--rounds N]\nMODE: reader writer append dirs cwd idle\n", stderr);
	exit(2);
}

static const struct mode *parse(int argc, char **argv)
{
	static const struct option known[] = {
		{ "name", 1, NULL, 'n' }, { "pace-ms", 1, NULL, 'p' },	{ "stall-ms", 1, NULL, 's' },
		{ "size", 1, NULL, 'z' }, { "duration", 1, NULL, 'd' }, { "rounds", 1, NULL, 'r' }, { 0 },
	};
	const char *name = NULL;
	const struct mode *mode = NULL;
	int c;

	while ((c = getopt_long(argc, argv, "", known, NULL)) != -1)
		switch (c) {
		case 'n': name = optarg; break;
		case 'p': opt.pace = atof(optarg) / 1000; break;
		case 's': opt.stall = atof(optarg) / 1000; break;
		case 'z': opt.size = atol(optarg) / RECORD * RECORD; break;
		case 'd': opt.duration = atof(optarg); break;
		case 'r': opt.rounds = atol(optarg); break;
		default: usage();
		}
	if (argc - optind != 3 || opt.size <= 0)
		usage();
	for (size_t i = 0; i < sizeof modes / sizeof *modes; i++)
		if (!strcmp(modes[i].name, argv[optind]))
			mode = &modes[i];
	if (!mode)
		usage();
	opt.mode = mode->name;
	opt.pace = opt.pace < 0 ? mode->pace : opt.pace;
	opt.stall += opt.pace;
	if (argv[optind + 2][0] != '/') {
		fputs("Error: REPORT has to be an absolute path: the cwd mode changes its directory\n", stderr);
		exit(2);
	}
	opt.report = argv[optind + 2];
	if (!realpath(argv[optind + 1], opt.target) ||
	    snprintf(opt.place, sizeof opt.place, "%s/%s", opt.target, name ? name : opt.mode) >= (int)sizeof opt.place) {
		fprintf(stderr, "Error: %s: %s\n", argv[optind + 1], strerror(errno));
		exit(2);
	}
	return mode;
}

int main(int argc, char **argv)
{
	const struct mode *mode = parse(argc, argv);
	struct sigaction action = { .sa_handler = stop, .sa_flags = SA_RESTART };
	double begin = now(CLOCK_MONOTONIC);
	bool good = true;

	sigaction(SIGTERM, &action, NULL);
	sigaction(SIGINT, &action, NULL);
	report_start();
	if ((mkdir(opt.place, 0700) && errno != EEXIST) || !mode->setup()) {
		fprintf(stderr, "Error: %s on %s: %s\n", opt.mode, opt.place, strerror(errno));
		return 2;
	}
	while (!stopped && (!opt.rounds || round_no < opt.rounds)) {
		if (opt.duration > 0 && now(CLOCK_MONOTONIC) - begin >= opt.duration)
			break;
		good = (good || mode->resync()) && mode->round();
		round_no++;
		write_report("running", false);
		nap(good || opt.pace > PAUSE_AFTER_FAILURE ? opt.pace : PAUSE_AFTER_FAILURE);
	}
	write_report("stopped", true);
	return error_count() ? 1 : 0;
}
