"""The page that plans 10⁹ rows says what was measured."""

from __future__ import annotations

from scale import DIMS, KINDS, PAGE, Cluster, marks, plan, results, tables


def test_the_page_shows_what_was_measured() -> None:
    text = PAGE.read_text()
    for name, lines in tables(results()).items():
        start, end = marks(name)
        assert f"{start}\n{lines}\n{end}" in text


def test_a_plan_grows_with_rows_and_shrinks_with_machines() -> None:
    found = results()
    for kind in KINDS:
        for dim in DIMS:
            one, ten = (plan(found, kind, dim, Cluster(rows=n)) for n in (10**8, 10**9))
            assert abs(ten.vectors / one.vectors - 10) < 1e-9
            assert abs(ten.write / one.write - 10) < 1e-9
            more = plan(found, kind, dim, Cluster(workers=160))
            assert abs(ten.write / more.write - 10) < 1e-9
            assert more.driver == ten.driver > 0
            assert ten.state > ten.vectors
