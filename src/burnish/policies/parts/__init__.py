"""What the families of models are made of."""
