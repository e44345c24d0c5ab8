"""Tests. The modules in this folder serve the tests of every package."""
