/* SPDX-License-Identifier: Apache-2.0
 *
 * The report of lxreader: counts, texts of the first errors, latencies as a histogram, a short history.
 */
#define _GNU_SOURCE
#include "lxreader.h"

#include <errno.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define EVERY 0.2 /* seconds between two reports, and the length of a window */
#define TEXTS 20
#define TEXT 300
#define VALUES 8
#define NOTES 8
#define SLOW 200
#define WINDOWS 600 /* two minutes */
#define SUB 16 /* buckets to a power of two: 6 % wide */
#define BUCKETS (40 * SUB)

struct value {
	char key[24];
	long value;
};

struct note_count {
	char what[64];
	long count;
};

struct window {
	double end, max_us;
	long operations, errors;
};

static struct {
	char path[4096], mode[16], why[TEXT];
	double started, written, max_us;
	long operations, errors, wrong, texts, slow, windows;
	char text[TEXTS][TEXT];
	struct value value[VALUES];
	struct note_count note[NOTES];
	struct { double at, ms; char what[40]; } slows[SLOW];
	struct window window[WINDOWS], now;
	long bucket[BUCKETS];
} rep;

double seconds(clockid_t clock)
{
	struct timespec t;

	clock_gettime(clock, &t);
	return t.tv_sec + t.tv_nsec / 1e9;
}

void nap(double ms)
{
	struct timespec t = { (time_t)(ms / 1e3), (long)(ms * 1e6) % 1000000000 };

	nanosleep(&t, NULL);
}

static void add_text(const char *format, va_list args)
{
	char *to = rep.text[rep.texts];
	int n;

	if (rep.texts >= TEXTS)
		return;
	n = snprintf(to, TEXT, "%.3f ", seconds(CLOCK_MONOTONIC));
	vsnprintf(to + n, TEXT - n, format, args);
	rep.texts++;
}

void wrong(const char *format, ...)
{
	va_list args;

	rep.wrong++;
	rep.now.errors++;
	va_start(args, format);
	add_text(format, args);
	va_end(args);
}

static void failed(const char *format, ...)
{
	va_list args;

	rep.errors++;
	rep.now.errors++;
	va_start(args, format);
	add_text(format, args);
	va_end(args);
}

void unsupported(const char *format, ...)
{
	va_list args;

	va_start(args, format);
	vsnprintf(rep.why, sizeof(rep.why), format, args);
	va_end(args);
}

const char *reason(void)
{
	return rep.why;
}

void note(const char *what)
{
	int i = 0;

	while (i < NOTES - 1 && rep.note[i].count && strcmp(rep.note[i].what, what))
		i++;
	snprintf(rep.note[i].what, sizeof(rep.note[i].what), "%s", what);
	rep.note[i].count++;
}

static struct value *value_of(const char *key)
{
	for (int i = 0; i < VALUES; i++)
		if (!*rep.value[i].key || !strcmp(rep.value[i].key, key))
			return &rep.value[i];
	abort();
}

void expect(const char *key, long value)
{
	struct value *v = value_of(key);

	snprintf(v->key, sizeof(v->key), "%s", key);
	v->value = value;
}

void same(const char *key, const char *who, long value)
{
	struct value *v = value_of(key);

	if (!*v->key)
		expect(key, value);
	else if (v->value != value)
		wrong("%s: %s is %ld, not %ld", who, key, value, v->value);
}

/* -- latencies */

static int bucket_of(double us)
{
	int power;
	double rest = frexp(us < 1 ? 1 : us, &power); /* 0.5 <= rest < 1 */
	int i = (power - 1) * SUB + (int)((rest * 2 - 1) * SUB);

	return i < BUCKETS ? i : BUCKETS - 1;
}

/* the upper bound of a bucket */
static double upper(int i)
{
	return ldexp(1 + (i % SUB + 1) / (double)SUB, i / SUB);
}

static double quantile(double q)
{
	long n = 0, wanted = (long)ceil(q * rep.operations);

	for (int i = 0; i < BUCKETS; i++) {
		n += rep.bucket[i];
		if (n >= wanted && n)
			return upper(i) < rep.max_us ? upper(i) : rep.max_us;
	}
	return 0;
}

double begin(void)
{
	return seconds(CLOCK_MONOTONIC);
}

bool done(double begun, const char *what, long result)
{
	double end = seconds(CLOCK_MONOTONIC), us = (end - begun) * 1e6;

	rep.operations++;
	rep.now.operations++;
	rep.bucket[bucket_of(us)]++;
	if (us > rep.max_us)
		rep.max_us = us;
	if (us > rep.now.max_us)
		rep.now.max_us = us;
	if (us > opt.slow * 1e3) {
		int i = rep.slow++ % SLOW;

		rep.slows[i].at = begun;
		rep.slows[i].ms = us / 1e3;
		snprintf(rep.slows[i].what, sizeof(rep.slows[i].what), "%s", what);
	}
	if (result < 0)
		failed("%s: %s", what, strerror((int)-result));
	return result >= 0;
}

/* -- writing it */

void start(const char *mode, const char *path)
{
	snprintf(rep.path, sizeof(rep.path), "%s", path);
	snprintf(rep.mode, sizeof(rep.mode), "%s", mode);
	rep.started = rep.written = seconds(CLOCK_MONOTONIC);
}

static void string(FILE *f, const char *s)
{
	fputc('"', f);
	for (; *s; s++)
		if (*s == '"' || *s == '\\')
			fprintf(f, "\\%c", *s);
		else if ((unsigned char)*s < 0x20 || (unsigned char)*s > 0x7e)
			fprintf(f, "\\u%04x", (unsigned char)*s);
		else
			fputc(*s, f);
	fputc('"', f);
}

static void numbers(FILE *f)
{
	fprintf(f, "\"pid\":%d,\"started\":%.6f,\"updated\":%.6f,\"operations\":%ld,\"errors\":%ld,\"wrong\":%ld", getpid(),
		rep.started, rep.written, rep.operations, rep.errors, rep.wrong);
	fprintf(f, ",\"p50_us\":%.1f,\"p99_us\":%.1f,\"p999_us\":%.1f,\"max_us\":%.1f", quantile(.5), quantile(.99),
		quantile(.999), rep.max_us);
	fprintf(f, ",\"values\":{");
	for (int i = 0; i < VALUES && *rep.value[i].key; i++)
		fprintf(f, "%s\"%s\":%ld", i ? "," : "", rep.value[i].key, rep.value[i].value);
	fprintf(f, "},\"histogram\":[");
	for (int i = 0, n = 0; i < BUCKETS; i++)
		if (rep.bucket[i])
			fprintf(f, "%s[%.1f,%ld]", n++ ? "," : "", upper(i), rep.bucket[i]);
	fprintf(f, "],\"windows\":[");
	for (long i = rep.windows > WINDOWS ? rep.windows - WINDOWS : 0, n = 0; i < rep.windows; i++) {
		struct window *w = &rep.window[i % WINDOWS];

		fprintf(f, "%s[%.3f,%ld,%ld,%.1f]", n++ ? "," : "", w->end, w->operations, w->errors, w->max_us);
	}
	fprintf(f, "]");
}

static void texts(FILE *f)
{
	fprintf(f, ",\"texts\":[");
	for (int i = 0; i < rep.texts; i++) {
		fputs(i ? "," : "", f);
		string(f, rep.text[i]);
	}
	fprintf(f, "],\"notes\":{");
	for (int i = 0; i < NOTES && rep.note[i].count; i++) {
		fputs(i ? "," : "", f);
		string(f, rep.note[i].what);
		fprintf(f, ":%ld", rep.note[i].count);
	}
	fprintf(f, "},\"slow\":[");
	for (long i = rep.slow > SLOW ? rep.slow - SLOW : 0, n = 0; i < rep.slow; i++) {
		fprintf(f, "%s[%.6f,%.3f,", n++ ? "," : "", rep.slows[i % SLOW].at, rep.slows[i % SLOW].ms);
		string(f, rep.slows[i % SLOW].what);
		fputc(']', f);
	}
	fprintf(f, "],\"unsupported\":");
	string(f, rep.why);
}

void report(bool last)
{
	char part[sizeof(rep.path) + 8];
	double now = seconds(CLOCK_MONOTONIC);
	FILE *f;

	if (!last && now - rep.written < EVERY)
		return;
	rep.written = now;
	rep.now.end = now;
	rep.window[rep.windows++ % WINDOWS] = rep.now;
	memset(&rep.now, 0, sizeof(rep.now));
	snprintf(part, sizeof(part), "%s.part", rep.path);
	f = fopen(part, "we");
	if (!f)
		return;
	fprintf(f, "{\"mode\":");
	string(f, rep.mode);
	fprintf(f, ",\"finished\":%s,", last ? "true" : "false");
	numbers(f);
	texts(f);
	fprintf(f, "}\n");
	if (fclose(f) == 0)
		rename(part, rep.path);
}
