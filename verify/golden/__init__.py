"""Golden steps: a reference that other trainers compare their results with."""
