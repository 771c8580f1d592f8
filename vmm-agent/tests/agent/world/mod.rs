//! A host without any VMM: its "processes" and "homes" live in memory, outlive every agent that the tests start
//! and drop, and can be told to fail, to wait, or to stop the agent at any step.

#![allow(clippy::expect_used)]

mod backend;
mod guest;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::SocketAddr,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use oc_proto::mesh::ActivateRequest;
use oc_vmm_agent::{
    backend::Captured,
    capacity::Limits,
    host::Host,
    identity::{Epoch, SandboxId},
    journal::Owner,
    microvm::{Kind, MakeError},
    network::Egress,
    pool::{Pool, Settings},
    vm::{start::Order, tier::Policy},
    workshop::Workshop,
};
use parking_lot::Mutex;
use tokio::{
    sync::{Notify, watch},
    task::JoinHandle,
};
use tokio_util::sync::CancellationToken;

pub use self::backend::FakeBackend;

pub const DEADLINE: Duration = Duration::from_secs(20);

/// The host that outlives its agents.
#[derive(Debug, Default)]
pub struct World {
    pub vms: Mutex<HashMap<String, FakeVm>>,
    /// Steps taken so far, and the one at which the agent is stopped for good.
    steps: AtomicUsize,
    crash_at: AtomicUsize,
    pub crashed: Notify,
    /// How many of the next restores and boots fail.
    pub failing_restores: AtomicUsize,
    pub failing_boots: AtomicUsize,
    pub failing_goldens: AtomicBool,
    /// How many of the next attempts to store a VM fail, and how many stored memories are found damaged.
    pub failing_stores: AtomicUsize,
    pub damaged_memories: AtomicUsize,
    /// How often storing a VM was begun, and whether it waits then.
    pub stores: AtomicUsize,
    pub store_waits: AtomicBool,
    /// How many of the next guests do not answer when they are woken.
    pub failing_wakes: AtomicUsize,
    /// How many of the next guests do not stand still when they are told to.
    pub restless: AtomicUsize,
    /// What was taken of VMs, by name.
    pub snapshots: Mutex<BTreeMap<String, Captured>>,
    /// What other hosts have put into the object store; one that is damaged there is `None`.
    pub store: Mutex<BTreeMap<String, Option<Captured>>>,
    /// How many of the next captures fail, and how many snapshots are found damaged.
    pub failing_captures: AtomicUsize,
    pub damaged_snapshots: AtomicUsize,
    /// Clones that took a snapshot on, and how many of the next ones fail to.
    pub grafts: AtomicUsize,
    pub failing_grafts: AtomicUsize,
    /// While true, goldens are waited for.
    pub golden_waits: AtomicBool,
    pub released: Notify,
    /// Every activation: (vm, request).
    pub activations: Mutex<Vec<(String, ActivateRequest)>>,
    pub made: AtomicUsize,
    /// What no guest reaches.
    pub secluded: watch::Sender<BTreeSet<SocketAddr>>,
}

#[derive(Debug, Default)]
pub struct FakeVm {
    pub process: Option<Process>,
    /// What it may reach.
    pub egress: Egress,
    /// Grows whenever its guest may have written to it.
    disk: Arc<AtomicUsize>,
    /// What is stored of its memory: its sandbox, and the disk that it was stored with.
    stored: Option<(String, usize)>,
}

#[derive(Clone, Debug)]
pub struct Process {
    pub exit: CancellationToken,
    pub paused: Arc<AtomicBool>,
    pub sandbox: Arc<Mutex<String>>,
    pub deaf: Arc<AtomicBool>,
}

impl World {
    pub fn new() -> Arc<Self> {
        let world = Self::default();
        world.crash_at.store(usize::MAX, Ordering::SeqCst);
        Arc::new(world)
    }

    /// The agent makes no further step after `steps` more.
    pub fn crash_after(&self, steps: usize) {
        self.steps.store(0, Ordering::SeqCst);
        self.crash_at.store(steps, Ordering::SeqCst);
    }

    pub fn never_crash(&self) {
        self.crash_at.store(usize::MAX, Ordering::SeqCst);
    }

    /// The machine fails: every process is gone. The agent is, too.
    pub fn power_off(&self) {
        for process in self.vms.lock().values().filter_map(|vm| vm.process.as_ref()) {
            process.exit.cancel();
        }
    }

    /// One thing that the agent does to the host: before it and after it are instants at which it may die.
    async fn step(&self) {
        if self.steps.fetch_add(1, Ordering::SeqCst) >= self.crash_at.load(Ordering::SeqCst) {
            self.crashed.notify_one();
            std::future::pending::<()>().await;
        }
        tokio::task::yield_now().await;
    }

    /// Sandboxes whose guests run, by what they were last told.
    pub fn sandboxes(&self) -> BTreeSet<String> {
        let vms = self.vms.lock();
        let named =
            vms.values().filter_map(|vm| vm.process.as_ref()).filter(|process| !process.exit.is_cancelled());
        named.map(|process| process.sandbox.lock().clone()).filter(|name| !name.is_empty()).collect()
    }

    pub fn vm_of(&self, sandbox: &str) -> Process {
        let vms = self.vms.lock();
        let mut named = vms.values().filter_map(|vm| vm.process.clone());
        named.find(|process| *process.sandbox.lock() == sandbox).expect("a VM of that sandbox")
    }

    /// Whether anything is stored of a sandbox's memory.
    pub fn has_stored(&self, sandbox: &str) -> bool {
        self.vms.lock().values().any(|vm| vm.stored.as_ref().is_some_and(|(of, _)| of == sandbox))
    }

    fn process(&self, vm: &str) -> Result<Process, MakeError> {
        let vms = self.vms.lock();
        let process = vms.get(vm).and_then(|vm| vm.process.clone());
        process.filter(|p| !p.exit.is_cancelled()).ok_or_else(|| MakeError::Backend("no process".into()))
    }

    fn change<T>(&self, vm: &str, change: impl FnOnce(&mut FakeVm) -> T) -> Result<T, MakeError> {
        let mut vms = self.vms.lock();
        vms.get_mut(vm).map(change).ok_or_else(|| MakeError::Backend("no home".into()))
    }

    fn start(&self, vm: &str, paused: bool) -> Result<(), MakeError> {
        self.made.fetch_add(1, Ordering::SeqCst);
        let mut vms = self.vms.lock();
        let vm = vms.get_mut(vm).ok_or_else(|| MakeError::Backend("no home".into()))?;
        vm.process = Some(Process {
            exit: CancellationToken::new(),
            paused: Arc::new(AtomicBool::new(paused)),
            sandbox: Arc::default(),
            deaf: Arc::default(),
        });
        Ok(())
    }
}

fn take_one(counter: &AtomicUsize) -> bool {
    counter.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1)).is_ok()
}

pub fn kind() -> Kind {
    Kind { template: "base".into(), cpu_count: 1, memory_mb: 1024 }
}

pub fn order() -> Order {
    Order {
        kind: kind(),
        disk_mb: 20480,
        envs: HashMap::from([("A".into(), "b".into())]),
        egress: Egress::Open,
        source: None,
    }
}

pub fn owner(sandbox: &str, epoch: u64) -> Owner {
    Owner { sandbox: id(sandbox), epoch: Epoch(epoch) }
}

pub fn id(sandbox: &str) -> SandboxId {
    SandboxId::parse(sandbox).unwrap()
}

/// Room for all that any test makes.
pub const LIMITS: Limits = Limits { max_sandboxes: 100, memory_reserve_mb: 0, disk_reserve_mb: 0 };

/// One agent of the host.
pub struct Agent {
    pub host: Host,
    pub pool: Pool,
    cancel: CancellationToken,
    tasks: [JoinHandle<()>; 2],
}

impl Agent {
    /// Starts an agent over what `data_dir` and `world` hold, on the boot called `boot`. What hibernates is stored at once.
    pub async fn start_on(boot: &str, world: &Arc<World>, data_dir: &Path, pool_size: usize) -> Self {
        Self::start_with(boot, world, data_dir, pool_size, (LIMITS, Duration::ZERO)).await
    }

    /// As above, with these limits, and VMs that are paused for so long.
    pub async fn start_with(
        boot: &str,
        world: &Arc<World>,
        data_dir: &Path,
        pool_size: usize,
        (limits, paused_for): (Limits, Duration),
    ) -> Self {
        let backend = Arc::new(FakeBackend(world.clone()));
        let workshop = Arc::new(Workshop::open(backend, data_dir, boot.into()).unwrap());
        let settings = Settings {
            shelves: vec![(kind(), pool_size)],
            parallel: 2,
            memory_reserve_mb: 0,
            clone_mb: 1,
            disk_reserve_mb: 0,
            data_dir: data_dir.into(),
        };
        let pool = Pool::new(workshop.clone(), settings);
        let policy = Policy { paused_for, headroom_mb: 0, uploads: false };
        let host = Host::open(workshop, pool.clone(), limits, policy).unwrap();
        host.recover().await.unwrap();
        let cancel = CancellationToken::new();
        let filling = tokio::spawn(pool.clone().run(cancel.clone()));
        let relieving = tokio::spawn(host.clone().relieve(cancel.clone()));
        Self { host, pool, cancel, tasks: [filling, relieving] }
    }

    pub async fn start(world: &Arc<World>, data_dir: &Path, pool_size: usize) -> Self {
        Self::start_on("boot", world, data_dir, pool_size).await
    }

    /// Waits until so many clones wait.
    pub async fn pool_holds(&self, ready: usize) {
        let mut watch = self.pool.ready();
        let full = watch.wait_for(|n| *n == ready);
        tokio::time::timeout(DEADLINE, full).await.expect("the pool fills in time").unwrap();
    }

    /// Ends the agent as a signal does: sandboxes go on.
    pub async fn stop(self) {
        self.cancel.cancel();
        for task in self.tasks {
            task.await.unwrap();
        }
        self.host.leave(DEADLINE).await;
    }
}

/// Waits until `condition` holds.
pub async fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let waiting = async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    tokio::time::timeout(DEADLINE, waiting).await.unwrap_or_else(|_| panic!("{what}"));
}
