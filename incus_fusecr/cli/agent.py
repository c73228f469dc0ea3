# SPDX-License-Identifier: Apache-2.0
"""``incus-fusecr agent``."""

from __future__ import annotations

import logging

import click

from .common import App, common


@click.command("agent", short_help="Run the agent of this host.")
@click.option("--no-recovery", is_flag=True, help="Do not protect lxcfs and other daemons of the host.")
@common
def command(app: App, no_recovery: bool) -> None:
    """Run the agent of this host.

    The service that CRIU's plugin and the other commands talk to; systemd starts it as incus-fusecr.service. It runs
    as root in the host's own namespaces until it is ended by SIGTERM. Containers that it holds frozen for a migration
    are taken over by the next agent.

    It also protects daemons of the host, see incus-fusecr status: /etc/incus-fusecr/daemons.conf says which; lxcfs if
    there is no such file.
    """
    from ..agent.main import main

    # A service logs more than a command says, in its own way.
    logging.getLogger().handlers.clear()
    main(debug=app.debug, recovery=not no_recovery)
