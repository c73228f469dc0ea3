// SPDX-License-Identifier: Apache-2.0
#define _GNU_SOURCE
#include "pump.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <sys/uio.h>
#include <unistd.h>

#include "log.h"
#include "loop.h"
#include "shapes.h"
#include "sidecar.h"

#define TRIAL_MS 1000			/* a request that did not kill the sidecar in that time is no suspect any more */
#define INTERRUPT_MS 1000		/* a signal ends what waits for a sidecar longer than that */
#define STANDBY_MS 1000			/* how often to see whether the connection is still there, and its clones */

struct pump_options pump_options;
struct pump_counts pump_counts;

static struct {
	bool serving, dirty, expired;
	bool ending;			/* the sidecar, because it was silent */
	bool silent;			/* the last sidecar was, and the present one has not answered yet */
	struct table sent;
	unsigned int suspects;
	uint64_t trial;			/* the suspect that is alone at the sidecar now */
	long long trial_until;
	long long unserved_since;	/* NEVER: it is served */
	long long next_look;
	uint64_t unique;
} pump = { .unserved_since = NEVER, .unique = 16 };

bool pump_serving(void)
{
	return pump.serving;
}

void pump_dirty(void)
{
	pump.dirty = true;
}

bool pump_trying(void)
{
	return pump.suspects;
}

bool pump_expired(void)
{
	return pump.expired;
}

size_t pump_asked(void)
{
	return pump.sent.count;
}

static bool nobody_serves(void)
{
	return pump.serving && !sidecar_ready();
}

const char *pump_phase(void)
{
	if (!pump.serving)
		return "standby";
	return pump.expired || (nobody_serves() && sidecar_failing()) ? "failing" : "serving";
}

/* -- requests */

void request_freed(const struct request *request)
{
	if (request->suspect) {
		pump.suspects--;
		pump.dirty = true;
	}
	pump_resume();
}

void request_answer(struct request *request, int error)
{
	kernel_reply(request->head.unique, error, NULL, 0);
	request_free(request);
}

void request_interrupt(struct request *request)
{
	struct in_header header = { .opcode = FUSE_INTERRUPT, .unique = request->sidecar_unique | FUSE_INT_REQ_BIT };
	struct iovec parts[2] = { { &header, sizeof(header) }, { &request->sidecar_unique, 8 } };

	header.len = sizeof(header) + 8;
	sidecar_send(parts, 2);
}

/* 0, or the error that everything gets now. */
int pump_refused(void)
{
	if (pump.expired)
		return ENOTCONN;
	return nobody_serves() && pump_options.fail_unserved && sidecar_failing() ? EIO : 0;
}

/* -- the sidecar's end */

struct sent *sent_as(enum purpose purpose, const struct request *owner, uint64_t *unique)
{
	struct sent *sent = must_alloc(sizeof(*sent));

	memset(sent, 0, sizeof(*sent));
	sent->purpose = purpose;
	sent->owner = owner ? owner->head.unique : 0;
	*unique = pump.unique += 2;
	table_add(&pump.sent, &sent->by_unique, *unique);
	return sent;
}

static struct sent *ask_with(struct in_header *header, enum purpose purpose, const struct request *owner, const void *body,
			     size_t size, const void *more, size_t more_size)
{
	struct iovec parts[3] = { { header, sizeof(*header) }, { (void *)body, size }, { (void *)more, more_size } };
	struct sent *sent = sent_as(purpose, owner, &header->unique);

	header->len = sizeof(*header) + size + more_size;
	sidecar_send(parts, 3);
	return sent;
}

struct sent *ask(enum purpose purpose, const struct request *owner, uint32_t opcode, uint64_t sid, const void *body,
		 size_t size, const void *more, size_t more_size)
{
	struct in_header header = { .opcode = opcode, .nodeid = sid, .pid = getpid() };

	if (owner) {
		header.uid = owner->head.uid;
		header.gid = owner->head.gid;
		header.pid = owner->head.pid;
	}
	return ask_with(&header, purpose, owner, body, size, more, more_size);
}

struct sent *ask_as_root(enum purpose purpose, const struct request *owner, uint32_t opcode, uint64_t sid,
			 const void *body, size_t size, const void *more, size_t more_size)
{
	struct in_header header = { .opcode = opcode, .nodeid = sid, .pid = owner ? owner->head.pid : (uint32_t)getpid() };

	return ask_with(&header, purpose, owner, body, size, more, more_size);
}

struct sent *ask_as_pid(enum purpose purpose, uint32_t pid, uint32_t opcode, uint64_t sid, const void *body, size_t size)
{
	struct in_header header = { .opcode = opcode, .nodeid = sid, .pid = pid };

	return ask_with(&header, purpose, NULL, body, size, NULL, 0);
}

static void (*const answers[])(const struct sent *sent, int error, const char *body, size_t size) = {
	[FOR_NODE] = node_primed,
	[FOR_HANDLE] = handle_reopened,
	[FOR_BEGINNING] = beginning_read,
	[FOR_SIZE] = again_size,
	[FOR_ENTRY] = again_entry,
	[FOR_ENTRY_OPEN] = again_entry_open,
	[FOR_TARGET] = again_target,
	[FOR_HIDDEN_OPEN] = hidden_opened,
	[FOR_HIDDEN_READ] = hidden_read,
	[FOR_WARMTH_OPEN] = warmth_opened,
	[FOR_WARMTH_READ] = warmth_read,
};

static struct sent *sent_take(uint64_t unique)
{
	struct link *link = table_find(&pump.sent, unique);

	if (!link)
		return NULL;
	table_remove(&pump.sent, link);
	return container_of(link, struct sent, by_unique);
}

static void served(void)
{
	if (pump.serving && pump.unserved_since != NEVER)
		event("served ms=%lld pending=%zu", now_ms() - pump.unserved_since, pump_counts.pending);
	pump.unserved_since = NEVER;
	pump.expired = false;
	pump.dirty = true;
}

static void heard(void)
{
	silence_heard();
	if (!pump.silent)
		return;
	pump.silent = false;
	served();
}

void pump_message(const struct out_header *header, char *body, size_t size)
{
	int error = header->error > 0 || header->error < -FUSE_ERROR_MAX ? EIO : -header->error;
	struct request *request;
	struct sent *sent;

	if (header->unique == 0) {
		notify_message(header->error, body, size);
		return;
	}
	sent = sent_take(header->unique);	/* none: the answer to an INTERRUPT, or one that nobody asked for */
	if (!sent)
		return;
	heard();
	if (sent->purpose == FOR_REQUEST) {
		request = request_find(sent->owner);
		if (request)
			finish(request, error, body, size);
	} else if (sent->purpose != FOR_NOTHING) {
		answers[sent->purpose](sent, error, body, size);
		pump.dirty = true;
	}
	free(sent);
}

void pump_malformed(const struct out_header *header, size_t size)
{
	struct out_header failed = { .error = -EIO };

	pump_counts.malformed++;
	if (pump_counts.malformed == 1 || pump_counts.malformed % 1000 == 0)
		event("malformed count=%llu size=%zu says=%u", (unsigned long long)pump_counts.malformed, size,
		      header ? header->len : 0);
	if (!header || header->unique == 0)
		return;
	failed.unique = header->unique;
	pump_message(&failed, NULL, 0);
}

void pump_sidecar_ready(void)
{
	if (!pump.silent)
		served();
	else if (pump.expired)
		silence_ask();
	pump.dirty = true;
}

void pump_sidecar_silent(long long since)
{
	if (pump.unserved_since == NEVER)
		pump.unserved_since = since;
	pump.silent = pump.ending = true;
	sidecar_replace();
	pump.ending = false;
}

static void wake_poller(uint64_t kh)
{
	if (pump.serving)
		kernel_notify(FUSE_NOTIFY_POLL, &kh, sizeof(kh));
}

/* One of these killed it, or none. With one alone at the next sidecar it is known which. */
static void accuse(struct request *request)
{
	request->attempts++;
	request->silenced = pump.ending;
	if (request->attempts >= pump_options.attempts) {
		pump_counts.poisoned++;
		poison_add(&request->head, request->body, request->size);
		event("poison opcode=%s node=%#llx pid=%u attempts=%u", opcode_name(request->head.opcode),
		      (unsigned long long)request->head.nodeid, request->head.pid, request->attempts);
		request_answer(request, EIO);
		return;
	}
	if (!request->suspect) {
		request->suspect = true;
		pump.suspects++;
	}
}

static void forget_sent(void)
{
	size_t i;

	for (i = 0; i < table_size(&pump.sent); i++) {
		while (pump.sent.buckets[i]) {
			struct sent *sent = container_of(pump.sent.buckets[i], struct sent, by_unique);
			struct request *owner = request_find(sent->owner);

			if (owner) {
				owner->touched = true;
				owner->again |= sent->purpose == FOR_REQUEST;
			}
			pump.sent.buckets[i] = sent->by_unique.next;
			pump.sent.count--;
			free(sent);
		}
	}
}

void pump_sidecar_died(void)
{
	struct request *request, *next, *trial = request_find(pump.trial);

	if (trial && !trial->suspect)
		trial = NULL;
	forget_sent();
	nodes_reset();
	handles_reset(wake_poller);
	pump.trial = 0;
	pump.dirty = true;
	if (pump.serving && pump.unserved_since == NEVER)
		pump.unserved_since = now_ms();
	for (request = request_first(); request; request = next) {
		/* beside the one on trial there may be some that take long, and were found innocent */
		bool accused = trial ? request == trial && request->touched : request->touched;

		next = request->next;
		request->sent = request->touched = request->replayed = request->checked = false;
		request->asked = request->opened = 0;
		if (accused)
			accuse(request);
	}
	pump_resume();
}

/* -- in time */

static void answer_all(int error)
{
	while (request_first()) {
		pump_counts.expired++;
		request_answer(request_first(), error);
	}
}

static void answer_interrupted(void)
{
	struct request *request, *next;

	for (request = request_first(); request; request = next) {
		next = request->next;
		if (request->interrupted && !request->sent)
			request_answer(request, EINTR);
	}
}

static bool past(long long since, long long ms)
{
	return since != NEVER && now_ms() - since >= ms;
}

/* A request that silenced all sidecars fails at the deadline: the others have to show then whether they are served. */
static long long patience_ms(void)
{
	return pump_options.deadline * 1000LL + (pump.silent ? silence_ms() : 0);
}

static void while_unserved(void)
{
	if (!nobody_serves() && !pump.silent)
		return;
	if (pump_options.deadline && !pump.expired && past(pump.unserved_since, patience_ms())) {
		event("deadline seconds=%u pending=%zu", pump_options.deadline, pump_counts.pending);
		pump.expired = true;
	}
	if (past(pump.unserved_since, INTERRUPT_MS))
		answer_interrupted();
	if (pump_refused())
		answer_all(pump_refused());
}

/* One suspect at a time, and nothing else, until none is left. */
static void try_suspect(void)
{
	struct request *request = request_find(pump.trial);

	if (request && request->suspect && now_ms() >= pump.trial_until) {
		request->suspect = false;
		pump.suspects--;
		pump.trial = 0;
	}
	if (!request || !request->suspect) {
		for (request = request_first(); request && !request->suspect; request = request->next)
			;
		if (!request)
			return;
		pump.trial = request->head.unique;
		pump.trial_until = now_ms() + TRIAL_MS + (request->silenced ? silence_ms() : 0);
	}
	if (!request->sent)
		advance(request);
}

static void prime_node(struct node *node)
{
	if (!node->sid)
		prime(node, NULL);
}

static void advance_all(void)
{
	struct request *request, *next;

	if (!pump.serving) {
		nodes_each(prime_node);
		return;
	}
	if (pump.suspects)
		try_suspect();
	for (request = pump.suspects ? NULL : request_first(); request; request = next) {
		next = request->next;
		if (!request->sent)
			advance(request);
	}
}

void pump_tick(void)
{
	struct pollfd entry = { .fd = pump_options.device.fds[0] };
	int turns;

	if (!pump.serving && now_ms() >= pump.next_look) {
		pump.next_look = now_ms() + STANDBY_MS;
		if (poll(&entry, 1, 0) > 0 && entry.revents & (POLLERR | POLLHUP | POLLNVAL))
			kernel_gone();
		else
			clones_look(&pump_options.device);
	}
	while_unserved();
	if (pump.suspects && now_ms() >= pump.trial_until)
		pump.dirty = true;
	/* an answer may let another one go on; what waits for the sidecar comes back by the loop */
	for (turns = 0; pump.dirty && sidecar_ready() && turns < 100; turns++) {
		pump.dirty = false;
		advance_all();
	}
	silence_tick();
}

long long pump_due(void)
{
	long long due = NEVER;

	if (!pump.serving)
		return pump.next_look;
	if (pump.dirty && sidecar_ready())
		return 0;
	due = silence_due();
	if (pump.suspects && sidecar_ready())
		due = sooner(due, pump.trial_until);
	if (pump.unserved_since == NEVER)
		return due;
	if (pump_options.deadline && !pump.expired)
		due = sooner(due, pump.unserved_since + patience_ms());
	if (pump_counts.pending)	/* for signals */
		due = sooner(due, now_ms() + INTERRUPT_MS);
	return due;
}

/* -- the take-over */

void pump_serve(void)
{
	unsigned int i;
	int error;

	if (pump.serving)
		return;
	pump.serving = true;
	pump.unserved_since = sidecar_ready() ? NEVER : now_ms();
	/*
	 * Not earlier: the flag belongs to the open file, which is the daemon's too, and libfuse ends when read() says
	 * EAGAIN.
	 */
	for (i = 0; i < pump_options.device.fd_count; i++)
		fcntl(pump_options.device.fds[i], F_SETFL, fcntl(pump_options.device.fds[i], F_GETFL) | O_NONBLOCK);
	/* What it had read and not answered comes again, from whichever of its descriptors. */
	error = kernel_notify(FUSE_NOTIFY_RESEND, NULL, 0);
	if (error)
		event("no-resend error=%d", error);
	/* Names are looked up anew rather than used with ids that only the dead daemon knew (EINVAL before 6.16). */
	kernel_notify(FUSE_NOTIFY_INC_EPOCH, NULL, 0);
	kernel_listen();
	event("serving sidecar=%d nodes=%zu", (int)sidecar_pid(), nodes_count());
	sidecar_start();
	pump.dirty = true;
}
