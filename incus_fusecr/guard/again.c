// SPDX-License-Identifier: Apache-2.0
/*
 * Requests that were on their way when a daemon died: it may have carried them out and not said so.
 *
 * The kernel holds the directory's lock from its look-up of a name to the end of the operation on it. So MKDIR was sent
 * because there was nothing, and EEXIST at the second attempt means the first one; UNLINK was sent because there was
 * something, and ENOENT means the same. What the error does not tell is looked up.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <sys/stat.h>

#include "pump.h"
#include "shapes.h"
#include "sidecar.h"

#define RENAME_NOREPLACE 1
#define RENAME_EXCHANGE 2
#define FALLOC_SHIFTS (0x08 | 0x20)	/* FALLOC_FL_COLLAPSE_RANGE, FALLOC_FL_INSERT_RANGE */
#define XATTR_CREATE 1

/* -- before it is sent */

static enum verdict refuse(struct request *request, int error)
{
	request_answer(request, error);
	return VERDICT_ANSWERED;
}

/* An FSYNC that says 0 about data that the dead daemon had acknowledged and not written would be a lie. */
static bool fsync_doubtful(const struct request *request, struct handle *handle)
{
	bool doubtful;

	if (!pump_options.strict || !handle || !handle_writable(handle))
		return false;
	doubtful = request->again || handle->suspect;
	handle->suspect = false;
	return doubtful;
}

static enum verdict ask_size(struct request *request, struct node *node)
{
	struct getattr_in getattr = { 0 };
	struct sent *sent = ask_as_root(FOR_SIZE, request, FUSE_GETATTR, node->sid, &getattr, sizeof(getattr), NULL, 0);

	sent->node = node->id;
	request->sent = true;
	return VERDICT_WAIT;
}

enum verdict again_before(struct request *request, struct node *node, struct handle *handle)
{
	const char *body = request->body;

	if (request->head.opcode == FUSE_FSYNC && fsync_doubtful(request, handle))
		return refuse(request, EIO);
	if (!request->again || request->checked)
		return VERDICT_SEND;
	request->checked = true;
	switch (request->head.opcode) {
	case FUSE_RENAME2:
		/* twice is as good as not at all, and nobody can tell */
		return get32(body + 8) & RENAME_EXCHANGE ? refuse(request, EIO) : VERDICT_SEND;
	case FUSE_FALLOCATE:
		return get32(body + 24) & FALLOC_SHIFTS ? refuse(request, EIO) : VERDICT_SEND;
	case FUSE_WRITE:
		if (get32(body + offsetof(struct read_in, flags)) & O_APPEND)
			return ask_size(request, node);
	}
	return VERDICT_SEND;
}

/* The kernel appends at the size that it knows, one writer at a time: a file that goes on behind it has got the data. */
void again_size(const struct sent *sent, int error, const char *body, size_t size)
{
	struct request *request = request_find(sent->owner);
	uint64_t end;
	uint32_t length;

	if (!request)
		return;
	request->sent = false;
	length = get32(request->body + offsetof(struct read_in, size));
	end = get64(request->body + offsetof(struct read_in, offset)) + length;
	if (!error && size >= ATTR_OUT_INO + sizeof(struct attr) && get64(body + ATTR_OUT_INO + 8) >= end) {
		uint32_t written[2] = { length, 0 };

		kernel_reply(request->head.unique, 0, written, sizeof(written));
		request_free(request);
	}
}

/* -- after an error */

static mode_t type_made(const struct request *request)
{
	switch (request->head.opcode) {
	case FUSE_MKDIR:
		return S_IFDIR;
	case FUSE_SYMLINK:
		return S_IFLNK;
	case FUSE_MKNOD:
		return get32(request->body) & S_IFMT;
	case FUSE_CREATE:
		return S_IFREG;
	default:
		return 0;
	}
}

/* @old: it is the name that something was renamed from. */
static bool look_up(struct request *request, enum purpose purpose, uint64_t parent, const char *name, uint32_t length,
		    bool old)
{
	struct node *node = node_find(parent);
	struct sent *sent;

	if (!node || !node->sid || !name)
		return false;
	sent = ask_as_root(purpose, request, FUSE_LOOKUP, node->sid, name, length + 1, NULL, 0);
	sent->size = old;
	return true;
}

static bool look_for_own(struct request *request)
{
	const struct shape *shape = shape_of(request->head.opcode);
	uint32_t length;
	const char *name = body_name(request->body, request->size, shape->name, &length);

	return look_up(request, FOR_ENTRY, request->head.nodeid, name, length, false);
}

static bool look_for_target(struct request *request, int error)
{
	const struct shape *shape = shape_of(request->head.opcode);
	uint32_t length, new_length;
	const char *name = body_name(request->body, request->size, shape->name, &length), *new;

	if (!name)
		return false;
	if (error == EEXIST)	/* RENAME_NOREPLACE: is the old name gone? */
		return look_up(request, FOR_TARGET, request->head.nodeid, name, length, true);
	new = body_name(request->body, request->size, shape->name + length + 1, &new_length);
	return look_up(request, FOR_TARGET, get64(request->body), new, new_length, false);
}

bool again_after(struct request *request, int *error)
{
	switch (request->head.opcode) {
	case FUSE_MKDIR:
	case FUSE_MKNOD:
	case FUSE_SYMLINK:
	case FUSE_LINK:
	case FUSE_CREATE:
		return *error == EEXIST && look_for_own(request);
	case FUSE_UNLINK:
	case FUSE_RMDIR:
		if (*error == ENOENT)
			*error = 0;
		return false;
	case FUSE_RENAME:
		return *error == ENOENT && look_for_target(request, *error);
	case FUSE_RENAME2:
		return (*error == ENOENT || (*error == EEXIST && get32(request->body + 8) & RENAME_NOREPLACE)) &&
		       look_for_target(request, *error);
	case FUSE_SETXATTR:
		if (*error == EEXIST && get32(request->body + 4) & XATTR_CREATE)
			*error = 0;
		return false;
	case FUSE_REMOVEXATTR:
		if (*error == ENODATA)
			*error = 0;
		return false;
	}
	return false;
}

/* From here on the request is as it was, so that its error is final. */
static void give_up(struct request *request, int error)
{
	request->again = false;
	finish(request, error, NULL, 0);
}

void again_entry(const struct sent *sent, int error, const char *body, size_t size)
{
	struct request *request = request_find(sent->owner);
	struct open_in open = { 0 };
	struct entry_out entry;
	mode_t type;

	if (error || size < sizeof(entry) || !get64(body)) {
		if (request)
			give_up(request, EEXIST);
		return;
	}
	memcpy(&entry, body, sizeof(entry));
	type = request ? type_made(request) : 0;
	if (!request || (type && type != (entry.attr.mode & S_IFMT)) ||
	    (request->head.opcode == FUSE_LINK && entry.attr.nlink < 2) ||
	    (request->head.opcode == FUSE_CREATE && entry.attr.size)) {	/* ours has got no data yet */
		sidecar_forget(entry.nodeid, 1);
		if (request)
			give_up(request, EEXIST);
		return;
	}
	if (request->head.opcode != FUSE_CREATE) {
		finish(request, 0, (char *)&entry, sizeof(entry));
		return;
	}
	request->found = entry;
	open.flags = get32(request->body) & ~(uint32_t)(O_CREAT | O_EXCL | O_NOCTTY);
	ask_as_root(FOR_ENTRY_OPEN, request, FUSE_OPEN, entry.nodeid, &open, sizeof(open), NULL, 0);
}

void again_entry_open(const struct sent *sent, int error, const char *body, size_t size)
{
	struct request *request = request_find(sent->owner);
	char reply[sizeof(struct entry_out) + sizeof(struct open_out)];

	if (!request)
		return;
	if (error || size < sizeof(struct open_out)) {
		sidecar_forget(request->found.nodeid, 1);
		give_up(request, error ? error : EIO);
		return;
	}
	memcpy(reply, &request->found, sizeof(request->found));
	memcpy(reply + sizeof(request->found), body, sizeof(struct open_out));
	finish(request, 0, reply, sizeof(reply));
}

void again_target(const struct sent *sent, int error, const char *body, size_t size)
{
	struct request *request = request_find(sent->owner);
	bool there = !error && size >= sizeof(struct entry_out) && get64(body);

	if (there)
		sidecar_forget(get64(body), 1);
	if (!request)
		return;
	if (sent->size ? !there : there)
		finish(request, 0, NULL, 0);
	else
		give_up(request, sent->size ? EEXIST : ENOENT);
}
