"""Search strategies: ask for candidates, tell their scores. No torch, no hidden randomness."""
