"""Create the table granted_roles.

Revision: 0025
Follows: 0024
Made: 2026-11-29

The migration locks no existing table and grants nothing. Processes that run the code of revision 0024
work with the schema of revision 0025. The downgrade drops the table, but leaves the privileges of
the roles: run `tiger-db revoke-grants` before.
"""

import sqlalchemy as sa

from alembic import op

revision = "0025"
down_revision = "0024"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "granted_roles",
        sa.Column(
            "role",
            sa.Text(collation="C"),
            nullable=False,
            comment="Name of the database role",
        ),
        sa.Column(
            "kind",
            sa.Text(),
            nullable=False,
            comment="Kind of the role, which decides about its privileges: app, auditor or sealer",
        ),
        sa.CheckConstraint(
            "kind IN ('app', 'auditor', 'sealer')", name=op.f("ck_granted_roles_kind")
        ),
        sa.PrimaryKeyConstraint("role", name=op.f("pk_granted_roles")),
        comment="Database roles that `tiger-db grant` has given privileges in this schema",
    )


def downgrade() -> None:
    op.drop_table("granted_roles")
