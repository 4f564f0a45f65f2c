//! The commit: a manifest becomes visible, once, whole and for good.
//!
//! ```text
//! shards there? -> what stands? -> put, if nothing (or that version) stands -> visible, durable
//!                       ^                       |
//!                       +-- 409, 412, no answer-+
//! ```
//!
//! Always holds: one of several writers of a step wins; where the service ignores conditions, what
//! stands after the put decides instead, and that is logged once. An attempt whose put may still
//! take effect is remembered, and its shard is kept.

use super::error::Failure;
use super::objects::{Asked, Condition};
use super::{Client, Shared, remove};
use crate::format::names::{AttemptId, shard_file_name};
use crate::store::Publication;
use crate::store::publication::{Action, Standing, decide};
use crate::{EngineError, Result};

/// An empty object that shows whether the service obeys conditions: putting it where it stands must
/// fail. It stays, so that asking again costs one request.
const PROBE: &str = "conditional-put.probe";

/// Publishes; see [`crate::store::Store::publish`].
pub(super) fn publish(shared: &Shared, publication: Publication<'_>) -> Result<()> {
    check_shards(shared, publication)?;
    let obeys = obeys_conditions(shared)?;
    let key = shared.manifest_key(publication.step);
    let what = shared.naming("publishing", &key);
    let mut attempt = 1;
    loop {
        let (standing, tag) = look(shared, publication)?;
        let condition = match decide(&standing, publication)? {
            Action::Nothing => return Ok(()),
            _ if !obeys => Condition::Always,
            Action::New => Condition::Absent,
            Action::Replace => Condition::Tag(tag),
        };
        let retries = shared.client.watch.retries();
        let put = shared.ask_raw(&what, shared.put(&key, publication.manifest, &condition))?;
        if put.is_err() && shared.client.watch.retries() > retries {
            // The answer is to the last of several attempts: an earlier one may yet take effect.
            shared.own().uncertain.insert(publication.attempt);
        }
        match put {
            Ok(()) if obeys => return Ok(()),
            Ok(()) => return read_after_write(shared, publication),
            Err(failure) if attempt < shared.client.settings.attempts && failure.is_race() => {
                std::thread::sleep(Client::pause(attempt));
                attempt += 1;
            }
            Err(failure) => return after_failure(shared, publication, &what, failure),
        }
    }
}

/// What stands at a step, as seen by an attempt, and the tag of that version.
fn look(shared: &Shared, publication: Publication<'_>) -> Result<(Standing, String)> {
    let Publication { step, attempt, .. } = publication;
    let what = shared.naming("reading", &shared.manifest_key(step));
    let object = shared.ask(&what, shared.get_manifest(step))?;
    let bytes = object.as_ref().map(|object| object.bytes.as_slice());
    let standing = Standing::of(bytes, step, attempt);
    Ok((standing, object.map(|object| object.tag).unwrap_or_default()))
}

/// The put failed. It may have taken effect, and may yet do so.
fn after_failure(
    shared: &Shared,
    publication: Publication<'_>,
    what: &str,
    failure: Failure,
) -> Result<()> {
    shared.own().uncertain.insert(publication.attempt);
    match look(shared, publication) {
        Ok((Standing::Ours, _)) => Ok(()),
        Ok((standing @ Standing::Other(_), _)) => {
            decide(&standing, publication)?;
            Err(shared.refused(what, failure))
        }
        _ => Err(shared.refused(what, failure)),
    }
}

/// Where conditions are ignored, another writer may have put its manifest over ours.
fn read_after_write(shared: &Shared, publication: Publication<'_>) -> Result<()> {
    let (standing, _) = look(shared, publication)?;
    match decide(&standing, Publication { replaces: None, ..publication })? {
        Action::Nothing => Ok(()),
        Action::New | Action::Replace => Err(EngineError::Unavailable {
            what: shared.naming("publishing", &shared.manifest_key(publication.step)),
            why: "the manifest was put, and is not there".into(),
            hint: "a service that forgets what it confirmed cannot hold checkpoints: look at its \
                   log"
            .into(),
        }),
    }
}

/// What is known of `step` for one that gives up: whether a manifest may name its shard.
pub(super) fn may_be_published(shared: &Shared, step: u64, attempt: AttemptId) -> bool {
    if shared.own().uncertain.contains(&attempt) {
        return true;
    }
    let object = shared.client.block_on(shared.get_manifest(step));
    object.map_or(true, |object| {
        let bytes = object.as_ref().map(|object| object.bytes.as_slice());
        Standing::of(bytes, step, attempt).may_be_ours()
    })
}

/// Checks that all shards exist whole: at one by its own request, at several by a listing.
fn check_shards(shared: &Shared, publication: Publication<'_>) -> Result<()> {
    let several = if let [_, _, ..] = publication.shards {
        let what = format!("looking for the shards of step {}", publication.step);
        Some(remove::shards_there(shared, &what, publication.step)?)
    } else {
        None
    };
    for (shard, expected_bytes) in publication.shards {
        let key = shared.shard_key(*shard);
        let what = shared.naming("publishing a manifest that names", &key);
        let bytes = match &several {
            Some(there) => there.get(&shard_file_name(shard.rank, shard.attempt)).copied(),
            None => shared.ask(&what, shared.length(&key))?,
        };
        match bytes {
            Some(bytes) if bytes == *expected_bytes => {}
            Some(bytes) => {
                return Err(EngineError::corrupt(
                    format!("s3://{}/{key}", shared.address.bucket()),
                    format!(
                        "it has {bytes} bytes just before it is published, and {expected_bytes} \
                         were written"
                    ),
                ));
            }
            None => {
                return Err(EngineError::Unavailable {
                    what,
                    why: "it is not there".into(),
                    hint:
                        "was it deleted by hand, by a lifecycle rule, or by another writer? Save \
                           again"
                            .into(),
                });
            }
        }
    }
    Ok(())
}

fn obeys_conditions(shared: &Shared) -> Result<bool> {
    if let Some(obeys) = shared.obeys_conditions.get() {
        return Ok(*obeys);
    }
    let key = shared.address.key(PROBE);
    let what = shared.naming("asking whether conditions are obeyed with", &key);
    let obeys = shared.ask(&what, probe(shared, &key))?;
    if shared.obeys_conditions.set(obeys).is_ok() && !obeys {
        tracing::warn!(
            store = %shared.address,
            endpoint = shared.client.endpoint(),
            "the service ignores `If-None-Match`: two writers of one step are told apart only by \
             reading back, so let a store have one writer"
        );
    }
    Ok(obeys)
}

/// Puts an object where it stands: at the latest the second time that must be refused.
async fn probe(shared: &Shared, key: &str) -> Asked<bool> {
    for _ in 0..2 {
        match shared.put(key, &[], &Condition::Absent).await {
            Ok(()) => {}
            Err(failure) if failure.is_race() => return Ok(true),
            Err(failure) if failure.is_unknown() => return Ok(false),
            Err(failure) => return Err(failure),
        }
    }
    Ok(false)
}
