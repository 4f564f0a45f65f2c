//! Other ways to a shard's bytes, for when what came is damaged.
//!
//! Always holds: what comes another way passes the same checks. If none is better, the damage that
//! was met first is reported, unless a network kept the others away: that is no damage, and nobody
//! goes back to an older step for it.

use crate::store::ShardSource;
use crate::{EngineError, Result};

/// Whether an error says that bytes are not what they were, or cannot be had.
pub(super) fn is_damage(error: &EngineError) -> bool {
    matches!(error, EngineError::Corrupt { .. } | EngineError::Io { .. })
}

/// Opens another way to a shard that is damaged, which is logged.
pub(super) fn open_second(
    source: &dyn ShardSource,
    met: &EngineError,
) -> Result<Option<Box<dyn ShardSource>>> {
    match source.second() {
        Ok(Some(second)) => {
            let (from, to) = (source.name(), second.name());
            tracing::warn!(error = %met, from, to, "damage was met, reading the copy");
            Ok(Some(second))
        }
        Ok(None) => Ok(None),
        Err(error) => none_or_unavailable(error, met).map_or(Ok(None), Err),
    }
}

/// Reads by `second`, and once more by its own second way: what is whole in a remote store may be
/// damaged on its way.
pub(super) fn read_elsewhere<T>(
    second: &dyn ShardSource,
    met: EngineError,
    mut read: impl FnMut(&dyn ShardSource) -> Result<T>,
) -> Result<T> {
    let error = match read(second) {
        Err(error) if is_damage(&error) => error,
        Err(error) => return Err(none_or_unavailable(error, &met).unwrap_or(met)),
        whole => return whole,
    };
    tracing::warn!(%error, "the copy came damaged too");
    let again = match second.second() {
        Ok(Some(again)) => read(again.as_ref()),
        Ok(None) => return Err(met),
        Err(error) => Err(error),
    };
    again.map_err(|error| none_or_unavailable(error, &met).unwrap_or(met))
}

/// The error that a network keeps the other way away; any other only means that there is none.
fn none_or_unavailable(error: EngineError, met: &EngineError) -> Option<EngineError> {
    match error {
        EngineError::Unavailable { what, why, hint } => {
            let met = met.to_string();
            let met = met.lines().next().unwrap_or_default();
            let why = format!("{why}; it was tried because the nearer copy is damaged: {met}");
            Some(EngineError::Unavailable { what, why, hint })
        }
        error => {
            tracing::warn!(%error, "the copy of a damaged shard cannot be read");
            None
        }
    }
}
