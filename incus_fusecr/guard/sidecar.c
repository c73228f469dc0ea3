// SPDX-License-Identifier: Apache-2.0
#define _GNU_SOURCE
#include "sidecar.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "log.h"
#include "loop.h"
#include "pump.h"
#include "table.h"
#include "wire.h"

#define SOCKET_BUFFER (8 << 20)		/* for messages of 1 MiB; needs CAP_NET_ADMIN beyond net.core.wmem_max */
#define MESSAGE_MAX ((1 << 20) + 65536)	/* a reply to a READ of the largest size, and its headers */
#define BATCH 32
#define INIT_UNIQUE 2
#define UNHEARD_UNIQUE 4	/* of requests whose answers are dropped; the pump begins above */
#define INIT_SECONDS 20
#define PROVEN_MS 10000			/* who lived that long has no part in the failures before */
#define BACKOFF_MAX_MS 5000
#define BACKOFF_IDLE_MAX_MS 60000

struct message {
	struct message *next;
	size_t size;
	char bytes[];
};

static struct {
	char **argv;
	unsigned char init[INIT_MAX], init_reply[INIT_MAX];
	size_t init_size, init_reply_size;
	const char *log;

	pid_t pid;		/* 0: none */
	int sock, pidfd;
	bool ready, failed;
	long long started, retry_at;
	unsigned int starts, failures;
	struct message *first, **last;	/* waiting for room in the socket */
	char *buffer;
} sidecar = { .sock = -1, .pidfd = -1, .retry_at = NEVER, .last = &sidecar.first };

static void socket_ready(unsigned int slot, uint32_t events);
static void has_exited(unsigned int slot, uint32_t events);

void sidecar_setup(char **argv, const unsigned char *init, size_t init_size, const char *log)
{
	sidecar.argv = argv;
	memcpy(sidecar.init, init, init_size);
	sidecar.init_size = init_size;
	sidecar.log = log;
}

bool sidecar_ready(void)
{
	return sidecar.ready;
}

bool sidecar_failing(void)
{
	return sidecar.failed;
}

bool sidecar_congested(void)
{
	return sidecar.first != NULL;
}

pid_t sidecar_pid(void)
{
	return sidecar.pid;
}

unsigned int sidecar_starts(void)
{
	return sidecar.starts;
}

const unsigned char *sidecar_init_reply(size_t *size)
{
	*size = sidecar.init_reply_size;
	return sidecar.init_reply;
}

/* -- the child */

static char *with_number(const char *word, int number)
{
	const char *mark = strstr(word, "@FD@");
	char *result = NULL;

	if (!mark)
		return (char *)word;
	if (asprintf(&result, "%.*s%d%s", (int)(mark - word), word, number, mark + 4) < 0)
		_exit(127);
	return result;
}

static void redirect(int fd, const char *path, int flags)
{
	int opened = open(path, flags | O_CLOEXEC, 0600);

	if (opened < 0)
		opened = open("/dev/null", flags & O_ACCMODE);
	if (opened >= 0 && opened != fd) {
		dup2(opened, fd);
		close(opened);
	}
}

/*
 * A session of its own, so that what it starts (sshfs: ssh) can be ended with it. None of our fds: a daemon that holds a
 * copy of its own /dev/fuse would keep the connection alive.
 */
static _Noreturn void become_sidecar(int sock, pid_t guard)
{
	const int keep = 3;
	sigset_t none;
	char **word;

	setsid();
	if (prctl(PR_SET_PDEATHSIG, SIGKILL) || getppid() != guard)
		_exit(127);
	redirect(STDIN_FILENO, "/dev/null", O_RDONLY);
	redirect(STDOUT_FILENO, sidecar.log ? sidecar.log : "/dev/null", O_WRONLY | O_CREAT | O_APPEND);
	dup2(STDOUT_FILENO, STDERR_FILENO);
	if (sock != keep && dup2(sock, keep) < 0)
		_exit(127);
	fcntl(keep, F_SETFD, 0);
	syscall(SYS_close_range, keep + 1, ~0U, 0);
	sigemptyset(&none);
	sigprocmask(SIG_SETMASK, &none, NULL);
	signal(SIGPIPE, SIG_DFL);
	for (word = sidecar.argv; *word; word++)
		*word = with_number(*word, keep);
	execvp(sidecar.argv[0], sidecar.argv);
	dprintf(STDERR_FILENO, "fusecr-guard: %s: %s\n", sidecar.argv[0], strerror(errno));
	_exit(127);
}

static int make_socket(int pair[2])
{
	const int size = SOCKET_BUFFER;
	int i;

	if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair))
		return -errno;
	for (i = 0; i < 2; i++) {
		if (setsockopt(pair[i], SOL_SOCKET, SO_SNDBUFFORCE, &size, sizeof(size)))
			setsockopt(pair[i], SOL_SOCKET, SO_SNDBUF, &size, sizeof(size));
		if (setsockopt(pair[i], SOL_SOCKET, SO_RCVBUFFORCE, &size, sizeof(size)))
			setsockopt(pair[i], SOL_SOCKET, SO_RCVBUF, &size, sizeof(size));
	}
	return 0;
}

static void retry_later(void)
{
	long long most = pump_serving() ? BACKOFF_MAX_MS : BACKOFF_IDLE_MAX_MS;
	unsigned int n = sidecar.failures < 16 ? sidecar.failures : 16;
	/* nobody waits for one in standby: start with a tenth of a second there; after the first death at once */
	long long delay = n == 0 ? 0 : (pump_serving() ? 5LL : 100LL) << n;

	sidecar.failures++;
	sidecar.retry_at = now_ms() + (delay > most ? most : delay);
}

void sidecar_start(void)
{
	struct in_header header = { .opcode = FUSE_INIT, .unique = INIT_UNIQUE };
	struct iovec parts[2] = { { &header, sizeof(header) }, { sidecar.init, sidecar.init_size } };
	pid_t guard = getpid(), pid;
	int pair[2], error;

	if (sidecar.pid)
		return;
	sidecar.retry_at = NEVER;
	error = make_socket(pair);
	if (error) {
		event("sidecar-failed reason=socketpair error=%d", -error);
		sidecar.failed = true;
		retry_later();
		return;
	}
	pid = fork();
	if (pid == 0)
		become_sidecar(pair[1], guard);
	close(pair[1]);
	sidecar.pidfd = pid < 0 ? -1 : (int)syscall(SYS_pidfd_open, pid, 0);
	if (sidecar.pidfd < 0) {
		event("sidecar-failed reason=fork error=%d", errno);
		if (pid > 0) {
			kill(pid, SIGKILL);
			waitpid(pid, NULL, 0);
		}
		close(pair[0]);
		sidecar.failed = true;
		retry_later();
		return;
	}
	fcntl(sidecar.pidfd, F_SETFD, FD_CLOEXEC);
	sidecar.pid = pid;
	sidecar.sock = pair[0];
	sidecar.started = now_ms();
	sidecar.starts++;
	header.len = sizeof(header) + sidecar.init_size;
	loop_add(SLOT_SIDECAR, sidecar.sock, EPOLLIN, socket_ready);
	loop_add(SLOT_SIDECAR_EXIT, sidecar.pidfd, EPOLLIN, has_exited);
	sidecar_send(parts, 2);
}

static void drop_messages(void)
{
	while (sidecar.first) {
		struct message *next = sidecar.first->next;

		free(sidecar.first);
		sidecar.first = next;
	}
	sidecar.last = &sidecar.first;
}

void sidecar_end(void)
{
	int status = 0;

	if (!sidecar.pid)
		return;
	loop_drop(SLOT_SIDECAR);
	loop_drop(SLOT_SIDECAR_EXIT);
	/* its children first: as long as it is not reaped, the number of its group is nobody else's */
	kill(-sidecar.pid, SIGKILL);
	kill(sidecar.pid, SIGKILL);
	while (waitpid(sidecar.pid, &status, 0) < 0 && errno == EINTR)
		;
	close(sidecar.sock);
	close(sidecar.pidfd);
	sidecar.sock = sidecar.pidfd = -1;
	if (WIFSIGNALED(status))
		event("sidecar-exit pid=%d signal=%d ready=%d", (int)sidecar.pid, WTERMSIG(status), sidecar.ready);
	else
		event("sidecar-exit pid=%d code=%d ready=%d", (int)sidecar.pid, WEXITSTATUS(status), sidecar.ready);
	sidecar.pid = 0;
	sidecar.failed = !sidecar.ready;
	sidecar.ready = false;
	drop_messages();
}

static void died(void)
{
	if (sidecar.ready && now_ms() - sidecar.started > PROVEN_MS)
		sidecar.failures = 0;
	sidecar_end();
	retry_later();
	pump_sidecar_died();
	if (sidecar.retry_at <= now_ms())
		sidecar_start();
}

void sidecar_replace(void)
{
	died();
}

static void has_exited(unsigned int slot, uint32_t events)
{
	(void)slot;
	(void)events;
	died();
}

long long sidecar_due(void)
{
	if (sidecar.pid && !sidecar.ready)
		return sidecar.started + INIT_SECONDS * 1000LL;
	return sidecar.pid ? NEVER : sidecar.retry_at;
}

void sidecar_tick(void)
{
	if (now_ms() < sidecar_due())
		return;
	if (sidecar.pid) {
		event("sidecar-failed reason=no-init-reply pid=%d", (int)sidecar.pid);
		died();
	} else {
		sidecar_start();
	}
}

/* -- messages */

static size_t size_of(const struct iovec *parts, int count)
{
	size_t size = 0;

	while (count-- > 0)
		size += parts++->iov_len;
	return size;
}

static void keep_message(const struct iovec *parts, int count)
{
	struct message *message = must_alloc(sizeof(*message) + size_of(parts, count));

	message->next = NULL;
	message->size = 0;
	for (; count > 0; count--, parts++) {
		memcpy(message->bytes + message->size, parts->iov_base, parts->iov_len);
		message->size += parts->iov_len;
	}
	*sidecar.last = message;
	sidecar.last = &message->next;
	loop_change(SLOT_SIDECAR, EPOLLIN | EPOLLOUT);
}

static int send_now(const struct iovec *parts, int count)
{
	struct msghdr msg = { .msg_iov = (struct iovec *)parts, .msg_iovlen = count };

	while (sendmsg(sidecar.sock, &msg, MSG_NOSIGNAL | MSG_DONTWAIT) < 0) {
		if (errno != EINTR)
			return errno == ENOBUFS ? -EAGAIN : -errno;
	}
	return 0;
}

int sidecar_send(const struct iovec *parts, int count)
{
	int error;

	if (!sidecar.pid)
		return -EPIPE;
	error = sidecar.first ? -EAGAIN : send_now(parts, count);
	if (error == -EAGAIN) {
		keep_message(parts, count);
		return 0;
	}
	return error;
}

void sidecar_forget(uint64_t sid, uint64_t count)
{
	struct in_header header = { .len = sizeof(header) + sizeof(count), .opcode = FUSE_FORGET, .nodeid = sid };
	struct iovec parts[2] = { { &header, sizeof(header) }, { &count, sizeof(count) } };

	if (sidecar.ready && sid != FUSE_ROOT_ID)
		sidecar_send(parts, 2);
}

void sidecar_unlink(uint64_t parent, const char *name)
{
	struct in_header header = { .opcode = FUSE_UNLINK, .unique = UNHEARD_UNIQUE, .nodeid = parent, .pid = getpid() };
	struct iovec parts[2] = { { &header, sizeof(header) }, { (char *)name, strlen(name) + 1 } };

	header.len = sizeof(header) + parts[1].iov_len;
	if (sidecar.ready)
		sidecar_send(parts, 2);
}

static void send_kept(void)
{
	while (sidecar.first) {
		struct message *message = sidecar.first;
		struct iovec part = { message->bytes, message->size };
		int error = send_now(&part, 1);

		if (error == -EAGAIN)
			return;
		sidecar.first = message->next;
		if (!sidecar.first)
			sidecar.last = &sidecar.first;
		free(message);
	}
	loop_change(SLOT_SIDECAR, EPOLLIN);
	pump_resume();
}

static bool take_init(const struct out_header *header, const char *body, size_t size)
{
	uint32_t major = size >= 8 ? get32(body) : 0;

	if (header->unique != INIT_UNIQUE || header->error || major != 7 || size > INIT_MAX) {
		event("sidecar-failed reason=init-reply error=%d major=%u size=%zu", header->error, major, size);
		return false;
	}
	memcpy(sidecar.init_reply, body, size);
	sidecar.init_reply_size = size;
	sidecar.ready = true;
	sidecar.failed = false;
	event("sidecar-ready pid=%d ms=%lld", (int)sidecar.pid, now_ms() - sidecar.started);
	pump_sidecar_ready();
	return true;
}

/* False: it is not the same sidecar any more. */
static bool receive_one(void)
{
	ssize_t size = recv(sidecar.sock, sidecar.buffer, MESSAGE_MAX, MSG_DONTWAIT | MSG_TRUNC);
	struct out_header header;

	if (size < 0)
		return false;	/* EAGAIN, or dead: the pidfd tells */
	if (size == 0) {
		/* it closed its socket and lives: it will answer nothing any more */
		died();
		return false;
	}
	if (size < (ssize_t)sizeof(header)) {
		/* nobody knows whose answer that is, and he would wait for ever */
		pump_malformed(NULL, size);
		died();
		return false;
	}
	memcpy(&header, sidecar.buffer, sizeof(header));
	if (!sidecar.ready) {
		if (take_init(&header, sidecar.buffer + sizeof(header), size - sizeof(header)))
			return true;
		died();
		return false;
	}
	if (size > MESSAGE_MAX || header.len != size)
		pump_malformed(&header, size);
	else
		pump_message(&header, sidecar.buffer + sizeof(header), size - sizeof(header));
	return true;
}

static void socket_ready(unsigned int slot, uint32_t events)
{
	unsigned int starts = sidecar.starts;
	int i;

	(void)slot;
	if (!sidecar.buffer) {
		sidecar.buffer = mmap(NULL, MESSAGE_MAX, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		if (sidecar.buffer == MAP_FAILED)
			die("no memory for messages of the sidecar");
	}
	if (events & EPOLLOUT)
		send_kept();
	for (i = 0; i < BATCH && sidecar.pid && starts == sidecar.starts; i++) {
		if (!receive_one())
			break;
	}
}
