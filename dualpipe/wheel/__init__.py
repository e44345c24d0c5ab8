"""The schedules as a package for other trainers: `make wheel`."""
