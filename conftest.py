"""Fixtures that stand in modules of their own; pytest takes plugins only in the root's conftest."""

pytest_plugins = ["tests.fakes.engine_fixtures"]
