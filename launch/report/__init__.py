"""A run or a comparison as one HTML page."""

import logging

# Where the home directory cannot be written, matplotlib has its cache in a temporary folder and warns of it twice.
logging.getLogger("matplotlib").setLevel(logging.ERROR)
