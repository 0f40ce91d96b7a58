"""The database roles that have the privileges of an application, an auditor or a sealer."""

from enum import StrEnum

from sqlalchemy import CheckConstraint, Column, Table
from sqlalchemy import Text as SQLText

from tiger_db.models.columns import UNIQUE_TEXT, metadata


class RoleKind(StrEnum):
    """The kinds of database roles. Each kind has other privileges, and none of them owns tables."""

    APP = "app"
    AUDITOR = "auditor"
    SEALER = "sealer"


# The names of roles are texts, so that a dump can be restored on a server without the roles.
granted_roles = Table(
    "granted_roles",
    metadata,
    Column("role", UNIQUE_TEXT, primary_key=True, comment="Name of the database role"),
    Column(
        "kind",
        SQLText,
        nullable=False,
        comment="Kind of the role, which decides about its privileges: app, auditor or sealer",
    ),
    CheckConstraint("kind IN ('app', 'auditor', 'sealer')", name="kind"),
    comment="Database roles that `tiger-db grant` has given privileges in this schema",
)
