"""Tests of the documentation: links, anchors, and the blocks of its pages."""
