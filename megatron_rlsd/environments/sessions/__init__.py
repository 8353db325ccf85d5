"""Agents of the user's own, which ask for the model's turns over HTTP.

``chat`` has the wire's forms, ``server`` the endpoint, ``agents`` the processes that agents run in,
``worker`` what runs there. Nothing is imported here: a worker needs no server.
"""
