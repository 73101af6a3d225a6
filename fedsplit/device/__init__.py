"""The device's side: records stay here, and so do the secrets."""
