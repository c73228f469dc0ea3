/* SPDX-License-Identifier: Apache-2.0
 *
 * The report, and the files of known content.
 */
#define _GNU_SOURCE
#include "fsclient.h"

#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define FIRST_ERRORS 20
#define ERROR_TEXT 400
#define STALLS 100
#define REPORT_EVERY 0.2 /* seconds */

struct gap {
	double realtime, ms;
};

struct options opt = { .pace = -1, .stall = 0.1, .size = 1 << 20 };
long round_no;
long append_lines = -1;

static struct {
	double started, last_mono, last_real, longest, longest_mono, longest_at, written;
	long operations, errors;
	bool armed;
	char texts[FIRST_ERRORS][ERROR_TEXT];
	struct gap stalls[STALLS];
	long stalled;
} rep;

double now(int clock)
{
	struct timespec t;

	clock_gettime(clock, &t);
	return t.tv_sec + t.tv_nsec / 1e9;
}

void nap(double seconds)
{
	struct timespec t = { (time_t)seconds, (long)((seconds - (time_t)seconds) * 1e9) };

	nanosleep(&t, NULL); /* a signal or a restore may cut it short, which harms nothing */
}

/* -- the report */

void ok(void)
{
	double mono = now(CLOCK_MONOTONIC), real = now(CLOCK_REALTIME);

	rep.operations++;
	if (rep.armed) {
		double by_mono = (mono - rep.last_mono) * 1000, by_real = (real - rep.last_real) * 1000;
		double gap = by_mono > by_real ? by_mono : by_real;

		if (by_mono > rep.longest_mono)
			rep.longest_mono = by_mono;
		if (gap > rep.longest) {
			rep.longest = gap;
			rep.longest_at = rep.last_real;
		}
		if (gap > opt.stall * 1000)
			rep.stalls[rep.stalled++ % STALLS] = (struct gap){ rep.last_real, gap };
	}
	rep.armed = true;
	rep.last_mono = mono;
	rep.last_real = real;
}

bool bad(const char *format, ...)
{
	if (rep.errors < FIRST_ERRORS) {
		char *text = rep.texts[rep.errors];
		int length = snprintf(text, ERROR_TEXT, "%.3f %s round %ld: ", now(CLOCK_REALTIME), opt.mode, round_no);
		va_list arguments;

		va_start(arguments, format);
		vsnprintf(text + length, ERROR_TEXT - length, format, arguments);
		va_end(arguments);
	}
	rep.errors++;
	return false;
}

bool bad_errno(const char *call, const char *what)
{
	int error = errno;

	return bad("%s %s: [Errno %d] %s", call, what, error, strerror(error));
}

void report_start(void)
{
	rep.started = now(CLOCK_REALTIME);
}

long error_count(void)
{
	return rep.errors;
}

static void put_text(FILE *file, const char *text)
{
	fputc('"', file);
	for (; *text; text++) {
		unsigned char c = *text;

		if (c == '"' || c == '\\' || c < ' ' || c >= 127)
			fprintf(file, "\\u%04x", c);
		else
			fputc(c, file);
	}
	fputc('"', file);
}

void write_report(const char *state, bool force)
{
	char temporary[PATH_MAX];
	double mono = now(CLOCK_MONOTONIC);
	long first = rep.stalled > STALLS ? rep.stalled - STALLS : 0;
	FILE *file;

	if (!force && mono >= rep.written && mono - rep.written < REPORT_EVERY)
		return;
	rep.written = mono;
	if (snprintf(temporary, sizeof temporary, "%s.%d", opt.report, getpid()) >= (int)sizeof temporary)
		return;
	file = fopen(temporary, "we");
	if (!file) {
		fprintf(stderr, "Error: report %s: %s\n", temporary, strerror(errno));
		return;
	}
	fprintf(file, "{\"v\": 1, \"mode\": \"%s\", \"target\": ", opt.mode);
	put_text(file, opt.target);
	fprintf(file, ", \"pid\": %d, \"state\": \"%s\", \"pace_ms\": %.3f, \"started\": %.6f, \"updated\": %.6f",
		getpid(), state, opt.pace * 1000, rep.started, now(CLOCK_REALTIME));
	fprintf(file, ", \"operations\": %ld, \"errors\": %ld, \"first_errors\": [", rep.operations, rep.errors);
	for (long i = 0; i < rep.errors && i < FIRST_ERRORS; i++) {
		fputs(i ? ", " : "", file);
		put_text(file, rep.texts[i]);
	}
	fprintf(file, "], \"longest_gap_ms\": %.3f, \"longest_gap_monotonic_ms\": %.3f, \"longest_gap_realtime\": %.6f",
		rep.longest, rep.longest_mono, rep.longest_at);
	fputs(", \"stalls\": [", file);
	for (long i = first; i < rep.stalled; i++)
		fprintf(file, "%s{\"realtime\": %.6f, \"ms\": %.3f}", i > first ? ", " : "",
			rep.stalls[i % STALLS].realtime, rep.stalls[i % STALLS].ms);
	fputs("], \"detail\": {", file);
	if (append_lines >= 0) {
		char log[PATH_MAX + 8];

		snprintf(log, sizeof log, "%s/log", opt.place);
		fputs("\"log\": ", file);
		put_text(file, log);
		fprintf(file, ", \"lines\": %ld", append_lines);
	}
	fputs("}}\n", file);
	if (fclose(file) || rename(temporary, opt.report))
		fprintf(stderr, "Error: report %s: %s\n", opt.report, strerror(errno));
}

/* -- known content */

void pattern(char *to, long start, long length, int tag)
{
	char record[RECORD + 1];

	for (long at = start; at < start + length; at += RECORD, to += RECORD) {
		snprintf(record, sizeof record, "%04x %010lx\n", tag & 0xffff, (unsigned long)at & 0xffffffffffUL);
		memcpy(to, record, RECORD);
	}
}

bool same(const char *found, long length, const char *wanted, long wanted_length, const char *where)
{
	long at = 0;

	if (length < 0)
		return bad_errno("read", where);
	if (length == wanted_length && !memcmp(found, wanted, length))
		return true;
	while (at < length && at < wanted_length && found[at] == wanted[at])
		at++;
	return bad("%s: %ld bytes, %ld wanted, first difference at %ld", where, length, wanted_length, at);
}

const char *path_of(const char *name)
{
	static char path[PATH_MAX + NAME_MAX + 2];

	snprintf(path, sizeof path, "%s/%s", opt.place, name);
	return path;
}

int known_file(const char *name, long size, int tag)
{
	char chunk[CHUNK];
	int fd = open(path_of(name), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);

	if (fd < 0)
		return -1;
	for (long at = 0; at < size; at += CHUNK) {
		long length = size - at < CHUNK ? size - at : CHUNK;

		pattern(chunk, at, length, tag);
		if (write(fd, chunk, length) != length) {
			close(fd);
			return -1;
		}
	}
	return close(fd);
}

bool at_position(int fd, off_t wanted, const char *where)
{
	off_t found = lseek(fd, 0, SEEK_CUR);

	return found == wanted || bad("%s: position %ld instead of %ld", where, (long)found, (long)wanted);
}

uint32_t crc32(const char *data, size_t length)
{
	uint32_t crc = ~0U;

	while (length--) {
		crc ^= (unsigned char)*data++;
		for (int bit = 0; bit < 8; bit++)
			crc = crc >> 1 ^ (crc & 1 ? 0xedb88320U : 0);
	}
	return ~crc;
}
