/* SPDX-License-Identifier: Apache-2.0
 *
 * What the parts of fsclient (C) share.
 */
#ifndef FUSECR_FSCLIENT_H
#define FUSECR_FSCLIENT_H

#include <limits.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#define RECORD 16 /* bytes; files of known content consist of records that name their own place */
#define CHUNK 32768

struct options {
	const char *mode, *report;
	char target[PATH_MAX], place[PATH_MAX];
	double pace, stall, duration; /* seconds */
	long rounds, size;
};

extern struct options opt;
extern long round_no;
extern long append_lines; /* acknowledged; -1: not the append mode */

double now(int clock);
void nap(double seconds);

void report_start(void);
void write_report(const char *state, bool force);
long error_count(void);
/* Count a successful operation, an error (always false, so that a check can return it), an error with errno. */
void ok(void);
bool bad(const char *format, ...) __attribute__((format(printf, 1, 2)));
bool bad_errno(const char *call, const char *what);

const char *path_of(const char *name); /* below the client's directory; valid until the next call */
void pattern(char *to, long start, long length, int tag);
int known_file(const char *name, long size, int tag); /* 0, or -1 with errno */
bool same(const char *found, long length, const char *wanted, long wanted_length, const char *where);
bool at_position(int fd, off_t wanted, const char *where);
uint32_t crc32(const char *data, size_t length);

#endif
