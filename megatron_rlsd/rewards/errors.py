"""Errors of rewards, told apart by who has to act."""


class TimeLimitExceeded(Exception):
    """Raised by a reward function that gives up on a response after its own time limit.

    Treated like the pool's own limit: the response has no verdict, and the run goes on also with
    ``reward.on_error: stop``, because an expensive response is not a defect of the function.
    """
