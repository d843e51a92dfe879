"""Being stopped by Ctrl-C or SIGTERM, with what to type to go on."""

from __future__ import annotations


class Interrupted(KeyboardInterrupt):
    """A command was stopped; the message says how to go on."""
