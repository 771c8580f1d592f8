//! What every life of a sandbox must hold, whatever steps it takes.

use proptest::prelude::*;

use super::*;

#[derive(Clone, Copy, Debug)]
enum Step {
    Place,
    Run,
    Undo,
    Fail,
    SetTimeout,
    MarkHibernating,
    Spare,
    Hibernate,
    NoteStored,
    LeaveToStore,
    MarkMoving,
    MarkWaking,
    Doze,
    Wake,
    MarkRestoring,
    Restore,
    Stay,
    Follow,
    MarkDeleting,
    Bury,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        Just(Step::Place),
        Just(Step::Run),
        Just(Step::Undo),
        Just(Step::Fail),
        Just(Step::SetTimeout),
        Just(Step::MarkHibernating),
        Just(Step::Spare),
        Just(Step::Hibernate),
        Just(Step::NoteStored),
        Just(Step::LeaveToStore),
        Just(Step::MarkMoving),
        Just(Step::MarkWaking),
        Just(Step::Doze),
        Just(Step::Wake),
        Just(Step::MarkRestoring),
        Just(Step::Restore),
        Just(Step::Stay),
        Just(Step::Follow),
        Just(Step::MarkDeleting),
        Just(Step::Bury),
    ];
    prop::collection::vec(step, 0..30)
}

fn at(second: u64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(1000 + second)
}

fn start() -> SandboxRecord {
    let order = crate::validate::order(Default::default()).unwrap();
    let record = draft(&SandboxId::generate().unwrap(), "acme", order, at(0));
    place(&record, "host-0").unwrap()
}

fn take(record: &SandboxRecord, step: Step, second: u64) -> Result<SandboxRecord, Denied> {
    let now = at(second);
    match step {
        Step::Place => place(record, &format!("host-{second}")),
        Step::Run => run(record, &CreateVmResponse::default(), now),
        Step::Undo => undo(record, now),
        Step::Fail => fail(record, "gone", now),
        Step::SetTimeout => set_timeout(record, 60, now),
        Step::MarkHibernating => mark_hibernating(record),
        Step::Spare => spare(record, now),
        Step::Hibernate => hibernate(record, &HibernateVmResponse { stored_bytes: 7, ..Default::default() }),
        Step::NoteStored => {
            let (snapshot_id, object_store_id) = ("s".into(), "o".into());
            note_stored(record, &Stored { bytes: 9, snapshot_id, object_store_id, ..Default::default() })
        }
        Step::LeaveToStore => leave_to_store(record),
        Step::MarkMoving => mark_moving(record),
        Step::MarkWaking => mark_waking(record),
        Step::Doze => doze(record),
        Step::Wake => wake(record, &WakeVmResponse::default(), now),
        Step::MarkRestoring => mark_restoring(record, &format!("cp-{second}")),
        Step::Restore => restore(record, record.tried_epoch, &CreateVmResponse::default(), now),
        Step::Stay => stay(record),
        Step::Follow => follow(record, &record.checkpoint_id, &format!("cp-{second}")),
        Step::MarkDeleting => mark_deleting(record),
        Step::Bury => bury(record, now),
    }
}

/// Every record that the steps lead through; those that are denied are left out.
fn play(steps: &[Step]) -> Vec<SandboxRecord> {
    let mut records = vec![start()];
    for (second, step) in steps.iter().enumerate() {
        if let Ok(next) = take(&records[records.len() - 1], *step, second as u64) {
            records.push(next);
        }
    }
    records
}

fn rank(record: &SandboxRecord) -> u8 {
    match record.state() {
        SandboxState::Creating => 0,
        // Back and forth.
        SandboxState::Running | SandboxState::Hibernated => 1,
        SandboxState::Failed => 2,
        SandboxState::Deleted => 3,
        other => panic!("{other:?} is not entered"),
    }
}

proptest! {
    #[test]
    fn a_life_only_goes_forward(steps in steps()) {
        prop_assert!(play(&steps).is_sorted_by_key(rank));
    }

    #[test]
    fn epochs_grow_and_placement_and_deletion_raise_them(steps in steps()) {
        for pair in play(&steps).windows(2) {
            prop_assert!(pair[0].epoch <= pair[1].epoch);
            if pair[0].host_id != pair[1].host_id || is_deleted(&pair[0]) != is_deleted(&pair[1]) {
                prop_assert_eq!(pair[0].epoch.max(pair[0].tried_epoch) + 1, pair[1].epoch);
            }
            // No epoch is asked for twice, whatever became of it.
            prop_assert!(pair[0].tried_epoch <= pair[1].tried_epoch);
            if is_restoring(&pair[1]) {
                prop_assert!(pair[1].tried_epoch > pair[1].epoch);
            }
        }
    }

    #[test]
    fn a_share_is_counted_while_a_host_gives_it(steps in steps()) {
        for record in play(&steps) {
            let given = match record.state() {
                SandboxState::Failed | SandboxState::Deleted => false,
                // One that is marked while it wakes keeps its share until its host says that nothing is left.
                SandboxState::Hibernated if record.deleting => continue,
                SandboxState::Hibernated => {
                    matches!(record.transition(), SandboxTransition::Waking | SandboxTransition::Restoring)
                }
                _ => true,
            };
            prop_assert_eq!(record.reserved, given, "{:?}", record);
        }
    }

    #[test]
    fn a_mark_is_of_its_state(steps in steps()) {
        for record in play(&steps) {
            match record.transition() {
                SandboxTransition::Unspecified => {}
                SandboxTransition::Hibernating => prop_assert_eq!(record.state(), SandboxState::Running),
                SandboxTransition::Waking => prop_assert_eq!(record.state(), SandboxState::Hibernated),
                SandboxTransition::Restoring => prop_assert!(matches!(
                    record.state(),
                    SandboxState::Running | SandboxState::Hibernated
                )),
            }
            prop_assert!(record.stored_bytes == 0 || record.state() == SandboxState::Hibernated);
            prop_assert!(!record.in_store_alone || !record.stored_snapshot_id.is_empty());
        }
    }

    #[test]
    fn what_is_deleted_stays_deleted(steps in steps()) {
        prop_assert!(play(&steps).is_sorted_by_key(is_deleted));
    }

    #[test]
    fn every_life_can_be_ended(steps in steps()) {
        let records = play(&steps);
        let last = &records[records.len() - 1];
        if last.state() != SandboxState::Deleted {
            let ended = bury(&mark_deleting(last).unwrap(), at(99)).unwrap();
            prop_assert_eq!(ended.state(), SandboxState::Deleted);
            prop_assert!(!ended.deleting && !ended.reserved && ended.deleted_at.is_some());
        }
    }
}

#[test]
fn a_timeout_waits_for_the_end_of_a_hibernation() {
    let running = take(&start(), Step::Run, 1).unwrap();
    let marked = mark_hibernating(&running).unwrap();
    assert_eq!(set_timeout(&marked, 0, at(3)), Err(Denied::NotReady));
    let spared = spare(&marked, at(4)).unwrap();
    assert_eq!(set_timeout(&spared, 0, at(5)).unwrap().timeout, 0);
    assert_eq!(active_at(&spared), at(4));
    let stored = hibernate(&marked, &HibernateVmResponse::default()).unwrap();
    assert_eq!(set_timeout(&stored, 60, at(5)).unwrap().timeout, 60);
}

#[test]
fn a_sandbox_is_put_back_by_an_epoch_that_nobody_was_asked_for() {
    let running = take(&start(), Step::Run, 1).unwrap();
    let first = mark_restoring(&running, "cp-1").unwrap();
    assert_eq!((first.epoch, first.tried_epoch), (1, 2));
    assert_eq!(mark_restoring(&first, "cp-2"), Err(Denied::NotReady));
    assert_eq!(mark_hibernating(&first), Err(Denied::NotReady));
    assert_eq!(set_timeout(&first, 0, at(2)), Err(Denied::NotReady));
    let stayed = stay(&first).unwrap();
    assert_eq!((stayed.epoch, stayed.checkpoint_id.as_str()), (1, ""));
    let second = mark_restoring(&stayed, "cp-2").unwrap();
    assert_eq!((second.epoch, second.tried_epoch), (1, 3));
    let made = CreateVmResponse::default();
    assert_eq!(restore(&second, 1, &made, at(3)), Err(Denied::Passed));
    assert_eq!(restore(&second, 4, &made, at(3)), Err(Denied::Passed));
    let restored = restore(&second, 3, &made, at(3)).unwrap();
    assert_eq!((restored.epoch, restored.checkpoint_id.as_str()), (3, "cp-2"));
    // One that its host did after all, though nobody waited for it any more.
    assert_eq!(restore(&stayed, 2, &made, at(3)).unwrap().epoch, 2);
    // One that was lost meanwhile leaves nothing on its host, whichever epoch that has.
    assert_eq!(fail(&second, "gone", at(3)).unwrap().epoch, 3);
}

#[test]
fn a_sandbox_follows_the_checkpoints_of_its_own_branch() {
    let running = take(&start(), Step::Run, 1).unwrap();
    let first = follow(&running, "", "cp-1").unwrap();
    let second = follow(&first, "cp-1", "cp-2").unwrap();
    assert_eq!(second.checkpoint_id, "cp-2");
    assert_eq!(follow(&second, "", "cp-1").unwrap(), second, "said once more, late");
    let marked = mark_restoring(&second, "cp-1").unwrap();
    let back = restore(&marked, marked.tried_epoch, &CreateVmResponse::default(), at(2)).unwrap();
    assert_eq!(follow(&back, "cp-2", "cp-3").unwrap().checkpoint_id, "cp-1", "taken on the branch it left");
}

#[test]
fn what_is_over_holds_no_secrets_and_little_else() {
    let mut record = take(&start(), Step::Run, 1).unwrap();
    record.envs = [("TOKEN".into(), "secret".into())].into();
    for (size, kept) in [(METADATA_KEPT - 7, 1), (METADATA_KEPT - 6, 0)] {
        record.metadata = [("purpose".into(), "x".repeat(size))].into();
        let failed = fail(&record, "gone", at(2)).unwrap();
        let buried = bury(&mark_deleting(&record).unwrap(), at(2)).unwrap();
        for over in [failed, buried] {
            assert!(over.envs.is_empty());
            assert_eq!(over.metadata.len(), kept, "{size} at {:?}", over.state());
        }
    }
}
