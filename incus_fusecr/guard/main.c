// SPDX-License-Identifier: Apache-2.0
/*
 * fusecr-guard: keeps one FUSE connection answered when its daemon dies (docs/adr/0012-recovery.md).
 *
 * It holds copies of the daemon's /dev/fuse descriptors, so that the connection outlives the daemon, and a pidfd, so that
 * it knows. In standby it is not in the way of anything. When the daemon is dead, it passes the kernel's requests on to a
 * second, unmodified copy of the daemon, the sidecar, and the answers back, until nobody uses the connection any more.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/wait.h>
#include <unistd.h>

#include "clones.h"
#include "control.h"
#include "log.h"
#include "loop.h"
#include "pump.h"
#include "resolve.h"
#include "sidecar.h"

#define EXIT_GONE 0		/* the connection is */
#define EXIT_USAGE 2
#define EXIT_STOPPED 3		/* somebody said stop: the connection lives */

static struct {
	int pidfd;
	const char *control, *log, *roots;
	unsigned char init[INIT_MAX];
	size_t init_size;
	bool warm;
} options = { .pidfd = -1, .warm = true };
static int signals = -1;
static bool roots_looked_at, sleepers_woken;

static _Noreturn void usage(const char *what, const char *value)
{
	fprintf(stderr, "fusecr-guard: %s: %s\n"
		"usage: fusecr-guard --connection N --fuse-fd FD[,FD..] --pidfd FD|-1 --init HEX --control PATH\n"
		"         [--standby warm|cold] [--durability strict|none] [--attempts N] [--unserved wait|fail]\n"
		"         [--deadline SECONDS] [--log PATH] [--roots PATH] [--userns FD]\n"
		"         -- SIDECAR ARGV... (@FD@: its socket)\n", what, value);
	exit(EXIT_USAGE);
}

static long number(const char *name, const char *text, long min, long max)
{
	char *end;
	long value;

	errno = 0;
	value = strtol(text, &end, 10);
	if (errno || end == text || *end || value < min || value > max)
		usage(name, text);
	return value;
}

static bool either(const char *name, const char *text, const char *yes, const char *no)
{
	if (strcmp(text, yes) != 0 && strcmp(text, no) != 0)
		usage(name, text);
	return strcmp(text, yes) == 0;
}

static void fds(char *text)
{
	char *word;

	while ((word = strsep(&text, ","))) {
		int fd = (int)number("--fuse-fd", word, 0, 1 << 20);

		if (pump_options.device.fd_count == FDS_MAX || fcntl(fd, F_SETFD, FD_CLOEXEC))
			usage("--fuse-fd", word);
		pump_options.device.fds[pump_options.device.fd_count++] = fd;
	}
}

static void init(const char *text)
{
	size_t i, size = strlen(text) / 2;

	if (strlen(text) % 2 || size < 16 || size > INIT_MAX)
		usage("--init", text);
	for (i = 0; i < size; i++) {
		char byte[3] = { text[2 * i], text[2 * i + 1], '\0' }, *end;

		options.init[i] = strtoul(byte, &end, 16);
		if (end != byte + 2)
			usage("--init", text);
	}
	options.init_size = size;
}

static void parse(int argc, char **argv)
{
	static const struct option known[] = {
		{ "connection", required_argument, NULL, 'c' }, { "fuse-fd", required_argument, NULL, 'f' },
		{ "pidfd", required_argument, NULL, 'p' }, { "init", required_argument, NULL, 'i' },
		{ "control", required_argument, NULL, 's' }, { "standby", required_argument, NULL, 'w' },
		{ "durability", required_argument, NULL, 'd' }, { "attempts", required_argument, NULL, 'a' },
		{ "unserved", required_argument, NULL, 'u' }, { "deadline", required_argument, NULL, 't' },
		{ "log", required_argument, NULL, 'l' }, { "roots", required_argument, NULL, 'r' },
		{ "userns", required_argument, NULL, 'n' }, { 0 },
	};
	int option;

	pump_options.attempts = 3;
	pump_options.userns = -1;
	pump_options.strict = true;
	while ((option = getopt_long(argc, argv, "+", known, NULL)) != -1) {
		switch (option) {
		case 'c':
			pump_options.device.connection = number("--connection", optarg, 1, 0xfffff);
			break;
		case 'f':
			fds(optarg);
			break;
		case 'p':
			options.pidfd = (int)number("--pidfd", optarg, -1, 1 << 20);
			break;
		case 'i':
			init(optarg);
			break;
		case 's':
			options.control = optarg;
			break;
		case 'w':
			options.warm = either("--standby", optarg, "warm", "cold");
			break;
		case 'd':
			pump_options.strict = either("--durability", optarg, "strict", "none");
			break;
		case 'a':
			pump_options.attempts = number("--attempts", optarg, 1, 1000);
			break;
		case 'u':
			pump_options.fail_unserved = either("--unserved", optarg, "fail", "wait");
			break;
		case 't':
			pump_options.deadline = number("--deadline", optarg, 0, 86400);
			break;
		case 'l':
			options.log = optarg;
			break;
		case 'r':
			options.roots = optarg;
			break;
		case 'n':
			pump_options.userns = (int)number("--userns", optarg, -1, 1 << 20);
			break;
		default:
			usage("option", "unknown, or without a value");
		}
	}
	if (!pump_options.device.connection || !pump_options.device.fd_count || !options.init_size || !options.control ||
	    optind == argc)
		usage("missing", "--connection, --fuse-fd, --init, --control or the sidecar's command");
	if (options.pidfd >= 0 && fcntl(options.pidfd, F_SETFD, FD_CLOEXEC))
		usage("--pidfd", strerror(errno));
	if (pump_options.userns >= 0 && fcntl(pump_options.userns, F_SETFD, FD_CLOEXEC))
		usage("--userns", strerror(errno));
	sidecar_setup(argv + optind, options.init, options.init_size, options.log);
}

static void daemon_dead(unsigned int slot, uint32_t events)
{
	(void)events;
	loop_drop(slot);
	event("daemon-dead");
	pump_serve();
}

static void signalled(unsigned int slot, uint32_t events)
{
	struct signalfd_siginfo info;

	(void)slot;
	(void)events;
	if (read(signals, &info, sizeof(info)) != sizeof(info))
		return;
	/* the sidecar is reaped where its pidfd tells: here come searches and the writer of notifications */
	if (info.ssi_signo == SIGCHLD) {
		resolve_reap();
	} else if (pump_serving()) {
		event("signal-ignored signal=%u reason=serving", info.ssi_signo);
	} else {
		control_stop();
	}
}

static void watch_signals(void)
{
	sigset_t set;

	sigemptyset(&set);
	sigaddset(&set, SIGTERM);
	sigaddset(&set, SIGINT);
	sigaddset(&set, SIGHUP);
	sigaddset(&set, SIGCHLD);
	sigprocmask(SIG_SETMASK, &set, NULL);
	signal(SIGPIPE, SIG_IGN);
	signals = signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
	if (signals < 0)
		die("signalfd: %s", strerror(errno));
	loop_add(SLOT_SIGNAL, signals, EPOLLIN, signalled);
}

static void start(void)
{
	struct pollfd daemon = { .fd = options.pidfd, .events = POLLIN };

	if (options.pidfd < 0 || poll(&daemon, 1, 0) > 0) {
		pump_serve();
		return;
	}
	loop_add(SLOT_DAEMON, options.pidfd, EPOLLIN, daemon_dead);
	clones_of(options.pidfd);
	event("standby connection=%u warm=%d", pump_options.device.connection, options.warm);
	if (options.warm)
		sidecar_start();
}

/* A warm sidecar knows the mounts' roots by the time that it is needed. Sleepers have time until others are served. */
static void prepare(void)
{
	if (pump_serving() && sidecar_ready() && !sleepers_woken)
		sleepers_woken = resolve_start(0, 0, LOOK_SLEEPERS);
	if (!options.warm || pump_serving() || roots_looked_at || !sidecar_ready())
		return;
	roots_looked_at = resolve_start(0, 0, LOOK_ROOTS);
}

int main(int argc, char **argv)
{
	parse(argc, argv);
	prctl(PR_SET_DUMPABLE, 0);
	loop_init();
	watch_signals();
	nodes_init();
	if (options.roots)
		control_read_roots(options.roots);
	control_open(options.control);
	start();
	while (!pump_gone() && !control_stopped()) {
		prepare();
		pump_tick();
		if (pump_gone())
			break;
		loop_wait(sooner(sooner(pump_due(), sidecar_due()), resolve_due()));
		sidecar_tick();
		resolve_tick();
	}
	event("%s requests=%llu", pump_gone() ? "gone" : "stopped", (unsigned long long)pump_counts.requests);
	resolve_end();
	sidecar_end();
	control_close();
	return pump_gone() ? EXIT_GONE : EXIT_STOPPED;
}
