/* SPDX-License-Identifier: Apache-2.0 */
/* What happened: a line on stderr, and a datagram for each follower of the control socket. */
#ifndef FUSECR_GUARD_LOG_H
#define FUSECR_GUARD_LOG_H

#define EVENT_MAX 512

/* "NAME key=value ..." after the time; the words are part of the interface (docs/adr/0012-recovery.md). */
void event(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* Say why and exit 1. */
void die(const char *format, ...) __attribute__((format(printf, 1, 2), noreturn));

#endif /* FUSECR_GUARD_LOG_H */
