// SPDX-License-Identifier: Apache-2.0
#define _GNU_SOURCE
#include "control.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "log.h"
#include "loop.h"
#include "nodes.h"
#include "pump.h"
#include "resolve.h"
#include "sidecar.h"

#define MESSAGE_MAX 4352	/* a path, a number and a word */
#define ANSWER_MAX 2048
#define DETACHED_MAX 16384
#define TOLD_MAX 4096

struct detached {
	struct link by_id;
	char root[];
};

static int listener = -1;
static const char *socket_path;
static ino_t socket_inode;
static struct {
	int fd;
	bool follows;
} clients[CONTROL_CLIENTS];
static struct table detached;
static bool stopped;

bool control_stopped(void)
{
	return stopped;
}

void control_stop(void)
{
	stopped = true;
}

const char *detached_root(uint64_t mount_id)
{
	struct link *link = table_find(&detached, mount_id);

	return link ? container_of(link, struct detached, by_id)->root : NULL;
}

static void drop_client(unsigned int index)
{
	loop_drop(SLOT_CLIENT + index);
	close(clients[index].fd);
	clients[index].fd = -1;
	clients[index].follows = false;
}

void control_publish(const char *line, size_t length)
{
	unsigned int i;

	if (listener < 0)
		return;
	for (i = 0; i < CONTROL_CLIENTS; i++) {
		if (clients[i].fd >= 0 && clients[i].follows &&
		    send(clients[i].fd, line, length, MSG_DONTWAIT | MSG_NOSIGNAL) < 0)
			drop_client(i);
	}
}

/* -- messages */

static size_t add(char *answer, size_t at, const char *format, ...) __attribute__((format(printf, 3, 4)));

static size_t add(char *answer, size_t at, const char *format, ...)
{
	va_list args;
	int more;

	va_start(args, format);
	more = vsnprintf(answer + at, ANSWER_MAX - at, format, args);
	va_end(args);
	return more < 0 || at + more >= ANSWER_MAX ? ANSWER_MAX - 1 : at + more;
}

static void status(char *answer)
{
	const unsigned char *reply;
	unsigned int starts = sidecar_starts();
	size_t at = 0, size, i;

	at = add(answer, at, "phase %s\nconnection %u\nfds %u\n", pump_phase(), pump_options.device.connection,
		 pump_options.device.fd_count);
	at = add(answer, at, "sidecar %d\nready %d\nlooking %d\n", (int)sidecar_pid(), sidecar_ready(),
		 resolve_running(0, LOOK_ROOTS));
	at = add(answer, at, "nodes %zu\nhandles %zu\npending %zu\n", nodes_count(), handles_count(), pump_counts.pending);
	at = add(answer, at, "requests %llu\nrespawns %u\n", (unsigned long long)pump_counts.requests,
		 starts ? starts - 1 : 0);
	at = add(answer, at, "poisoned %llu\nexpired %llu\nstale %llu\nmalformed %llu\ndropped_notifications %llu\n",
		 (unsigned long long)pump_counts.poisoned, (unsigned long long)pump_counts.expired,
		 (unsigned long long)pump_counts.stale, (unsigned long long)pump_counts.malformed,
		 (unsigned long long)pump_counts.dropped_notifications);
	reply = sidecar_init_reply(&size);
	at = add(answer, at, "init_reply ");
	for (i = 0; i < size; i++)
		at = add(answer, at, "%02x", reply[i]);
	add(answer, at, "\n");
}

static const char *learn_root(char *words)
{
	struct detached *entry;
	struct link *old;
	char *end;
	unsigned long long id = strtoull(words, &end, 10);
	size_t length;

	if (end == words || *end != ' ' || end[1] != '/')
		return "error roots: MNT_ID ROOT, the root begins with /";
	end++;
	length = strlen(end);
	while (length > 1 && end[length - 1] == '/')
		end[--length] = '\0';
	old = table_find(&detached, id);
	if (old) {
		table_remove(&detached, old);
		free(container_of(old, struct detached, by_id));
	}
	if (detached.count >= DETACHED_MAX)
		return "error roots: too many";
	entry = must_alloc(sizeof(*entry) + length + 1);
	/* the root of the file system adds nothing in front of a path */
	strcpy(entry->root, strcmp(end, "/") == 0 ? "" : end);
	table_add(&detached, &entry->by_id, id);
	return "ok";
}

static const char *learn_node(char *words)
{
	char *end, *path;
	unsigned long long id = strtoull(words, &end, 10), generation = strtoull(end, &path, 10);

	if (id <= FUSE_ROOT_ID || id >= SMALL_ID || end == path || *path != ' ' || path[1] != '/')
		return "error node: ID GENERATION PATH, the id is one that counts, the path begins with /";
	if (!node_find(id) && nodes_count() >= TOLD_MAX)
		return "error node: too many";
	node_learn(id, generation, path + 1, false, false);
	return "ok";
}

static const char *warm_each(char *words)
{
	char *end, *next;
	unsigned long long id = strtoull(words, &end, 10), pid;
	const char *answer = "error warm: ID PID...";

	if (end == words)
		return answer;
	for (words = end; (pid = strtoull(words, &next, 10)) && next != words; words = next) {
		answer = warm(id, pid);
		if (strcmp(answer, "ok") != 0)
			break;
	}
	return answer;
}

void control_read_roots(const char *path)
{
	char *line = NULL;
	size_t size = 0;
	ssize_t length;
	FILE *file = fopen(path, "re");

	if (!file)
		die("%s: %s", path, strerror(errno));
	while ((length = getline(&line, &size, file)) > 0) {
		if (line[length - 1] == '\n')
			line[length - 1] = '\0';
		learn_root(line);
	}
	free(line);
	fclose(file);
}

static void handle_message(unsigned int index, char *message)
{
	char text[ANSWER_MAX];
	const char *answer = "ok";

	if (strcmp(message, "status") == 0) {
		status(text);
		answer = text;
	} else if (strcmp(message, "serve") == 0) {
		pump_serve();
	} else if (strcmp(message, "look") == 0) {
		/* at the roots of mounts, before they are detached: whose inode a root is cannot be asked afterwards */
		if (!resolve_start(0, 0, LOOK_ROOTS))
			answer = "error look: other searches are under way";
	} else if (strncmp(message, "roots ", 6) == 0) {
		answer = learn_root(message + 6);
	} else if (strncmp(message, "node ", 5) == 0) {
		answer = learn_node(message + 5);
	} else if (strncmp(message, "warm ", 5) == 0) {
		answer = warm_each(message + 5);
	} else if (strcmp(message, "stop") == 0) {
		if (pump_serving())
			answer = "error stop: it serves: whoever has files open would get no answer";
		else
			control_stop();
	} else if (strcmp(message, "follow") == 0) {
		clients[index].follows = true;
	} else {
		answer = "error unknown message";
	}
	if (send(clients[index].fd, answer, strlen(answer), MSG_DONTWAIT | MSG_NOSIGNAL) < 0)
		drop_client(index);
}

static void client_ready(unsigned int slot, uint32_t events)
{
	unsigned int index = slot - SLOT_CLIENT;
	char message[MESSAGE_MAX + 1];
	ssize_t size = recv(clients[index].fd, message, MESSAGE_MAX, MSG_DONTWAIT);

	(void)events;
	if (size < 0 && (errno == EAGAIN || errno == EINTR))
		return;
	if (size <= 0) {
		drop_client(index);
		return;
	}
	while (size > 0 && message[size - 1] == '\n')
		size--;
	message[size] = '\0';
	handle_message(index, message);
}

/* -- clients */

static uint64_t pid_namespace(const char *pid)
{
	char path[64];
	struct stat stat_buf;

	snprintf(path, sizeof(path), "/proc/%s/ns/pid", pid);
	return stat(path, &stat_buf) ? 0 : stat_buf.st_ino;
}

/* Root of a container that got hold of the socket is not root here: it has another pid namespace if not other ids. */
static bool is_trusted(int fd)
{
	struct ucred peer;
	socklen_t size = sizeof(peer);
	char pid[16];

	if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &size) || peer.uid != 0 || peer.pid <= 0)
		return false;
	snprintf(pid, sizeof(pid), "%d", (int)peer.pid);
	return pid_namespace(pid) && pid_namespace(pid) == pid_namespace("self");
}

/* The first free place. Who has hung up may not have been heard yet: both can come in one turn of the loop. */
static unsigned int find_place(void)
{
	unsigned int i;
	char byte;

	for (i = 0; i < CONTROL_CLIENTS && clients[i].fd >= 0; i++)
		;
	if (i < CONTROL_CLIENTS)
		return i;
	for (i = 0; i < CONTROL_CLIENTS && recv(clients[i].fd, &byte, 1, MSG_PEEK | MSG_DONTWAIT) != 0; i++)
		;
	if (i < CONTROL_CLIENTS)
		drop_client(i);
	return i;
}

static void listener_ready(unsigned int slot, uint32_t events)
{
	int fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
	unsigned int i;

	(void)slot;
	(void)events;
	if (fd < 0)
		return;
	i = find_place();
	if (i == CONTROL_CLIENTS || !is_trusted(fd)) {
		close(fd);
		return;
	}
	clients[i].fd = fd;
	loop_add(SLOT_CLIENT + i, fd, EPOLLIN, client_ready);
}

void control_open(const char *path)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX };
	struct stat own;
	unsigned int i;

	for (i = 0; i < CONTROL_CLIENTS; i++)
		clients[i].fd = -1;
	if (strlen(path) >= sizeof(address.sun_path))
		die("the path of the control socket is too long: %s", path);
	strcpy(address.sun_path, path);
	unlink(path);	/* of a guard before us: one that lives loses only its name */
	listener = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	umask(0177);
	if (listener < 0 || bind(listener, (struct sockaddr *)&address, sizeof(address)) || listen(listener, CONTROL_CLIENTS))
		die("%s: %s", path, strerror(errno));
	umask(022);
	if (!stat(path, &own))
		socket_inode = own.st_ino;
	socket_path = path;
	loop_add(SLOT_CONTROL, listener, EPOLLIN, listener_ready);
}

/* The kernel gives the number of a connection that is gone to the next one: its guard may listen there by now. */
void control_close(void)
{
	struct stat there;

	if (socket_path && !stat(socket_path, &there) && there.st_ino == socket_inode)
		unlink(socket_path);
	socket_path = NULL;
}
