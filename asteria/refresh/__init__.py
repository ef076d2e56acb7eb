"""When eigenbases are refreshed; knows steps, not what a refresh computes."""
