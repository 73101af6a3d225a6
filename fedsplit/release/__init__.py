"""From records to what leaves of them."""
