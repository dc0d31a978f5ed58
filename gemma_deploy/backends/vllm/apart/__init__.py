"""What runs in the Python of vLLM; nothing here is imported by this program."""
