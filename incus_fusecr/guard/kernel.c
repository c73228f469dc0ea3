// SPDX-License-Identifier: Apache-2.0
/* The kernel's end: /dev/fuse is read and written here, and by the child of notify.c. */
#define _GNU_SOURCE
#include <errno.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

#include "log.h"
#include "loop.h"
#include "pump.h"
#include "resolve.h"
#include "sidecar.h"

#define READ_BUFFER ((1UL << 20) + 65536)
#define READ_BUFFER_MAX (512UL << 20)	/* 65535 pages, the most that fs.fuse.max_pages_limit allows, and a reserve */
#define BYTES_MAX (64 << 20)		/* of waiting requests; beyond that they wait in the kernel */
#define BATCH 32

static bool gone;
static char *buffer;
static size_t buffer_size;

bool pump_gone(void)
{
	return gone;
}

void kernel_gone(void)
{
	gone = true;
}

static int kernel_write(const struct iovec *parts, int count)
{
	while (writev(pump_options.device.fds[0], parts, count) < 0) {
		if (errno == EINTR)
			continue;
		if (errno == ENODEV || errno == EPERM)
			gone = true;
		return errno;
	}
	return 0;
}

int kernel_reply(uint64_t unique, int error, const void *body, size_t size)
{
	struct out_header header = { .unique = unique, .error = -error };
	struct iovec parts[2] = { { &header, sizeof(header) }, { (void *)body, size } };

	if (error < 0 || error > FUSE_ERROR_MAX)
		header.error = -EIO;
	if (header.error)
		parts[1].iov_len = 0;
	header.len = sizeof(header) + parts[1].iov_len;
	return kernel_write(parts, 2);
}

int kernel_notify(int code, const void *body, size_t size)
{
	struct out_header header = { .len = sizeof(header) + size, .error = code };
	struct iovec parts[2] = { { &header, sizeof(header) }, { (void *)body, size } };

	return kernel_write(parts, size ? 2 : 1);
}

static void interrupted(const char *body, size_t size)
{
	struct request *request = size >= 8 ? request_find(get64(body)) : NULL;

	if (!request)
		return;
	request->interrupted = true;
	if (request->sent)
		request_interrupt(request);
}

static void forget_batch(const char *body, size_t size)
{
	struct batch_forget_in batch;
	struct forget_one one;
	uint32_t i;

	if (size < sizeof(batch))
		return;
	memcpy(&batch, body, sizeof(batch));
	for (i = 0; i < batch.count && sizeof(batch) + (i + 1UL) * sizeof(one) <= size; i++) {
		memcpy(&one, body + sizeof(batch) + i * sizeof(one), sizeof(one));
		node_forget(one.nodeid, one.nlookup);
	}
}

/* What our search asks on behalf of sleepers (look.c): they are woken, and ask for themselves. */
static bool asked_for_sleepers(const struct in_header *head, const char *body, size_t size)
{
	static const char no_events[8];

	if (size < sizeof(struct poll_in) || !resolve_polls(head->pid))
		return false;
	kernel_reply(head->unique, 0, no_events, sizeof(no_events));
	if (get32(body + offsetof(struct poll_in, flags)) & FUSE_POLL_SCHEDULE_NOTIFY)
		kernel_notify(FUSE_NOTIFY_POLL, body + offsetof(struct poll_in, kh), sizeof(uint64_t));
	return true;
}

static void take(const struct in_header *head, const char *body, size_t size)
{
	struct request *request;
	int error;

	pump_counts.requests++;
	switch (head->opcode) {
	case FUSE_FORGET:
		if (size >= 8)
			node_forget(head->nodeid, get64(body));
		return;
	case FUSE_BATCH_FORGET:
		forget_batch(body, size);
		return;
	case FUSE_INTERRUPT:
		interrupted(body, size);
		return;
	case FUSE_NOTIFY_REPLY:		/* nobody asked: notify.c lets no RETRIEVE through */
		return;
	case FUSE_POLL:
		if (asked_for_sleepers(head, body, size))
			return;
		break;
	case FUSE_DESTROY:
		kernel_reply(head->unique, 0, NULL, 0);
		return;
	}
	error = pump_refused();
	if (error) {
		pump_counts.expired++;
		kernel_reply(head->unique, error, NULL, 0);
		return;
	}
	if (pump_counts.poisoned && poison_found(head, body, size)) {
		kernel_reply(head->unique, EIO, NULL, 0);
		return;
	}
	request = request_new(head, body, size);
	if (!pump_trying())
		advance(request);
}

static void new_buffer(size_t size)
{
	if (buffer)
		munmap(buffer, buffer_size);
	/* pages come when they are used: a large buffer costs nothing while requests are small */
	buffer = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (buffer == MAP_FAILED)
		die("no memory for a buffer of %zu bytes", size);
	buffer_size = size;
}

/* False: nothing more for now. */
static bool read_one(void)
{
	ssize_t size = read(pump_options.device.fds[0], buffer, buffer_size);
	struct in_header head;

	if (size < 0) {
		if (errno == ENODEV || errno == EPERM)
			gone = true;
		else if (errno == EINVAL && buffer_size < READ_BUFFER_MAX)
			new_buffer(buffer_size * 2);	/* the daemon has agreed upon larger WRITEs */
		return errno == EINTR || errno == ENOENT || (errno == EINVAL && buffer_size < READ_BUFFER_MAX);
	}
	if (size < (ssize_t)sizeof(head))
		return false;
	memcpy(&head, buffer, sizeof(head));
	if (head.len < sizeof(head) || head.len > size)
		return false;
	take(&head, buffer + sizeof(head), head.len - sizeof(head));
	return true;
}

static bool has_room(void)
{
	return pump_serving() && !sidecar_congested() && pump_counts.bytes < BYTES_MAX;
}

void pump_resume(void)
{
	if (pump_serving())
		loop_change(SLOT_FUSE, has_room() ? EPOLLIN : 0);
}

static void fuse_ready(unsigned int slot, uint32_t events)
{
	int i;

	(void)slot;
	if (events & (EPOLLERR | EPOLLHUP)) {
		gone = true;
		return;
	}
	for (i = 0; i < BATCH && !gone && has_room(); i++) {
		if (!read_one())
			break;
	}
	pump_resume();
}

void kernel_listen(void)
{
	if (!buffer)
		new_buffer(READ_BUFFER);
	loop_add(SLOT_FUSE, pump_options.device.fds[0], EPOLLIN, fuse_ready);
}
