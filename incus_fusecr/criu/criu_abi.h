/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The part of CRIU's plugin interface that fusecr uses, declared here because Debian ships no header for it.
 *
 * Sources: criu/include/criu-plugin.h, plugin.c, external.c, action-scripts.c, files.c and log.c of CRIU 4.1.1 and
 * 4.2.1. The descriptor ends after the last hook in use: CRIU reads max_hooks entries of hooks[] and refuses a plugin
 * that has more than it knows (4.1: 12, 4.2: 13), or a newer version than its own. So one .so loads in both.
 */
#ifndef FUSECR_CRIU_ABI_H
#define FUSECR_CRIU_ABI_H

enum criu_plugin_stage {
	CR_PLUGIN_STAGE__DUMP,
	CR_PLUGIN_STAGE__PRE_DUMP,
	CR_PLUGIN_STAGE__RESTORE,
};

enum criu_plugin_hook {
	CR_PLUGIN_HOOK__DUMP_EXT_FILE = 2,	/* int (*)(int fd, int id): 0, -ENOTSUP (not ours) or < 0 */
	CR_PLUGIN_HOOK__RESTORE_EXT_FILE = 3,	/* int (*)(int id): fd, -ENOTSUP (not ours) or < 0 */
	FUSECR_MAX_HOOKS
};

/* CRIU_PLUGIN_GEN_VERSION(0, 2, 0): the version of 4.1; CRIU accepts its own and any older one. */
#define CRIU_PLUGIN_VERSION_0_2 (2u << 8)

struct criu_plugin_desc {
	const char *name;
	int (*init)(int stage);
	void (*exit)(int stage, int ret);
	unsigned int version;
	unsigned int max_hooks;
	void *hooks[FUSECR_MAX_HOOKS];
};

/* Log levels of criu/include/log.h (enum __criu_log_levels). */
enum criu_log_level {
	CRIU_LOG_ERROR = 1,
	CRIU_LOG_WARN = 2,
	CRIU_LOG_INFO = 3,
};

/* CRIU's public plugin API. */
extern int criu_get_image_dir(void);
extern void print_on_level(unsigned int level, const char *format, ...) __attribute__((format(printf, 2, 3)));

/*
 * Not its public API, but exported by every build (criu links with -rdynamic for its plugins). Weak: a CRIU without
 * one of them still loads the plugin, which then only refuses the runs that need it.
 */
extern int add_external(char *key) __attribute__((weak));
extern int add_script(char *path) __attribute__((weak));
extern int new_cg_root_add(char *controller, char *newroot) __attribute__((weak));
extern int inherit_fd_add(int fd, char *key) __attribute__((weak));
extern int inherit_fd_lookup_id(char *key) __attribute__((weak));

#endif /* FUSECR_CRIU_ABI_H */
