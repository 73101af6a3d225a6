"""What several studies share; nothing here is a study."""
