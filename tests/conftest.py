"""Properties are tried without a clock: on a busy machine an example may take long, and nothing is wrong with it."""

import os

from hypothesis import settings

settings.register_profile("house", settings.get_profile("ci" if "CI" in os.environ else "default"), deadline=None)
settings.load_profile("house")
