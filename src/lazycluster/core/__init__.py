"""The base of the manager: the event loop, waiting, clean-up at the end, optional packages, host sets."""
