"""The base of everything else: the event loop, waiting, clean-up at the end, optional packages, host sets."""
