"""Clusters of Hyperopt, https://hyperopt.github.io/hyperopt; `programs` and `mongo` have what runs elsewhere."""
