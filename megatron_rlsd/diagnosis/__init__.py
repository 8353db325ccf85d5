"""Checks of a machine, a configuration and all that it names, before a run is started."""
