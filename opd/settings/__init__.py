"""Settings: types, ranges, secrets, devices, and the check of all of them."""
