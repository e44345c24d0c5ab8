"""How a rank's process tells its launcher why it ended. No torch here."""

EXIT_OTHER = 1  # another rank failed by an error of its own
EXIT_PREEMPTED = 75  # asked to make room, and saved
EXIT_HANG = 76  # a rank did not come in time
EXIT_NON_FINITE = 77  # the guard stopped the run
EXIT_LOST = 78  # a rank's process has ended
