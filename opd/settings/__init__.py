"""What a setting may be: types, ranges, secrets, devices, and the check of all of them."""
