/* SPDX-License-Identifier: Apache-2.0 */
/* The one epoll(7) loop, and the clocks. */
#ifndef FUSECR_GUARD_LOOP_H
#define FUSECR_GUARD_LOOP_H

#include <stdint.h>

#define CONTROL_CLIENTS 8
#define RESOLVERS 4

/* A place for each fd that is waited for. An event of an fd that has left its place meanwhile is dropped. */
enum slot {
	SLOT_FUSE,
	SLOT_DAEMON,
	SLOT_SIGNAL,
	SLOT_SIDECAR,
	SLOT_SIDECAR_EXIT,
	SLOT_CONTROL,
	SLOT_CLIENT,
	SLOT_RESOLVER = SLOT_CLIENT + CONTROL_CLIENTS,
	SLOTS = SLOT_RESOLVER + RESOLVERS,
};

typedef void (*ready_fn)(unsigned int index, uint32_t events);

void loop_init(void);
void loop_add(unsigned int slot, int fd, uint32_t events, ready_fn ready);
void loop_change(unsigned int slot, uint32_t events);
void loop_drop(unsigned int slot);

/* Wait until something is ready, or @until (now_ms()) has come, and call for what is. */
void loop_wait(long long until);

long long now_ms(void);		/* CLOCK_MONOTONIC */
long long boottime_ms(void);	/* CLOCK_BOOTTIME: suspended or set by hand, it never repeats within a boot */

#define NEVER 0x7fffffffffffffffLL

static inline long long sooner(long long a, long long b)
{
	return a < b ? a : b;
}

#endif /* FUSECR_GUARD_LOOP_H */
