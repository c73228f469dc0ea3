/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The inodes that the kernel knows and the sidecar's ids of them.
 *
 * The kernel goes on using the ids that a predecessor (the dead daemon, or an earlier guard) gave out: those nodes are
 * `foreign`, and are learnt when somebody uses them. What a sidecar gives out gets an id of ours, as the next sidecar
 * will have other ones. Names are kept so that a node can be looked up again in a new sidecar.
 */
#ifndef FUSECR_GUARD_NODES_H
#define FUSECR_GUARD_NODES_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "table.h"
#include "wire.h"

struct node {
	struct link by_id;
	struct link by_sid;	/* only with a sid */
	struct link by_name;	/* only with a parent and not unlinked */
	uint64_t id, sid;	/* as the kernel and as the sidecar know it; sid 0: not looked up yet */
	uint64_t generation;	/* another one in a reply would make the kernel's inode bad */
	uint64_t ino;		/* st_ino as it was first seen; 0: unknown */
	uint64_t given;		/* look-ups that the kernel counts by replies of ours */
	uint64_t refs;		/* look-ups that the sidecar counts */
	uint64_t hidden_id;	/* of an unlinked one: what libfuse calls it in .fuse_hidden<id><counter> */
	struct node *parent;
	char *name;
	char *other;		/* path that was seen while the sidecar was asked for this one */
	unsigned int children;
	uint32_t handles;
	uint32_t open_flags;	/* of the descriptors that were found, without the access mode */
	mode_t type;		/* S_IFMT, 0: unknown */
	uint8_t access;		/* ACCESS_READ and ACCESS_WRITE of the descriptors that were found */
	bool foreign;
	bool unlinked;
	bool maybe_named;	/* the name that it had may be its own still */
	bool hidden;		/* is a .fuse_hidden file now: to be removed with its last handle */
	bool priming;		/* a LOOKUP of the sidecar is on its way */
	int failed;		/* errno of that LOOKUP */
};

/* A count of the daemon's and will not be another file's. A larger one may be a pointer, which can be. */
#define SMALL_ID (1ULL << 32)

#define ACCESS_READ 1
#define ACCESS_WRITE 2

void nodes_init(void);
size_t nodes_count(void);

/* An id or a handle that was never used on this boot. */
uint64_t fresh_id(void);

struct node *node_find(uint64_t id);
struct node *node_of_sid(uint64_t sid, mode_t type);

/* The sidecar has replied with @sid for @name in @parent (NULL: no name): its node, a new one if it has none. */
struct node *node_entered(struct node *parent, const char *name, size_t length, uint64_t sid, const struct entry_out *entry);

/* The sidecar's id of a node that it was asked for; @entry has been counted by it. False: not the same kind of file. */
bool node_bind(struct node *node, const struct entry_out *entry);

/* A node of a predecessor, at a path relative to the root of the file system (NULL: unknown). */
/*
 * @deleted: the kernel shows no such name any more. It was @unlinked then, or only looked up anew with another id: a
 * take-over does that to the names of all open files.
 */
struct node *node_learn(uint64_t id, uint64_t generation, const char *path, bool deleted, bool unlinked);
/* The sidecar does not have it where it was looked for. There may be one more path to try: then it has not @failed. */
void node_failed(struct node *node, int error);
/* It is no .fuse_hidden file. False: it has no other name either. */
bool node_try_name(struct node *node);
void node_rename_to(struct node *node, struct node *parent, const char *name, size_t length);

/* The kernel forgets. */
void node_forget(uint64_t id, uint64_t count);
/* The kernel did not take the reply that node_entered() was for. */
void node_not_entered(uint64_t id);
void node_release_if_unused(struct node *node);

/* What the sidecar did to names. */
void names_unlinked(struct node *parent, const char *name, size_t length);
void names_renamed(struct node *from, const char *old, size_t old_length, struct node *to, const char *new,
		   size_t new_length, bool exchange);

/* Call @each for every node; it may not add or remove one. */
void nodes_each(void (*each)(struct node *node));

/* A new sidecar knows nothing yet. */
void nodes_reset(void);

/* Call @each for every node with this sid; there may be more than one. */
void nodes_of_sid(uint64_t sid, void (*each)(struct node *node, void *data), void *data);

#endif /* FUSECR_GUARD_NODES_H */
