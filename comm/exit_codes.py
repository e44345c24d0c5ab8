"""Exit codes by which a rank's process reports to its launcher why it ended. No torch here."""

EXIT_OTHER = 1  # another rank failed by an error of its own
EXIT_PREEMPTED = 75  # preempted after saving
EXIT_HANG = 76  # a rank did not arrive in time
EXIT_NON_FINITE = 77  # the guard stopped the run
EXIT_LOST = 78  # a rank's process has ended
