// SPDX-License-Identifier: Apache-2.0
/*
 * A sidecar in standby is asked for a file in the name of some process, and what it says is thrown away. lxcfs forks when a pid
 * namespace asks it for the first time in five seconds, a millisecond or two in which all others wait: so it is not at a death.
 */
#define _GNU_SOURCE
#include <fcntl.h>

#include "pump.h"
#include "sidecar.h"

#define READ_SIZE 4096

const char *warm(uint64_t id, uint32_t pid)
{
	struct node *node = node_find(id);
	struct open_in open = { .flags = O_RDONLY };
	struct sent *sent;

	if (!node)
		return "error warm: it was not told of this node";
	if (pump_serving() || !sidecar_ready())
		return "error warm: no sidecar is in standby";
	if (!node->sid)	/* the next one will find it */
		return prime(node, NULL) ? "ok" : "error warm: the sidecar does not have this node";
	sent = ask_as_pid(FOR_WARMTH_OPEN, pid, FUSE_OPEN, node->sid, &open, sizeof(open));
	sent->node = id;
	sent->size = pid;
	return "ok";
}

void warmth_opened(const struct sent *sent, int error, const char *body, size_t size)
{
	struct read_in read = { .size = READ_SIZE };
	struct node *node = node_find(sent->node);
	struct sent *next;

	if (error || size < sizeof(struct open_out) || !node || !node->sid)
		return;
	read.fh = get64(body);
	next = ask_as_pid(FOR_WARMTH_READ, sent->size, FUSE_READ, node->sid, &read, sizeof(read));
	next->node = sent->node;
	next->fh = read.fh;
}

void warmth_read(const struct sent *sent, int error, const char *body, size_t size)
{
	struct release_in release = { .fh = sent->fh, .flags = O_RDONLY };
	struct node *node = node_find(sent->node);

	(void)error;
	(void)body;
	(void)size;
	if (node && node->sid)
		ask_as_root(FOR_NOTHING, NULL, FUSE_RELEASE, node->sid, &release, sizeof(release), NULL, 0);
}
