"""Defines the exit codes that report to the launcher why a rank's process ended. Imports no torch."""

EXIT_CONFIGURATION = 2  # refused; no step was made
EXIT_OTHER = 1  # another rank failed with an error
EXIT_PREEMPTED = 75  # preempted after saving
EXIT_HANG = 76  # a rank did not reach a collective within the timeout
EXIT_NON_FINITE = 77  # the guard stopped the run
EXIT_LOST = 78  # a rank's process has ended
