"""The tests; `tests.models` and the like are imported from the repository root."""
