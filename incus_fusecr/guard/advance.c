// SPDX-License-Identifier: Apache-2.0
/* A request goes to the sidecar once the sidecar knows the nodes and handles that it is about. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <sys/uio.h>

#include "log.h"
#include "pump.h"
#include "resolve.h"
#include "shapes.h"
#include "sidecar.h"

#define HIDDEN_LISTING 65536	/* bytes of a READDIR */
#define HIDDEN_LISTINGS 1000	/* READDIRs: a directory of a hostile daemon has no end */
#define HEAD 64			/* of a body: all ids and handles are in it */

/* What was found out about a request. */
struct ends {
	struct node *node, *node2;
	struct handle *handle, *handle2;
	bool without_fh;	/* the attributes by name: there is no handle */
};

/* -- nodes */

static void ask_hidden(struct node *node, const struct request *owner)
{
	struct open_in open = { .flags = 0 };
	struct sent *sent = ask_as_root(FOR_HIDDEN_OPEN, owner, FUSE_OPENDIR, node->parent->sid, &open, sizeof(open), NULL, 0);

	sent->node = node->id;
	node->priming = true;
}

/*
 * Have the sidecar look up the node by its name, and before it the directories above. False: that leads nowhere. As root:
 * the client has got there already.
 */
bool prime(struct node *node, const struct request *owner)
{
	struct sent *sent;

	while (node->parent && !node->parent->sid && !node->priming && !node->failed)
		node = node->parent;
	if (node->priming)
		return true;
	if (node->failed || !node->parent)
		return false;
	if (node->unlinked) {
		ask_hidden(node, owner);
		return true;
	}
	sent = ask_as_root(FOR_NODE, owner, FUSE_LOOKUP, node->parent->sid, node->name, strlen(node->name) + 1, NULL, 0);
	sent->node = node->id;
	node->priming = true;
	return true;
}

void node_primed(const struct sent *sent, int error, const char *body, size_t size)
{
	struct node *node = node_find(sent->node);
	struct entry_out entry;
	bool counted = !error && size >= sizeof(entry) && get64(body);

	if (counted)
		memcpy(&entry, body, sizeof(entry));
	if (node) {
		node->priming = false;
		if (counted && node_bind(node, &entry))
			counted = false;
		else
			node_failed(node, error ? error : ENOENT);
	}
	if (counted)
		sidecar_forget(entry.nodeid, 1);
	if (node)
		node_release_if_unused(node);
}

/* libfuse renames a file that is unlinked while it is open: to .fuse_hidden, its id, and a counter that nobody knows. */
static bool find_hidden(struct node *node, const char *body, size_t size, uint64_t *offset)
{
	char wanted[32];
	size_t at = 0, length = snprintf(wanted, sizeof(wanted), ".fuse_hidden%08x", (unsigned int)node->hidden_id);
	struct dirent entry;

	while (size - at >= sizeof(entry)) {
		memcpy(&entry, body + at, sizeof(entry));
		if (entry.namelen == 0 || entry.namelen > size - at - sizeof(entry))
			break;
		*offset = entry.off;
		if (entry.namelen == length + 8 && memcmp(body + at + sizeof(entry), wanted, length) == 0) {
			node_rename_to(node, node->parent, body + at + sizeof(entry), entry.namelen);
			node->hidden = true;
			return true;
		}
		at += DIRENT_ALIGN(sizeof(entry) + entry.namelen);
		if (at > size)
			break;
	}
	return false;
}

static void ask_listing(struct node *node, const struct sent *before, uint64_t fh, uint64_t offset, uint64_t turn)
{
	struct read_in read = { .fh = fh, .offset = offset, .size = HIDDEN_LISTING };
	struct sent *sent = ask_as_root(FOR_HIDDEN_READ, request_find(before->owner), FUSE_READDIR, node->parent->sid, &read,
					sizeof(read), NULL, 0);

	sent->node = node->id;
	sent->fh = fh;
	sent->size = turn;
}

void hidden_opened(const struct sent *sent, int error, const char *body, size_t size)
{
	struct node *node = node_find(sent->node);

	if (!node)
		return;
	if ((!error && size < sizeof(struct open_out)) || !node->parent || !node->parent->sid)
		error = EIO;
	if (error && error != ENOSYS) {
		node->priming = false;
		if (!node_try_name(node))
			node_failed(node, error);
		return;
	}
	ask_listing(node, sent, error ? 0 : get64(body), 0, 1);
}

void hidden_read(const struct sent *sent, int error, const char *body, size_t size)
{
	struct node *node = node_find(sent->node);
	struct node *directory = node ? node->parent : NULL;
	struct release_in release = { .fh = sent->fh };
	uint64_t offset = 0;
	bool found;

	if (!directory || !directory->sid)
		return;
	found = !error && find_hidden(node, body, size, &offset);
	if (!error && !found && size >= sizeof(struct dirent) && sent->size < HIDDEN_LISTINGS) {
		ask_listing(node, sent, sent->fh, offset, sent->size + 1);
		return;
	}
	/* first: it may be forgotten when its last child gets another name */
	ask_as_root(FOR_NOTHING, NULL, FUSE_RELEASEDIR, directory->sid, &release, sizeof(release), NULL, 0);
	node->priming = false;
	if (!found && !node_try_name(node))
		node_failed(node, ENOENT);
}

/* 1: it is there; 0: not yet, the request waits; or -errno. */
static int want_node(struct request *request, uint64_t id, uint8_t asked, struct node **result)
{
	struct node *node = node_find(id);

	*result = node;
	if (node && node->sid)
		return 1;
	if (node && prime(node, request))
		return 0;
	if (!(request->asked & asked)) {
		if (resolve_missed(id))
			return -ESTALE;
		if (resolve_start(id, request->head.pid, LOOK_NODE))
			request->asked |= asked;
		return 0;
	}
	return resolve_running(id, LOOK_NODE) ? 0 : -ESTALE;
}

/* -- requests */

static void stale(struct request *request, uint64_t id)
{
	const struct node *node = node_find(id);

	pump_counts.stale++;
	event("stale opcode=%s node=%#llx pid=%u error=%d name=%s", opcode_name(request->head.opcode), (unsigned long long)id,
	      request->head.pid, node ? node->failed : 0, node && node->name ? node->name : "");
	request_answer(request, ESTALE);
}

/*
 * What ends the use of a handle that the sidecar never had is answered here: opening it for that would be absurd. True:
 * answered.
 */
static bool ends_unknown_handle(struct request *request, const struct shape *shape)
{
	struct handle *handle;

	if (!(shape->has & RELEASES) && request->head.opcode != FUSE_FLUSH)
		return false;
	handle = handle_find(request->head.nodeid, get64(request->body));
	if (handle && handle->state == HANDLE_OPEN && !(shape->has & RELEASES && handle->no_open))
		return false;
	if (request->head.opcode == FUSE_FLUSH) {
		/* close(2) may not say that all is well with data that the dead daemon may have lost; adr/0012 */
		bool doubtful = pump_options.strict && request->again && (!handle || handle_writable(handle));

		request_answer(request, doubtful ? EIO : 0);
		return true;
	}
	if (handle && handle->state == HANDLE_OPENING)
		handle->doomed = true;
	else if (handle)
		handle_free(handle);
	request_answer(request, 0);
	return true;
}

/* As want_node(). */
static int find_nodes(struct request *request, const struct shape *shape, struct ends *ends)
{
	uint64_t id = request->head.nodeid;
	int ret = 1;

	if (id)
		ret = want_node(request, id, ASKED_NODE, &ends->node);
	if (ret == -ESTALE && request->head.opcode == FUSE_STATFS) {
		ends->node = node_find(FUSE_ROOT_ID);	/* is about the whole file system */
		ret = 1;
	}
	if (ret > 0 && shape->has & HAS_NODE2) {
		id = get64(request->body + shape->node2);
		ret = want_node(request, id, ASKED_NODE2, &ends->node2);
	}
	if (ret == -ESTALE)
		stale(request, id);
	return ret;
}

static int find_attr_handle(struct request *request, const struct shape *shape, struct ends *ends)
{
	uint32_t flags = get32(request->body);
	uint64_t fh = get64(request->body + shape->fh);
	int ret;

	if (!(flags & shape->fh_flag))
		return 1;
	ends->handle = handle_find(request->head.nodeid, fh);
	if (ends->handle && ends->handle->state == HANDLE_OPEN && !(shape->has & NEEDS_WRITE))
		return 1;
	if (shape->has & NEEDS_WRITE && flags & FATTR_SIZE) {	/* ftruncate(2): the file's mode may forbid it by name */
		ret = want_handle(request, ends->node, fh, true, 1, &ends->handle);
		if (ret >= 0)
			return ret;
	}
	ends->without_fh = !ends->handle || ends->handle->state != HANDLE_OPEN;
	return 1;
}

static int find_handles(struct request *request, const struct shape *shape, struct ends *ends)
{
	const char *body = request->body;
	bool write = shape->has & NEEDS_WRITE;
	int ret = 1;

	if (shape->has & FH_IF_FLAGGED)
		return find_attr_handle(request, shape, ends);
	if (shape->has & HAS_FH)
		ret = want_handle(request, ends->node, get64(body + shape->fh), write, 1, &ends->handle);
	if (ret > 0 && shape->has & HAS_FH2)
		ret = want_handle(request, ends->node2, get64(body + shape->fh2), true, 2, &ends->handle2);
	return ret;
}

static void forward(struct request *request, const struct shape *shape, const struct ends *ends)
{
	char head[sizeof(struct in_header) + HEAD], *body = head + sizeof(struct in_header);
	size_t size = request->size < HEAD ? request->size : HEAD;
	struct in_header header = request->head;
	struct iovec parts[2] = {
		{ head, sizeof(header) + size },
		{ request->body + size, request->size - size },
	};
	int error;

	sent_as(FOR_REQUEST, request, &header.unique);
	request->sidecar_unique = header.unique;
	request->sent = true;
	header.nodeid = ends->node ? ends->node->sid : 0;
	header.len = sizeof(header) + request->size;
	memcpy(head, &header, sizeof(header));
	memcpy(body, request->body, size);
	if (ends->without_fh)
		put32(body, get32(body) & ~(uint32_t)shape->fh_flag);
	else if (ends->handle)
		put64(body + shape->fh, ends->handle->sfh);
	if (ends->node2)
		put64(body + shape->node2, ends->node2->sid);
	if (ends->handle2)
		put64(body + shape->fh2, ends->handle2->sfh);
	if (ends->handle && request->head.opcode == FUSE_WRITE)
		ends->handle->written = true;
	if (ends->handle && request->head.opcode == FUSE_POLL &&
	    get32(body + offsetof(struct poll_in, flags)) & FUSE_POLL_SCHEDULE_NOTIFY)
		ends->handle->kh = get64(body + offsetof(struct poll_in, kh));
	if (ends->handle && shape->has & RELEASES)
		handle_free(ends->handle);
	error = sidecar_send(parts, 2);
	if (error == -EMSGSIZE)
		finish(request, EIO, NULL, 0);
	else if (request->interrupted)
		request_interrupt(request);
}

/* The connection was never initialised: its INIT waited all along. */
static void answer_init(struct request *request)
{
	size_t size;
	const unsigned char *reply = sidecar_init_reply(&size);

	kernel_reply(request->head.unique, 0, reply, size);
	request_free(request);
}

void advance(struct request *request)
{
	const struct shape *shape = shape_of(request->head.opcode);
	struct ends ends = { 0 };
	int ret;

	if (request->head.opcode != FUSE_INIT && (!shape || request->size < shape->body_min)) {
		request_answer(request, ENOSYS);
		return;
	}
	if (shape && ends_unknown_handle(request, shape))
		return;
	if (!sidecar_ready())
		return;
	if (!shape) {
		answer_init(request);
		return;
	}
	ret = find_nodes(request, shape, &ends);
	if (ret <= 0)
		return;		/* it waits, or was answered */
	ret = find_handles(request, shape, &ends);
	if (ret < 0)
		request_answer(request, -ret);
	if (ret <= 0)
		return;
	if (ends.handle && want_beginning(request, ends.handle, ends.node))
		return;
	if (request->head.opcode == FUSE_READ && request->replayed && ends.handle->end >= 0 &&
	    get64(request->body + offsetof(struct read_in, offset)) >= (uint64_t)ends.handle->end) {
		request_answer(request, 0);	/* lxcfs would say EINVAL: what it makes anew is shorter now */
		return;
	}
	if (again_before(request, ends.node, ends.handle) == VERDICT_SEND)
		forward(request, shape, &ends);
}
