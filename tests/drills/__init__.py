"""Drills: restores and failovers with the tools that an administrator uses, as docs/backup.md."""
