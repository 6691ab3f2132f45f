"""The command line."""

from __future__ import annotations

__all__ = ["main"]


def main() -> None:
    """Run the command line, and exit with its status."""
    try:
        from .app import main as run
    except KeyboardInterrupt:  # from a busy machine or a slow disk it takes seconds to be read
        raise SystemExit(130) from None
    run()
