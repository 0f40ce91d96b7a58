"""Integrations with web frameworks and MCP servers. Each module needs the extra of its name."""
