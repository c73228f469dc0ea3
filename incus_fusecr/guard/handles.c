// SPDX-License-Identifier: Apache-2.0
#define _GNU_SOURCE
#include "handles.h"

#include <fcntl.h>
#include <stdlib.h>
#include <string.h>

#include "nodes.h"

static struct table handles;

size_t handles_count(void)
{
	return handles.count;
}

static uint64_t key_of(uint64_t node, uint64_t fh)
{
	return hash_bytes(node, &fh, sizeof(fh));
}

struct handle *handle_find(uint64_t node, uint64_t fh)
{
	struct link *link = table_find(&handles, key_of(node, fh));

	for (; link; link = table_again(link)) {
		struct handle *handle = container_of(link, struct handle, by_key);

		if (handle->node == node && handle->fh == fh)
			return handle;
	}
	return NULL;
}

struct handle *handle_learn(uint64_t id, uint64_t fh)
{
	struct handle *handle = must_alloc(sizeof(*handle));
	struct node *node = node_find(id);

	memset(handle, 0, sizeof(*handle));
	handle->node = id;
	handle->fh = fh;
	handle->end = -1;
	handle->suspect = true;
	table_add(&handles, &handle->by_key, key_of(id, fh));
	if (node)
		node->handles++;
	return handle;
}

struct handle *handle_opened(uint64_t node, uint64_t sfh, uint32_t flags, bool directory)
{
	struct handle *handle = handle_learn(node, fresh_id());

	handle->sfh = sfh;
	handle->state = HANDLE_OPEN;
	handle->flags = flags & ~(uint32_t)(O_CREAT | O_EXCL | O_NOCTTY | O_TRUNC);
	handle->flags_known = true;
	handle->directory = directory;
	handle->suspect = false;
	return handle;
}

void handle_free(struct handle *handle)
{
	struct node *node = node_find(handle->node);

	table_remove(&handles, &handle->by_key);
	free(handle);
	if (node && node->handles) {
		node->handles--;
		node_release_if_unused(node);
	}
}

bool handle_writable(const struct handle *handle)
{
	return !handle->directory && (!handle->flags_known || (handle->flags & O_ACCMODE) != O_RDONLY);
}

void handles_reset(void (*wake)(uint64_t kh))
{
	size_t i;

	for (i = 0; i < table_size(&handles); i++) {
		struct link *link = handles.buckets[i];

		for (; link; link = link->next) {
			struct handle *handle = container_of(link, struct handle, by_key);

			handle->state = HANDLE_CLOSED;
			handle->replaying = handle->doomed = handle->no_open = handle->as_root = false;
			handle->error = 0;
			handle->end = -1;
			handle->suspect |= handle->written;
			if (handle->kh)
				wake(handle->kh);
			handle->kh = 0;
		}
	}
}
