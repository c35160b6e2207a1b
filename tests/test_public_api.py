import pytest

import rlhf_ray as rr


def test_every_public_name_is_there_and_documented() -> None:
    assert sorted(rr.__all__) == list(rr.__all__)
    for name in rr.__all__:
        assert getattr(rr, name).__doc__, name
    assert set(rr.__all__) <= set(dir(rr))


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'serach'"):
        rr.serach  # noqa: B018
