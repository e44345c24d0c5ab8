"""Prepares samples of chats, pairs or problems, which are never split."""
