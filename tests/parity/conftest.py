"""An option of the tests here: the errors that they find, as tables."""

from pathlib import Path

import parity_table


def pytest_addoption(parser):
    parser.addoption(
        "--parity-tables", type=Path, metavar="FOLDER", help="write the errors that were found"
    )


def pytest_sessionfinish(session, exitstatus):
    folder = session.config.getoption("parity_tables", None)  # unknown in a run of all tests
    if folder and exitstatus == 0:
        parity_table.write(folder)
