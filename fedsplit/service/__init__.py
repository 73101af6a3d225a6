"""The prediction service: routes, pages, tokens and the fleet of watched devices."""
