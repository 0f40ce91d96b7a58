"""Refuse seals with numbers below 1.

Revision: 0022
Follows: 0021
Made: 2026-11-29

If the table already has such a seal, which only an attacker inserts, the seal stays as evidence for
`tiger-db verify-audit`, and the constraint is valid for new seals only.
"""

from alembic import op

revision = "0022"
down_revision = "0021"
branch_labels = None
depends_on = None
squawk_ignore = {"ban-drop-constraint": "The constraint is added again in the same transaction"}

VALIDATE = """
DO $$
BEGIN
    IF NOT EXISTS (SELECT FROM audit_seals WHERE number < 1) THEN
        ALTER TABLE audit_seals VALIDATE CONSTRAINT ck_audit_seals_number;
    END IF;
END
$$
"""


def upgrade() -> None:
    # The constraint already exists if an earlier run of this migration stopped during validation.
    op.execute("ALTER TABLE audit_seals DROP CONSTRAINT IF EXISTS ck_audit_seals_number")
    op.execute(
        "ALTER TABLE audit_seals ADD CONSTRAINT ck_audit_seals_number CHECK (number >= 1) NOT VALID"
    )
    with op.get_context().autocommit_block():
        op.execute(VALIDATE)


def downgrade() -> None:
    op.drop_constraint(op.f("ck_audit_seals_number"), "audit_seals")
