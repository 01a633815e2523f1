"""What holds for every test."""

from collections.abc import Iterator

import pytest
import structlog

pytest.register_assert_rewrite("tests.support")  # else `python -O` removes what it asserts


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """Whole processes run inside of tests and configure logging; the next test starts plain."""
    yield
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()
