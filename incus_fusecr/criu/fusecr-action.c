// SPDX-License-Identifier: GPL-2.0-only
/*
 * fusecr-action: CRIU's action script (CRIU has the plugin add it) that hands an action to the incus-fusecr agent and
 * exits with the agent's verdict: 0, or 1 with the reason on stderr, which is CRIU's log.
 *
 * CRIU runs it with CRTOOLS_SCRIPT_ACTION and, once it knows it, CRTOOLS_INIT_PID in the environment. After post-dump,
 * exit 0 makes CRIU kill the dumped tree, anything else makes it run on: there the helper waits for a restarted agent.
 */
#include <errno.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/types.h>
#include <time.h>
#include <unistd.h>

#include "agentsock.h"

#define CONNECT_SECONDS 10
#define RETRY_NS 200000000L
#define HOLD_SECONDS_DEFAULT 30
#define HOLD_SECONDS_MAX 86400

/*
 * The agent holds CRIU here until the migration is decided and has its own, shorter leases: these deadlines are the last
 * resort against an agent that lives but does not answer.
 */
static const struct action {
	const char *name;
	int answer_seconds;
	bool required;		/* without an agent CRIU must not go on as if nothing were */
	bool retried;		/* a connection that is lost, is made again */
} actions[] = {
	{ "setup-namespaces", 60, true, false },
	{ "post-setup-namespaces", 60, true, false },
	{ "post-restore", 3600, true, false },
	{ "post-resume", 3600, true, false },
	{ "network-unlock", 60, false, false },
	{ "post-dump", 86400, true, true },
};

static char answer[FUSECR_MESSAGE_MAX + 1];

static const struct action *find_action(const char *name)
{
	size_t i;

	for (i = 0; i < sizeof(actions) / sizeof(actions[0]); i++) {
		if (strcmp(actions[i].name, name) == 0)
			return &actions[i];
	}
	return NULL;
}

static int complain(const struct action *action, const char *what, const char *why)
{
	fprintf(stderr, "Error (fusecr-action): %s: %s: %.900s\n", action->name, what, why);
	return 1;
}

static time_t now(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return ts.tv_sec;
}

/* Ask the agent once. Returns the length of its answer, or <= 0 if there was none: 0 or a negative errno. */
static ssize_t ask_once(const struct action *action, const char *question)
{
	ssize_t length;
	int sock;

	sock = agent_connect(agent_path(), CONNECT_SECONDS);
	length = sock < 0 ? sock : agent_send(sock, question, -1);
	/* an agent too busy to take the question is as good as one that is away; ETIMEDOUT is for a missing answer */
	if (length == -ETIMEDOUT)
		length = -EAGAIN;
	if (length == 0)
		length = agent_recv(sock, answer, sizeof(answer), NULL, action->answer_seconds);
	if (sock >= 0)
		close(sock);
	return length;
}

/* Ask again until the agent has been away for @hold seconds. A connection that lasted longer starts the count anew. */
static ssize_t ask_again(const struct action *action, const char *question, time_t hold)
{
	const struct timespec pause = { .tv_nsec = RETRY_NS };
	time_t lost = now();

	for (;;) {
		time_t asked = now();
		ssize_t length = ask_once(action, question);

		if (length > 0 || length == -ETIMEDOUT || length == -EBADMSG)
			return length;
		if (now() - asked > hold)
			lost = now();
		if (now() - lost >= hold)
			return length;
		nanosleep(&pause, NULL);
	}
}

/* FUSECR_HOLD_SECONDS, or the default where it is not set or no number. */
static time_t hold_seconds(void)
{
	const char *text = getenv("FUSECR_HOLD_SECONDS");
	long seconds;

	if (!text || parse_number(text, 0, HOLD_SECONDS_MAX, &seconds))
		return HOLD_SECONDS_DEFAULT;
	return seconds;
}

static int verdict(const struct action *action, ssize_t length)
{
	if (length == 0)
		return complain(action, "no verdict", "the agent closed the connection without an answer");
	if (length < 0)
		return complain(action, "no verdict of the agent", strerror(-length));
	if (strcmp(answer, "ok") == 0)
		return 0;
	if (strncmp(answer, "error ", 6) == 0)
		return complain(action, "the agent refuses", answer + 6);
	return complain(action, "the agent's answer is not understood", answer);
}

/* The pid in CRTOOLS_INIT_PID, "0" where CRIU does not know it yet. */
static long init_pid(void)
{
	const char *text = getenv("CRTOOLS_INIT_PID");
	long pid;

	return text && parse_number(text, 1, 0x7fffffffL, &pid) == 0 ? pid : 0;
}

int main(void)
{
	const char *name = getenv("CRTOOLS_SCRIPT_ACTION");
	const struct action *action = name ? find_action(name) : NULL;
	pid_t criu = getppid();
	char question[128];
	ssize_t length;

	if (!action)
		return 0;
	/* a CRIU that was killed waits for no verdict, and the agent shall see that nobody does */
	if (prctl(PR_SET_PDEATHSIG, SIGKILL) || getppid() != criu)
		return complain(action, "CRIU", "has gone");
	snprintf(question, sizeof(question), "act %s %ld %d", action->name, init_pid(), (int)criu);
	if (action->retried)
		length = ask_again(action, question, hold_seconds());
	else
		length = ask_once(action, question);
	if (!action->required && length <= 0)
		return 0;
	return verdict(action, length);
}
