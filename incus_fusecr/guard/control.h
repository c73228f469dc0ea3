/* SPDX-License-Identifier: Apache-2.0 */
/* The control socket: one text datagram a message, for root in our namespaces. */
#ifndef FUSECR_GUARD_CONTROL_H
#define FUSECR_GUARD_CONTROL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

void control_open(const char *path);
void control_read_roots(const char *path);	/* lines MNT_ID ROOT, of mounts that were detached before we were started */
void control_close(void);

/* To all followers; one whose socket is full is dropped. */
void control_publish(const char *line, size_t length);

bool control_stopped(void);
void control_stop(void);

/* The root, within the file system, of a detached mount (told by "roots"), NULL if nobody said so. */
const char *detached_root(uint64_t mount_id);

#endif /* FUSECR_GUARD_CONTROL_H */
