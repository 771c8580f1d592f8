//! Whatever happens, each change is told once and in order, however often a stream is cut and resumed.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, SystemTime},
};

use oc_mesh::keys;
use oc_proto::mesh::{CreateVmResponse, WakeVmResponse};
use proptest::prelude::*;
use prost::Message as _;

use super::*;
use crate::{lifecycle::Denied, sandbox_id::SandboxId};

type Step = fn(&SandboxRecord, SystemTime) -> Result<SandboxRecord, Denied>;

const STEPS: &[Step] = &[
    |record, _| lifecycle::place(record, "other"),
    |record, now| lifecycle::run(record, &CreateVmResponse::default(), now),
    |record, now| lifecycle::undo(record, now),
    |record, now| lifecycle::fail(record, "gone", now),
    |record, now| lifecycle::set_timeout(record, 60, now),
    |record, _| lifecycle::mark_hibernating(record),
    |record, now| lifecycle::spare(record, now),
    |record, _| lifecycle::hibernate(record, &Default::default()),
    |record, _| lifecycle::mark_waking(record),
    |record, _| lifecycle::doze(record),
    |record, now| lifecycle::wake(record, &WakeVmResponse::default(), now),
    |record, _| lifecycle::mark_restoring(record, "cp-1"),
    |record, now| lifecycle::restore(record, record.tried_epoch, &CreateVmResponse::default(), now),
    |record, _| lifecycle::stay(record),
    |record, _| lifecycle::mark_deleting(record),
    |record, now| lifecycle::bury(record, now),
];

const TENANTS: [&str; 2] = ["acme", "other"];
const SANDBOXES: usize = 4;

fn id_of(number: usize) -> String {
    format!("sb-{number:020}")
}

fn at(second: u64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(1000 + second)
}

fn draft(number: usize) -> SandboxRecord {
    let order = crate::validate::order(Default::default()).unwrap();
    let id: SandboxId = id_of(number).parse().unwrap();
    let draft = lifecycle::draft(&id, TENANTS[number % 2], order, at(0));
    lifecycle::place(&draft, "host").unwrap()
}

/// A store: its records, and every transaction that made them, each at a revision of its own.
#[derive(Clone, Debug, Default)]
struct World {
    records: BTreeMap<usize, (Revision, SandboxRecord)>,
    history: Vec<Vec<Event>>,
    /// Whose tombstones were collected: no ID is used twice.
    collected: BTreeSet<usize>,
}

impl World {
    /// Takes steps in one transaction; those that are denied are left out. Others write in between: not every revision
    /// is of a sandbox.
    fn commit(&mut self, steps: &[(usize, usize)], revision: Revision) {
        let mut changes: BTreeMap<usize, Event> = BTreeMap::new();
        for &(number, step) in steps {
            if changes.contains_key(&number) || self.collected.contains(&number) {
                continue;
            }
            let before = self.records.get(&number).map(|(_, record)| record.clone());
            let next = match &before {
                None => Ok(draft(number)),
                Some(record) if record.state() == SandboxState::Deleted && step == 0 => {
                    // Its tombstone is collected.
                    self.records.remove(&number);
                    self.collected.insert(number);
                    changes.insert(number, Event::Delete { key: keys::sandbox(&id_of(number)), revision });
                    continue;
                }
                Some(record) => STEPS[step](record, at(revision.0)),
            };
            let Ok(next) = next else { continue };
            // As the ledger does.
            let changed_from = before.as_ref().map_or(SandboxState::Unspecified, lifecycle::phase).into();
            let next = SandboxRecord { changed_from, ..next };
            changes.insert(number, Event::Put(entry(&next, revision)));
            self.records.insert(number, (revision, next));
        }
        if !changes.is_empty() {
            self.history.push(changes.into_values().collect());
        }
    }

    fn of(transactions: &[Vec<(usize, usize)>]) -> Self {
        let mut world = Self::default();
        for (number, steps) in transactions.iter().enumerate() {
            world.commit(steps, Revision(3 * number as u64 + 1));
        }
        world
    }

    fn listed(&self) -> Vec<KeyValue> {
        self.records.values().map(|(revision, record)| entry(record, *revision)).collect()
    }

    /// What a stream that is after `position` is told until it ends.
    fn told(&self, position: &mut Position) -> Vec<Told> {
        let mut told = Vec::new();
        for group in &self.history {
            if group[0].revision() > position.seen() && !position.is_over() {
                told.extend(position.advance(group.clone()).unwrap());
            }
        }
        told
    }
}

fn entry(record: &SandboxRecord, mod_revision: Revision) -> KeyValue {
    let key = keys::sandbox(&record.sandbox_id);
    KeyValue { key, value: record.encode_to_vec().into(), mod_revision }
}

fn transactions() -> impl Strategy<Value = Vec<Vec<(usize, usize)>>> {
    let step = (0..SANDBOXES, 0..STEPS.len());
    prop::collection::vec(prop::collection::vec(step, 1..4), 0..60)
}

fn scopes() -> impl Strategy<Value = Scope> {
    prop_oneof![
        Just(Scope::Tenant("acme".into())),
        Just(Scope::Sandbox { tenant: "acme".into(), sandbox_id: id_of(0) }),
    ]
}

proptest! {
    #[test]
    fn each_life_is_told_without_a_gap(transactions in transactions(), scope in scopes()) {
        let mut lives: BTreeMap<String, SandboxState> = BTreeMap::new();
        let mut last = Revision(0);
        let told = World::of(&transactions).told(&mut Position::after(scope.clone(), Revision(0)));
        for Told { kind, record, revision, complete } in told {
            prop_assert!(scope.holds(&record));
            prop_assert!(last <= revision && complete <= revision);
            last = revision;
            let (before, now) = (lives.get(&record.sandbox_id).copied(), lifecycle::phase(&record));
            match kind {
                SandboxEventType::Created => prop_assert_eq!(before, None),
                SandboxEventType::StateChanged => prop_assert_ne!(before.unwrap(), now),
                SandboxEventType::Updated => prop_assert_eq!(before.unwrap(), now),
                SandboxEventType::Deleted => prop_assert_eq!(now, SandboxState::Deleted),
                other => panic!("{other:?} is no change"),
            }
            prop_assert_eq!(before.unwrap_or(SandboxState::Unspecified), record.changed_from());
            prop_assert_ne!(before, Some(SandboxState::Deleted));
            lives.insert(record.sandbox_id, now);
        }
    }

    #[test]
    fn a_stream_that_is_cut_misses_nothing_and_repeats_nothing(
        transactions in transactions(),
        scope in scopes(),
        cut in any::<prop::sample::Index>(),
    ) {
        let world = World::of(&transactions);
        let whole = world.told(&mut Position::after(scope.clone(), Revision(0)));
        prop_assume!(!whole.is_empty());
        let cut = cut.index(whole.len());
        let resumed = world.told(&mut Position::after(scope, whole[cut].complete));
        // Amid what was written as one, all of that comes again; at its end nothing does.
        let kept = whole[..=cut].iter().filter(|told| told.revision <= whole[cut].complete).count();
        prop_assert_eq!(&resumed[..], &whole[kept..]);
        if whole.get(cut + 1).is_none_or(|next| next.revision > whole[cut].revision) {
            prop_assert_eq!(kept, cut + 1);
        }
    }

    /// A list that is read page by page shows some records later than others.
    #[test]
    fn what_a_long_list_shows_late_is_not_told_again(
        transactions in transactions(),
        listed_at in any::<prop::sample::Index>(),
        late in 0..SANDBOXES,
    ) {
        let scope = Scope::Tenant("acme".into());
        let first = listed_at.index(transactions.len() + 1);
        let (early, world) = (World::of(&transactions[..first]), World::of(&transactions));
        let seen = Revision(3 * first as u64);
        let mut mixed = early;
        mixed.records.retain(|number, _| *number < late);
        mixed.records.extend(world.records.clone().into_iter().filter(|(number, _)| *number >= late));
        let (mut position, present) = Position::at_present(scope.clone(), mixed.listed(), seen).unwrap();
        prop_assert!(present.is_sorted_by_key(|told| told.revision));
        let followed: Vec<_> = world.told(&mut position).into_iter().map(of).collect();
        let whole = world.told(&mut Position::after(scope, Revision(0)));
        let expected: Vec<_> = whole
            .iter()
            .filter(|told| {
                let number: usize = told.record.sandbox_id.trim_start_matches("sb-").parse().unwrap();
                let shown = mixed.records.get(&number).map_or(seen, |(revision, _)| seen.max(*revision));
                told.revision > shown
            })
            .cloned()
            .map(of)
            .collect();
        prop_assert_eq!(followed, expected);
    }
}

fn of(told: Told) -> (Revision, String, SandboxEventType) {
    (told.revision, told.record.sandbox_id, told.kind)
}

#[test]
fn a_stream_of_one_sandbox_is_over_with_it() {
    let scope = Scope::Sandbox { tenant: "acme".into(), sandbox_id: id_of(0) };
    // Made, marked, buried.
    let world = World::of(&[vec![(0, 0), (2, 0)], vec![(2, 1)], vec![(0, 14)], vec![(0, 15)], vec![(2, 14)]]);
    let mut position = Position::after(scope.clone(), Revision(0));
    let kinds: Vec<_> = world.told(&mut position).into_iter().map(|told| told.kind).collect();
    assert_eq!(kinds, [SandboxEventType::Created, SandboxEventType::Deleted]);
    assert!(position.is_over());
    let (position, present) = Position::at_present(scope, world.listed(), Revision(20)).unwrap();
    assert!(position.is_over() && present.len() == 1 && lifecycle::is_deleted(&present[0].record));
    let all = Scope::Tenant("acme".into());
    let (position, present) = Position::at_present(all, world.listed(), Revision(20)).unwrap();
    assert!(!position.is_over() && present.is_empty(), "what is deleted is not there");
}
