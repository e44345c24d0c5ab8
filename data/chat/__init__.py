"""Reads chats, and encodes them by templates that are tables of tokens."""
