"""The database of a Tiger Brokers MCP system."""
