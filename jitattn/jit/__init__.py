"""The lower half: from specs to cubins, on disk and on the GPU."""

import logging

from jitattn.text import OneLine

# Paths, and what an archive says of itself, reach the log in many places.
logging.getLogger("jitattn").addFilter(OneLine())
