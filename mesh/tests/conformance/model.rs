//! Any sequence of transactions against the simplest thing that could be a store: a map and a count.

use std::collections::BTreeMap;

use oc_mesh::store::{Compare, Op, Revision, TxnOutcome};
use proptest::{
    collection::vec,
    prelude::*,
    strategy::{Strategy, ValueTree as _},
    test_runner::TestRunner,
};

use super::fixture::{Change, Fixture, next, put_op};

const KEYS: [&str; 4] = ["m/1", "m/2", "m/22", "n/1"];
const TRANSACTIONS: usize = 300;

/// What a step compares a key with.
#[derive(Clone, Copy, Debug)]
enum Expect {
    Absent,
    Current,
    Older,
}

#[derive(Clone, Debug)]
struct Step {
    compare: Vec<(&'static str, Expect)>,
    /// A value to put, or none to delete.
    then: BTreeMap<&'static str, Option<u8>>,
}

fn step() -> impl Strategy<Value = Step> {
    let key = || prop::sample::select(&KEYS[..]);
    let expect = prop_oneof![2 => Just(Expect::Absent), 4 => Just(Expect::Current), 1 => Just(Expect::Older)];
    let compare = vec((key(), expect), 0..2);
    let then = prop::collection::btree_map(key(), prop::option::weighted(0.7, any::<u8>()), 0..4);
    (compare, then).prop_map(|(compare, then)| Step { compare, then })
}

#[derive(Default)]
struct Model {
    entries: BTreeMap<&'static str, (String, Revision)>,
    history: Vec<Vec<Change>>,
}

impl Model {
    fn compare(&self, (key, expect): (&str, Expect)) -> (Compare, bool) {
        let current = self.entries.get(key).map(|(_, revision)| *revision);
        match expect {
            Expect::Absent => (Compare::Absent(key.into()), current.is_none()),
            Expect::Current => {
                let revision = current.unwrap_or(Revision(1));
                (Compare::Unchanged(key.into(), revision), current.is_some())
            }
            Expect::Older => {
                let revision = Revision(current.map_or(1, |current| current.0 - 1));
                (Compare::Unchanged(key.into(), revision), false)
            }
        }
    }

    fn apply(&mut self, then: &BTreeMap<&'static str, Option<u8>>, revision: Revision) {
        let mut changes = Vec::new();
        for (key, value) in then {
            let value = value.map(|value| value.to_string());
            match &value {
                Some(value) => {
                    self.entries.insert(key, (value.clone(), revision));
                }
                None if self.entries.remove(key).is_none() => continue,
                None => {}
            }
            changes.push(((*key).to_owned(), value, revision));
        }
        if !changes.is_empty() {
            self.history.push(changes);
        }
    }
}

pub async fn any_history_is_that_of_a_map(fixture: Fixture) {
    let mut runner = TestRunner::deterministic();
    let steps = vec(step(), TRANSACTIONS).new_tree(&mut runner).unwrap().current();
    // So that even a revision older than the first one is none of ours, and not zero.
    let start = fixture.put("start", "").await;
    let mut watch = fixture.store.watch("", start).await.unwrap();
    let mut model = Model::default();
    let mut newest = start;
    for step in steps {
        let (compare, holds): (Vec<_>, Vec<_>) =
            step.compare.iter().map(|compare| model.compare(*compare)).unzip();
        let then = step.then.iter().map(|(key, value)| match value {
            Some(value) => put_op(key, &value.to_string()),
            None => Op::Delete { key: (*key).into() },
        });
        let outcome = fixture.txn(compare, then.collect()).await.unwrap();
        if holds.contains(&false) {
            assert_eq!(outcome, TxnOutcome::Conflict, "{step:?}");
            continue;
        }
        let TxnOutcome::Committed(revision) = outcome else { panic!("conflict: {step:?}") };
        let length = model.history.len();
        model.apply(&step.then, revision);
        if model.history.len() > length {
            assert!(revision > newest, "{step:?}");
        } else {
            assert_eq!(revision, newest, "{step:?}");
        }
        newest = revision;
    }

    for prefix in ["m/", "m/2", "n/"] {
        let found = fixture.store.range(prefix, None, 100).await.unwrap();
        let found: Vec<_> = found
            .items
            .iter()
            .map(|entry| (entry.key.as_str(), entry.value.as_ref(), entry.mod_revision))
            .collect();
        let expected: Vec<_> = model
            .entries
            .iter()
            .filter(|(key, _)| key.starts_with(prefix))
            .map(|(key, (value, revision))| (*key, value.as_bytes(), *revision))
            .collect();
        assert_eq!(found, expected);
    }
    assert!(model.history.len() > TRANSACTIONS / 4, "most of it happened");
    for expected in model.history {
        let mut changes = next(&mut watch).await.unwrap();
        changes.sort();
        assert_eq!(changes, expected);
    }
}
