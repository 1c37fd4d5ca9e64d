"""What holds for every test. Fixtures live beside the tests that use them."""

import os

from hypothesis import settings

# A developer's own store must never be the one that tests write to; child processes inherit this too.
os.environ.pop("PERDURE_STORE", None)

# No deadline: on a shared two-core machine it measures the neighbours. The blob reproduces a failure seen only in CI.
settings.register_profile("perdure", deadline=None, print_blob=True)
settings.load_profile("perdure")
