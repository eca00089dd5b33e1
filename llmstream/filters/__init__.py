"""Personal data and other texts on their way to a model and back."""
