// SPDX-License-Identifier: Apache-2.0
#define _GNU_SOURCE
#include "loop.h"

#include <errno.h>
#include <string.h>
#include <sys/epoll.h>
#include <time.h>

#include "log.h"

#define BATCH 16

static int epoll_fd = -1;
static struct {
	int fd;
	uint32_t events;
	uint32_t turn;		/* who is in the place, for events that come late */
	ready_fn ready;
} slots[SLOTS];

static long long clock_ms(clockid_t clock)
{
	struct timespec now;

	clock_gettime(clock, &now);
	return now.tv_sec * 1000LL + now.tv_nsec / 1000000;
}

long long now_ms(void)
{
	return clock_ms(CLOCK_MONOTONIC);
}

long long boottime_ms(void)
{
	return clock_ms(CLOCK_BOOTTIME);
}

void loop_init(void)
{
	unsigned int i;

	for (i = 0; i < SLOTS; i++)
		slots[i].fd = -1;
	epoll_fd = epoll_create1(EPOLL_CLOEXEC);
	if (epoll_fd < 0)
		die("epoll_create1: %s", strerror(errno));
}

void loop_add(unsigned int slot, int fd, uint32_t events, ready_fn ready)
{
	struct epoll_event event = { .events = events };

	loop_drop(slot);
	event.data.u64 = (uint64_t)++slots[slot].turn << 32 | slot;
	if (epoll_ctl(epoll_fd, EPOLL_CTL_ADD, fd, &event))
		die("epoll_ctl: fd %d: %s", fd, strerror(errno));
	slots[slot].fd = fd;
	slots[slot].events = events;
	slots[slot].ready = ready;
}

void loop_change(unsigned int slot, uint32_t events)
{
	struct epoll_event event = { .events = events };

	if (slots[slot].fd < 0 || slots[slot].events == events)
		return;
	event.data.u64 = (uint64_t)slots[slot].turn << 32 | slot;
	slots[slot].events = events;
	epoll_ctl(epoll_fd, EPOLL_CTL_MOD, slots[slot].fd, &event);
}

void loop_drop(unsigned int slot)
{
	if (slots[slot].fd < 0)
		return;
	/* by hand: a copy of the fd in a child would keep the registration alive beyond close() */
	epoll_ctl(epoll_fd, EPOLL_CTL_DEL, slots[slot].fd, NULL);
	slots[slot].fd = -1;
	slots[slot].turn++;
}

void loop_wait(long long until)
{
	struct epoll_event events[BATCH];
	long long left = until == NEVER ? -1 : until - now_ms();
	int i, n;

	if (until != NEVER && left < 0)
		left = 0;
	if (left > 3600000)
		left = 3600000;
	n = epoll_wait(epoll_fd, events, BATCH, (int)left);
	for (i = 0; i < n; i++) {
		unsigned int slot = (uint32_t)events[i].data.u64;

		if (slots[slot].fd >= 0 && slots[slot].turn == events[i].data.u64 >> 32)
			slots[slot].ready(slot, events[i].events);
	}
}
