//! Deleting on request: one checkpoint, or everything that no checkpoint needs.

use std::time::{Duration, SystemTime};

use serde::Serialize;

use super::Core;
use crate::recovery::{OrphanFile, StepState};
use crate::retention::plan_cleanup;
use crate::store::Space;
use crate::{EngineError, Result};

/// How [`crate::Engine::gc`] cleans.
#[derive(Clone, Copy, Debug, Default)]
pub struct GcOptions {
    /// Only say what would go.
    pub dry_run: bool,
    /// Instead of the configured grace period.
    pub grace: Option<Duration>,
}

/// What cleaning did, or would do.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct GcReport {
    /// What went.
    pub removed: Vec<GcItem>,
    /// What no checkpoint needs and stays for now.
    pub kept: Vec<GcItem>,
    /// Bytes that came back.
    pub freed_bytes: u64,
}

/// A file, or a retired checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct GcItem {
    /// The step.
    pub step: u64,
    /// The file in its directory; all of them if it is a retired checkpoint.
    pub file: Option<String>,
    /// Its length.
    pub bytes: u64,
    /// Seconds since anybody wrote it, by the store's clock.
    pub age_seconds: u64,
    /// Why it goes, or stays.
    pub why: String,
}

impl Core {
    /// Deletes one checkpoint; whatever it retired goes before it, or would exist again.
    pub(super) fn delete(&self, step: u64) -> Result<u64> {
        let freed_bytes = self.try_delete(step);
        // A part of it may be done, whatever came of the rest.
        self.note_change();
        freed_bytes
    }

    fn try_delete(&self, step: u64) -> Result<u64> {
        let survey = self.survey()?;
        self.check_exists(step)?;
        if let Some(StepState::Newer { why }) = survey.step(step).map(|step| &step.state) {
            return Err(EngineError::UnsupportedFormat {
                what: format!("deleting step {step} in `{}`", self.store.location()),
                why: why.clone(),
                hint: "delete it with the version that wrote it".into(),
            });
        }
        let mut freed_bytes = 0;
        for retired in survey.steps.iter().rev() {
            if retired.state == (StepState::Retired { by: step }) {
                freed_bytes +=
                    self.store.remove_checkpoint(retired.step, retired.attempt, Space::Now)?;
            }
        }
        let attempt = survey.step(step).and_then(|step| step.attempt);
        Ok(freed_bytes + self.store.remove_checkpoint(step, attempt, Space::Now)?)
    }

    pub(super) fn gc(&self, options: GcOptions) -> Result<GcReport> {
        let report = self.try_gc(options);
        if !options.dry_run {
            self.note_change();
        }
        report
    }

    fn try_gc(&self, options: GcOptions) -> Result<GcReport> {
        let survey = self.survey()?;
        let now = self.store.now()?;
        let grace = options.grace.unwrap_or(Duration::from_secs(self.config.gc_grace_seconds));
        let mut report = GcReport::default();
        for step in survey.steps.iter().rev() {
            if let StepState::Retired { by } = step.state {
                if !options.dry_run {
                    self.store.remove_checkpoint(step.step, step.attempt, Space::Now)?;
                }
                report.remove(GcItem {
                    step: step.step,
                    file: None,
                    bytes: step.bytes,
                    age_seconds: 0,
                    why: format!("retired by the rewind to step {by}"),
                });
            }
        }
        let old = plan_cleanup(&survey, now, grace);
        let orphans =
            survey.steps.iter().filter(|step| !matches!(step.state, StepState::Retired { .. }));
        for orphan in orphans.flat_map(|step| &step.orphans) {
            let age = now.duration_since(orphan.idle_since).unwrap_or_default();
            let item = |why: &str| item(orphan, age, why);
            if !old.contains(orphan) {
                let grace = grace.as_secs();
                report.kept.push(item(&format!("younger than the grace period of {grace} s")));
            } else if options.dry_run
                || self.store.remove_orphan(orphan.step, &orphan.file, Space::Now)?.is_some()
            {
                report.remove(item("of an attempt that was never committed, or was replaced"));
            } else {
                report.kept.push(item("an attempt in progress holds its lock"));
            }
        }
        self.gc_uploads(options, grace, now, &mut report)?;
        Ok(report)
    }

    /// Gives up what dead processes were uploading: no listing shows it, and it takes space.
    fn gc_uploads(
        &self,
        options: GcOptions,
        grace: Duration,
        now: SystemTime,
        report: &mut GcReport,
    ) -> Result<()> {
        for upload in self.store.unfinished_uploads(None)? {
            let age = now.duration_since(upload.last_active).unwrap_or_default();
            let item = |why: &str| GcItem {
                step: upload.step,
                file: Some(upload.file.clone()),
                bytes: upload.bytes,
                age_seconds: age.as_secs(),
                why: why.into(),
            };
            if age < grace {
                let grace = grace.as_secs();
                report.kept.push(item(&format!(
                    "an upload that is younger than the grace period of {grace} s"
                )));
            } else if options.dry_run || self.store.abort_upload(&upload)? {
                report.remove(item("an upload that was begun and never finished"));
            } else {
                report.kept.push(item("an upload in progress"));
            }
        }
        Ok(())
    }
}

impl GcReport {
    fn remove(&mut self, item: GcItem) {
        self.freed_bytes = self.freed_bytes.saturating_add(item.bytes);
        self.removed.push(item);
    }
}

fn item(orphan: &OrphanFile, age: Duration, why: &str) -> GcItem {
    GcItem {
        step: orphan.step,
        file: Some(orphan.file.clone()),
        bytes: orphan.bytes,
        age_seconds: age.as_secs(),
        why: why.into(),
    }
}
