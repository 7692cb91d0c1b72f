"""One thread a process: the suite runs on two cores, several processes at a time."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from hypothesis import settings

torch.set_num_threads(1)

EXEMPT = {"test_extreme_gates": "no gate a token"}  # why a row has no case of a law


def pytest_addoption(parser):
    parser.addoption("--grid", action="store_true", help="print which law ran for which row, and how often")


def pytest_terminal_summary(terminalreporter, config):
    """The grid rows × laws: how many cases passed. No cell is empty without its reason."""
    if not config.getoption("--grid"):
        return
    from reference.lsm import LSM
    from reference.routers import ROUTER

    passed = [r.nodeid for r in terminalreporter.stats.get("passed", []) if r.when == "call"]
    for table in (LSM, ROUTER):
        grid = {}
        for node in passed:
            law, _, case = node.partition("::")[2].partition("[")
            for row in set(case.rstrip("]").split("-")) & set(table):
                grid.setdefault(law, dict.fromkeys(table, 0))[row] += 1
        width = max(map(len, grid), default=0)
        for row in table:
            terminalreporter.write_line(f"\n{row}")
            for law, cases in sorted(grid.items()):
                said = cases[row] or EXEMPT.get(law, "not for this row")
                terminalreporter.write_line(f"    {law:{width}} {said}")


settings.register_profile("ci", deadline=None, derandomize=True, max_examples=15, print_blob=True)
settings.load_profile("ci")
