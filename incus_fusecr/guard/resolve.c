// SPDX-License-Identifier: Apache-2.0
#define _GNU_SOURCE
#include "resolve.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "log.h"
#include "loop.h"
#include "pump.h"
#include "sidecar.h"

#define SEARCH_MS 5000
#define MISSED 64
#define MISSED_MS 1000

static struct search {
	pid_t pid;		/* 0: none */
	int sock;
	uint64_t id;
	enum look look;
	bool found;
	long long until;
} searches[RESOLVERS];

static struct {
	uint64_t id;
	long long until;
} missed[MISSED];
static unsigned int next_missed;
static bool somebody_ended;

bool resolve_missed(uint64_t id)
{
	unsigned int i;

	for (i = 0; i < MISSED; i++) {
		if (missed[i].id == id && now_ms() < missed[i].until)
			return true;
	}
	return false;
}

bool resolve_running(uint64_t id, enum look look)
{
	unsigned int i;

	for (i = 0; i < RESOLVERS; i++) {
		if (searches[i].pid && searches[i].id == id && searches[i].look == look)
			return true;
	}
	return false;
}

bool resolve_polls(uint32_t pid)
{
	unsigned int i;

	for (i = 0; i < RESOLVERS; i++) {
		/* who is not in the pid namespace of the mount has pid 0 there */
		if (searches[i].pid && (!pid || (uint32_t)searches[i].pid == pid) && searches[i].look == LOOK_SLEEPERS)
			return true;
	}
	return false;
}

static void end_search(struct search *search, bool complete)
{
	loop_drop(SLOT_RESOLVER + (search - searches));
	close(search->sock);
	kill(search->pid, SIGKILL);	/* it is ours still: resolve_reap() leaves it alone */
	search->pid = 0;
	if (complete && !search->found && search->look == LOOK_NODE) {
		missed[next_missed].id = search->id;
		missed[next_missed].until = now_ms() + MISSED_MS;
		next_missed = (next_missed + 1) % MISSED;
	}
	pump_dirty();
}

static void take_record(struct search *search, const struct seen *seen, const char *path)
{
	struct node *node;

	/*
	 * A pointer may be another file's, should this one be forgotten before the daemon dies: such an id is looked for
	 * when it is used.
	 */
	if (!pump_serving() && seen->id >= SMALL_ID)
		return;
	if (seen->id == search->id && (search->look != LOOK_DESCRIPTOR || seen->is_descriptor))
		search->found = true;
	node = node_learn(seen->id, seen->generation, seen->has_path ? path : NULL, seen->deleted,
			  seen->unlinked);
	if (!node->type)
		node->type = seen->mode & S_IFMT;
	if (!node->ino)
		node->ino = seen->ino;
	if (seen->is_descriptor && !(seen->flags & O_PATH)) {
		node->open_flags = seen->flags & ~(uint32_t)O_ACCMODE;
		node->access |= (seen->flags & O_ACCMODE) != O_WRONLY ? ACCESS_READ : 0;
		node->access |= (seen->flags & O_ACCMODE) != O_RDONLY ? ACCESS_WRITE : 0;
	}
	pump_dirty();
}

static void search_ready(unsigned int slot, uint32_t events)
{
	struct search *search = &searches[slot - SLOT_RESOLVER];
	char record[SEEN_MAX + 1];
	struct seen seen;
	ssize_t size;

	(void)events;
	while ((size = recv(search->sock, record, SEEN_MAX, MSG_DONTWAIT)) > 0) {
		if (size < (ssize_t)sizeof(seen))
			continue;
		memcpy(&seen, record, sizeof(seen));
		record[size] = '\0';
		take_record(search, &seen, record + sizeof(seen));
	}
	if (size == 0 || (errno != EAGAIN && errno != EINTR))
		end_search(search, size == 0);
}

bool resolve_start(uint64_t id, uint32_t pid, enum look what)
{
	struct search *search = searches;
	int pair[2];

	if (resolve_running(id, what))
		return true;
	while (search < searches + RESOLVERS && search->pid)
		search++;
	if (search == searches + RESOLVERS || socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair))
		return false;
	search->pid = fork();
	if (search->pid == 0)
		look(pair[1], pump_options.userns, pump_options.device.connection, id, pid, what);
	close(pair[1]);
	if (search->pid < 0) {
		search->pid = 0;
		close(pair[0]);
		return false;
	}
	search->sock = pair[0];
	search->id = id;
	search->look = what;
	search->found = false;
	search->until = now_ms() + SEARCH_MS;
	loop_add(SLOT_RESOLVER + (search - searches), search->sock, EPOLLIN, search_ready);
	return true;
}

long long resolve_due(void)
{
	long long due = NEVER;
	unsigned int i;

	for (i = 0; i < RESOLVERS; i++) {
		if (searches[i].pid)
			due = sooner(due, searches[i].until);
	}
	return due;
}

void resolve_tick(void)
{
	unsigned int i;

	if (somebody_ended)
		resolve_reap();
	for (i = 0; i < RESOLVERS; i++) {
		if (!searches[i].pid || now_ms() < searches[i].until)
			continue;
		event("search-hangs node=%#llx pid=%d", (unsigned long long)searches[i].id, (int)searches[i].pid);
		end_search(&searches[i], false);
	}
}

/* One that was told to end may hang in the kernel: it is reaped when it comes back from there. */
void resolve_reap(void)
{
	siginfo_t info;

	somebody_ended = true;	/* whoever stands in the queue behind the sidecar comes with the next tick */
	for (;;) {
		unsigned int i;

		info.si_pid = 0;
		if (waitid(P_ALL, 0, &info, WEXITED | WNOHANG | WNOWAIT) || info.si_pid == 0)
			break;
		if (info.si_pid == sidecar_pid())
			return;
		for (i = 0; i < RESOLVERS; i++) {
			if (searches[i].pid == info.si_pid)
				search_ready(SLOT_RESOLVER + i, 0);
		}
		waitpid(info.si_pid, NULL, 0);
	}
	somebody_ended = false;
}

void resolve_end(void)
{
	unsigned int i;

	for (i = 0; i < RESOLVERS; i++) {
		if (searches[i].pid)
			end_search(&searches[i], false);
	}
}
