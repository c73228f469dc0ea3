/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A daemon may clone its /dev/fuse at any time (FUSE_DEV_IOC_CLONE): libfuse with clone_fd does so for each thread that it
 * starts, and starts one when all are busy. What was read from a clone and not answered fails when its last copy is closed,
 * which is when the daemon dies: so there must be another copy by then.
 */
#ifndef FUSECR_GUARD_CLONES_H
#define FUSECR_GUARD_CLONES_H

#define FDS_MAX 64	/* as many as the holder keeps of a connection */

/* Copies of the descriptors of a connection; the first one is read and written. */
struct device {
	unsigned int connection;
	unsigned int fd_count;
	int fds[FDS_MAX];
};

/* The daemon behind a pidfd. */
void clones_of(int pidfd);

/* In standby: take copies of what has come since. Cheap as long as the daemon has started no thread. */
void clones_look(struct device *device);

#endif /* FUSECR_GUARD_CLONES_H */
