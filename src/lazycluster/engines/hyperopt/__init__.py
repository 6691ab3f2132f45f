"""Hyperopt: https://hyperopt.github.io/hyperopt."""
