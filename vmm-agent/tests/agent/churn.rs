//! Many callers at once, at random, over a host whose VMs die and whose snapshots are torn. Whatever happened, in the
//! end the registry, the journal and the host agree.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, atomic::Ordering},
    time::{Duration, SystemTime},
};

use oc_vmm_agent::vm::{
    decide::{Denied, Phase},
    handle::VmError,
};
use parking_lot::Mutex;
use tokio::{task::JoinSet, time::timeout};

use crate::world::{Agent, DEADLINE, World, eventually, id, order, owner};

const SANDBOXES: u64 = 6;
const CALLERS: u64 = 12;
const CALLS: usize = 60;

/// A generator that needs no crate: the sequence only has to differ from caller to caller (Knuth's MMIX constants).
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % sides
    }
}

/// The highest epoch at which each sandbox's deletion was confirmed.
type Deleted = Arc<Mutex<BTreeMap<String, u64>>>;

async fn caller(agent: Arc<Agent>, world: Arc<World>, deleted: Deleted, mut dice: Dice) {
    for _ in 0..CALLS {
        let name = format!("sb-{}", dice.roll(SANDBOXES));
        let epoch = 1 + dice.roll(20);
        match dice.roll(10) {
            0..5 => {
                let known = deleted.lock().get(&name).copied().unwrap_or(0);
                // Some callers do not wait for the answer.
                let patience = if dice.roll(4) == 0 { Duration::from_micros(300) } else { DEADLINE };
                let created = timeout(patience, agent.host.create(owner(&name, epoch), order())).await;
                assert!(patience < DEADLINE || created.is_ok(), "a create at {epoch} of {name} never ended");
                if let Ok(Ok(_)) = created {
                    assert!(epoch > known, "{name} at {epoch} came back after its deletion at {known}");
                }
            }
            5..8 => {
                match timeout(DEADLINE, agent.host.delete(&id(&name), owner(&name, epoch).epoch, None))
                    .await
                    .unwrap_or_else(|_| panic!("a deletion at {epoch} of {name} never ended"))
                {
                    Ok(()) => {
                        let mut deleted = deleted.lock();
                        let latest = deleted.entry(name).or_default();
                        *latest = epoch.max(*latest);
                    }
                    Err(error) => {
                        assert!(matches!(error, VmError::Denied(Denied::StaleEpoch { .. })), "{error}");
                    }
                }
            }
            8 => {
                let victim = world.vms.lock().values().find_map(|vm| vm.process.clone());
                if let Some(victim) = victim {
                    victim.exit.cancel();
                }
            }
            _ => {
                world.failing_restores.store(2, Ordering::SeqCst);
                world.failing_boots.store(1, Ordering::SeqCst);
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn registry_journal_and_host_agree_after_any_mix_of_calls() {
    for seed in 0..64 {
        let (world, dir) = (World::new(), tempfile::tempdir().unwrap());
        let agent = Arc::new(Agent::start(&world, dir.path(), 2).await);
        let deleted = Deleted::default();
        let mut callers = JoinSet::new();
        for n in 0..CALLERS {
            let dice = Dice(seed * 1000 + n);
            callers.spawn(caller(agent.clone(), world.clone(), deleted.clone(), dice));
        }
        while let Some(done) = callers.join_next().await {
            done.unwrap();
        }
        let agent = Arc::into_inner(agent).unwrap();
        let settled = |vm: &oc_vmm_agent::host::Listed| matches!(vm.phase, Phase::Running | Phase::Failed);
        eventually("all settle", || agent.host.list(SystemTime::now()).iter().all(settled)).await;
        // A process that was killed a moment ago may still be listed as running.
        let running = || {
            let listed = agent.host.list(SystemTime::now()).into_iter();
            listed.filter(|vm| vm.phase == Phase::Running).map(|vm| vm.owner.sandbox.to_string()).collect()
        };
        eventually("what runs is listed as running", || {
            BTreeSet::<String>::eq(&running(), &world.sandboxes())
        })
        .await;
        let (listed, pool) = (agent.host.list(SystemTime::now()), agent.pool.clone());
        for vm in &listed {
            let dead = deleted.lock().get(vm.owner.sandbox.as_str()).copied().unwrap_or(0);
            assert!(vm.owner.epoch.0 > dead, "seed {seed}: {vm:?} was deleted at {dead}");
        }
        let accounted = || world.vms.lock().len() == listed.len() + *pool.ready().borrow();
        eventually("every VM is a sandbox's or the pool's", accounted).await;

        for vm in listed {
            timeout(DEADLINE, agent.host.delete(&vm.owner.sandbox, vm.owner.epoch, None))
                .await
                .unwrap()
                .unwrap();
        }
        timeout(DEADLINE, agent.stop()).await.unwrap();
        assert!(world.vms.lock().is_empty(), "seed {seed}: nothing is left");
        assert_eq!(std::fs::read_dir(dir.path().join("journal")).unwrap().count(), 0, "seed {seed}");
    }
}
