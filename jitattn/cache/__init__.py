"""Disk cache of compiled kernels, and archives that move them between machines."""

import logging

from jitattn.spec.text import OneLine

# Paths and fields of archives are logged in many places; any of them may hold control characters.
logging.getLogger("jitattn").addFilter(OneLine())
