"""The command line: `ocs`, or `python -m ocs`; see docs/command-line.md."""
