"""Watching runs from their files alone."""
