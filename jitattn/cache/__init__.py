"""Compiled kernels on disk: found, checked, kept, moved in archives."""

import logging

from jitattn.spec.text import OneLine

# Paths, and what an archive says of itself, reach the log in many places.
logging.getLogger("jitattn").addFilter(OneLine())
