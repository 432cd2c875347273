"""How many random inputs a test is given: all of them in `make test`, a tenth in `make check`."""

from __future__ import annotations

from hypothesis import settings

QUICK = "quick"  # the profile that `make check` names


def random_inputs(count: int) -> settings:
    """Hypothesis settings of a test that is to be given `count` inputs."""
    quick = settings.get_current_profile_name() == QUICK
    return settings(max_examples=max(10, count // 10) if quick else count, deadline=None)
