"""Describes the machine, writes files that survive a kill, and decides how a process ends."""
