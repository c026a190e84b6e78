"""Files: written atomically, read without running what is in them."""
