"""What ends a run by itself."""


class NonFiniteError(RuntimeError):
    """A step's loss or gradient norm is infinite or no number. Equal on all ranks, and nothing was updated."""
