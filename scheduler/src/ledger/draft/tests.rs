//! What a draft must hold, whatever it is made of.

use oc_proto::{mesh::VmSize, v1::SandboxState};
use proptest::prelude::*;

use super::*;
use crate::ledger::Versioned;

const QUOTA: Quota = Quota { max_sandboxes: 4, max_memory_mb: 1 << 20 };

fn hosts() -> Vec<Arc<HostRecord>> {
    let host = |name: &str| HostRecord {
        host_id: name.into(),
        templates: vec!["base".into()],
        max_sandboxes: 3,
        memory_capacity_mb: 8192,
        disk_free_mb: 100_000,
        ..Default::default()
    };
    vec![Arc::new(host("a")), Arc::new(host("b"))]
}

fn record(n: usize, memory_mb: i32) -> SandboxRecord {
    SandboxRecord {
        sandbox_id: format!("sb-{n}"),
        tenant: format!("t{}", n % 2),
        state: SandboxState::Creating.into(),
        template_id: "base".into(),
        size: Some(VmSize { cpu_count: 1, memory_mb, disk_mb: 20_480 }),
        ..Default::default()
    }
}

fn create(n: usize, memory_mb: i32) -> Change {
    let record = record(n, memory_mb);
    Change {
        sandbox_id: record.sandbox_id.clone(),
        from: None,
        to: Next::Placed { record, avoid: Vec::new(), like: None },
    }
}

fn step(from: &SandboxRecord, to: Next) -> Change {
    let from = Versioned { record: from.clone(), revision: Revision(1) };
    Change { sandbox_id: from.record.sandbox_id.clone(), from: Some(from), to }
}

/// Adds the changes to a draft; returns the records of those accepted, and the counts that they lead to.
fn play(
    known: &mut HashMap<Account, Entry>,
    changes: &[Change],
) -> (Vec<Result<Option<SandboxRecord>, LedgerError>>, Txn) {
    let hosts = hosts();
    let mut draft = Draft::new(known, Limits { hosts: &hosts, quota: QUOTA });
    let results = changes.iter().map(|change| draft.add(change, &mut |_| 0)).collect();
    let (txn, settled) = draft.finish();
    settled.apply(known, Revision(2));
    (results, txn)
}

fn count(known: &HashMap<Account, Entry>, account: Account) -> Count {
    known.get(&account).map(|entry| entry.count).unwrap_or_default()
}

#[test]
fn what_is_accepted_earlier_counts_for_what_comes_later() {
    let mut known = HashMap::new();
    // Two hosts with three places each; two tenants with four each.
    let changes: Vec<_> = (0..8).map(|n| create(n, 1024)).collect();
    let (results, txn) = play(&mut known, &changes);
    assert_eq!(results.iter().filter(|result| result.is_ok()).count(), 6);
    assert!(matches!(results[7], Err(LedgerError::Unplaceable(_))));
    assert_eq!(count(&known, Account::Host("a".into())), Count { sandboxes: 3, memory_mb: 3072 });
    // Six records, two hosts, two tenants.
    assert_eq!((txn.compare.len(), txn.then.len()), (10, 10));
}

#[test]
fn the_quota_is_the_tenants_own() {
    let mut known = HashMap::new();
    let changes: Vec<_> = (0..5).map(|n| create(2 * n, 256)).collect();
    let (results, _) = play(&mut known, &changes);
    assert!(matches!(results[4], Err(LedgerError::Quota(_))));
    assert_eq!(count(&known, Account::Tenant("t0".into())).sandboxes, 4);
}

#[test]
fn moving_to_another_host_moves_the_share_and_leaves_the_tenant_alone() {
    let mut known = HashMap::new();
    let (results, _) = play(&mut known, &[create(0, 1024)]);
    let placed = results[0].as_ref().unwrap().clone().unwrap();
    assert_eq!(placed.epoch, 1);
    let avoid = vec![placed.host_id.clone()];
    let again = step(&placed, Next::Placed { record: placed.clone(), avoid, like: None });
    let (results, txn) = play(&mut known, &[again]);
    let moved = results[0].as_ref().unwrap().clone().unwrap();
    assert_ne!(moved.host_id, placed.host_id);
    assert_eq!(moved.epoch, 2);
    assert_eq!(count(&known, Account::Host(placed.host_id)), Count::default());
    assert_eq!(count(&known, Account::Host(moved.host_id)).sandboxes, 1);
    assert_eq!(count(&known, Account::Tenant("t0".into())).sandboxes, 1);
    // The record and both hosts; the tenant's count did not change.
    assert_eq!(txn.then.len(), 3);
}

#[test]
fn what_is_counted_on_its_host_needs_no_more_room_there() {
    let mut known = HashMap::new();
    let (results, _) = play(&mut known, &[create(0, 8192)]);
    let placed = results[0].as_ref().unwrap().clone().unwrap();
    let marked = SandboxRecord { restoring_id: "cp-1".into(), ..placed.clone() };
    let (results, txn) = play(&mut known, &[step(&placed, Next::Reserved(marked))]);
    assert!(results[0].is_ok(), "its host is full of itself");
    assert_eq!(txn.then.len(), 1, "no count changes");
    let hibernated = SandboxRecord { reserved: false, ..placed.clone() };
    let woken = step(&hibernated, Next::Reserved(placed));
    assert!(matches!(play(&mut known, &[woken]).0[0], Err(LedgerError::Unplaceable(_))));
}

#[test]
fn a_transaction_never_exceeds_the_stores_limit() {
    let mut known = HashMap::new();
    let hosts: Vec<_> = (0..2 * MAX_CHANGES)
        .map(|n| Arc::new(HostRecord { host_id: n.to_string(), ..(*hosts()[0]).clone() }))
        .collect();
    let mut draft = Draft::new(&known, Limits { hosts: &hosts, quota: QUOTA });
    for n in 0..MAX_CHANGES {
        // A tenant of its own each, and one count that has drifted below what is to be released.
        let tenant = format!("tenant-{n}");
        let from = SandboxRecord { host_id: n.to_string(), tenant, reserved: true, ..record(n, 1024) };
        let record = SandboxRecord { host_id: (MAX_CHANGES + n).to_string(), ..from.clone() };
        draft.add(&step(&from, Next::Record(record)), &mut |_| 0).unwrap();
    }
    let (txn, settled) = draft.finish();
    assert!(txn.then.len() <= oc_mesh::store::MAX_TXN_OPS, "{}", txn.then.len());
    settled.apply(&mut known, Revision(1));
}

proptest! {
    /// The counts always equal the sum over the records, through any sequence of creates, releases and removals.
    #[test]
    fn counts_equal_the_sum_of_the_records(
        steps in prop::collection::vec((0..6_usize, 0..3_u8, prop::sample::select(vec![256, 1024, 4096])), 0..60)
    ) {
        let mut known = HashMap::new();
        let mut records: HashMap<usize, SandboxRecord> = HashMap::new();
        for (n, kind, memory_mb) in steps {
            let change = match (records.get(&n), kind) {
                (None, _) => create(n, memory_mb),
                (Some(record), 0) => step(record, Next::Removed),
                (Some(record), 1) => step(record, Next::Record(SandboxRecord { reserved: false, ..record.clone() })),
                (Some(record), _) => {
                    step(record, Next::Placed { record: record.clone(), avoid: vec![record.host_id.clone()], like: None })
                }
            };
            let (mut results, _) = play(&mut known, &[change]);
            if let Ok(next) = results.remove(0) {
                match next {
                    Some(record) => records.insert(n, record),
                    None => records.remove(&n),
                };
            }
            let due = crate::ledger::account::sum(records.values());
            for (account, entry) in &known {
                prop_assert_eq!(entry.count, due.get(account).copied().unwrap_or_default());
            }
            prop_assert!(due.keys().all(|account| known.contains_key(account)));
        }
    }
}

#[test]
fn a_record_names_where_it_was_before() {
    let mut known = HashMap::new();
    let (results, _) = play(&mut known, &[create(0, 1024)]);
    let placed = results.into_iter().next().unwrap().unwrap().unwrap();
    assert_eq!(placed.changed_from(), SandboxState::Unspecified);
    let running = SandboxRecord { state: SandboxState::Running.into(), ..placed.clone() };
    let (results, _) = play(&mut known, &[step(&placed, Next::Record(running))]);
    let running = results.into_iter().next().unwrap().unwrap().unwrap();
    assert_eq!(running.changed_from(), SandboxState::Creating);
    let marked = lifecycle::mark_hibernating(&running).unwrap();
    let (results, _) = play(&mut known, &[step(&running, Next::Record(marked))]);
    let marked = results.into_iter().next().unwrap().unwrap().unwrap();
    assert_eq!(marked.changed_from(), SandboxState::Running);
    let marked = lifecycle::mark_deleting(&marked).unwrap();
    let hibernating = SandboxRecord { transition: 1, ..running };
    let (results, _) = play(&mut known, &[step(&hibernating, Next::Record(marked))]);
    assert_eq!(results[0].as_ref().unwrap().as_ref().unwrap().changed_from(), lifecycle::phase(&hibernating));
}
