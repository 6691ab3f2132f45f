"""A cluster in a file: ``cluster.toml``, which may come from a repository of other people."""
