/* SPDX-License-Identifier: Apache-2.0 */
/* The second copy of the daemon: its process, its socket in place of /dev/fuse, its INIT. */
#ifndef FUSECR_GUARD_SIDECAR_H
#define FUSECR_GUARD_SIDECAR_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>
#include <sys/uio.h>

#define INIT_MAX 256

void sidecar_setup(char **argv, const unsigned char *init, size_t init_size, const char *log);

void sidecar_start(void);		/* unless there is one */
void sidecar_end(void);			/* kill it */
void sidecar_replace(void);		/* kill it and start another, as if it had died */
bool sidecar_ready(void);		/* it has answered INIT */
bool sidecar_failing(void);		/* the last attempt to start one failed */
bool sidecar_congested(void);		/* messages wait for room in its socket */
pid_t sidecar_pid(void);
unsigned int sidecar_starts(void);
const unsigned char *sidecar_init_reply(size_t *size);

/* One message. 0 if it was sent or waits to be; -EMSGSIZE; -EPIPE: it is dead, which is reported in its own time. */
int sidecar_send(const struct iovec *parts, int count);
void sidecar_forget(uint64_t sid, uint64_t count);
void sidecar_unlink(uint64_t parent, const char *name);	/* as root; nobody waits for it */

/* When sidecar_tick() wants to be called. */
long long sidecar_due(void);
void sidecar_tick(void);

#endif /* FUSECR_GUARD_SIDECAR_H */
