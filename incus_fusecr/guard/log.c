// SPDX-License-Identifier: Apache-2.0
#include "log.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "control.h"
#include "loop.h"

/* One write(2) a line: lines of several guards share a log. */
static void put_line(const char *line, size_t length)
{
	ssize_t written = write(STDERR_FILENO, line, length);

	(void)written;
}

void event(const char *format, ...)
{
	char line[EVENT_MAX + 1];
	va_list args;
	int start, more;

	start = snprintf(line, sizeof(line), "t=%lld ", boottime_ms());
	va_start(args, format);
	more = vsnprintf(line + start, EVENT_MAX - start, format, args);
	va_end(args);
	if (more < 0)
		return;
	if (more >= EVENT_MAX - start)
		more = EVENT_MAX - start - 1;
	control_publish(line, start + more);
	line[start + more] = '\n';
	put_line(line, start + more + 1);
}

void die(const char *format, ...)
{
	char line[EVENT_MAX];
	va_list args;
	int start, more;

	start = snprintf(line, sizeof(line), "fusecr-guard: ");
	va_start(args, format);
	more = vsnprintf(line + start, sizeof(line) - start - 1, format, args);
	va_end(args);
	if (more > (int)sizeof(line) - start - 2)
		more = sizeof(line) - start - 2;
	line[start + more] = '\n';
	put_line(line, start + more + 1);
	exit(1);
}
