"""What runs in the Python of any engine; nothing here is imported by this program."""
