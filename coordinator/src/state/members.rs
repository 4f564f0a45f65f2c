//! Who is in a job.
//!
//! A job has one rank after another filled by workers. `epoch` counts every join, leave and death
//! and never goes back; `fence` is the epoch of the newest *loss* (a leave, a death, a
//! replacement). A worker that fills an empty rank disturbs nobody, so who knows the membership up
//! to the fence is current.
//!
//! Always holds:
//! - a rank has at most one living worker, and a living worker one process (its incarnation);
//! - a process that was replaced, declared dead or left changes nothing any more; one that was
//!   taken for dead may come back to its rank, under a new incarnation, while nobody else holds it;
//! - a run ends when nobody of it lives; the next registration begins a new one.

use dtr_proto::v1::{self, ChangeKind, WorkerRecord, WorkerState};

use super::losses::Loss;
use super::{
    CHANGES_KEPT, Change, Context, Job, Key, Level, Refusal, RefusalKind, Reply, WORLD_SIZE_MAX,
};

/// A worker: what is kept of it, and what is only remembered.
#[derive(Debug, Default)]
pub(super) struct Member {
    pub(super) record: WorkerRecord,
    /// When it was heard of last, or died.
    pub(super) heard_ms: u64,
    pub(super) progress: u64,
    pub(super) progressed_ms: u64,
    pub(super) is_suspect: bool,
    pub(super) is_stalled: bool,
    /// The failure that its end is, or is part of; 0 if it is none.
    pub(super) failure: u64,
}

impl Member {
    pub(super) fn is_alive(&self) -> bool {
        self.record.state() == WorkerState::Alive
    }

    fn state(&self) -> WorkerState {
        match self.record.state() {
            WorkerState::Alive if self.is_suspect => WorkerState::Suspect,
            WorkerState::Alive if self.is_stalled => WorkerState::Stalled,
            state => state,
        }
    }

    fn hear(&mut self, now_ms: u64, progress: u64) {
        self.heard_ms = now_ms;
        self.is_suspect = false;
        if progress != self.progress {
            self.progress = progress;
            self.progressed_ms = now_ms;
            self.is_stalled = false;
        }
    }
}

impl Job {
    pub(super) fn register(
        &mut self,
        context: &mut Context<'_>,
        incarnation: u64,
        request: v1::RegisterRequest,
    ) -> Result<Reply, Refusal> {
        check_rank(&request)?;
        if let Some(member) = self.members.get_mut(&request.worker_id)
            && member.record.incarnation == request.incarnation
        {
            if !member.is_alive() {
                return Err(ended(&request.worker_id, &self.name));
            }
            member.heard_ms = context.at.now_ms;
            let epoch = member.record.joined_epoch;
            return Ok(self.welcome(context, incarnation, epoch));
        }
        let known = self.members.get(&request.worker_id);
        if known.is_some_and(|known| known.record.former_incarnation == request.incarnation) {
            return Err(ended(&request.worker_id, &self.name));
        }
        if request.rejoins == 0 {
            self.make_room(context, &request)?;
            self.renew_rank_of_given_up(request.rank);
        } else {
            self.check_may_rejoin(&request)?;
        }
        let epoch = self.join(context, request);
        Ok(self.welcome(context, incarnation, epoch))
    }

    /// Ends the last run or the worker's last process, if they stand in the way and may be ended.
    fn make_room(
        &mut self,
        context: &mut Context<'_>,
        request: &v1::RegisterRequest,
    ) -> Result<(), Refusal> {
        let is_known = self.members.get(&request.worker_id).is_some_and(Member::is_alive);
        let resizes = request.world_size != self.record.world_size;
        if self.holders.is_empty() {
            self.begin_run(context, request.world_size);
            return Ok(());
        }
        if resizes && !is_known {
            return Err(self.wrong_size(request.world_size));
        }
        if resizes {
            let reason = format!("a run of world size {} took the job over", request.world_size);
            self.lose_everybody(context, &reason);
            self.begin_run(context, request.world_size);
            return Ok(());
        }
        self.refuse_if_aborted()?;
        self.check_rank_is_free(context, request)?;
        if is_known {
            let worker_id = &request.worker_id;
            let reason = format!("a new process of `{worker_id}` took its place");
            let kind = ChangeKind::Replaced;
            self.lose(context, &Loss { worker_id, kind, reason });
            self.refuse_if_aborted()?;
        }
        Ok(())
    }

    /// Lets a process that was taken for dead have its rank again, in the same run and while nobody
    /// else has it: with what it holds in memory nothing was lost.
    fn check_may_rejoin(&self, request: &v1::RegisterRequest) -> Result<(), Refusal> {
        self.refuse_if_aborted()?;
        let is_same = |member: &Member| {
            let WorkerRecord { incarnation, rank, .. } = member.record;
            (incarnation, rank) == (request.rejoins, request.rank)
                && member.record.state() == WorkerState::Dead
        };
        let is_known = self.members.get(&request.worker_id).is_some_and(is_same);
        let is_taken = self.holders.contains_key(&request.rank);
        if is_known && !is_taken && request.world_size == self.record.world_size {
            return Ok(());
        }
        Err(replaced(&request.worker_id))
    }

    fn check_rank_is_free(
        &self,
        context: &Context<'_>,
        request: &v1::RegisterRequest,
    ) -> Result<(), Refusal> {
        let rank = request.rank;
        if let Some(holder) = self.holders.get(&rank)
            && *holder != request.worker_id
        {
            let ip = &self.members[holder].record.ip;
            return Err(Refusal::new(
                RefusalKind::Conflict,
                format!("rank {rank} of job `{}` is held by `{holder}` at `{ip}`", self.name),
                "give each worker its own rank, or wait until that worker has ended",
            ));
        }
        for (worker_id, member) in self.members.iter().filter(|(_, m)| m.record.rank == rank) {
            let free_ms = member.heard_ms.saturating_add(context.policy.failure_backoff_ms);
            let is_kept = member.record.state() == WorkerState::Dead && context.at.now_ms < free_ms;
            if is_kept && *worker_id != request.worker_id {
                let left_ms = free_ms - context.at.now_ms;
                return Err(Refusal::new(
                    RefusalKind::Conflict,
                    format!("rank {rank} is kept for `{worker_id}` for another {left_ms} ms"),
                    "wait, or lower `failure_backoff_ms`",
                ));
            }
        }
        Ok(())
    }

    /// Forgets the last run. Failures stay counted where the same job just starts over.
    fn begin_run(&mut self, context: &mut Context<'_>, world_size: u32) {
        let finished = self.members.values().all(|m| m.record.state() == WorkerState::Left);
        let was_aborted = !self.record.abort_reason.is_empty();
        if finished || was_aborted || world_size != self.record.world_size {
            self.forgive();
        }
        for worker_id in std::mem::take(&mut self.members).into_keys() {
            let key = Key::Worker { job: self.name.clone(), worker_id };
            context.effects.changes.push(Change::remove(key));
        }
        self.forget_barriers(context);
        self.forget_attempts(context, "a new run of the job began");
        self.record.run += 1;
        self.record.world_size = world_size;
        self.record.abort_reason.clear();
    }

    fn join(&mut self, context: &mut Context<'_>, request: v1::RegisterRequest) -> u64 {
        let v1::RegisterRequest { worker_id, incarnation, rank, ip, port, .. } = request;
        self.drop_former_holders(context, rank, &worker_id);
        let former = self.members.get(&worker_id);
        let former_incarnation = former.map_or(0, |former| former.record.incarnation);
        let failure = former.map_or(0, |former| former.failure);
        if request.rejoins != 0 {
            self.take_back(failure);
        }
        self.record.epoch += 1;
        let record = WorkerRecord {
            incarnation,
            rank,
            ip,
            port,
            advertise_address: request.advertise_address,
            joined_epoch: self.record.epoch,
            state: WorkerState::Alive.into(),
            former_incarnation,
        };
        let now_ms = context.at.now_ms;
        let member =
            Member { record, heard_ms: now_ms, progressed_ms: now_ms, ..Member::default() };
        self.holders.insert(rank, worker_id.clone());
        self.members.insert(worker_id.clone(), member);
        self.keep_member(context, &worker_id);
        self.keep_job(context);
        self.log(&worker_id, rank, ChangeKind::Joined, String::new());
        let (alive, world) = (self.holders.len(), self.record.world_size);
        let text = format!("`{worker_id}` joined as rank {rank}: {alive} of {world} are there");
        self.note(context, Level::Info, text);
        self.record.epoch
    }

    /// Those who held the rank before are history once it is taken again.
    fn drop_former_holders(&mut self, context: &mut Context<'_>, rank: u32, worker_id: &str) {
        let is_former = |id: &String, member: &Member| {
            member.record.rank == rank && !member.is_alive() && id != worker_id
        };
        let former: Vec<String> = self
            .members
            .iter()
            .filter(|(id, member)| is_former(id, member))
            .map(|(id, _)| id.clone())
            .collect();
        for worker_id in former {
            self.members.remove(&worker_id);
            let key = Key::Worker { job: self.name.clone(), worker_id };
            context.effects.changes.push(Change::remove(key));
        }
    }

    fn welcome(&self, context: &Context<'_>, incarnation: u64, epoch: u64) -> Reply {
        let policy = context.policy;
        Reply::Register(v1::RegisterReply {
            epoch,
            coordinator_incarnation: incarnation,
            heartbeat_interval_ms: policy.heartbeat_interval_ms,
            heartbeat_timeout_ms: policy.heartbeat_timeout_ms,
            run: self.record.run,
            settings: policy.settings.clone().into_iter().collect(),
        })
    }

    pub(super) fn heartbeat(
        &mut self,
        context: &mut Context<'_>,
        incarnation: u64,
        request: &v1::HeartbeatRequest,
    ) -> Result<Reply, Refusal> {
        let worker_id = self.member_of(request.identity.as_ref())?.0;
        let known_epoch = request.identity.as_ref().map_or(0, |identity| identity.epoch);
        self.heartbeat_count += 1;
        let member = self.members.get_mut(&worker_id).expect("it was just found");
        member.hear(context.at.now_ms, request.progress);
        let changes = if known_epoch == self.record.epoch {
            Vec::new()
        } else {
            self.log.iter().filter(|change| change.epoch > known_epoch).cloned().collect()
        };
        Ok(Reply::Heartbeat(v1::HeartbeatReply {
            epoch: self.record.epoch,
            fence: self.record.fence,
            coordinator_incarnation: incarnation,
            abort_reason: self.record.abort_reason.clone(),
            changes,
        }))
    }

    pub(super) fn leave(
        &mut self,
        context: &mut Context<'_>,
        request: &v1::LeaveRequest,
    ) -> Result<Reply, Refusal> {
        match self.member_of(request.identity.as_ref()) {
            Ok((worker_id, _)) => {
                let (kind, reason) = if request.failure.is_empty() {
                    (ChangeKind::Left, "it finished".to_owned())
                } else {
                    (ChangeKind::Failed, request.failure.clone())
                };
                let worker_id = &worker_id;
                self.lose(context, &Loss { worker_id, kind, reason });
            }
            // It is gone already: by this call, sent twice, or by its death.
            Err(refusal) if refusal.kind == RefusalKind::Fenced => {}
            Err(refusal) => return Err(refusal),
        }
        Ok(Reply::Leave(v1::LeaveReply { epoch: self.record.epoch }))
    }

    pub(super) fn list_workers(&self, context: &Context<'_>) -> Reply {
        let mut workers: Vec<v1::Worker> = self
            .members
            .iter()
            .map(|(worker_id, member)| v1::Worker {
                worker_id: worker_id.clone(),
                rank: member.record.rank,
                ip: member.record.ip.clone(),
                port: member.record.port,
                advertise_address: member.record.advertise_address.clone(),
                state: member.state().into(),
                silent_ms: context.at.now_ms.saturating_sub(member.heard_ms),
                progress: member.progress,
                joined_epoch: member.record.joined_epoch,
            })
            .collect();
        workers.sort_by(|a, b| (a.rank, &a.worker_id).cmp(&(b.rank, &b.worker_id)));
        Reply::Workers(v1::ListWorkersReply {
            workers,
            epoch: self.record.epoch,
            world_size: self.record.world_size,
        })
    }

    /// The worker that `identity` is, and its rank, if it is a living member.
    pub(super) fn member_of(
        &self,
        identity: Option<&v1::Identity>,
    ) -> Result<(String, u32), Refusal> {
        let Some(identity) = identity else { return Err(Refusal::unregistered(&self.name)) };
        let Some(member) = self.members.get(&identity.worker_id) else {
            return Err(Refusal::unregistered(&self.name));
        };
        if member.record.incarnation != identity.incarnation {
            return Err(replaced(&identity.worker_id));
        }
        if !member.is_alive() {
            return Err(ended(&identity.worker_id, &self.name));
        }
        Ok((identity.worker_id.clone(), member.record.rank))
    }

    /// As [`Job::member_of`], for a member that knows of the newest loss.
    pub(super) fn current_member_of(
        &self,
        identity: Option<&v1::Identity>,
    ) -> Result<(String, u32), Refusal> {
        let found = self.member_of(identity)?;
        let known_epoch = identity.map_or(0, |identity| identity.epoch);
        if known_epoch < self.record.fence {
            return Err(Refusal::new(
                RefusalKind::StaleEpoch,
                format!(
                    "job `{}` lost a worker since epoch {known_epoch}: {}",
                    self.name,
                    self.newest_loss()
                ),
                "decide whether to go on without it, then call again",
            ));
        }
        Ok(found)
    }

    /// Ends the job for everybody, once.
    pub(super) fn abort(&mut self, context: &mut Context<'_>, reason: &str) {
        if !self.record.abort_reason.is_empty() {
            return;
        }
        reason.clone_into(&mut self.record.abort_reason);
        self.keep_job(context);
        self.note(context, Level::Warn, format!("the job is aborted: {reason}"));
        self.abort_barriers(context, reason);
        self.forget_attempts(context, &format!("the job is aborted: {reason}"));
    }

    pub(super) fn abort_by_operator(&mut self, context: &mut Context<'_>, reason: &str) -> Reply {
        self.abort(context, &format!("an operator aborted it: {reason}"));
        Reply::Done
    }

    pub(super) fn restore_member(&mut self, worker_id: String, record: WorkerRecord) {
        // The machine's time begins again with it: everybody was heard of at 0.
        let member = Member { record, ..Member::default() };
        if member.is_alive() {
            self.holders.insert(member.record.rank, worker_id.clone());
        }
        self.members.insert(worker_id, member);
    }

    pub(super) fn count_state(&self, state: WorkerState) -> usize {
        self.members.values().filter(|member| member.state() == state).count()
    }

    fn wrong_size(&self, world_size: u32) -> Refusal {
        let (alive, current) = (self.holders.len(), self.record.world_size);
        Refusal::new(
            RefusalKind::Conflict,
            format!(
                "job `{}` runs with world size {current} and has {alive} living workers; this one \
                 asks for world size {world_size}",
                self.name
            ),
            "give the other run a name of its own (`job=`), or end its workers first",
        )
    }

    pub(super) fn keep_member(&self, context: &mut Context<'_>, worker_id: &str) {
        let key = Key::Worker { job: self.name.clone(), worker_id: worker_id.to_owned() };
        context.effects.changes.push(Change::put(key, &self.members[worker_id].record));
    }

    pub(super) fn log(&mut self, worker_id: &str, rank: u32, kind: ChangeKind, reason: String) {
        if self.log.len() == CHANGES_KEPT {
            self.log.pop_front();
        }
        self.log.push_back(v1::MembershipChange {
            epoch: self.record.epoch,
            worker_id: worker_id.to_owned(),
            rank,
            kind: kind.into(),
            reason,
        });
    }
}

fn check_rank(request: &v1::RegisterRequest) -> Result<(), Refusal> {
    let v1::RegisterRequest { rank, world_size, .. } = request;
    if *world_size == 0 || *world_size > WORLD_SIZE_MAX {
        return Err(Refusal::new(
            RefusalKind::Invalid,
            format!("`world_size` is {world_size}, 1 to {WORLD_SIZE_MAX} is allowed"),
            "set WORLD_SIZE, or pass `world_size=`, to the number of workers",
        ));
    }
    if rank >= world_size {
        return Err(Refusal::new(
            RefusalKind::Invalid,
            format!("`rank` is {rank}, below the world size of {world_size} is allowed"),
            "ranks count from 0: set RANK, or pass `rank=`",
        ));
    }
    Ok(())
}

fn replaced(worker_id: &str) -> Refusal {
    Refusal::new(
        RefusalKind::Fenced,
        format!("another process took the place of `{worker_id}`"),
        "end this process, or give its worker an id of its own",
    )
}

pub(super) fn ended(worker_id: &str, job: &str) -> Refusal {
    Refusal::new(
        RefusalKind::Fenced,
        format!("this process of `{worker_id}` left job `{job}`, or was declared dead"),
        "it registers again by itself with its next heartbeat, unless it left: then \
         `await orchestrator.register_worker(ip, port)`",
    )
}
