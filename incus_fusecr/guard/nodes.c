// SPDX-License-Identifier: Apache-2.0
#define _GNU_SOURCE
#include "nodes.h"

#include <stdlib.h>
#include <sys/stat.h>

#include "loop.h"
#include "sidecar.h"

/*
 * Our ids: bit 62, 40 bits of CLOCK_BOOTTIME in ms (34 years), a counter. Daemons number from 1 or use pointers, so none
 * of theirs looks like that. A counter that is used up takes the next millisecond, which has long passed by then.
 */
#define ID_MARK (1ULL << 62)
#define COUNTER_BITS 22

static struct table by_id, by_sid, by_name;
static uint64_t incarnation, counter;

uint64_t fresh_id(void)
{
	if (!incarnation || counter >> COUNTER_BITS) {
		uint64_t now = boottime_ms();

		incarnation = now > incarnation ? now : incarnation + 1;
		counter = 0;
	}
	return ID_MARK | incarnation << COUNTER_BITS | counter++;
}

size_t nodes_count(void)
{
	return by_id.count;
}

struct node *node_find(uint64_t id)
{
	struct link *link = table_find(&by_id, id);

	return link ? container_of(link, struct node, by_id) : NULL;
}

static struct node *node_new(uint64_t id)
{
	struct node *node = must_alloc(sizeof(*node));

	memset(node, 0, sizeof(*node));
	node->id = id;
	table_add(&by_id, &node->by_id, id);
	return node;
}

static void set_sid(struct node *node, uint64_t sid)
{
	if (node->sid)
		table_remove(&by_sid, &node->by_sid);
	node->sid = sid;
	if (sid)
		table_add(&by_sid, &node->by_sid, sid);
}

void nodes_init(void)
{
	struct node *root = node_new(FUSE_ROOT_ID);

	root->type = S_IFDIR;
	root->foreign = true;
	set_sid(root, FUSE_ROOT_ID);
}

struct node *node_of_sid(uint64_t sid, mode_t type)
{
	struct link *link = table_find(&by_sid, sid);
	struct node *found = NULL;

	for (; link; link = table_again(link)) {
		struct node *node = container_of(link, struct node, by_sid);

		if (type && node->type && node->type != type)
			continue;
		/* the kernel's own inode rather than a second one for the same file */
		if (!found || node->foreign)
			found = node;
	}
	return found;
}

void nodes_of_sid(uint64_t sid, void (*each)(struct node *node, void *data), void *data)
{
	struct link *link = table_find(&by_sid, sid);

	for (; link; link = table_again(link))
		each(container_of(link, struct node, by_sid), data);
}

static uint64_t name_key(const struct node *parent, const char *name, size_t length)
{
	return hash_bytes(parent->id, name, length);
}

static bool is_named(const struct node *node, const struct node *parent, const char *name, size_t length)
{
	return node->parent == parent && !node->unlinked && strlen(node->name) == length &&
	       memcmp(node->name, name, length) == 0;
}

static struct node *first_named(struct node *parent, const char *name, size_t length)
{
	struct link *link = table_find(&by_name, name_key(parent, name, length));

	for (; link; link = table_again(link)) {
		struct node *node = container_of(link, struct node, by_name);

		if (is_named(node, parent, name, length))
			return node;
	}
	return NULL;
}

static void drop_name(struct node *node)
{
	struct node *parent = node->parent;

	if (!parent)
		return;
	if (!node->unlinked)
		table_remove(&by_name, &node->by_name);
	free(node->name);
	node->name = NULL;
	node->parent = NULL;
	node->unlinked = false;
	parent->children--;
	node_release_if_unused(parent);
}

static bool is_below(const struct node *node, const struct node *above)
{
	while (node && node != above)
		node = node->parent;
	return node != NULL;
}

void node_rename_to(struct node *node, struct node *parent, const char *name, size_t length)
{
	char *copy;

	/* a daemon may call a directory its own child: such a chain of parents would have no end */
	if (node->id == FUSE_ROOT_ID || is_below(parent, node) || is_named(node, parent, name, length))
		return;
	copy = must_alloc(length + 1);
	memcpy(copy, name, length);
	copy[length] = '\0';
	parent->children++;
	drop_name(node);
	node->parent = parent;
	node->name = copy;
	node->failed = 0;
	table_add(&by_name, &node->by_name, name_key(parent, copy, length));
}

/* The kernel has it, or a child or a handle needs it. */
static bool in_use(const struct node *node)
{
	return node->foreign || node->given || node->children || node->handles || node->priming;
}

void node_release_if_unused(struct node *node)
{
	while (node && !in_use(node)) {
		struct node *parent = node->parent;

		/* libfuse's own unlink of it, at the last close, died with the daemon that hid it */
		if (node->hidden && parent && parent->sid && !node->unlinked)
			sidecar_unlink(parent->sid, node->name);
		if (node->sid && node->refs)
			sidecar_forget(node->sid, node->refs);
		set_sid(node, 0);
		if (parent) {
			if (!node->unlinked)
				table_remove(&by_name, &node->by_name);
			parent->children--;
		}
		table_remove(&by_id, &node->by_id);
		free(node->name);
		free(node->other);
		free(node);
		node = parent;
	}
}

struct node *node_entered(struct node *parent, const char *name, size_t length, uint64_t sid, const struct entry_out *entry)
{
	mode_t type = entry->attr.mode & S_IFMT;
	struct node *node = node_of_sid(sid, type);

	if (!node) {
		node = node_new(fresh_id());
		node->generation = entry->generation;
		set_sid(node, sid);
	}
	node->type = type;
	if (!node->ino)
		node->ino = entry->attr.ino;
	node->refs++;
	node->given++;
	if (parent && length)
		node_rename_to(node, parent, name, length);
	return node;
}

bool node_bind(struct node *node, const struct entry_out *entry)
{
	mode_t type = entry->attr.mode & S_IFMT;

	if (node->type && node->type != type)
		return false;
	if (node->sid && node->sid != entry->nodeid)
		return false;
	node->type = type;
	if (!node->sid)
		set_sid(node, entry->nodeid);
	if (!node->foreign && !node->given)
		node->generation = entry->generation;
	node->refs++;
	return true;
}

/* The directories of a path get ids of ours: the kernel's ones of them are not known here. */
static struct node *make_directories(const char **path)
{
	struct node *at = node_find(FUSE_ROOT_ID);
	const char *slash;

	while ((slash = strchr(*path, '/'))) {
		size_t length = slash - *path;
		struct node *next;

		if (length) {
			next = first_named(at, *path, length);
			if (!next) {
				next = node_new(fresh_id());
				next->type = S_IFDIR;
				node_rename_to(next, at, *path, length);
			}
			next->failed = 0;
			at = next;
		}
		*path = slash + 1;
	}
	return at;
}

static void keep_other(struct node *node, const char *path)
{
	free(node->other);
	node->other = must_alloc(strlen(path) + 1);
	strcpy(node->other, path);
}

void node_failed(struct node *node, int error)
{
	char *path = node->other;

	node->other = NULL;
	node->failed = error;
	if (path)
		node_learn(node->id, node->generation, path, false, false);
	free(path);
}

struct node *node_learn(uint64_t id, uint64_t generation, const char *path, bool deleted, bool unlinked)
{
	struct node *node = node_find(id), *parent;

	if (!node) {
		node = node_new(id);
		node->foreign = true;
		node->generation = generation;
	}
	if (!path || node->sid || id == FUSE_ROOT_ID)
		return node;
	/*
	 * An inode can have several names in the kernel: one from before a take-over that shows as deleted, and one that was
	 * looked up since. What the sidecar is being asked for is not changed below that: the answer would be about neither.
	 */
	if (node->priming) {
		if (!deleted)
			keep_other(node, path);
		return node;
	}
	while (*path == '/')
		path++;
	if (*path && deleted && node->unlinked) {
		node->failed = 0;	/* the same again; who hid it, and under which id, is known better than from the kernel */
	} else if (*path) {
		parent = make_directories(&path);
		node_rename_to(node, parent, path, strlen(path));
		if (node->parent)
			node->failed = 0;
		if (node->parent && deleted && !node->unlinked) {
			table_remove(&by_name, &node->by_name);
			node->unlinked = true;
			node->maybe_named = !unlinked;
			node->hidden_id = id;
		}
		node_release_if_unused(parent);
	}
	return node;
}

bool node_try_name(struct node *node)
{
	if (!node->unlinked || !node->maybe_named || !node->parent)
		return false;
	node->unlinked = node->maybe_named = false;
	table_add(&by_name, &node->by_name, name_key(node->parent, node->name, strlen(node->name)));
	return true;
}

/*
 * The kernel counts all look-ups of an inode and forgets them together when it drops it; one alone it forgets when it
 * had no use for a reply. More than we gave can only be all of them, those that a predecessor gave included. What the
 * sidecar counts is forgotten then and not before: never more than it gave, as libfuse aborts on that.
 */
void node_forget(uint64_t id, uint64_t count)
{
	struct node *node = node_find(id);

	if (!node || id == FUSE_ROOT_ID)
		return;
	if (count > node->given || (count == node->given && !node->foreign)) {
		node->given = 0;
		node->foreign = false;
	} else {
		node->given -= count;
	}
	node_release_if_unused(node);
}

void node_not_entered(uint64_t id)
{
	struct node *node = node_find(id);

	if (!node)
		return;
	if (node->given)
		node->given--;
	node_release_if_unused(node);
}

static void unlink_node(struct node *node)
{
	table_remove(&by_name, &node->by_name);
	node->unlinked = true;
	node->hidden_id = node->sid;
}

void names_unlinked(struct node *parent, const char *name, size_t length)
{
	struct node *node;

	while ((node = first_named(parent, name, length)))
		unlink_node(node);
}

void names_renamed(struct node *from, const char *old, size_t old_length, struct node *to, const char *new,
		   size_t new_length, bool exchange)
{
	struct node *node, *other = first_named(to, new, new_length);

	if (from == to && old_length == new_length && memcmp(old, new, new_length) == 0)
		return;
	if (other && exchange) {
		node = first_named(from, old, old_length);
		node_rename_to(other, from, old, old_length);
		if (node)
			node_rename_to(node, to, new, new_length);
		return;
	}
	names_unlinked(to, new, new_length);
	while ((node = first_named(from, old, old_length))) {
		node_rename_to(node, to, new, new_length);
		if (is_named(node, from, old, old_length))
			break;	/* refused: it would have been its own parent */
	}
}

void nodes_each(void (*each)(struct node *node))
{
	size_t i;

	for (i = 0; i < table_size(&by_id); i++) {
		struct link *link = by_id.buckets[i];

		for (; link; link = link->next)
			each(container_of(link, struct node, by_id));
	}
}

static void reset(struct node *node)
{
	node->refs = 0;
	node->priming = false;
	node->failed = 0;
	if (node->id != FUSE_ROOT_ID)
		set_sid(node, 0);
}

void nodes_reset(void)
{
	nodes_each(reset);
}
