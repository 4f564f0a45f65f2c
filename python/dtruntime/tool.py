"""`ckpt-tool`, for those who installed the package and built nothing.

Always holds: it is the same program, with the same options, output and exit status.
"""

from __future__ import annotations

import signal
import sys

from dtruntime import _native


def main() -> None:
    """Run the tool on this process's command line, and end with its exit status."""
    # Python's own handler would wait for the tool, which never comes back to Python meanwhile.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.exit(_native.ckpt_tool(["ckpt-tool", *sys.argv[1:]]))


if __name__ == "__main__":
    main()
