"""Timers that tests hand to compress, so that nothing depends on how fast this machine is."""


def says(ratio: float):
    """A timer that finds the compressed call `ratio` times as fast as the float one."""

    def timer(calls):
        assert "float" in calls
        for call in calls.values():
            call()
        return {name: 1.0 if name == "float" else 1.0 / ratio for name in calls}

    return timer
