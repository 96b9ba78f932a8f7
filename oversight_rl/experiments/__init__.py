"""What can be trained, judged and shown."""
