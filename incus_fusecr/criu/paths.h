/* SPDX-License-Identifier: GPL-2.0-only */
/* CRIU must neither walk below FUSE mounts whose daemons stand still, nor open files there. */
#ifndef FUSECR_PATHS_H
#define FUSECR_PATHS_H

#define PATHS_FILE "fusecr.paths"

/*
 * Take the table that the agent has left as PATHS_FILE in the image directory @dir (and remove it there: it is of this
 * dump and this host only), and answer CRIU's fstatat() of the paths in it; files of
 * the same file systems it opens with O_PATH. Without the file nothing is redirected.
 * Returns 0, or -1 with a line in the log.
 */
int paths_dump(int dir);

#endif /* FUSECR_PATHS_H */
