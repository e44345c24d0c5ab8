"""How a rank's process tells its launcher that the job cannot go on. No torch here."""

EXIT_OTHER = 1  # another rank failed by an error of its own
EXIT_HANG = 76  # a rank did not come in time
EXIT_LOST = 78  # a rank's process has ended
