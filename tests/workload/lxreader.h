/* SPDX-License-Identifier: Apache-2.0
 *
 * The report of lxreader.
 */
#include <stdbool.h>
#include <time.h>

struct options {
	const char *root;
	double pace, slow; /* milliseconds */
	bool detach;
};

extern struct options opt;

double seconds(clockid_t clock);
void nap(double ms);

/* what a value has to be, from the beginning */
void expect(const char *key, long value);
/* it has to be as expected, or else as it was for the first time under this key, whoever says so */
void same(const char *key, const char *who, long value);
void wrong(const char *format, ...) __attribute__((format(printf, 1, 2)));
/* worth knowing and no error */
void note(const char *what);
void unsupported(const char *format, ...) __attribute__((format(printf, 1, 2)));
const char *reason(void);

double begin(void);
/* the end of an operation, with what it gave: negative for an errno; true if it went well */
bool done(double begun, const char *what, long result);

void start(const char *mode, const char *path);
/* writes it when it is time to, or now */
void report(bool last);
