"""Tests that train or generate in bfloat16: real where the CPU has arithmetic for it, too slow to be of use where it is
emulated.
"""

from __future__ import annotations

import pytest

from actors.device import computes_bfloat16

NOT_EMULATED = pytest.mark.skipif(
    not computes_bfloat16(0), reason="this CPU emulates bfloat16, at about a hundredth of float32's speed"
)
