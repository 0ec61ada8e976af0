"""Run the command line: python -m ocs."""

import sys

from ocs.cli.command_line import main

if __name__ == "__main__":
    sys.exit(main())
