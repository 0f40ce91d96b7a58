"""Change nothing. Revision 0017 sets the comments that this revision set in earlier releases.

Revision: 0010
Follows: 0009
Made: 2026-11-28
"""

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    pass


def downgrade() -> None:
    pass
