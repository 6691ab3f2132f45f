"""The documented name of the server for hyperopt: ``python -m lazycluster.mongo``. It lies in `lazycluster.engines`."""
