"""Weight quantizers. Each is one file; they import torch only when called."""
