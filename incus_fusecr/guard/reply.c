// SPDX-License-Identifier: Apache-2.0
/* What the sidecar answers, in the kernel's ids. All of it may be wrong: the daemon belongs to somebody else. */
#define _GNU_SOURCE
#include <errno.h>

#include "pump.h"
#include "shapes.h"
#include "sidecar.h"

#define DIRENTPLUS (sizeof(struct entry_out) + sizeof(struct dirent))

/* What has to be taken back if the kernel does not take the reply. */
struct given {
	struct node *node;
	struct handle *handle;
};

static bool is_dots(const char *name, size_t length)
{
	return name[0] == '.' && (length == 1 || (length == 2 && name[1] == '.'));
}

static void translate_entry(char *body, struct node *parent, const char *name, size_t length, struct given *given)
{
	struct entry_out entry;

	memcpy(&entry, body, sizeof(entry));
	given->node = node_entered(parent, name, length, entry.nodeid, &entry);
	entry.nodeid = given->node->id;
	entry.generation = given->node->generation;
	entry.attr.ino = given->node->ino;
	memcpy(body, &entry, sizeof(entry));
}

static void translate_made(struct request *request, const struct shape *shape, char *body, struct given *given)
{
	struct node *parent = node_find(request->head.nodeid);
	uint32_t length = 0;
	const char *name = NULL;

	/* LINK: a node keeps the name that it has */
	if (shape->has & HAS_NAME && request->head.opcode != FUSE_LINK)
		name = body_name(request->body, request->size, shape->name, &length);
	if (!name || is_dots(name, length))
		length = 0;
	translate_entry(body, parent, name, length, given);
}

static void translate_open(struct request *request, const struct shape *shape, char *body, struct given *given)
{
	uint64_t node = given->node ? given->node->id : request->head.nodeid;

	given->handle = handle_opened(node, get64(body), get32(request->body), shape->has & IS_DIR);
	put64(body, given->handle->fh);
}

/* Walk over the entries; returns how much of the body is well formed. */
static size_t each_entry(char *body, size_t size, struct node *directory, bool undo)
{
	struct given given = { 0 };
	size_t at = 0, length;
	struct dirent entry;

	while (size - at >= DIRENTPLUS) {
		char *name = body + at + DIRENTPLUS;

		memcpy(&entry, body + at + sizeof(struct entry_out), sizeof(entry));
		length = DIRENT_ALIGN(DIRENTPLUS + entry.namelen);
		if (entry.namelen == 0 || entry.namelen > size - at - DIRENTPLUS || length > size - at)
			break;
		/* the kernel counts no look-up for these, whatever the daemon says */
		if (is_dots(name, entry.namelen))
			put64(body + at, 0);
		else if (get64(body + at) && undo)
			node_not_entered(get64(body + at));
		else if (get64(body + at))
			translate_entry(body + at, directory, name, entry.namelen, &given);
		at += length;
	}
	return at;
}

static void translate_ino(const struct request *request, char *ino)
{
	const struct node *node = node_find(request->head.nodeid);

	/* libfuse makes it up from its own ids: who has the file open shall not see it change */
	if (node && node->ino)
		put64(ino, node->ino);
}

static void keep_names(const struct request *request, const struct shape *shape)
{
	uint32_t length, new_length;
	const char *name = body_name(request->body, request->size, shape->name, &length), *new;
	struct node *parent = node_find(request->head.nodeid), *to;
	bool exchange = request->head.opcode == FUSE_RENAME2 && get32(request->body + 8) & 2;

	if (!name || !parent)
		return;
	if (!(shape->has & HAS_NODE2)) {
		names_unlinked(parent, name, length);
		return;
	}
	new = body_name(request->body, request->size, shape->name + length + 1, &new_length);
	to = node_find(get64(request->body));
	if (new && to)
		names_renamed(parent, name, length, to, new, new_length, exchange);
}

/* 0, or the error that the client gets instead. */
static int translate(struct request *request, const struct shape *shape, char *body, size_t *size, struct given *given)
{
	size_t entry = shape->has & REPLY_ENTRY ? sizeof(struct entry_out) : 0;
	size_t least = entry + (shape->has & REPLY_OPEN ? sizeof(struct open_out) : 0);
	bool negative = request->head.opcode == FUSE_LOOKUP && *size >= entry && get64(body) == 0;

	if (*size < least || (entry && !negative && get64(body) == 0)) {
		pump_counts.malformed++;
		return EIO;
	}
	if (entry && !negative)
		translate_made(request, shape, body, given);
	if (shape->has & REPLY_OPEN)
		translate_open(request, shape, body + entry, given);
	if (shape->ino && *size >= shape->ino + sizeof(uint64_t))
		translate_ino(request, body + shape->ino);
	switch (request->head.opcode) {
	case FUSE_READDIRPLUS:
		*size = each_entry(body, *size, node_find(request->head.nodeid), false);
		break;
	case FUSE_UNLINK:
	case FUSE_RMDIR:
	case FUSE_RENAME:
	case FUSE_RENAME2:
		keep_names(request, shape);
		break;
	}
	return 0;
}

/* The client was killed meanwhile: it has neither the node nor the handle. */
static void take_back(struct request *request, struct given *given, char *body, size_t size)
{
	struct node *node = node_find(given->handle ? given->handle->node : 0);

	if (given->handle) {
		handle_release(given->handle, node ? node->sid : 0, NULL);
		handle_free(given->handle);
	}
	if (given->node)
		node_not_entered(given->node->id);
	if (request->head.opcode == FUSE_READDIRPLUS)
		each_entry(body, size, NULL, true);
}

void finish(struct request *request, int error, char *body, size_t size)
{
	const struct shape *shape = shape_of(request->head.opcode);
	struct given given = { 0 };

	if (error && request->again && again_after(request, &error))
		return;
	if (!error)
		error = translate(request, shape, body, &size, &given);
	if (kernel_reply(request->head.unique, error, body, size) && !error)
		take_back(request, &given, body, size);
	request_free(request);
}
