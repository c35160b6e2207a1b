"""Figures as people read them: on the terminal, on the page, in notebooks and in explanations.

Figures of one kind that are shown together are written alike. `figure` of `templates/page.js` is
the same for the charts.
"""

import math
from collections.abc import Iterable
from statistics import median

FINE = 0.01
"""Of figures below this in size three decimals leave too little."""

LONG = 1000
"""Figures from this on in size are rounded to four digits."""


def are_fine(values: Iterable[float | None]) -> bool:
    """Whether figures that are shown together are too small for decimals.

    Goes by their median in size, zeros and gaps aside: one that has diverged says nothing of the
    others.

    >>> are_fine([1.2e-4, 2.4e-4, None, 5.0]), are_fine([0.91, 0.002, 0.4])
    (True, False)
    """
    sizes = [abs(value) for value in values if value and math.isfinite(value)]
    return bool(sizes) and median(sizes) < FINE


def figure(
    value: float | None,
    digits: int = 3,
    fine: bool = False,
    *,
    sign: str = "",
    none: str = "–",  # noqa: RUF001
) -> str:
    """A figure with so many decimals, or to four digits where it is long or `fine`.

    >>> figure(0.9137), figure(915119437.605), figure(1.234e-4, fine=True), figure(0.9, 2, sign="+")
    ('0.914', '9.151e+08', '0.0001234', '+0.90')
    """
    if value is None or math.isnan(value):
        return none
    short = fine or abs(value) >= LONG
    return format(value, f"{sign}.4g" if short else f"{sign}.{digits}f")


def percent(share: float) -> str:
    """A share in [0, 1]; what is there is never told as nothing, and what lacks never as all.

    >>> [percent(share) for share in (0, 0.001, 0.25, 0.996, 1)]
    ['0%', '<1%', '25%', '>99%', '100%']
    """
    if 0 < share < 0.01:
        return "<1%"
    return ">99%" if 0.99 < share < 1 else f"{share:.0%}"
