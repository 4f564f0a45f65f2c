//! A worker's part in a checkpoint of all ranks: begin, report, publish where asked, commit.
//!
//! Always holds: each call may be sent again, and is, while the coordinator is away and patience
//! lasts; what is waited for ends when the attempt does, which the coordinator sees to.

use std::sync::Arc;
use std::time::Duration;

use tonic::{Response, Status};

use super::connection::{Pending, Wait};
use super::error::{ClientError, ErrorKind};
use super::worker::Worker;
use crate::v1::checkpoints_client::CheckpointsClient;
use crate::v1::{self, shard_outcome::Outcome};

/// What a rank says of its part in an attempt.
#[derive(Clone, Debug, PartialEq)]
pub struct ShardReport {
    /// Its durable shard.
    pub shard: v1::Shard,
    /// Whether each rank publishes in a store of its own; the same on every rank.
    pub own_store: bool,
    /// Checksum of the manifest that is durable there.
    pub published_crc32c: Option<u32>,
    /// With a store of its own: checksum of the structure of the replicated entries.
    pub replicated_crc32c: Option<u32>,
}

/// What became of an attempt, for one rank.
#[derive(Clone, Debug, PartialEq)]
pub enum ShardOutcome {
    /// This rank publishes the manifest, which names these shards, and commits; in a store of its
    /// own, it reports again instead.
    Publish(Vec<v1::Shard>),
    /// The checkpoint is committed.
    Committed(v1::Commit),
    /// The attempt was given up.
    Aborted(v1::AttemptAborted),
}

/// What came of the offers of all ranks.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Agreement {
    /// The newest step that every rank can load.
    pub step: Option<u64>,
    /// Without one: what keeps a rank from loading, if anything does.
    pub hindrance: Option<v1::Hindrance>,
    /// How many ranks offered a step.
    pub offering: u32,
}

impl Worker {
    /// Begins the save of a step, or joins it. A loss that this worker had not heard of is no
    /// obstacle: whether a save can still be complete, the coordinator says.
    pub fn begin_checkpoint(&self, step: u64, rewind: bool) -> Pending<v1::BeginCheckpointReply> {
        let what = format!("beginning to save step {step} with all ranks");
        let (shared, inner) = (Arc::clone(&self.shared), Arc::clone(self.connection.inner()));
        let (name, tries) = (what.clone(), self.next_try(step));
        let known_epoch = self.known_epoch();
        self.connection.start(&what, async move {
            shared.check(&name)?;
            let call = |channel, request| async move {
                CheckpointsClient::new(channel).begin_checkpoint(request).await
            };
            let request = || v1::BeginCheckpointRequest {
                identity: Some(shared.acknowledged_identity()),
                step,
                rewind,
                tries,
                known_epoch,
            };
            let ask = async || {
                let reply = inner.ask(&name, Wait::Short, request(), call).await;
                shared.learn(&inner, reply).await
            };
            let has_changed = |error: &ClientError| error.kind == ErrorKind::MembershipChanged;
            let mut reply = ask().await;
            // The same try: it is told if the others have given that up meanwhile. Who comes back
            // is also notified of its loss.
            for _ in 0..2 {
                if reply.as_ref().is_err_and(has_changed) || shared.is_back_after(&reply).await {
                    reply = ask().await;
                }
            }
            reply
        })
    }

    /// Reports a durable shard, and waits for what becomes of the attempt: a worker that is taken
    /// for dead meanwhile and comes back asks again.
    pub fn report_shard(
        &self,
        step: u64,
        attempt: &str,
        report: ShardReport,
    ) -> Pending<ShardOutcome> {
        let what = format!("waiting for all ranks to save step {step}");
        let (worker, inner) = (Arc::clone(&self.shared), Arc::clone(self.connection.inner()));
        let (name, attempt) = (what.clone(), attempt.to_owned());
        self.connection.start(&what, async move {
            worker.check(&name)?;
            let request = || v1::ReportShardRequest {
                identity: Some(worker.acknowledged_identity()),
                step,
                attempt: attempt.clone(),
                shard: Some(report.shard.clone()),
                own_store: report.own_store,
                published_crc32c: report.published_crc32c,
                replicated_crc32c: report.replicated_crc32c,
            };
            let call = |channel, request| async move {
                let reply = CheckpointsClient::new(channel).report_shard(request).await?;
                outcome_of(reply.into_inner()).await.map(Response::new)
            };
            let ask = async || {
                let reply = inner.ask(&name, Wait::Long, request(), call).await;
                worker.learn(&inner, reply).await
            };
            let reply = ask().await;
            if worker.is_back_after(&reply).await { ask().await } else { reply }
        })
    }

    /// Says that the manifest is durable.
    pub fn commit_checkpoint(
        &self,
        step: u64,
        attempt: &str,
        manifest_crc32c: u32,
    ) -> Pending<v1::CommitCheckpointReply> {
        let request = v1::CommitCheckpointRequest {
            identity: Some(self.identity()),
            step,
            attempt: attempt.to_owned(),
            manifest_crc32c,
        };
        let what = format!("committing step {step}");
        self.connection.ask(&what, request, |channel, request| async move {
            CheckpointsClient::new(channel).commit_checkpoint(request).await
        })
    }

    /// Gives an attempt up on every rank, for this reason; `unpublished` says that this rank, if it
    /// was asked to publish the manifest, did not and will not.
    pub fn abort_checkpoint(
        &self,
        step: u64,
        attempt: &str,
        reason: &str,
        unpublished: bool,
    ) -> Pending<v1::AbortCheckpointReply> {
        let request = v1::AbortCheckpointRequest {
            identity: Some(self.identity()),
            step,
            attempt: attempt.to_owned(),
            reason: super::worker::shortened(reason),
            unpublished,
        };
        let what = format!("giving up the save of step {step}");
        self.connection.ask(&what, request, |channel, request| async move {
            CheckpointsClient::new(channel).abort_checkpoint(request).await
        })
    }

    /// Waits until every rank has offered the steps that it can load, each with its attempt, and
    /// said what keeps it from more, if anything does, and whether it gives up for that.
    pub fn agree_step(
        &self,
        offered: Vec<(u64, String)>,
        (hindrance, gives_up): (&str, bool),
        timeout: Duration,
    ) -> Pending<Agreement> {
        let what = "agreeing with all ranks on the step to load";
        let (shared, inner) = (Arc::clone(&self.shared), Arc::clone(self.connection.inner()));
        let arrival = self.next_arrival();
        let hindrance = super::worker::shortened(hindrance);
        let (steps, attempts) = offered.into_iter().unzip();
        self.connection.start(what, async move {
            shared.check(what)?;
            let request = v1::AgreeStepRequest {
                identity: Some(shared.acknowledged_identity()),
                arrival,
                steps,
                attempts,
                hindrance,
                gives_up,
                timeout_ms: u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX),
            };
            let call = |channel, request| async move {
                CheckpointsClient::new(channel).agree_step(request).await
            };
            let reply = inner.ask(what, Wait::Long, request, call).await;
            let (waited, agreement) = match reply {
                Ok(reply) => {
                    let v1::AgreeStepReply { waited, step, hindrance, offering } = reply;
                    (Ok(waited.unwrap_or_default()), Agreement { step, hindrance, offering })
                }
                Err(error) => (Err(error), Agreement::default()),
            };
            shared.barrier_outcome(&inner, what, timeout, waited).await?;
            Ok(agreement)
        })
    }
}

/// Puts the parts together that a publisher gets.
async fn outcome_of(
    mut stream: tonic::Streaming<v1::ShardOutcome>,
) -> Result<ShardOutcome, Status> {
    let mut shards = Vec::new();
    while let Some(message) = stream.message().await? {
        match message.outcome {
            Some(Outcome::Publish(part)) => {
                shards.extend(part.shards);
                if part.is_last {
                    return Ok(ShardOutcome::Publish(shards));
                }
            }
            Some(Outcome::Committed(commit)) => return Ok(ShardOutcome::Committed(commit)),
            Some(Outcome::Aborted(aborted)) => return Ok(ShardOutcome::Aborted(aborted)),
            None => break,
        }
    }
    // A coordinator that ends dropped it: the report is sent again.
    Err(Status::unavailable("the coordinator ended the call before the attempt had ended"))
}
