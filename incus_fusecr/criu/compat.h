/* SPDX-License-Identifier: GPL-2.0-only */
/* What stock CRIU 4.1 needs to dump a container on newer kernels, and on hosts whose root is limited. */
#ifndef FUSECR_COMPAT_H
#define FUSECR_COMPAT_H

/*
 * Look at the kernel and at our capabilities, and where CRIU's dump would fail for what they lack, put functions of our
 * own between this CRIU and libc. Failing to do so is only logged: a tree without such sockets or tasks can be dumped.
 */
void compat_dump(void);

/* The same for a restore. */
void compat_restore(void);

#endif /* FUSECR_COMPAT_H */
