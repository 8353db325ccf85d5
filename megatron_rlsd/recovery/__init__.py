"""Stopping a run at any moment, going on where it stopped, and making one of its steps again."""
