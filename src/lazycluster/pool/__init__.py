"""Calls spread over the hosts of a group: `map`, an executor, joblib's backend."""
