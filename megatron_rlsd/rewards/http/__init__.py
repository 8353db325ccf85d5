"""The reward ``http``: judges, reward models and reward servers behind an address."""

from megatron_rlsd.rewards.http.judges import Judges
from megatron_rlsd.rewards.http.replies import Verdict

__all__ = ["Judges", "Verdict"]
