"""A newer release, which has added values to the enums of the audit trail, and records an event."""

NEWER_SCHEMA = (
    "ALTER TYPE audit_result ADD VALUE 'deferred'",
    "ALTER TYPE audit_severity ADD VALUE 'fatal'",
)
NEWER_EVENT = """
INSERT INTO audit_logs (id, action, result, severity)
VALUES (uuid7_floor(now()), 'mcp:future', 'deferred', 'fatal')
"""
NEWER_VALUES = ("mcp:future", "deferred", "fatal")  # action, result, severity
