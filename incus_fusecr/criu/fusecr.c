// SPDX-License-Identifier: GPL-2.0-only
/*
 * CRIU plugin: checkpoint and restore of tasks that hold /dev/fuse, for containers with FUSE daemons inside.
 *
 * CRIU cannot dump a /dev/fuse fd and cannot mount FUSE. The incus-fusecr agent on the host can; the plugin asks it:
 *   dump     init tells the agent which tree is dumped, before CRIU stops a task. The agent makes the FUSE mounts
 *            answerable without their daemons and names the mounts that CRIU takes as external.
 *   restore  init hands the agent the image directory. Each /dev/fuse fd is asked for in the restored task, because
 *            it cannot be opened before the container's user namespace exists.
 * Where the agent says "none", or no agent runs, CRIU works as if the plugin were not there; only an image with
 * fusecr.json in it is not restored without the agent.
 *
 * The protocol stands in docs/adr/0001-parts-and-protocols.md.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/capability.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/fsuid.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "agentsock.h"
#include "compat.h"
#include "criu_abi.h"
#include "fusecr.h"
#include "log.h"
#include "paths.h"
#include "redirect.h"

#define CONNECT_SECONDS 10
#define INIT_SECONDS 60		/* the agent quiesces the container (dump) or reads the image (restore) */
#define CMDLINE_MAX (1 << 20)	/* Incus passes --external and --skip-mnt once per mount: room for thousands */
#define TEXT_SHOWN 900		/* bytes of the agent's text in one line of CRIU's log, which holds 8 KiB */

/*
 * The agent connection of this run, -1 without one. It stays open during a dump: the agent takes its end for the end of
 * CRIU. During a restore it moves to CRIU's fd store, from where the restored tasks get it.
 */
static int agent = -1;
static bool session;		/* the agent has answered "ok" */

static char answer[FUSECR_MESSAGE_MAX + 1];

bool in_session(void)
{
	return session;
}

const char *printable(char *text)
{
	char *c;

	if (strlen(text) > TEXT_SHOWN)
		text[TEXT_SHOWN] = '\0';
	for (c = text; *c; c++) {
		if ((unsigned char)*c < ' ' || *c == '\x7f')
			*c = ' ';
	}
	return text;
}

ssize_t read_file(int dir, const char *path, char *buf, size_t size)
{
	ssize_t length = 0, n;
	int fd;

	fd = openat(dir, path, O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
	if (fd < 0)
		return -errno;
	while ((n = read(fd, buf + length, size - length)) != 0) {
		if (n > 0)
			length += n;
		else if (errno != EINTR)
			length = -errno;
		if (length < 0)
			break;
		if ((size_t)length == size) {
			length = -E2BIG;
			break;
		}
	}
	close(fd);
	if (length >= 0)
		buf[length] = '\0';
	return length;
}

/* ---- The tree that is dumped ---- */

/*
 * The value of -t or --tree in @args (NUL separated, @size bytes), or NULL. The command line is the one stable source:
 * CRIU's own options are in a struct whose layout changes with every version.
 */
static const char *tree_argument(const char *args, size_t size)
{
	const char *arg, *end = args + size;
	bool value_follows = false;

	for (arg = args; arg < end; arg += strlen(arg) + 1) {
		if (value_follows)
			return arg;
		if (strcmp(arg, "--") == 0)
			return NULL;
		if (strcmp(arg, "-t") == 0 || strcmp(arg, "--tree") == 0)
			value_follows = true;
		else if (strncmp(arg, "--tree=", 7) == 0)
			return arg + 7;
		else if (strncmp(arg, "-t", 2) == 0)
			return arg + 2;
	}
	return NULL;
}

/* The pid of -t on CRIU's command line, 0 without one (CRIU as an RPC service), negative with a line in the log. */
static long tree_pid(void)
{
	char *args = malloc(CMDLINE_MAX);
	const char *value;
	ssize_t size;
	long pid = 0;

	if (!args) {
		pr_err("no memory for the command line");
		return -ENOMEM;
	}
	size = read_file(AT_FDCWD, "/proc/self/cmdline", args, CMDLINE_MAX);
	if (size < 0) {
		pr_err("cannot read /proc/self/cmdline: %s", strerror(-size));
		pid = size;
	} else {
		value = tree_argument(args, size);
		if (value && parse_number(value, 1, CONNECTION_MAX, &pid)) {
			pr_err("cannot read the pid to dump from '-t %.20s'", value);
			pid = -EINVAL;
		}
	}
	free(args);
	return pid;
}

/* ---- What the agent answered ---- */

static int raise_capabilities(void)
{
	struct __user_cap_header_struct header = { .version = _LINUX_CAPABILITY_VERSION_3 };
	struct __user_cap_data_struct data[_LINUX_CAPABILITY_U32S_3];

	if (syscall(SYS_capget, &header, data))
		return -errno;
	data[0].effective = data[0].permitted;
	data[1].effective = data[1].permitted;
	return syscall(SYS_capset, &header, data) ? -errno : 0;
}

/*
 * Touch files as the container's root. A FUSE mount of a user namespace refuses everybody outside of it, so also CRIU
 * on the host (fuse_allow_current_process()), and an inode whose owner has no mapping gives EOVERFLOW.
 */
static int set_fsids(uid_t uid, gid_t gid)
{
	int error;

	setfsgid(gid);
	setfsuid(uid);
	/* the calls return the previous id, never an error: ask with an id that cannot be set */
	if ((uid_t)setfsuid(-1) != uid || (gid_t)setfsgid(-1) != gid)
		return -EPERM;
	/* capabilities(7): a filesystem uid that leaves 0 clears CAP_DAC_OVERRIDE, CAP_CHOWN, ... from the effective set */
	error = raise_capabilities();
	if (error)
		return error;
	/* commit_creds() in the kernel has also made CRIU undumpable: leave it as it was before, but for the two ids */
	return prctl(PR_SET_DUMPABLE, 1, 0, 0, 0) ? -errno : 0;
}

static int apply_fsuid(char *ids)
{
	char *gid_text = strchr(ids, ' ');
	long uid, gid;

	if (!gid_text)
		return -EINVAL;
	*gid_text++ = '\0';
	/* (uid_t)-1 is no id */
	if (parse_number(ids, 0, 0xfffffffeL, &uid) || parse_number(gid_text, 0, 0xfffffffeL, &gid))
		return -EINVAL;
	return set_fsids(uid, gid);
}

/*
 * CRIU runs scripts as root of the host. The path comes from the agent, next to paths that a container chose: should one
 * of these ever pass for a line of its own, a file of the container's users is still not run.
 */
static int apply_script(char *path)
{
	struct stat st;

	if (*path != '/')
		return -EINVAL;
	if (stat(path, &st))
		return -errno;
	if (!S_ISREG(st.st_mode) || st.st_uid != 0 || (st.st_mode & (S_IWGRP | S_IWOTH)))
		return -EPERM;
	return add_script(path) ? -ENOMEM : 0;
}

/*
 * Restore the tasks' cgroups below another one than they were in: the container was renamed. liblxc says so as well, but
 * names controllers, and the unified hierarchy's name is empty for CRIU. The strings stay CRIU's.
 */
static int apply_cgroup_root(const char *path)
{
	char *controller, *root;

	if (*path != '/' || !new_cg_root_add)
		return *path != '/' ? -EINVAL : -ENOSYS;
	controller = strdup("");
	root = strdup(path);
	return !controller || !root || new_cg_root_add(controller, root) ? -ENOMEM : 0;
}

/* The argument of @line if it begins with @word and a blank, else NULL. */
static char *argument(char *line, const char *word)
{
	size_t length = strlen(word);

	return strncmp(line, word, length) == 0 && line[length] == ' ' && line[length + 1] ? line + length + 1 : NULL;
}

static int apply_line(char *line)
{
	char *value;

	value = argument(line, "ext");
	if (value)
		return add_external(value) ? -ENOMEM : 0;
	value = argument(line, "script");
	if (value)
		return apply_script(value);
	value = argument(line, "fsuid");
	if (value)
		return apply_fsuid(value);
	value = argument(line, "cgroup-root");
	if (value)
		return apply_cgroup_root(value);
	return -EINVAL;
}

/* Do what the lines after "ok" say. Returns 0, or -1 with a line in the log. */
static int apply_lines(char *lines)
{
	char *line, *rest = lines;

	while ((line = strsep(&rest, "\n"))) {
		char shown[201];
		int error;

		if (!*line && !rest)
			break;	/* the newline at the end */
		snprintf(shown, sizeof(shown), "%s", line);
		printable(shown);
		error = apply_line(line);
		if (error == -EINVAL) {
			pr_err("the agent's answer has a line that this plugin does not understand: '%s'; are the agent "
			       "and the plugin of the same version?", shown);
			return -1;
		}
		if (error) {
			pr_err("cannot do what the agent asks for: '%s': %s", shown, strerror(-error));
			return -1;
		}
		pr_info("agent: %s", shown);
	}
	return 0;
}

/* ---- init and exit ---- */

/* Also true where it cannot be told: better no restore than one without the FUSE state. */
static bool image_has_manifest(void)
{
	return faccessat(criu_get_image_dir(), MANIFEST, F_OK, AT_SYMLINK_NOFOLLOW) == 0 || errno != ENOENT;
}

static void drop_agent(void)
{
	if (agent >= 0)
		close(agent);
	agent = -1;
	session = false;
}

/* Ask the agent @question about the image directory. Returns the length of the answer, or -1 with a line in the log. */
static ssize_t ask(const char *question)
{
	ssize_t length;
	int error;

	error = agent_send(agent, question, criu_get_image_dir());
	if (error) {
		pr_err("cannot send '%s' to the agent: %s", question, strerror(-error));
		return -1;
	}
	length = agent_recv(agent, answer, sizeof(answer), NULL, INIT_SECONDS);
	if (length > 0)
		return length;
	if (length == 0)
		pr_err("the agent closed the connection without an answer to '%s'; see its log", question);
	else
		pr_err("no answer of the agent to '%s' (waited up to %d s): %s", question, INIT_SECONDS,
		       strerror(-length));
	return -1;
}

static bool exports_complete(void)
{
	if (add_external && add_script && inherit_fd_add && inherit_fd_lookup_id)
		return true;
	pr_err("this CRIU does not export add_external, add_script, inherit_fd_add and inherit_fd_lookup_id: "
	       "it cannot carry FUSE daemons; use CRIU 4.1 or 4.2");
	return false;
}

/* Returns 1 for a session with the agent, 0 for "none", or -1 with a line in the log. */
static int open_session(const char *question)
{
	if (ask(question) < 0)
		return -1;
	if (strcmp(answer, "none") == 0) {
		pr_info("the agent has nothing to do here");
		return 0;
	}
	if (strncmp(answer, "error ", 6) == 0) {
		pr_err("the agent refuses: %s", printable(answer + 6));
		return -1;
	}
	if (strcmp(answer, "ok") != 0 && strncmp(answer, "ok\n", 3) != 0) {
		pr_err("the agent's answer is not understood: '%s'; are the agent and the plugin of the same version?",
		       printable(answer));
		return -1;
	}
	if (!exports_complete())
		return -1;
	if (answer[2] && apply_lines(answer + 3))
		return -1;
	return 1;
}

/* Returns 1 when connected, 0 if no agent is there, or -1 with a line in the log. */
static int reach_agent(void)
{
	const char *path = agent_path();

	agent = agent_connect(path, CONNECT_SECONDS);
	if (agent >= 0)
		return 1;
	if (agent_absent(agent)) {
		pr_info("no agent on %s: %s", path, strerror(-agent));
		return 0;
	}
	pr_err("cannot connect to the incus-fusecr agent on %s: %s", path, strerror(-agent));
	return -1;
}

static int init_dump(void)
{
	char question[32];
	long pid;
	int state;

	pid = tree_pid();
	if (pid < 0)
		return -1;
	if (pid == 0) {
		pr_info("no -t on the command line: not a dump by Incus, plugin stays out");
		return 0;
	}
	state = reach_agent();
	if (state <= 0)
		return state;
	snprintf(question, sizeof(question), "dump %ld", pid);
	state = open_session(question);
	if (state <= 0) {
		drop_agent();
		return state;
	}
	session = true;
	compat_dump();
	if (paths_dump(criu_get_image_dir())) {
		redirect_undo();
		drop_agent();
		return -1;
	}
	return 0;
}

/* An image with FUSE state and no agent for it: restoring the rest would only fail later and less clearly. */
static int refuse_manifest(const char *why)
{
	if (!image_has_manifest())
		return 0;
	pr_err("the image holds the state of FUSE daemons (%s), but %s; start it with: systemctl start incus-fusecr",
	       MANIFEST, why);
	return -1;
}

static int init_restore(void)
{
	int state;

	state = reach_agent();
	if (state < 0)
		return -1;
	if (state == 0)
		return refuse_manifest("the incus-fusecr agent does not run on this host");
	state = open_session("restore");
	if (state == 0) {
		drop_agent();
		return refuse_manifest("the incus-fusecr agent says that it has nothing to do");
	}
	if (state > 0 && inherit_fd_add(agent, AGENT_KEY)) {
		pr_err("cannot put the agent connection into CRIU's fd store");
		state = -1;
	}
	if (state < 0) {
		drop_agent();
		return -1;
	}
	agent = -1;	/* CRIU moves and closes it */
	session = true;
	compat_restore();
	return 0;
}

static int fusecr_init(int stage)
{
	switch (stage) {
	case CR_PLUGIN_STAGE__DUMP:
		return init_dump();
	case CR_PLUGIN_STAGE__RESTORE:
		return init_restore();
	default:	/* a pre-dump copies memory only, the daemons run on */
		return 0;
	}
}

/* @ret is the result of the dump itself: it is 0 also when a post-dump script then let the tree run on. */
static void fusecr_exit(int stage, int ret)
{
	char message[32];

	if (!session)
		return;
	redirect_undo();
	if (stage != CR_PLUGIN_STAGE__DUMP)
		return;
	snprintf(message, sizeof(message), "exit %d", ret);
	if (agent_send(agent, message, -1))
		pr_warn("the agent has gone before the end of the dump");
}
__attribute__((visibility("default"))) struct criu_plugin_desc CR_PLUGIN_DESC = {
	.name = "fusecr",
	.init = fusecr_init,
	.exit = fusecr_exit,
	.version = CRIU_PLUGIN_VERSION_0_2,
	.max_hooks = FUSECR_MAX_HOOKS,
	.hooks = {
		[CR_PLUGIN_HOOK__DUMP_EXT_FILE] = fusecr_dump_file,
		[CR_PLUGIN_HOOK__RESTORE_EXT_FILE] = fusecr_restore_file,
	},
};
