//! What keeps a store and its service apart: one clear line each, with a hint.

use std::time::Duration;

use dtr_engine::engine::GcOptions;
use dtr_engine::{Config, EngineError};

use crate::place::{Place, config_at, try_open};
use crate::server::{BUCKET, BUCKET_ELSEWHERE, OWNER, READER};
use crate::support::State;

/// The message of an error, without what differs from run to run.
fn told(error: &EngineError, place: &Place) -> String {
    let port = place.address().port().to_string();
    let mut text = error.to_string().replace(&port, "PORT");
    if let Some((before, after)) = text.split_once("rank-00000.") {
        let after = after.split_once(".shard").map_or("", |(_, after)| after);
        text = format!("{before}rank-00000.ATTEMPT.shard{after}");
    }
    text
}

fn refused(place: &Place, config: Config, user: (&str, &str)) -> String {
    told(&try_open(config, user).unwrap_err(), place)
}

#[test]
fn what_keeps_a_store_and_its_service_apart_is_told() {
    let Some(place) = Place::own("it compares the messages of the tests' own service") else {
        return;
    };
    let at = |store: &str| config_at(&place.url(), store);
    assert_eq!(
        refused(&place, at("s3://no-such-bucket/runs"), OWNER),
        "opening store `s3://no-such-bucket/runs`: NoSuchBucket, status 404\n\
         hint: check the bucket's name, or create it in this account and region"
    );
    assert_eq!(
        refused(&place, at(&format!("s3://{BUCKET_ELSEWHERE}/runs")), OWNER),
        "opening store `s3://elsewhere/runs`: PermanentRedirect: this bucket must be addressed \
         elsewhere\n\
         hint: the bucket is in `eu-west-1`: pass `s3={\"region\": \"eu-west-1\"}`, or set \
         AWS_REGION"
    );
    assert_eq!(
        refused(&place, at(&format!("s3://{BUCKET}/runs")), (OWNER.0, "another")),
        "opening store `s3://checkpoints/runs`: SignatureDoesNotMatch, status 403\n\
         hint: check the credentials: `aws sts get-caller-identity` shows whose they are"
    );
    assert_eq!(
        refused(&place, at(&format!("s3://{BUCKET}/runs")), ("nobody", "x")),
        "opening store `s3://checkpoints/runs`: NotSignedUp: Your account is not signed up\n\
         hint: check the credentials: `aws sts get-caller-identity` shows whose they are"
    );
}

#[test]
fn a_user_who_may_only_read_reads_and_is_told_at_the_first_write() {
    let Some(place) = Place::own("it compares the messages of the tests' own service") else {
        return;
    };
    let state = State::training(1, 0);
    let config = place.config();
    state.save(&try_open(config.clone(), OWNER).unwrap(), 1).unwrap();
    let engine = try_open(config, READER).unwrap();
    state.assert_equals(&engine.checkpoint(1).unwrap());
    let error = state.save(&engine, 2).unwrap_err();
    assert!(matches!(error, EngineError::Unavailable { .. }), "{error:?}");
    assert_eq!(
        told(&error, &place),
        "writing `s3://checkpoints/runs/store-0/step-000000000002/rank-00000.ATTEMPT.shard`: \
         AccessDenied: this user may only read\n\
         hint: allow this on the bucket and its keys: engine/docs/s3.md has the policy that \
         suffices"
    );
}

#[test]
fn a_user_who_may_not_list_uploads_is_told_of_everything_else_that_could_go() {
    let Some(place) = Place::own("it removes a manifest behind the service's back") else { return };
    let config = place.config();
    State::training(1, 0).save(&try_open(config.clone(), OWNER).unwrap(), 1).unwrap();
    let step = place.objects(&config).join("step-000000000001");
    std::fs::remove_file(step.join("manifest.json")).unwrap();
    let reader = try_open(Config { read_only: true, ..config }, READER).unwrap();
    let options = GcOptions { dry_run: true, grace: Some(Duration::ZERO) };
    assert_eq!(reader.gc(options).unwrap().removed.len(), 1);
}

#[test]
fn an_endpoint_where_nobody_answers_is_told_in_time() {
    let place = Place::new();
    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let mut config = config_at(&format!("http://{closed}"), "s3://checkpoints/runs");
    config.s3.attempts = 2;
    let error = try_open(config.clone(), OWNER).unwrap_err();
    assert!(matches!(error, EngineError::Unavailable { .. }), "{error:?}");
    let text = told(&error, &place).replace(&closed.to_string(), "ENDPOINT");
    assert!(text.starts_with("opening store `s3://checkpoints/runs`: "), "{text}");
    assert!(text.contains("Connection refused"), "{text}");
    assert!(text.contains("(endpoint http://ENDPOINT)\nhint: check `s3.endpoint_url`"), "{text}");

    config.s3.endpoint_url = Some("http://no-such-host.invalid:9000".into());
    let text = told(&try_open(config, OWNER).unwrap_err(), &place);
    assert!(text.contains("dns error"), "{text}");
    assert!(text.contains("(endpoint http://no-such-host.invalid:9000)"), "{text}");
}

#[test]
fn an_address_that_is_none_is_refused_before_anybody_is_asked() {
    let place = Place::new();
    assert_eq!(
        refused(&place, config_at("http://127.0.0.1:9", "s3://x//y"), OWNER),
        "setting `path` = `s3://x//y`: `x` is no bucket's name: 3 to 63 letters, digits, dots and \
         hyphens are expected\n\
         hint: name a bucket and, if it holds more than one store, a prefix: `s3://bucket/runs/gpt`"
    );
}
