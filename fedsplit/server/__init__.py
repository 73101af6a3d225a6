"""The server's side: rounds, trunk, roster; no record ever gets here."""
