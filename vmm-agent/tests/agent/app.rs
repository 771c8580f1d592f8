//! The whole agent on a socket, with a record store, as the mesh sees it; and what is left when it is told to clean up.

use std::{collections::BTreeSet, path::Path, sync::Arc, time::Duration};

use clap::Parser as _;
use oc_mesh::{
    channel::Channels,
    error::reason_of,
    keys, record,
    store::{self, Op, Txn},
};
use oc_proto::{
    mesh::{
        CreateVmRequest, DeleteVmRequest, HostRecord, ListVmsRequest, SchedulerRecord, StartPath, VmSize,
        VmState, agent_service_client::AgentServiceClient,
    },
    v1::{
        RunRequest, WatchDirectoryRequest, exec_service_client::ExecServiceClient,
        file_service_client::FileServiceClient,
    },
};
use oc_vmm_agent::{
    app::{self, AppError},
    cleanup::clean_up,
    config::{Args, Config},
};
use tokio::{task::JoinHandle, time::timeout};
use tokio_util::sync::CancellationToken;
use tonic::Request;

use crate::world::{DEADLINE, FakeBackend, World};

struct Running {
    endpoint: String,
    store: String,
    shutdown: CancellationToken,
    serving: JoinHandle<Result<(), AppError>>,
}

impl Running {
    async fn start(world: &Arc<World>, dir: &Path) -> Self {
        let endpoint = format!("unix://{}", dir.join("agent.sock").display());
        let store = format!("file://{}", dir.join("store.db").display());
        let data_dir = dir.join("data");
        let args = Args::try_parse_from([
            "oc-vmm-agent",
            "--host-id=h1",
            "--guest-binary=/proc/self/exe",
            "--pool-size=2",
            "--memory-reserve-mb=1",
            "--disk-reserve-mb=1",
            &format!("--data-dir={}", data_dir.display()),
            &format!("--store={store}"),
            &format!("--listen={endpoint}"),
        ]);
        let config = Config::new(args.unwrap()).unwrap();
        let shutdown = CancellationToken::new();
        let (backend, stop) = (Arc::new(FakeBackend(world.clone())), shutdown.clone());
        let serving = tokio::spawn(async move {
            let _lock = app::claim(&config.data_dir)?;
            app::run(config, backend, stop).await
        });
        let running = Self { endpoint, store, shutdown, serving };
        running.host_record(|host| host.pool_ready == 2).await;
        running
    }

    /// Waits for a record of the host, as the scheduler sees it.
    async fn host_record(&self, mut fits: impl FnMut(&HostRecord) -> bool) -> HostRecord {
        let looking = async {
            let store = loop {
                if let Ok(store) = store::open(&self.store).await {
                    break store;
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            };
            loop {
                let found = record::get::<HostRecord>(store.as_ref(), &keys::host("h1")).await.unwrap();
                match found {
                    Some((host, _)) if fits(&host) => return host,
                    _ => tokio::time::sleep(Duration::from_millis(10)).await,
                }
            }
        };
        timeout(DEADLINE, looking).await.unwrap()
    }

    fn client(&self) -> AgentServiceClient<oc_mesh::channel::ClientChannel> {
        AgentServiceClient::new(Channels::new().get(&self.endpoint).unwrap())
    }

    async fn stop(self) {
        self.shutdown.cancel();
        timeout(DEADLINE, self.serving).await.unwrap().unwrap().unwrap();
    }
}

fn create(sandbox: &str, epoch: u64) -> CreateVmRequest {
    CreateVmRequest {
        sandbox_id: sandbox.into(),
        epoch,
        template_id: "base".into(),
        size: Some(VmSize { cpu_count: 1, memory_mb: 1024, disk_mb: 20480 }),
        ..Default::default()
    }
}

#[tokio::test]
async fn guests_are_kept_from_the_parts_of_the_mesh_whoever_comes_and_goes() {
    let (world, dir) = (World::new(), tempfile::tempdir().unwrap());
    let mut secluded = world.secluded.subscribe();
    let agent = Running::start(&world, dir.path()).await;
    assert!(secluded.borrow_and_update().is_empty(), "nobody listens by TCP");
    let store = store::open(&agent.store).await.unwrap();
    let host = HostRecord { endpoint: "http://10.1.2.3:7000".into(), ..Default::default() };
    let joins = record::put(keys::host("h2"), &host);
    store.txn(Txn { compare: Vec::new(), then: vec![joins] }).await.unwrap();
    let parts = |all: &[&str]| all.iter().map(|part| part.parse().unwrap()).collect::<BTreeSet<_>>();
    let one = parts(&["10.1.2.3:7000"]);
    timeout(DEADLINE, secluded.wait_for(|parts| *parts == one)).await.unwrap().unwrap();
    // A host that is no member any more may listen all the same.
    let scheduler = SchedulerRecord { endpoint: "http://[fd00::1]:7100".into(), ..Default::default() };
    let joins = record::put(keys::scheduler("s2"), &scheduler);
    let then = vec![Op::Delete { key: keys::host("h2") }, joins];
    store.txn(Txn { compare: Vec::new(), then }).await.unwrap();
    let both = parts(&["10.1.2.3:7000", "[fd00::1]:7100"]);
    timeout(DEADLINE, secluded.wait_for(|parts| *parts == both)).await.unwrap().unwrap();
    agent.stop().await;
}

#[tokio::test]
async fn the_mesh_sees_a_host_and_uses_it() {
    let (world, dir) = (World::new(), tempfile::tempdir().unwrap());
    let agent = Running::start(&world, dir.path()).await;
    let host = agent.host_record(|_| true).await;
    assert_eq!((host.endpoint.as_str(), host.accelerator.as_str()), (agent.endpoint.as_str(), "tcg"));
    assert_eq!((host.region.as_str(), &host.templates[..]), ("local", &["base".to_owned()][..]));
    assert!(host.max_sandboxes > 0 && host.memory_capacity_mb > 0 && host.disk_free_mb > 0);

    let mut client = agent.client();
    let created = client.create_vm(create("sb-1", 1)).await.unwrap().into_inner();
    assert_eq!((created.accelerator.as_str(), created.start_path()), ("tcg", StartPath::Warm));
    let listed = client.list_vms(ListVmsRequest {}).await.unwrap().into_inner().vms;
    assert_eq!((listed.len(), listed[0].state(), listed[0].epoch), (1, VmState::Running, 1));
    assert!(listed[0].active_at.is_some());

    let channel = Channels::new().get(&agent.endpoint).unwrap();
    let mut call = Request::new(RunRequest { cmd: "whoami".into(), ..Default::default() });
    call.metadata_mut().insert("oc-sandbox-id", "sb-1".parse().unwrap());
    let answer = ExecServiceClient::new(channel).run(call).await.unwrap().into_inner();
    assert_eq!(answer.stdout, "sb-1".as_bytes());

    let stale = client.create_vm(create("sb-1", 0)).await.unwrap_err();
    assert_eq!(reason_of(&stale).unwrap(), "STALE_EPOCH");
    let unknown = CreateVmRequest { template_id: "nonesuch".into(), ..create("sb-2", 1) };
    let unknown = client.create_vm(unknown).await.unwrap_err();
    assert_eq!(reason_of(&unknown).unwrap(), "TEMPLATE_NOT_FOUND");

    let delete = DeleteVmRequest { sandbox_id: "sb-1".into(), epoch: 2, if_idle_since: None };
    client.delete_vm(delete.clone()).await.unwrap();
    client.delete_vm(delete).await.unwrap();
    assert!(client.list_vms(ListVmsRequest {}).await.unwrap().into_inner().vms.is_empty());
    agent.stop().await;
}

#[tokio::test]
async fn a_stopped_agent_leaves_the_mesh_and_its_sandboxes_run_on() {
    let (world, dir) = (World::new(), tempfile::tempdir().unwrap());
    let agent = Running::start(&world, dir.path()).await;
    agent.client().create_vm(create("sb-1", 1)).await.unwrap();
    let store = store::open(&agent.store).await.unwrap();
    agent.stop().await;
    assert!(record::get::<HostRecord>(store.as_ref(), &keys::host("h1")).await.unwrap().is_none());
    assert_eq!(world.vms.lock().len(), 1, "the pool is gone, the sandbox is not");

    let agent = Running::start(&world, dir.path()).await;
    let created = agent.client().create_vm(create("sb-1", 1)).await.unwrap().into_inner();
    assert_eq!(created.start_path(), StartPath::Warm, "as the first time");
    agent.stop().await;
}

#[tokio::test]
async fn attached_streams_do_not_hold_up_an_agent_that_stops() {
    let (world, dir) = (World::new(), tempfile::tempdir().unwrap());
    let agent = Running::start(&world, dir.path()).await;
    agent.client().create_vm(create("sb-1", 1)).await.unwrap();
    // More than a connection has room for by default.
    let files = FileServiceClient::new(Channels::new().get(&agent.endpoint).unwrap());
    let mut watches = Vec::new();
    for _ in 0..300 {
        let mut request = Request::new(WatchDirectoryRequest::default());
        request.metadata_mut().insert("oc-sandbox-id", "sb-1".parse().unwrap());
        let mut events = files.clone().watch_directory(request).await.unwrap().into_inner();
        assert!(events.message().await.unwrap().is_some());
        watches.push(events);
    }
    agent.stop().await;
    // If they had been waited for, they would have ended without a reason, broken off with their connections.
    for mut events in watches {
        assert_eq!(reason_of(&events.message().await.unwrap_err()).unwrap(), "HOST_UNAVAILABLE");
    }
}

#[tokio::test]
async fn a_second_agent_is_kept_off_and_a_clean_up_leaves_nothing() {
    let (world, dir) = (World::new(), tempfile::tempdir().unwrap());
    let data_dir = dir.path().join("data");
    let agent = Running::start(&world, dir.path()).await;
    agent.client().create_vm(create("sb-1", 1)).await.unwrap();
    assert!(matches!(app::claim(&data_dir), Err(AppError::Lock(_))));
    let backend = || Arc::new(FakeBackend(world.clone()));
    assert!(clean_up(backend(), &data_dir).await.is_err(), "not under a running agent");
    agent.stop().await;

    clean_up(backend(), &data_dir).await.unwrap();
    assert!(world.vms.lock().is_empty());
    assert!(!data_dir.exists());
    clean_up(backend(), &data_dir).await.unwrap();
}
