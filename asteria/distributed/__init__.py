"""Who owns what, who is near whom, and how results reach every rank."""
