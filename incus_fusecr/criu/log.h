/* SPDX-License-Identifier: GPL-2.0-only */
/* Lines of the plugin in CRIU's log. */
#ifndef FUSECR_LOG_H
#define FUSECR_LOG_H

#include "criu_abi.h"

#define pr_err(fmt, ...) print_on_level(CRIU_LOG_ERROR, "Error (fusecr): " fmt "\n", ##__VA_ARGS__)
#define pr_warn(fmt, ...) print_on_level(CRIU_LOG_WARN, "Warn  (fusecr): " fmt "\n", ##__VA_ARGS__)
#define pr_info(fmt, ...) print_on_level(CRIU_LOG_INFO, "fusecr: " fmt "\n", ##__VA_ARGS__)

#endif /* FUSECR_LOG_H */
