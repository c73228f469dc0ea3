/* SPDX-License-Identifier: GPL-2.0-only */
/* CRIU has no hook for most of its system calls; its imports of libc's functions can be led elsewhere. */
#ifndef FUSECR_REDIRECT_H
#define FUSECR_REDIRECT_H

/*
 * From now on CRIU's own calls of the libc function @name go to @function; those of its libraries and plugins stay. It
 * is only logged if that cannot be done, with @reason: what the redirection is for.
 */
void redirect(const char *name, void *function, const char *reason);

/* Lead all back. CRIU unloads its plugins before it is done with the libc functions. */
void redirect_undo(void);

#endif /* FUSECR_REDIRECT_H */
