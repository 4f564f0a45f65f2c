//! [`Ranks`] by way of a coordinator and a registered worker.

use std::sync::Arc;
use std::time::Duration;

use dtr_proto::client::{
    Agreement, ClientError, ErrorKind, Pending, ShardOutcome, ShardReport, Worker,
};
use dtr_proto::v1;

use super::{Agreed, Attempt, Begun, Hindrance, Outcome, Ranks, Report};
use crate::error::CoordinationKind;
use crate::format::checksum;
use crate::format::manifest::ShardEntry;
use crate::format::names::AttemptId;
use crate::{EngineError, Result};

/// How often a wait looks whether it was cancelled.
const LOOK: Duration = Duration::from_millis(50);
/// How long a cancelled wait waits for the coordinator to say what became of the attempt.
const FAREWELL: Duration = Duration::from_secs(10);

/// A worker among the ranks of its job.
#[derive(Debug)]
pub struct Coordinated {
    worker: Arc<Worker>,
    world_size: u32,
}

impl Coordinated {
    /// `world_size` is what this rank was configured with.
    pub fn new(worker: Arc<Worker>, world_size: u32) -> Self {
        Self { worker, world_size }
    }

    fn check_world_size(&self, counted: u32) -> Result<()> {
        if counted == self.world_size {
            return Ok(());
        }
        Err(EngineError::invalid(
            format!("setting `world_size` = {}", self.world_size),
            format!("the job has {counted} ranks"),
            "start every rank with the same world size",
        ))
    }
}

impl Ranks for Coordinated {
    fn begin(&self, step: u64) -> Result<Begun> {
        // Whether the step may be saved is decided by what is in the store, as for one rank.
        let begun = self.worker.begin_checkpoint(step, true).join().map_err(error_of)?;
        let attempt = AttemptId::parse(&begun.attempt).ok_or_else(|| {
            EngineError::internal(
                format!("beginning to save step {step}"),
                format!("the coordinator named the attempt `{}`", begun.attempt),
            )
        })?;
        if let Err(error) = self.check_world_size(begun.world_size) {
            self.abort(Attempt { step, id: attempt }, &error.to_string(), true)?;
            return Err(error);
        }
        Ok(Begun { attempt, created_unix_ms: begun.created_unix_ms })
    }

    fn report(
        &self,
        attempt: Attempt,
        report: Report<'_>,
        is_cancelled: &dyn Fn() -> bool,
    ) -> Result<Outcome> {
        let id = attempt.id.to_string();
        let Report { shard, own_store, published_crc32c, replicated_crc32c, annotations } = report;
        let shard = v1::Shard { annotations: annotations.to_vec(), ..shard_of(shard)? };
        let report = ShardReport { shard, own_store, published_crc32c, replicated_crc32c };
        let pending = self.worker.report_shard(attempt.step, &id, report);
        let outcome = loop {
            if let Some(outcome) = pending.wait(LOOK) {
                break outcome;
            }
            if is_cancelled() {
                break self.give_up(attempt, &pending);
            }
        };
        match outcome.map_err(error_of)? {
            ShardOutcome::Publish(mut shards) => {
                let annotations =
                    shards.first_mut().map(|first| std::mem::take(&mut first.annotations));
                Ok(Outcome::Publish {
                    shards: shards.into_iter().map(entry_of).collect(),
                    annotations: annotations.unwrap_or_default(),
                })
            }
            ShardOutcome::Committed(_) => Ok(Outcome::Committed),
            ShardOutcome::Aborted(aborted) => Ok(Outcome::Aborted {
                why: aborted.reason,
                may_be_published: aborted.may_be_published,
            }),
        }
    }

    fn commit(&self, attempt: Attempt, manifest_crc32c: u32) -> Result<bool> {
        let id = attempt.id.to_string();
        match self.worker.commit_checkpoint(attempt.step, &id, manifest_crc32c).join() {
            Ok(_) => Ok(true),
            Err(error) if error.kind == ErrorKind::Incomplete => Ok(false),
            Err(error) => Err(error_of(error)),
        }
    }

    fn abort(&self, attempt: Attempt, reason: &str, is_unpublished: bool) -> Result<()> {
        let id = attempt.id.to_string();
        let aborting = self.worker.abort_checkpoint(attempt.step, &id, reason, is_unpublished);
        aborting.join().map(drop).map_err(error_of)
    }

    fn agree(
        &self,
        offered: &[Attempt],
        hindrance: Hindrance<'_>,
        timeout: Duration,
    ) -> Result<Agreed> {
        let offered = offered.iter().map(|offer| (offer.step, offer.id.to_string())).collect();
        let hindrance = match hindrance {
            Hindrance::None => ("", false),
            Hindrance::Damage(why) => (why, false),
            Hindrance::GivesUp(why) => (why, true),
        };
        let agreed = self.worker.agree_step(offered, hindrance, timeout).join();
        let Agreement { step, hindrance, offering } = agreed.map_err(error_of)?;
        Ok(match (step, hindrance) {
            (Some(step), _) => Agreed::Step(step),
            (None, None) => Agreed::Nothing { offering },
            (None, Some(v1::Hindrance { rank, why, gave_up })) => {
                Agreed::Hindered { rank, why, gave_up }
            }
        })
    }
}

impl Coordinated {
    /// Gives the attempt up. Others may have been faster: what the coordinator answers counts.
    fn give_up(
        &self,
        attempt: Attempt,
        pending: &Pending<ShardOutcome>,
    ) -> std::result::Result<ShardOutcome, ClientError> {
        let id = attempt.id.to_string();
        let why = "the save was cancelled";
        let aborting = self.worker.abort_checkpoint(attempt.step, &id, why, false);
        pending.wait(FAREWELL).unwrap_or_else(|| {
            drop(aborting);
            Err(ClientError {
                kind: ErrorKind::Unavailable,
                what: format!("cancelling the save of step {}", attempt.step),
                why: "the coordinator does not say what became of it".into(),
                hint: "list the checkpoints: one that has a manifest exists".into(),
            })
        })
    }
}

fn shard_of(entry: &ShardEntry) -> Result<v1::Shard> {
    let footer_crc32c = checksum::from_hex(&entry.footer_crc32c)
        .ok_or_else(|| EngineError::internal("reporting a shard", "its checksum is malformed"))?;
    Ok(v1::Shard {
        rank: entry.rank,
        file: entry.file.clone(),
        bytes: entry.bytes,
        raw_bytes: entry.raw_bytes,
        footer_crc32c,
        replicated: entry.replicated.clone(),
        annotations: Vec::new(),
    })
}

fn entry_of(shard: v1::Shard) -> ShardEntry {
    ShardEntry {
        bytes: shard.bytes,
        file: shard.file,
        footer_crc32c: checksum::to_hex(shard.footer_crc32c),
        rank: shard.rank,
        raw_bytes: shard.raw_bytes,
        replicated: shard.replicated,
    }
}

fn error_of(error: ClientError) -> EngineError {
    let ClientError { kind, what, why, hint } = error;
    let kind = match kind {
        ErrorKind::Unavailable => CoordinationKind::Unavailable,
        ErrorKind::Unauthenticated => CoordinationKind::Unauthenticated,
        ErrorKind::Conflict => CoordinationKind::Conflict,
        ErrorKind::Fenced => CoordinationKind::Fenced,
        ErrorKind::MembershipChanged => CoordinationKind::MembershipChanged,
        ErrorKind::JobAborted => CoordinationKind::JobAborted,
        ErrorKind::TimedOut => CoordinationKind::TimedOut,
        ErrorKind::AttemptAborted => CoordinationKind::SaveAborted,
        ErrorKind::Invalid | ErrorKind::NotFound => {
            return EngineError::InvalidArgument { what, why, hint };
        }
        ErrorKind::AlreadyCommitted => return EngineError::StepConflict { what, why, hint },
        ErrorKind::Closed => return EngineError::Closed { what, why, hint },
        ErrorKind::Incomplete | ErrorKind::Internal => {
            return EngineError::Internal { what, why, hint };
        }
    };
    EngineError::Coordination { kind, what, why, hint }
}
