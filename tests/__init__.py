"""Laws. The helper modules here serve the tests of every package."""
