"""What a user says of environments, and what is told of it."""

from __future__ import annotations

from lazycluster import EnvironmentSpec


def test_passwords_in_addresses_are_not_told() -> None:
    spec = EnvironmentSpec(["thing @ git+https://me:s3cret@example.invalid/thing.git@main", "other"])
    assert str(spec) == "[thing @ git+https://***@example.invalid/thing.git@main, other]"
    assert "s3cret" not in repr(spec)
    assert repr(EnvironmentSpec("manager", exclude=["torch"])) == "EnvironmentSpec('manager', exclude=('torch',))"
