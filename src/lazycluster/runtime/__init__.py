"""One host: tasks that run there, its ports, its directories."""
