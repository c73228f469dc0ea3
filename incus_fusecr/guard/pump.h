/* SPDX-License-Identifier: Apache-2.0 */
/* Between the kernel and the sidecar: who waits for what. */
#ifndef FUSECR_GUARD_PUMP_H
#define FUSECR_GUARD_PUMP_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "clones.h"
#include "handles.h"
#include "nodes.h"
#include "table.h"
#include "wire.h"

enum asked { ASKED_NODE = 1, ASKED_NODE2 = 2, ASKED_FLAGS = 4 };

/* A request that the kernel waits for. It has no pointers into anything: all may change while it waits. */
struct request {
	struct link by_unique;	/* the kernel's */
	struct request *previous, *next;
	struct in_header head;
	uint32_t size;		/* of the body */
	uint32_t attempts;	/* sidecars that died of it, perhaps */
	uint8_t asked;		/* what the processes were searched for */
	uint8_t opened;		/* bit 0: it waited for its handle to be opened, bit 1: for the second one */
	bool again;		/* somebody may have carried it out already */
	bool sent;
	bool suspect;
	bool silenced;		/* a sidecar said nothing any more when it had it */
	bool replayed;		/* its handle's beginning was read first */
	bool checked;		/* what had to be found out before sending it, is */
	bool interrupted;
	bool touched;		/* the sidecar had it, or something on its behalf */
	uint64_t sidecar_unique;
	struct entry_out found;	/* of what it has made, perhaps, in its first life */
	char body[];
};

/* What a message to the sidecar was for. */
enum purpose {
	FOR_REQUEST,		/* it is the request itself */
	FOR_NODE,		/* LOOKUP of a node's name */
	FOR_HANDLE,		/* OPEN or OPENDIR of a handle */
	FOR_BEGINNING,		/* READ or READDIR from 0 on a handle that was reopened */
	FOR_SIZE,		/* GETATTR before an append that may have been done */
	FOR_ENTRY,		/* LOOKUP after an error that may be the trace of an own success */
	FOR_ENTRY_OPEN,		/* and OPEN of it */
	FOR_TARGET,		/* LOOKUP of where something was renamed to, or from */
	FOR_HIDDEN_OPEN,	/* OPENDIR, READDIR: the .fuse_hidden file of an unlinked node */
	FOR_HIDDEN_READ,
	FOR_WARMTH_OPEN,	/* OPEN and READ by nobody, see warm.c */
	FOR_WARMTH_READ,
	FOR_NOTHING,
};

struct sent {
	struct link by_unique;	/* the sidecar's */
	enum purpose purpose;
	uint64_t owner;		/* kernel's unique of the request on whose behalf, 0: none */
	uint64_t node, fh;
	uint64_t size;		/* of what was asked for; FOR_HIDDEN_READ: how often */
};

struct pump_options {
	struct device device;
	unsigned int attempts;
	bool fail_unserved, strict;
	unsigned int deadline;	/* seconds, 0: none */
	int userns;		/* of the mount; -1: our own */
};

struct pump_counts {
	uint64_t requests, malformed, poisoned, expired, stale, dropped_notifications;
	size_t pending, bytes;
};

extern struct pump_options pump_options;
extern struct pump_counts pump_counts;

/* -- kernel.c */
bool pump_gone(void);			/* the connection is */
void kernel_gone(void);
void kernel_listen(void);
void pump_resume(void);			/* there may be room for more requests */

/* Returns 0 or the errno of write(2): ENOENT is an answer that nobody wanted any more. */
int kernel_reply(uint64_t unique, int error, const void *body, size_t size);
int kernel_notify(int code, const void *body, size_t size);

/* -- poison.c */
void poison_add(const struct in_header *head, const char *body, size_t size);
bool poison_found(const struct in_header *head, const char *body, size_t size);

/* -- silence.c */
long long silence_ms(void);		/* how long a sidecar may say nothing while it is asked for something */
long long silence_due(void);
void silence_tick(void);
void silence_heard(void);		/* an answer has come */
void silence_ask(void);			/* for one */

/* -- pump.c: what waits, and for what */
bool pump_serving(void);
void pump_serve(void);
const char *pump_phase(void);
bool pump_trying(void);			/* a suspect is alone at the sidecar */
int pump_refused(void);			/* 0, or the error that everything gets now */
long long pump_due(void);
void pump_tick(void);			/* at the end of each turn of the loop */
void pump_dirty(void);			/* somebody may have got what he waited for */

void pump_sidecar_ready(void);
void pump_sidecar_died(void);
/* Replace it: it has answered nothing since. */
void pump_sidecar_silent(long long since);
size_t pump_asked(void);		/* how many answers of the sidecar are to come */
bool pump_expired(void);		/* the deadline has passed: everything is refused until something is heard */

/* -- requests.c */
struct request *request_first(void);
struct request *request_new(const struct in_header *head, const char *body, size_t size);
struct request *request_find(uint64_t unique);
void request_free(struct request *request);
void request_freed(const struct request *request);	/* pump.c: it is about to be */

/* Tell the sidecar that a signal has come. */
void request_interrupt(struct request *request);

/* Answer with a positive errno or 0, and forget it. */
void request_answer(struct request *request, int error);

/* Send something of our own to the sidecar. */
struct sent *ask(enum purpose purpose, const struct request *owner, uint32_t opcode, uint64_t sid, const void *body,
		 size_t size, const void *more, size_t more_size);
/* The same with the ids of root. */
struct sent *ask_as_root(enum purpose purpose, const struct request *owner, uint32_t opcode, uint64_t sid,
			 const void *body, size_t size, const void *more, size_t more_size);
/* The same by a process of root that asks for itself. */
struct sent *ask_as_pid(enum purpose purpose, uint32_t pid, uint32_t opcode, uint64_t sid, const void *body, size_t size);
struct sent *sent_as(enum purpose purpose, const struct request *owner, uint64_t *unique);

/* -- advance.c: what a request still needs before it can be sent */
void advance(struct request *request);
bool prime(struct node *node, const struct request *owner);
void node_primed(const struct sent *sent, int error, const char *body, size_t size);
void hidden_opened(const struct sent *sent, int error, const char *body, size_t size);
void hidden_read(const struct sent *sent, int error, const char *body, size_t size);

/* -- reopen.c: the handle of a request */
int want_handle(struct request *request, struct node *node, uint64_t fh, bool write, unsigned int which,
		struct handle **handle);
bool want_beginning(struct request *request, struct handle *handle, struct node *node);
void handle_reopened(const struct sent *sent, int error, const char *body, size_t size);
void beginning_read(const struct sent *sent, int error, const char *body, size_t size);
void handle_release(struct handle *handle, uint64_t sid, const struct request *owner);

/* -- reply.c: from the sidecar to the kernel */
void pump_message(const struct out_header *header, char *body, size_t size);
void pump_malformed(const struct out_header *header, size_t size);
void finish(struct request *request, int error, char *body, size_t size);

/* -- again.c: requests that may have been carried out already */
enum verdict { VERDICT_SEND, VERDICT_WAIT, VERDICT_ANSWERED };
enum verdict again_before(struct request *request, struct node *node, struct handle *handle);
/* True: the reply is not final, something is being looked at. *@error may be made 0. */
bool again_after(struct request *request, int *error);
void again_size(const struct sent *sent, int error, const char *body, size_t size);
void again_entry(const struct sent *sent, int error, const char *body, size_t size);
void again_entry_open(const struct sent *sent, int error, const char *body, size_t size);
void again_target(const struct sent *sent, int error, const char *body, size_t size);

/* -- warm.c: the sidecar is asked before it is needed */
const char *warm(uint64_t id, uint32_t pid);	/* "ok", or why not */
void warmth_opened(const struct sent *sent, int error, const char *body, size_t size);
void warmth_read(const struct sent *sent, int error, const char *body, size_t size);

/* -- notify.c: what the sidecar says unasked */
void notify_message(int code, char *body, size_t size);

#endif /* FUSECR_GUARD_PUMP_H */
