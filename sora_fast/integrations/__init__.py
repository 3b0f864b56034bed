"""Other people's models and trainers."""
