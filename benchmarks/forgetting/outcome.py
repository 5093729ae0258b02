"""How a command ends: what it refuses is one line and an exit code, not a traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable


def exit_code(run: Callable[[], None], *refusals: type[Exception]) -> int:
    """Run a command that goes on where it was stopped; 0, 2 if it raises one of ``refusals``, 130 if interrupted."""
    try:
        run()
    except refusals as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; started again, it goes on from here", file=sys.stderr)
        return 130
    return 0
