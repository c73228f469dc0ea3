/* SPDX-License-Identifier: Apache-2.0
 *
 * Reads what lxcfs shows to a container, for as long as its daemon is killed and replaced, and notices everything that a
 * reader could: errors, values that change or are the host's, delays. Static, for any image.
 *
 *   lxreader MODE REPORT STOP [--root DIR] [--mem KB] [--cpus N] [--pace MS] [--slow MS] [--detach]
 *
 * MODE: loop (open, read, close of every file), held (fds that stay open), cwd (in /sys/devices/system/cpu), dirs (directory
 * streams), poll (a PSI trigger). REPORT: JSON, replaced atomically. Ends when STOP exists. --mem, --cpus: what the values
 * have to be; without them the first ones seen must stay. --root: in place of / for the files.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "lxreader.h"

#define CPU_DIR "/sys/devices/system/cpu"
#define TRIGGER "some 150000 2000000"
#define HELD 3 /* fds of each file */

enum { CPUINFO, DISKSTATS, LOADAVG, MEMINFO, SLABINFO, STAT, SWAPS, UPTIME, ONLINE, FILES };

static const char *const path_of[FILES] = {
	"/proc/cpuinfo", "/proc/diskstats", "/proc/loadavg", "/proc/meminfo", "/proc/slabinfo",
	"/proc/stat", "/proc/swaps", "/proc/uptime", CPU_DIR "/online",
};

struct options opt = { .pace = 10, .slow = 20 };
static char text[1 << 20];
static char cwd_wanted[4096];

static const char *at(const char *path)
{
	static char buf[4096];

	snprintf(buf, sizeof(buf), "%s%s", opt.root ? opt.root : "", path);
	return buf;
}

/* -- what the values have to be */

static int lines_with(const char *start)
{
	int n = 0;

	for (const char *p = text; p; p = strchr(p, '\n'), p += p != NULL)
		n += !strncmp(p, start, strlen(start));
	return n;
}

static long field(const char *name)
{
	const char *p = strstr(text, name);

	return p ? atol(p + strlen(name)) : -1;
}

static int count_of_list(const char *list)
{
	int n = 0, first, last, used;

	while (sscanf(list, "%d%n", &first, &used) == 1) {
		list += used;
		last = first;
		if (*list == '-' && sscanf(list, "-%d%n", &last, &used) == 1)
			list += used;
		n += last - first + 1;
		if (*list++ != ',')
			break;
	}
	return n;
}

static void check_stat(void)
{
	static long long before;
	long long user = 0, nice = 0, system = 0;
	int n = lines_with("cpu") - 1;

	same("cpus", "stat", n);
	if (sscanf(text, "cpu %lld %lld %lld", &user, &nice, &system) != 3)
		wrong("stat: no first line");
	/* a new lxcfs counts from anew where it keeps counters of its own: told, and no error */
	if (user + system < before)
		note("stat went back");
	before = user + system;
}

static void check_uptime(void)
{
	static double before, offset;
	double up, idle, now = seconds(CLOCK_BOOTTIME);

	if (sscanf(text, "%lf %lf", &up, &idle) != 2) {
		wrong("uptime: no two numbers");
		return;
	}
	if (up < before - 0.02)
		wrong("uptime went back: %.2f after %.2f", up, before);
	if (!before)
		offset = now - up;
	else if (now - up - offset > 1.5 || now - up - offset < -1.5)
		wrong("uptime jumped: %.2f, by its first value it is %.2f", up, now - offset);
	before = up;
}

/* \p n: bytes in \c text, which is a string */
static void check(int file, long n)
{
	double load;
	char word[64];

	if (!n && file != DISKSTATS && file != SLABINFO) {
		wrong("%s: empty", path_of[file]);
		return;
	}
	switch (file) {
	case MEMINFO:
		same("mem", "MemTotal", field("MemTotal:"));
		same("swap", "SwapTotal", field("SwapTotal:"));
		if (field("MemFree:") > field("MemTotal:"))
			wrong("MemFree %ld of %ld", field("MemFree:"), field("MemTotal:"));
		break;
	case CPUINFO:
		same("cpus", "cpuinfo", lines_with("processor"));
		break;
	case STAT:
		check_stat();
		break;
	case UPTIME:
		check_uptime();
		break;
	case SWAPS:
		if (strncmp(text, "Filename", 8))
			wrong("swaps: no heading");
		same("swaps", "swaps", lines_with("/") + lines_with("none"));
		break;
	case LOADAVG:
		if (sscanf(text, "%lf %lf %lf %63s", &load, &load, &load, word) != 4 || !strchr(word, '/'))
			wrong("loadavg: %.40s", text);
		break;
	case DISKSTATS:
		if (n && sscanf(text, "%*d %*d %63s", word) != 1)
			wrong("diskstats: %.40s", text);
		break;
	case ONLINE:
		same("cpus", "online", count_of_list(text));
		break;
	}
}

/* -- the modes; each does one round */

static long read_all(int fd)
{
	long n = 0, r;

	while ((r = read(fd, text + n, sizeof(text) - 1 - n)) > 0)
		n += r;
	text[n] = 0;
	return r < 0 ? -errno : n;
}

static long open_read_close(int dirfd, const char *path)
{
	long n;
	int fd = openat(dirfd, path, O_RDONLY | O_CLOEXEC);

	if (fd < 0)
		return -errno;
	n = read_all(fd);
	close(fd);
	return n;
}

static long entries(DIR *dir)
{
	long n = 0;

	errno = 0;
	while (readdir(dir))
		n++;
	return errno ? -errno : n;
}

static void loop(void)
{
	for (int i = 0; i < FILES; i++) {
		double t = begin();
		long n = open_read_close(AT_FDCWD, at(path_of[i]));

		if (i == SLABINFO && (n == -EACCES || n == -EPERM || n == -ENOENT)) { /* so it is in an unprivileged container */
			note("slabinfo cannot be read");
			continue;
		}
		if (done(t, path_of[i], n))
			check(i, n);
	}
}

static void held(void)
{
	static int fds[FILES][HELD];
	static int round;
	int how = round++ % HELD;

	for (int i = 0; i < FILES; i++) {
		double t;
		long n;

		if (i == SLABINFO || i == DISKSTATS)
			continue;
		for (int k = 0; k < HELD && !fds[i][k]; k++) {
			fds[i][k] = open(at(path_of[i]), O_RDONLY | O_CLOEXEC);
			if (fds[i][k] < 0)
				done(begin(), path_of[i], -errno);
		}
		t = begin();
		if (how == 0) { /* from the start, as top does it */
			n = lseek(fds[i][0], 0, SEEK_SET) < 0 ? -errno : read_all(fds[i][0]);
		} else if (how == 1) {
			n = pread(fds[i][1], text, sizeof(text) - 1, 0);
			n = n < 0 ? -errno : n;
			text[n < 0 ? 0 : n] = 0;
		} else { /* in two pieces: the second at an offset that another daemon has never served */
			long m = 0;

			n = pread(fds[i][2], text, 20, 0);
			if (n == 20)
				m = pread(fds[i][2], text + n, sizeof(text) - 1 - n, n);
			n = n < 0 || m < 0 ? -errno : n + m;
			text[n < 0 ? 0 : n] = 0;
		}
		/* what is regenerated between two pieces may be longer or shorter: their seam says nothing */
		if (done(t, path_of[i], n) && how != 2)
			check(i, n);
	}
}

static void in_cwd(void)
{
	struct stat st;
	char buf[4096];
	double t;
	long n;
	DIR *dir;

	if (!*cwd_wanted) {
		if (chdir(at(CPU_DIR)) || !getcwd(cwd_wanted, sizeof(cwd_wanted)))
			done(begin(), "chdir", -errno);
		return;
	}
	t = begin();
	n = open_read_close(AT_FDCWD, "online");
	if (done(t, "cwd online", n))
		check(ONLINE, n);
	t = begin();
	if (done(t, "getcwd", getcwd(buf, sizeof(buf)) ? 0 : -errno) && strcmp(buf, cwd_wanted))
		wrong("getcwd: %s, it was %s", buf, cwd_wanted);
	t = begin();
	dir = opendir(".");
	n = dir ? entries(dir) : -errno;
	if (dir)
		closedir(dir);
	if (done(t, "cwd readdir", n))
		same("entries", "cwd readdir", n);
	t = begin();
	done(t, "cwd stat", stat("cpu0", &st) ? -errno : 0);
}

static void dirs(void)
{
	static DIR *kept;
	double t = begin();
	DIR *dir = opendir(at(CPU_DIR));
	long n = dir ? entries(dir) : -errno;

	if (dir)
		closedir(dir);
	if (done(t, "readdir", n))
		same("entries", "readdir", n);
	if (!kept && !(kept = opendir(at(CPU_DIR)))) {
		done(begin(), "opendir", -errno);
		return;
	}
	t = begin();
	rewinddir(kept);
	errno = 0;
	n = readdir(kept) ? 0 : errno ? -errno : -ENODATA;
	if (!done(t, "held readdir", n))
		return;
	nap(opt.pace); /* in the middle of the stream */
	t = begin();
	n = entries(kept);
	if (done(t, "held readdir goes on", n))
		same("entries", "held readdir", n + 1);
}

static void psi(void)
{
	static struct pollfd p;
	double t;
	int n;

	if (!p.events) {
		p.fd = open(at("/proc/pressure/memory"), O_RDWR | O_NONBLOCK | O_CLOEXEC);
		if (p.fd < 0 || write(p.fd, TRIGGER, sizeof(TRIGGER)) < 0) {
			unsupported("/proc/pressure/memory: %s", strerror(errno));
			return;
		}
		p.events = POLLPRI;
	}
	t = begin();
	n = poll(&p, 1, 0);
	if (done(t, "poll", n < 0 ? -errno : 0) && n && (p.revents & ~POLLPRI))
		wrong("poll: revents %#x", p.revents);
}

static const struct mode {
	const char *name;
	void (*round)(void);
} modes[] = { { "loop", loop }, { "held", held }, { "cwd", in_cwd }, { "dirs", dirs }, { "poll", psi } };

static const struct mode *options(int argc, char **argv)
{
	const struct mode *mode = NULL;

	for (int i = 4; i < argc; i++) {
		const char *value = i + 1 < argc ? argv[i + 1] : NULL;

		if (!strcmp(argv[i], "--detach")) {
			opt.detach = true;
			continue;
		}
		if (!value)
			return NULL;
		if (!strcmp(argv[i], "--root"))
			opt.root = value;
		else if (!strcmp(argv[i], "--mem"))
			expect("mem", atol(value));
		else if (!strcmp(argv[i], "--cpus"))
			expect("cpus", atol(value));
		else if (!strcmp(argv[i], "--pace"))
			opt.pace = atof(value);
		else if (!strcmp(argv[i], "--slow"))
			opt.slow = atof(value);
		else
			return NULL;
		i++;
	}
	for (size_t i = 0; argc > 3 && i < sizeof(modes) / sizeof(*modes); i++)
		if (!strcmp(argv[1], modes[i].name))
			mode = &modes[i];
	return mode;
}

int main(int argc, char **argv)
{
	const struct mode *mode = options(argc, argv);
	struct stat st;

	if (!mode) {
		fprintf(stderr, "usage: lxreader loop|held|cwd|dirs|poll REPORT STOP [--root DIR] [--mem KB] [--cpus N] [--pace MS] "
				"[--slow MS] [--detach]\n");
		return 2;
	}
	if (opt.detach && daemon(1, 0))
		return 1;
	start(mode->name, argv[2]);
	while (stat(argv[3], &st) && !*reason()) {
		mode->round();
		report(false);
		nap(opt.pace);
	}
	report(true);
	return 0;
}
