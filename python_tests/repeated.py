"""A stand-in for a CUDA graph, for training as on a device where there is none."""


class Repeated:
    """Stands for a CUDA graph: what is recorded is kept, and called."""

    def __init__(self):
        self.replays = 0

    def capture(self, prepare, work):
        prepare()
        self._work = work

    def replay(self):
        self._work()
        self.replays += 1
