"""What is tested on eight devices: `tests/test_eight_devices.py` runs these files in a process of its own that has them."""

import jax

collect_ignore_glob = [] if jax.device_count() == 8 else ["test_*.py"]
