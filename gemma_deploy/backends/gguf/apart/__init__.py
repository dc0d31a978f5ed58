"""What runs in the Python of llama-cpp-python; nothing here is imported by this program."""
