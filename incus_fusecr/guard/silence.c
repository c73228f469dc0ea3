// SPDX-License-Identifier: Apache-2.0
/*
 * A sidecar that lives and answers nothing. One request may take as long as it likes (a lock that is waited for), so before
 * it is given up it is asked for something of our own: a daemon with several threads answers that.
 */
#define _GNU_SOURCE
#include "log.h"
#include "loop.h"
#include "pump.h"
#include "sidecar.h"

#define SILENCE_MIN_MS 1000

static long long since = NEVER;		/* when something was heard last, or was waited for first */
static bool asked;

/* So that a request that makes each sidecar silent is found out within the deadline. */
long long silence_ms(void)
{
	long long share = pump_options.deadline * 1000LL / pump_options.attempts;

	return share > SILENCE_MIN_MS ? share : SILENCE_MIN_MS;
}

void silence_heard(void)
{
	since = now_ms();
	asked = false;
}

static bool listens(void)
{
	return pump_options.deadline && pump_serving() && sidecar_ready() && (pump_asked() || pump_expired());
}

void silence_ask(void)
{
	struct getattr_in getattr = { 0 };

	asked = true;
	ask_as_root(FOR_NOTHING, NULL, FUSE_GETATTR, FUSE_ROOT_ID, &getattr, sizeof(getattr), NULL, 0);
}

void silence_tick(void)
{
	long long before = since;

	if (!listens()) {
		since = NEVER;
		asked = false;
		return;
	}
	if (since == NEVER)
		since = now_ms();
	if (!asked && now_ms() >= since + silence_ms() / 2)
		silence_ask();
	if (before == NEVER || now_ms() < since + silence_ms())
		return;
	event("sidecar-silent pid=%d ms=%lld", (int)sidecar_pid(), now_ms() - since);
	since = NEVER;
	asked = false;
	pump_sidecar_silent(before);
}

long long silence_due(void)
{
	if (!listens())
		return NEVER;
	if (since == NEVER)
		return now_ms();
	return since + (asked ? silence_ms() : silence_ms() / 2);
}
