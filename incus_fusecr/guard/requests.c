// SPDX-License-Identifier: Apache-2.0
/* What the kernel waits for, in the order in which it came. */
#include <stdlib.h>

#include "pump.h"

static struct request *first, *last;
static struct table requests;

struct request *request_first(void)
{
	return first;
}

struct request *request_find(uint64_t unique)
{
	struct link *link = unique ? table_find(&requests, unique) : NULL;

	return link ? container_of(link, struct request, by_unique) : NULL;
}

struct request *request_new(const struct in_header *head, const char *body, size_t size)
{
	struct request *request = must_alloc(sizeof(*request) + size);

	memset(request, 0, sizeof(*request));
	request->head = *head;
	request->size = size;
	memcpy(request->body, body, size);
	request->again = head->unique & FUSE_UNIQUE_RESEND;
	request->previous = last;
	if (last)
		last->next = request;
	else
		first = request;
	last = request;
	table_add(&requests, &request->by_unique, head->unique);
	pump_counts.pending++;
	pump_counts.bytes += size;
	return request;
}

void request_free(struct request *request)
{
	if (request->previous)
		request->previous->next = request->next;
	else
		first = request->next;
	if (request->next)
		request->next->previous = request->previous;
	else
		last = request->previous;
	table_remove(&requests, &request->by_unique);
	pump_counts.pending--;
	pump_counts.bytes -= request->size;
	request_freed(request);
	free(request);
}
