"""Several hosts: groups of runtimes, and the manager that makes groups."""
