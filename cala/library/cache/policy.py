"""Old path of two names; use `from cala.library.cache import use_caches`."""

from . import cache_folder as cache_folder
from . import use_caches as use_caches
