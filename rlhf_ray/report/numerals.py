"""Figures as people read them, on the page, in notebooks and in explanations."""


def percent(share: float) -> str:
    """A share in [0, 1]; what is there is never told as nothing, and what lacks never as all.

    >>> [percent(share) for share in (0, 0.001, 0.25, 0.996, 1)]
    ['0%', '<1%', '25%', '>99%', '100%']
    """
    if 0 < share < 0.01:
        return "<1%"
    return ">99%" if 0.99 < share < 1 else f"{share:.0%}"
