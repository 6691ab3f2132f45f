"""Modules that programs of all engines share: they are sent along, and run where lazycluster is not installed.

They import nothing but the standard library and each other.
"""
