"""Computes what a run will need from its configuration and config.json before it starts."""
