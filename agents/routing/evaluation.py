"""What a part of a network knows, how much leaks into it, and how fast what is gone comes back."""
