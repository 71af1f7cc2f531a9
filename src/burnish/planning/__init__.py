"""What a stage needs of a device, before anything large is loaded."""
