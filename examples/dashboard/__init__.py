"""A dashboard of accounts, API keys, audit events and token refreshes: see docs/dashboard.md."""
