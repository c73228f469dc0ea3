// SPDX-License-Identifier: Apache-2.0
/* Handles that another daemon gave out: the sidecar opens them again when they are used. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>

#include "loop.h"
#include "pump.h"
#include "resolve.h"
#include "shapes.h"
#include "sidecar.h"

#define BEGINNING 131072	/* bytes; lxcfs makes the whole of a file at the READ from 0 */
#define BEGINNING_OF_DIR 4096
#define NEVER_AGAIN (uint32_t)(O_CREAT | O_EXCL | O_NOCTTY | O_TRUNC)

static bool can_write(uint32_t flags)
{
	return (flags & O_ACCMODE) != O_RDONLY;
}

static uint32_t with_access(uint32_t flags, uint32_t access)
{
	return (flags & ~(uint32_t)O_ACCMODE) | access;
}

/* The flags that the request itself tells. */
static bool flags_in(const struct request *request, const struct shape *shape, uint32_t *flags)
{
	if (shape->has & IS_DIR || (request->head.opcode == FUSE_IOCTL && get32(request->body + 8) & FUSE_IOCTL_DIR)) {
		*flags = O_RDONLY | O_DIRECTORY;
		return true;
	}
	if (!(shape->has & HAS_FLAGS))
		return false;
	*flags = get32(request->body + offsetof(struct read_in, flags)) & ~NEVER_AGAIN;
	/* the write-back of dirty pages has no file at hand, and says 0 */
	return !(shape->has & NEEDS_WRITE) || can_write(*flags);
}

/* As the descriptors of all clients together have it open. */
static bool flags_found(const struct node *node, uint32_t *flags)
{
	static const uint32_t modes[] = { 0, O_RDONLY, O_WRONLY, O_RDWR };

	if (!node->access)
		return false;
	*flags = with_access(node->open_flags, modes[node->access & 3]) & ~NEVER_AGAIN;
	return true;
}

static void open_handle(struct handle *handle, struct node *node, const struct request *request)
{
	struct open_in open = { .flags = handle->flags };
	uint32_t opcode = handle->directory ? FUSE_OPENDIR : FUSE_OPEN;
	struct sent *sent;

	if (handle->as_root)
		sent = ask_as_root(FOR_HANDLE, request, opcode, node->sid, &open, sizeof(open), NULL, 0);
	else
		sent = ask(FOR_HANDLE, request, opcode, node->sid, &open, sizeof(open), NULL, 0);
	sent->node = handle->node;
	sent->fh = handle->fh;
	handle->state = HANDLE_OPENING;
	handle->error = 0;
}

void handle_release(struct handle *handle, uint64_t sid, const struct request *owner)
{
	struct release_in release = { .fh = handle->sfh, .flags = handle->flags };

	if (handle->state == HANDLE_OPEN && !handle->no_open)
		ask_as_root(FOR_NOTHING, owner, handle->directory ? FUSE_RELEASEDIR : FUSE_RELEASE, sid, &release,
			    sizeof(release), NULL, 0);
}

static bool good_for(const struct handle *handle, bool write)
{
	return handle->state == HANDLE_OPEN && (!write || handle->directory || handle->no_open || can_write(handle->flags));
}

/* True: the handle's flags are set; false: the request waits for a look at the clients' descriptors. */
static bool choose_flags(struct request *request, const struct node *node, struct handle *handle, bool write, bool second)
{
	const struct shape *shape = shape_of(request->head.opcode);
	uint32_t flags = O_RDWR;

	if (handle->flags_known && (!write || can_write(handle->flags)))
		return true;
	handle->guessed = false;
	if (second || !flags_in(request, shape, &flags)) {
		if (!(request->asked & ASKED_FLAGS)) {
			if (resolve_start(node->id, request->head.pid, LOOK_DESCRIPTOR))
				request->asked |= ASKED_FLAGS;
			return false;
		}
		if (resolve_running(node->id, LOOK_DESCRIPTOR))
			return false;
		handle->guessed = !flags_found(node, &flags);
	}
	if (write && !can_write(flags))
		flags = with_access(flags, O_RDWR);
	/* one fh for several clients: who reads and who writes share it */
	if (handle->flags_known && (handle->flags & O_ACCMODE) == O_RDONLY && can_write(flags))
		flags = with_access(flags, O_RDWR);
	handle->flags = flags;
	handle->flags_known = true;
	handle->directory = flags & O_DIRECTORY;
	return true;
}

/* 1: it is open; 0: not yet, the request waits; or -errno. @which: 1 for the first handle of a request, 2 for the second. */
int want_handle(struct request *request, struct node *node, uint64_t fh, bool write, unsigned int which,
		struct handle **result)
{
	struct handle *handle = handle_find(node->id, fh);

	if (!handle)
		handle = handle_learn(node->id, fh);
	*result = handle;
	if (good_for(handle, write))
		return 1;
	if (handle->state == HANDLE_OPENING) {
		request->opened |= which;
		return 0;
	}
	if (handle->error && request->opened & which)
		return -handle->error;
	if (!choose_flags(request, node, handle, write, which == 2))
		return 0;
	handle_release(handle, node->sid, request);
	request->opened |= which;
	open_handle(handle, node, request);
	return 0;
}

static bool may_be_the_mode(int error)
{
	return error == EACCES || error == EPERM || error == EROFS || error == EISDIR || error == ETXTBSY || error == EINVAL;
}

void handle_reopened(const struct sent *sent, int error, const char *body, size_t size)
{
	struct handle *handle = handle_find(sent->node, sent->fh);
	struct node *node = node_find(sent->node);
	const struct request *owner = request_find(sent->owner);

	if (!handle || !node)
		return;		/* neither goes while an OPEN is on its way */
	if (!error && size < sizeof(struct open_out))
		error = EIO;
	if (!error || error == ENOSYS) {
		uint32_t flags = error ? 0 : get32(body + offsetof(struct open_out, open_flags));

		handle->sfh = error ? 0 : get64(body);
		handle->no_open = error == ENOSYS;
		handle->state = HANDLE_OPEN;
		handle->fresh = !(flags & (FOPEN_STREAM | FOPEN_NONSEEKABLE));
		handle->end = -1;
		if (handle->doomed) {
			handle_release(handle, node->sid, NULL);
			handle_free(handle);
		}
		return;
	}
	handle->state = HANDLE_CLOSED;
	if (handle->doomed) {
		handle_free(handle);
		return;
	}
	if (owner && (error == EACCES || error == EPERM) && !handle->as_root) {
		handle->as_root = true;
		open_handle(handle, node, owner);
	} else if (owner && handle->guessed && may_be_the_mode(error)) {
		handle->guessed = false;
		handle->flags = with_access(handle->flags, O_RDONLY);
		open_handle(handle, node, owner);
	} else {
		handle->error = error;
		handle->flags_known &= !handle->guessed;
	}
}

/*
 * A daemon that makes a file or a directory at its first READ from 0 (lxcfs, libfuse's readdir) has nothing to go on with
 * in a new handle. True: the request waits for that READ.
 */
bool want_beginning(struct request *request, struct handle *handle, struct node *node)
{
	struct read_in read = { .fh = handle->sfh, .size = BEGINNING, .flags = handle->flags };
	uint32_t opcode = request->head.opcode;
	struct sent *sent;

	if (opcode != FUSE_READ && opcode != FUSE_READDIR && opcode != FUSE_READDIRPLUS)
		return false;
	if (handle->replaying) {
		request->replayed = true;
		return true;
	}
	if (!handle->fresh)
		return false;
	handle->fresh = false;
	if (get64(request->body + offsetof(struct read_in, offset)) == 0)
		return false;
	if (opcode != FUSE_READ) {
		opcode = FUSE_READDIR;	/* counts no look-ups, as READDIRPLUS does */
		read.size = BEGINNING_OF_DIR;
	}
	handle->replaying = request->replayed = true;
	sent = ask(FOR_BEGINNING, request, opcode, node->sid, &read, sizeof(read), NULL, 0);
	sent->node = handle->node;
	sent->fh = handle->fh;
	sent->size = read.size;
	return true;
}

void beginning_read(const struct sent *sent, int error, const char *body, size_t size)
{
	struct handle *handle = handle_find(sent->node, sent->fh);

	(void)body;
	if (!handle)
		return;
	handle->replaying = false;
	/* a full buffer says nothing about where the file ends */
	handle->end = !error && !handle->directory && size < sent->size ? (int64_t)size : -1;
}
