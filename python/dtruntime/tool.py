"""`ckpt-tool`, as a command of the installed package.

Always holds: it is the same program, with the same options, output and exit status.
"""

from __future__ import annotations

import signal
import sys

from dtruntime import _native


def main() -> None:
    """Run the tool with this process's command line, and exit with its status."""
    # Python's own handler would only run after the tool returns to Python.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.exit(_native.ckpt_tool(["ckpt-tool", *sys.argv[1:]]))


if __name__ == "__main__":
    main()
