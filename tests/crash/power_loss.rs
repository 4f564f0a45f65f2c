//! Any legal reordering or tearing recovers: the power fails at every point of recorded histories,
//! and what is left of what was not synced is every choice that matters and many at random.
//!
//! `medium.rs` says what a filesystem may do, `history.rs` what may be found, `check.rs` what must
//! work then.

use std::path::Path;

use dtr_engine::config::Compression;
use fastrand::Rng;

use super::budget::{self, Budget, Seen};
use super::check::{Tools, check};
use super::history::Call::{Clean, Delete, Reopen, Rewind, Save};
use super::history::{Call, History, Player, store};
use super::medium::Fate;
use super::state;

/// States that are tried when nobody asks for more.
const SHORT: u64 = 5_000;
/// The same, where a process was killed before.
const SHORT_AFTER_KILL: u64 = 2_000;

/// One state: a history, a point of it, and what becomes of what was not synced there.
#[derive(Clone, Copy, Debug)]
struct Case {
    history: usize,
    point: usize,
    fate: Fate,
}

/// All that can be tried: first every case in which all, none, all but one, or only one of the
/// unsynced operations happens; then random ones without end.
struct Campaign {
    histories: Vec<History>,
    systematic: Vec<Case>,
}

impl Campaign {
    fn new(histories: Vec<History>) -> Self {
        let mut systematic = Vec::new();
        for (number, history) in histories.iter().enumerate() {
            for point in history.first..=history.length {
                let unsynced = history.medium.unsynced(point);
                let single = unsynced.iter().flat_map(|at| [Fate::AllBut(*at), Fate::Only(*at)]);
                let fates = [Fate::All, Fate::None].into_iter().chain(single);
                systematic.extend(fates.map(|fate| Case { history: number, point, fate }));
            }
        }
        // A part of them is a part of every history.
        Rng::with_seed(0).shuffle(&mut systematic);
        Self { histories, systematic }
    }

    fn case(&self, number: u64) -> Case {
        let known = usize::try_from(number).ok().and_then(|number| self.systematic.get(number));
        known.copied().unwrap_or_else(|| {
            let mut random = Rng::with_seed(number);
            let history = random.usize(..self.histories.len());
            let History { first, length, .. } = self.histories[history];
            let point = first + random.usize(..length + 1 - first);
            Case { history, point, fate: Fate::Random(random.u64(..)) }
        })
    }

    fn run(&self, what: &str, budget: Budget) {
        let seen = Seen::default();
        let outcome = budget::run(
            budget,
            u64::MAX,
            |directory| (directory.join("medium"), Tools::new()),
            |(root, tools), number| self.try_case(number, root, tools, &seen),
        );
        println!(
            "{what}: {} states tried, no two alike ({} alike were left out), of {} histories; {} \
             cases in which all, none, all but one or only one unsynced operation happens, the \
             rest at random; numbers {} to {}",
            outcome.tried,
            outcome.alike,
            self.histories.len(),
            self.systematic.len(),
            budget.first,
            outcome.next
        );
    }

    fn try_case(
        &self,
        number: u64,
        root: &Path,
        tools: &Tools,
        seen: &Seen,
    ) -> Result<bool, String> {
        let case = self.case(number);
        let history = &self.histories[case.history];
        let mut image = history.medium.image(case.point, case.fate);
        let exists = image.has_directory(&store());
        if exists {
            // Of other numbers than those that drew the case.
            let mut random = Rng::with_seed(number).fork();
            let lock = match random.usize(..3) {
                0 => None,
                1 => Some(Vec::new()),
                _ => Some(state::bytes(&mut random, 4096)),
            };
            if let Some(bytes) = lock {
                image.add_file(store().join("writer.lock"), bytes);
            }
        }
        let legal = history.legal(case.point);
        if !seen.is_new(image.fingerprint(legal)) {
            return Ok(false);
        }
        image.build(root);
        let path = root.join(store());
        let checked = check(&path, exists, legal, &history.states, tools);
        std::fs::remove_dir_all(root).unwrap();
        checked.map(|()| true).map_err(|why| {
            format!(
                "state {number} (`{}`, power lost at operation {} of {}, {:?}): {why}\nagain with \
                 DTR_TORTURE_FIRST={number} DTR_TORTURE_STATES=1",
                history.name, case.point, history.length, case.fate
            )
        })
    }
}

fn histories() -> Vec<History> {
    let keep = |kept| move |config: &mut dtr_engine::Config| config.keep_last_n = kept;
    let plain = [Save(1), Save(2), Save(3)];
    let rewind = [Save(10), Save(20), Save(30), Rewind(15), Save(16)];
    let overwrite = [Save(10), Save(20), Rewind(10), Rewind(10), Clean, Save(20), Rewind(10)];
    let retention = [Save(1), Save(2), Save(3), Rewind(2), Save(3), Save(4)];
    let deletion = [Save(1), Save(2), Delete(1), Delete(2), Save(1), Reopen, Save(2), Clean];
    vec![
        Player::new(|config| config.compression = Compression::Float).play(&plain).over("plain"),
        Player::new(keep(None)).play(&rewind).over("rewind"),
        Player::new(keep(None)).play(&overwrite).over("overwrite"),
        Player::new(keep(Some(1))).play(&retention).over("retention of one"),
        Player::new(keep(Some(2))).play(&retention).over("retention of two"),
        Player::new(keep(None)).play(&deletion).over("deletion"),
    ]
}

#[test]
fn any_legal_reordering_or_tearing_recovers() {
    Campaign::new(histories()).run("power loss", Budget::of(SHORT));
}

/// A process is killed at each operation of a save; the next one believes what it sees, goes on,
/// and then the power fails.
fn killed_histories() -> Vec<History> {
    let before: [&[Call]; 3] = [&[Save(1)], &[Save(10), Save(20)], &[Save(10)]];
    let killed = [Save(2), Rewind(10), Rewind(10)];
    let afterwards: [&[Call]; 3] = [&[Save(30)], &[Clean], &[Clean, Save(30)]];
    let mut histories = Vec::new();
    for (before, killed) in before.into_iter().zip(killed) {
        for (afterwards, keep_last_n) in afterwards.into_iter().zip([Some(2), None, Some(1)]) {
            for operations in 0.. {
                let player = Player::new(|config| config.keep_last_n = keep_last_n).play(before);
                let Some(player) = player.play_killed(killed, operations) else { break };
                let name = format!(
                    "{before:?}, killed {operations} operations into {killed:?}, then \
                     {afterwards:?}, keep_last_n {keep_last_n:?}"
                );
                histories.push(player.play(afterwards).over(name));
            }
        }
    }
    histories
}

#[test]
fn a_power_loss_after_a_process_was_killed_recovers() {
    Campaign::new(killed_histories()).run("power loss after a kill", Budget::of(SHORT_AFTER_KILL));
}
