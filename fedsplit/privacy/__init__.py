"""What releases tell of records: the exact criterion, the accountant and the limits, and attacks to measure by."""
