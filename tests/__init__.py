"""Laws. The modules here serve the tests of every package."""
