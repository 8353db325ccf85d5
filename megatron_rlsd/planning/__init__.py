"""What a run will need, computed from its configuration and config.json before it starts."""
