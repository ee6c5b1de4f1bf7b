"""An option of the tests here: the errors that they find, as a table."""

from pathlib import Path

import parity_table


def pytest_addoption(parser):
    parser.addoption(
        "--parity-table", type=Path, metavar="CSV", help="write the errors that were found"
    )


def pytest_sessionfinish(session, exitstatus):
    path = session.config.getoption("parity_table", None)  # unknown in a run of all tests
    if path and exitstatus == 0:
        parity_table.write(path)
