"""Search strategies: ask for candidates, tell their scores. No torch, no hidden randomness."""

from evokernels.search.enes import ENES

__all__ = ["ENES"]
