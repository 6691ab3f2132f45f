"""What everything else is built on: the event loop, waiting, clean-up at the end, optional packages, host sets."""
