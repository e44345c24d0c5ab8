"""Everything between the start of the ranks and the first step."""
