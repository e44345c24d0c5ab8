"""The command line: help, errors and exit codes of every command."""
