"""What the package stands on: the machine, files that survive a kill, how a process ends."""
