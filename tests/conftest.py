"""With DISKCHAIN_NO_SKIPS=1 (set by scripts/test) or --no-skips, a skipped test makes the session fail."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator

import pytest

from tests.support.libvirtd import Libvirtd
from tests.support.witness import qemus_below


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--no-skips", action="store_true", help="fail if any test was skipped")


@pytest.fixture(scope="session")
def daemon() -> Iterator[Libvirtd]:
    """One private libvirtd for the session."""
    found = Libvirtd()
    found.start()
    yield found
    found.destroy()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A test that failed says what its QEMUs were doing then."""
    report = yield
    if report.failed and report.when != "teardown":
        base = item.config._tmp_path_factory.getbasetemp()  # type: ignore[attr-defined]
        if told := qemus_below(base):
            report.sections.append(("its QEMUs", told))
    return report


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--no-skips") or os.environ.get("DISKCHAIN_NO_SKIPS") == "1":
        config.pluginmanager.register(SkipGuard(), "diskchain-no-skips")


class SkipGuard:
    """Collect what was skipped, whole modules too; an expected failure is not a skip."""

    def __init__(self) -> None:
        self._skips: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.skipped and not hasattr(report, "wasxfail"):
            self._skips.append(describe_skip(report))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.skipped:
            self._skips.append(describe_skip(report))

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self._skips and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self._skips:
            terminalreporter.section("skipped, but skips are not allowed here", red=True)
            terminalreporter.write_line("\n".join(self._skips))


def describe_skip(report: pytest.TestReport | pytest.CollectReport) -> str:
    """Given the report of a skip, return one line: what was skipped, and why."""
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return f"{report.nodeid}: {reason}"
