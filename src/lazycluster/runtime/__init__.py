"""One host: what runs there, its ports, its directories."""
