"""What a settings file says, and what follows from it for both sides."""
