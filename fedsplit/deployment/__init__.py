"""Real nodes and a real server: certificates, the processes of both, and what they say to each other."""
