"""Audit trail: signed seals of audit events, verification, exports, and monthly retention."""

from tiger_db.audit.archiving import ArchivedMonth, archive
from tiger_db.audit.chain import AuditFinding, FindingKind
from tiger_db.audit.checkpoints import read_checkpoint
from tiger_db.audit.exporting import export, export_checkpoint
from tiger_db.audit.following import follow
from tiger_db.audit.restoring import RecordedRestore, record_restore
from tiger_db.audit.retention import Maintenance, maintain
from tiger_db.audit.seal_format import ArchivedFile, Seal, SealPayload
from tiger_db.audit.sealer import required_key
from tiger_db.audit.sealing import Sealing, change_signing_key, repair_sequence, seal
from tiger_db.audit.verifying import Verification, verify, verify_export

__all__ = [
    "ArchivedFile",
    "ArchivedMonth",
    "AuditFinding",
    "FindingKind",
    "Maintenance",
    "RecordedRestore",
    "Seal",
    "SealPayload",
    "Sealing",
    "Verification",
    "archive",
    "change_signing_key",
    "export",
    "export_checkpoint",
    "follow",
    "maintain",
    "read_checkpoint",
    "record_restore",
    "repair_sequence",
    "required_key",
    "seal",
    "verify",
    "verify_export",
]
