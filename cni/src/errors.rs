//! What the core says went wrong, with the code that the runtime is told.

use flannel_core::act::attach::AttachError;
use flannel_core::act::claim::ClaimError;
use flannel_core::act::pass::chain;
use flannel_core::decide::ranges::RangeError;
use flannel_core::touch::ledger::LedgerError;
use flannel_core::touch::world::WorldError;
use flannel_core::words::code::Code;

use crate::result::CniError;

impl From<WorldError> for CniError {
    fn from(error: WorldError) -> Self {
        Self::new(Code::CHANGE_FAILED.number().into(), chain(&error))
    }
}

impl From<LedgerError> for CniError {
    fn from(error: LedgerError) -> Self {
        let code = match &error {
            LedgerError::Locked { .. } => Self::TRY_AGAIN,
            LedgerError::Taken { .. } => Code::ADDRESS_TAKEN.number().into(),
            LedgerError::Clash { .. } | LedgerError::Foreign { .. } => Self::CONFIG,
            LedgerError::Io { .. } => Self::INPUT,
        };
        Self::new(code, chain(&error))
    }
}

impl From<RangeError> for CniError {
    fn from(error: RangeError) -> Self {
        let code = if matches!(error, RangeError::Exhausted { .. }) { Self::TRY_AGAIN } else { Self::CONFIG };
        Self::new(code, error.to_string())
    }
}

impl From<ClaimError> for CniError {
    fn from(error: ClaimError) -> Self {
        match error {
            ClaimError::Ledger(error) => error.into(),
            ClaimError::Range(error) => error.into(),
            ClaimError::World(error) => error.into(),
            ClaimError::Unserved { .. } => Self::config(error.to_string()),
            ClaimError::Duplicate { .. } => {
                Self::new(Code::ATTACHMENT_EXISTS.number().into(), error.to_string())
            }
            ClaimError::Undo { .. } => Self::new(Code::LEFTOVER.number().into(), chain(&error)),
        }
    }
}

impl From<AttachError> for CniError {
    fn from(error: AttachError) -> Self {
        if let AttachError::Claim(error) = error {
            return error.into();
        }
        let code = match &error {
            AttachError::Claim(_)
            | AttachError::Plan(_)
            | AttachError::NoBridge { .. }
            | AttachError::OtherAddress { .. } => Self::CONFIG,
            AttachError::NoVlans => Self::UNSUPPORTED_FIELD,
            AttachError::Occupied { .. } => Code::ATTACHMENT_EXISTS.number().into(),
            AttachError::Exists { .. } => Code::ATTACHMENT_EXISTS.number().into(),
            AttachError::World(_) | AttachError::Unsettled { .. } => Code::CHANGE_FAILED.number().into(),
            AttachError::Undo { .. } => Code::LEFTOVER.number().into(),
        };
        Self::new(code, chain(&error))
    }
}
