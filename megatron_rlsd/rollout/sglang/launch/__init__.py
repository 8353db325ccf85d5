"""How SGLang is started, in its own environment; the trainer imports the variable's name alone."""
