//! What plans must hold, and a simulation in which nothing but plans repairs a mesh.

use oc_proto::mesh::{HibernateVmResponse, VmSize};
use proptest::prelude::*;

use super::*;

const HOUR: Duration = Duration::from_secs(3600);

fn at(second: u64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000 + second)
}

fn moment(second: u64) -> Moment {
    Moment { now: at(second), is_alone: true }
}

fn record(state: SandboxState, epoch: u64) -> SandboxRecord {
    SandboxRecord {
        sandbox_id: "sb-1".into(),
        state: state.into(),
        size: Some(VmSize { cpu_count: 1, memory_mb: 1024, disk_mb: 20_480 }),
        host_id: "here".into(),
        epoch,
        timeout: 60,
        created_at: Some(at(0).into()),
        active_at: Some(at(0).into()),
        reserved: matches!(state, SandboxState::Creating | SandboxState::Running),
        ..Default::default()
    }
}

fn vm(state: VmState, epoch: u64, used: u64) -> Vm {
    Vm {
        sandbox_id: "sb-1".into(),
        epoch,
        state: state.into(),
        active_at: Some(at(used).into()),
        ..Default::default()
    }
}

fn judged(record: Option<&SandboxRecord>, vm: Option<&Vm>, second: u64) -> Option<&'static str> {
    judge("here", record, vm, moment(second)).map(|action| action.kind())
}

fn around(is_live: bool, has_host: bool) -> Around {
    Around { is_live, has_host }
}

#[test]
fn a_microvm_that_should_run_and_does_is_left_alone() {
    let running = record(SandboxState::Running, 1);
    assert_eq!(judged(Some(&running), Some(&vm(VmState::Running, 1, 0)), 60), None);
    assert_eq!(judged(Some(&running), Some(&vm(VmState::Starting, 1, 0)), 10), None);
}

#[test]
fn a_lost_microvm_fails_its_sandbox() {
    let running = record(SandboxState::Running, 1);
    assert_eq!(judged(Some(&running), None, 10), Some("fail"));
    let failed = Vm { failure: "killed".into(), ..vm(VmState::Failed, 1, 0) };
    assert_eq!(
        judge("here", Some(&running), Some(&failed), moment(10)),
        Some(Action::Fail { failure: "killed".into() })
    );
}

#[test]
fn strays_are_ended_at_their_own_epoch() {
    let stray = vm(VmState::Running, 1, 0);
    assert_eq!(judge("here", None, Some(&stray), moment(0)), Some(Action::EndStray { epoch: 1 }));
    let deleted = record(SandboxState::Deleted, 2);
    assert_eq!(judge("here", Some(&deleted), Some(&stray), moment(0)), Some(Action::EndStray { epoch: 1 }));
    let failed = record(SandboxState::Failed, 1);
    assert_eq!(judge("here", Some(&failed), Some(&stray), moment(0)), Some(Action::EndStray { epoch: 1 }));
    let moved = SandboxRecord { host_id: "there".into(), ..record(SandboxState::Running, 2) };
    assert_eq!(judge("here", Some(&moved), Some(&stray), moment(0)), Some(Action::EndStray { epoch: 1 }));
}

#[test]
fn a_microvm_newer_than_the_record_is_left_alone() {
    let newer = vm(VmState::Running, 3, 0);
    for state in [SandboxState::Running, SandboxState::Deleted, SandboxState::Failed] {
        assert_eq!(judged(Some(&record(state, 2)), Some(&newer), 10), None);
    }
    let moved = SandboxRecord { host_id: "there".into(), ..record(SandboxState::Running, 2) };
    assert_eq!(judged(Some(&moved), Some(&newer), 10), None);
}

#[test]
fn idleness_is_counted_from_the_last_use_or_the_last_timeout() {
    let running = record(SandboxState::Running, 1);
    assert_eq!(judged(Some(&running), Some(&vm(VmState::Running, 1, 0)), 61), Some("hibernate_idle"));
    assert_eq!(judged(Some(&running), Some(&vm(VmState::Running, 1, 30)), 61), None);
    let renewed = SandboxRecord { active_at: Some(at(30).into()), ..running.clone() };
    assert_eq!(judged(Some(&renewed), Some(&vm(VmState::Running, 1, 0)), 61), None);
    let without = SandboxRecord { timeout: 0, ..running };
    assert_eq!(judged(Some(&without), Some(&vm(VmState::Running, 1, 0)), 1_000_000), None);
}

#[test]
fn a_hibernation_that_nobody_finishes_is_settled_by_what_the_host_has() {
    let marked = lifecycle::mark_hibernating(&record(SandboxState::Running, 1)).unwrap();
    assert_eq!(judged(Some(&marked), None, 62), Some("fail"));
    assert_eq!(judged(Some(&marked), Some(&vm(VmState::Running, 1, 61)), 62), Some("spare"));
    assert_eq!(judged(Some(&marked), Some(&vm(VmState::Running, 1, 0)), 62), Some("hibernate_idle"));
    assert_eq!(judged(Some(&marked), Some(&vm(VmState::Hibernated, 1, 0)), 62), Some("finish_hibernate"));
    let hibernated = lifecycle::hibernate(&marked, &Default::default()).unwrap();
    assert_eq!(judged(Some(&hibernated), Some(&vm(VmState::Hibernated, 1, 0)), 1_000_000), None);
    assert_eq!(judged(Some(&hibernated), None, 62), Some("fail"));
}

#[test]
fn what_a_host_stores_after_it_has_answered_is_noted() {
    let marked = lifecycle::mark_hibernating(&record(SandboxState::Running, 1)).unwrap();
    let hibernated = lifecycle::hibernate(&marked, &Default::default()).unwrap();
    let stored = Vm { stored_bytes: 5, ..vm(VmState::Hibernated, 1, 0) };
    let action = judge("here", Some(&hibernated), Some(&stored), moment(2));
    let what = Stored { bytes: 5, ..Default::default() };
    assert_eq!(action, Some(Action::NoteStored(what.clone())));
    let noted = lifecycle::note_stored(&hibernated, &what).unwrap();
    assert_eq!(judged(Some(&noted), Some(&stored), 4), None);
    // It wakes: what is stored is worth nothing any more.
    let waking = lifecycle::mark_waking(&hibernated).unwrap();
    assert_eq!(judged(Some(&waking), Some(&stored), 4), Some("doze"));
    assert!(lifecycle::note_stored(&waking, &what).is_err());
}

#[test]
fn what_is_in_an_object_store_outlives_its_host() {
    let hibernated = SandboxRecord { stored_bytes: 5, ..record(SandboxState::Hibernated, 1) };
    let listed = Vm {
        stored_bytes: 5,
        snapshot_id: "hibernated-1".into(),
        object_store_id: "store".into(),
        snapshot_key: "key".into(),
        base_digest: "base".into(),
        ..vm(VmState::Hibernated, 1, 0)
    };
    let what = Stored {
        bytes: 5,
        snapshot_id: "hibernated-1".into(),
        object_store_id: "store".into(),
        snapshot_key: "key".into(),
        base_digest: "base".into(),
    };
    let action = judge("here", Some(&hibernated), Some(&listed), moment(2));
    assert_eq!(action, Some(Action::NoteStored(what.clone())));
    let noted = lifecycle::note_stored(&hibernated, &what).unwrap();
    assert_eq!(judged(Some(&noted), Some(&listed), 4), None);
    let unsure = Vm { stored_bytes: 5, ..vm(VmState::Hibernated, 1, 0) };
    assert_eq!(judged(Some(&noted), Some(&unsure), 4), None, "its agent has just started");
    assert_eq!(judged(Some(&hibernated), None, 4), Some("fail"));
    assert_eq!(judged(Some(&noted), None, 4), Some("leave_to_store"));
    let left = lifecycle::leave_to_store(&noted).unwrap();
    assert_eq!(judged(Some(&left), None, 4), None);
    // It is given another host, which has nothing of it until it has made it.
    let moving = lifecycle::place(&lifecycle::mark_moving(&noted).unwrap(), "there").unwrap();
    assert_eq!((moving.epoch, moving.host_id.as_str(), moving.reserved), (2, "there", true));
    let there = |vm: Option<Vm>| judge("there", Some(&moving), vm.as_ref(), moment(4)).map(|a| a.kind());
    assert_eq!(there(None), Some("doze"));
    assert_eq!(there(Some(vm(VmState::Running, 2, 0))), Some("finish_wake"));
    assert_eq!(judged(Some(&moving), Some(&listed), 4), Some("end_stray"), "the first host comes back");
    let dozes = lifecycle::doze(&moving).unwrap();
    assert_eq!(judge("there", Some(&dozes), None, moment(4)), None);
    let woken = lifecycle::wake(&moving, &Default::default(), at(5)).unwrap();
    assert_eq!((woken.in_store_alone, woken.stored_snapshot_id.as_str()), (false, ""));
}

#[test]
fn a_wake_that_nobody_finishes_is_settled_by_what_the_host_has() {
    let marked = lifecycle::mark_waking(&record(SandboxState::Hibernated, 1)).unwrap();
    assert_eq!(judged(Some(&marked), Some(&vm(VmState::Running, 1, 0)), 62), Some("finish_wake"));
    assert_eq!(judged(Some(&marked), Some(&vm(VmState::Hibernated, 1, 0)), 62), Some("doze"));
    assert_eq!(judged(Some(&marked), Some(&vm(VmState::Failed, 1, 0)), 62), Some("fail"));
    // A request that was late on its way.
    let hibernated = lifecycle::doze(&marked).unwrap();
    assert_eq!(judged(Some(&hibernated), Some(&vm(VmState::Running, 1, 0)), 62), Some("finish_wake"));
    let running = record(SandboxState::Running, 1);
    assert_eq!(judged(Some(&running), Some(&vm(VmState::Hibernated, 1, 0)), 62), Some("finish_hibernate"));
}

#[test]
fn which_epoch_a_host_has_tells_whether_it_has_put_a_sandbox_back() {
    for before in [record(SandboxState::Running, 1), record(SandboxState::Hibernated, 1)] {
        let marked = lifecycle::mark_restoring(&before, "cp-1").unwrap();
        assert_eq!(judged(Some(&marked), Some(&vm(VmState::Running, 2, 0)), 10), Some("finish_restore"));
        assert_eq!(judged(Some(&marked), Some(&vm(VmState::Starting, 2, 0)), 10), None, "it may fail yet");
        assert_eq!(judged(Some(&marked), Some(&vm(VmState::Failed, 2, 0)), 10), Some("fail"));
        assert_eq!(judged(Some(&marked), Some(&vm(VmState::Running, 1, 0)), 10), Some("stay"));
        assert_eq!(judged(Some(&marked), None, 10), Some("fail"));
        // A request that was late on its way.
        let stayed = lifecycle::stay(&marked).unwrap();
        assert_eq!(judged(Some(&stayed), Some(&vm(VmState::Running, 2, 0)), 10), Some("finish_restore"));
        // And one that came when all was over.
        let buried = lifecycle::bury(&lifecycle::mark_deleting(&marked).unwrap(), at(1)).unwrap();
        assert_eq!(judged(Some(&buried), Some(&vm(VmState::Running, 2, 0)), 10), Some("end_stray"));
    }
}

#[test]
fn creating_is_left_to_its_flow_and_undone_without_one() {
    let creating = record(SandboxState::Creating, 1);
    let kind = |is_live, second, is_alone| {
        judge_record(&creating, around(is_live, true), Moment { now: at(second), is_alone })
            .map(|action| action.kind())
    };
    assert_eq!(judged(Some(&creating), None, 1000), None);
    assert_eq!(kind(true, 1000, true), None);
    assert_eq!(kind(false, 1, true), None);
    assert_eq!(kind(false, 4, true), Some("undo"));
    assert_eq!(kind(false, 100, false), None);
    assert_eq!(kind(false, 200, false), Some("undo"));
}

#[test]
fn a_delete_does_not_wait_for_a_host_that_is_gone() {
    for state in [SandboxState::Creating, SandboxState::Running, SandboxState::Failed] {
        let marked = lifecycle::mark_deleting(&record(state, 1)).unwrap();
        let kind = |is_live, has_host| {
            judge_record(&marked, around(is_live, has_host), moment(1)).map(|action| action.kind())
        };
        assert_eq!(kind(false, false), Some("finish_delete"));
        assert_eq!(kind(true, false), None, "its flow does it");
        assert_eq!(kind(false, true), None, "the look at its host does it");
        // Should the host come back with it, it is a stray.
        let buried = lifecycle::bury(&marked, at(1)).unwrap();
        assert_eq!(judged(Some(&buried), Some(&vm(VmState::Running, 1, 0)), 2), Some("end_stray"));
    }
    // What nobody deletes may come back with its host.
    let running = record(SandboxState::Running, 1);
    assert_eq!(judge_record(&running, around(false, false), moment(1_000_000)), None);
}

#[test]
fn the_dead_are_forgotten_in_time() {
    let second = |duration: Duration| duration.as_secs();
    let kind = |record: &SandboxRecord, at| {
        judge_record(record, around(false, true), moment(at)).map(|action| action.kind())
    };
    let deleted = SandboxRecord { deleted_at: Some(at(0).into()), ..record(SandboxState::Deleted, 2) };
    assert_eq!(kind(&deleted, second(HOUR)), None);
    assert_eq!(kind(&deleted, second(HOUR) + 1), Some("collect"));
    let failed = record(SandboxState::Failed, 1);
    assert_eq!(kind(&failed, second(23 * HOUR)), None);
    assert_eq!(kind(&failed, second(25 * HOUR)), Some("bury"));
}

/// A host and a record store, reduced to one sandbox.
#[derive(Clone, Debug)]
struct World {
    record: Option<SandboxRecord>,
    vm: Option<Vm>,
    /// The newest epoch that was ended here: an older one is not made any more.
    ended: u64,
}

impl World {
    /// Does what the driver does for an action.
    fn perform(&mut self, action: Action, now: SystemTime) {
        let write = |record: &mut Option<SandboxRecord>, step: &dyn Fn(&SandboxRecord) -> _| {
            if let Some(current) = record.as_ref() {
                *record = Some(Result::<_, lifecycle::Denied>::expect(step(current), "step"));
            }
        };
        match action {
            Action::Undo => write(&mut self.record, &|r| lifecycle::undo(r, now)),
            Action::Collect => self.record = None,
            Action::Fail { failure } => write(&mut self.record, &|r| lifecycle::fail(r, &failure, now)),
            Action::EndStray { epoch } => self.end(epoch),
            Action::FinishDelete => {
                let epoch = self.record.as_ref().unwrap().epoch;
                self.end(epoch);
                write(&mut self.record, &|r| lifecycle::bury(r, now));
            }
            Action::HibernateIdle { idle_since } => {
                write(&mut self.record, &lifecycle::mark_hibernating);
                let vm = self.vm.as_mut().unwrap();
                if lifecycle::time(vm.active_at) > idle_since {
                    write(&mut self.record, &|r| lifecycle::spare(r, now));
                } else {
                    vm.state = VmState::Hibernated.into();
                    write(&mut self.record, &|r| lifecycle::hibernate(r, &Default::default()));
                }
            }
            Action::FinishHibernate { stored_bytes } => {
                let host = HibernateVmResponse { stored_bytes, ..Default::default() };
                write(&mut self.record, &|r| lifecycle::hibernate(r, &host));
            }
            Action::NoteStored(what) => {
                write(&mut self.record, &|r| lifecycle::note_stored(r, &what));
            }
            Action::LeaveToStore => write(&mut self.record, &lifecycle::leave_to_store),
            Action::FinishWake => {
                write(&mut self.record, &|r| lifecycle::wake(r, &Default::default(), now));
            }
            Action::Doze => write(&mut self.record, &lifecycle::doze),
            Action::FinishRestore { epoch } => {
                write(&mut self.record, &|r| lifecycle::restore(r, epoch, &Default::default(), now));
            }
            Action::Stay => write(&mut self.record, &lifecycle::stay),
            Action::Spare => write(&mut self.record, &|r| lifecycle::spare(r, now)),
            Action::Bury => write(&mut self.record, &|r| lifecycle::bury(r, now)),
        }
    }

    fn end(&mut self, epoch: u64) {
        if self.vm.as_ref().is_some_and(|vm| vm.epoch <= epoch) {
            self.vm = None;
        }
        self.ended = self.ended.max(epoch);
    }

    fn is_consistent(&self) -> bool {
        match (&self.record, &self.vm) {
            (None, None) => true,
            (None, Some(_)) => false,
            (Some(record), vm) if record.state() == SandboxState::Running => {
                vm.as_ref().is_some_and(|vm| vm.state() == VmState::Running && vm.epoch == record.epoch)
            }
            (Some(record), None) if record.in_store_alone => {
                record.transition() == SandboxTransition::Unspecified && !record.reserved
            }
            (Some(record), vm) if record.state() == SandboxState::Hibernated => {
                vm.as_ref().is_some_and(|vm| vm.state() == VmState::Hibernated && vm.epoch == record.epoch)
                    && record.transition() == SandboxTransition::Unspecified
                    && !record.reserved
            }
            (Some(record), vm) => {
                vm.is_none()
                    && !record.deleting
                    && record.state() != SandboxState::Creating
                    && !record.reserved
            }
        }
    }
}

fn worlds() -> impl Strategy<Value = World> {
    let states = prop::sample::select(vec![
        SandboxState::Creating,
        SandboxState::Running,
        SandboxState::Hibernated,
        SandboxState::Failed,
        SandboxState::Deleted,
    ]);
    let record = (states, 1..4_u64, any::<bool>(), 0..3, 0..100_u64, 0..3).prop_map(
        |(state, epoch, deleting, mark, active, stored)| {
            let is_deleted = state == SandboxState::Deleted;
            let is_stored = stored > 0 && state == SandboxState::Hibernated;
            let record = SandboxRecord {
                deleting: deleting && !is_deleted,
                deleted_at: is_deleted.then(|| at(100).into()),
                active_at: Some(at(active).into()),
                stored_snapshot_id: if is_stored { "hibernated-1".into() } else { String::new() },
                in_store_alone: is_stored && stored > 1,
                ..record(state, epoch)
            };
            let marked = match state {
                _ if mark == 0 => None,
                SandboxState::Running | SandboxState::Hibernated if mark == 1 => {
                    lifecycle::mark_restoring(&record, "cp-1").ok()
                }
                SandboxState::Running => lifecycle::mark_hibernating(&record).ok(),
                SandboxState::Hibernated => lifecycle::mark_waking(&record).ok(),
                _ => None,
            };
            marked.unwrap_or(record)
        },
    );
    let vm_states = prop::sample::select(vec![VmState::Running, VmState::Hibernated, VmState::Failed]);
    let vm = (vm_states, 1..4_u64, 0..100_u64, 0..3_i64, any::<bool>()).prop_map(
        |(state, epoch, used, stored_bytes, is_stored)| Vm {
            stored_bytes,
            snapshot_id: if is_stored { "hibernated-2".into() } else { String::new() },
            ..vm(state, epoch, used)
        },
    );
    (prop::option::of(record), prop::option::of(vm))
        .prop_filter("no host holds what no record ever said", |(record, vm)| match (record, vm) {
            (Some(record), Some(vm)) => {
                // Marking raised the epoch: what the host holds is older.
                vm.epoch + u64::from(record.deleting) <= record.epoch.max(record.tried_epoch)
            }
            _ => true,
        })
        .prop_map(|(record, vm)| World { record, vm, ended: 0 })
}

proptest! {
    /// From wherever a crash left it, a few rounds lead to records and microVMs that agree, and then nothing is done.
    #[test]
    fn plans_lead_to_agreement_and_then_rest(world in worlds(), second in 100..400_u64) {
        let mut world = world;
        for _ in 0..4 {
            let moment = moment(second);
            if let Some(action) = world.record.as_ref().and_then(|r| judge_record(r, around(false, true), moment)) {
                world.perform(action, moment.now);
            }
            if let Some(action) = judge("here", world.record.as_ref(), world.vm.as_ref(), moment) {
                world.perform(action, moment.now);
            }
        }
        prop_assert!(world.is_consistent(), "{:?}", world);
        prop_assert_eq!(judge("here", world.record.as_ref(), world.vm.as_ref(), moment(second)), None);
    }

    /// No plan ends a microVM that its record wants running and that is neither lost nor idle.
    #[test]
    fn plans_never_touch_what_is_in_use(used in 50..100_u64, second in 100..150_u64, is_alone: bool, has_host: bool) {
        let running = record(SandboxState::Running, 2);
        let moment = Moment { now: at(second), is_alone };
        prop_assert_eq!(judge("here", Some(&running), Some(&vm(VmState::Running, 2, used + 50)), moment), None);
        prop_assert_eq!(judge_record(&running, around(false, has_host), moment), None);
    }

    /// A plan speaks of every sandbox at most once, and only of those that are on the host or in its records.
    #[test]
    fn plans_speak_once_of_each(worlds in prop::collection::vec(worlds(), 0..10)) {
        let mut records = BTreeMap::new();
        let mut vms = Vec::new();
        for (n, world) in worlds.into_iter().enumerate() {
            let id = format!("sb-{n}");
            if let Some(record) = world.record {
                records.insert(id.clone(), Arc::new(SandboxRecord { sandbox_id: id.clone(), ..record }));
            }
            if let Some(vm) = world.vm {
                vms.push(Vm { sandbox_id: id, ..vm });
            }
        }
        let planned = plan("here", &records, &vms, moment(200));
        prop_assert!(planned.windows(2).all(|pair| pair[0].0 < pair[1].0));
        for (id, action) in planned {
            let vm = vms.iter().find(|vm| vm.sandbox_id == id);
            prop_assert_eq!(Some(action), judge("here", records.get(&id).map(AsRef::as_ref), vm, moment(200)));
        }
    }
}
