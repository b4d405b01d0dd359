"""Drills: break a running server on purpose, and judge what its clients saw. See docs/drills.md."""
