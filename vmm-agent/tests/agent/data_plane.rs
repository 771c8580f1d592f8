//! Calls that pass through to guests, and what their callers are told when the sandbox is not there to answer.

use std::{sync::atomic::Ordering, time::SystemTime};

use oc_mesh::error::reason_of;
use oc_proto::v1::{
    RunRequest, RunResponse, WatchDirectoryRequest, WatchDirectoryResponse,
    exec_service_client::ExecServiceClient, file_service_client::FileServiceClient,
};
use oc_vmm_agent::{
    data_plane::{ExecPlane, FilePlane},
    host::Host,
    vm::{decide::Denied, handle::VmError},
};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Status, Streaming};

use crate::world::{Agent, World, eventually, id, order, owner};

async fn run(host: &Host, sandbox: Option<&str>, cmd: &str) -> Result<RunResponse, Status> {
    let mut request = Request::new(RunRequest { cmd: cmd.into(), ..Default::default() });
    if let Some(sandbox) = sandbox {
        request.metadata_mut().insert("oc-sandbox-id", sandbox.parse().unwrap());
    }
    let plane = ExecPlane::new(host.clone(), CancellationToken::new());
    ExecServiceClient::new(plane).run(request).await.map(tonic::Response::into_inner)
}

async fn reason(host: &Host, sandbox: Option<&str>, cmd: &str) -> String {
    reason_of(&run(host, sandbox, cmd).await.unwrap_err()).unwrap()
}

#[tokio::test]
async fn a_call_reaches_the_sandbox_that_its_metadata_names() {
    let (world, dir) = (World::new(), tempfile::tempdir().unwrap());
    let agent = Agent::start(&world, dir.path(), 0).await;
    for name in ["sb-1", "sb-2"] {
        agent.host.create(owner(name, 1), order()).await.unwrap();
    }
    for name in ["sb-1", "sb-2"] {
        assert_eq!(run(&agent.host, Some(name), "whoami").await.unwrap().stdout, name.as_bytes());
    }
    assert_eq!(reason(&agent.host, None, "whoami").await, "INVALID_ARGUMENT");
    assert_eq!(reason(&agent.host, Some("../1"), "whoami").await, "INVALID_ARGUMENT");
    assert_eq!(reason(&agent.host, Some("sb-3"), "whoami").await, "SANDBOX_NOT_FOUND");
}

#[tokio::test]
async fn a_sandbox_that_starts_asks_for_patience() {
    let (world, dir) = (World::new(), tempfile::tempdir().unwrap());
    world.golden_waits.store(true, Ordering::SeqCst);
    let agent = Agent::start(&world, dir.path(), 0).await;
    let host = agent.host.clone();
    let create = tokio::spawn(async move { host.create(owner("sb-1", 1), order()).await });
    eventually("it starts", || agent.host.find(&id("sb-1")).is_some()).await;
    assert_eq!(reason(&agent.host, Some("sb-1"), "whoami").await, "SANDBOX_NOT_READY");
    world.golden_waits.store(false, Ordering::SeqCst);
    world.released.notify_waiters();
    create.await.unwrap().unwrap();
    run(&agent.host, Some("sb-1"), "whoami").await.unwrap();
}

#[tokio::test]
async fn a_call_during_which_the_vm_is_lost_says_so() {
    let (world, dir) = (World::new(), tempfile::tempdir().unwrap());
    let agent = Agent::start(&world, dir.path(), 0).await;
    agent.host.create(owner("sb-1", 1), order()).await.unwrap();
    let process = world.vm_of("sb-1");
    let host = agent.host.clone();
    let call = tokio::spawn(async move { reason(&host, Some("sb-1"), "wait").await });
    let vm = agent.host.find(&id("sb-1")).unwrap();
    let long_ago = SystemTime::UNIX_EPOCH;
    eventually("the call runs", || vm.last_used(long_ago) == long_ago).await;
    process.exit.cancel();
    assert_eq!(call.await.unwrap(), "SANDBOX_FAILED");
    assert_eq!(reason(&agent.host, Some("sb-1"), "whoami").await, "SANDBOX_FAILED");
}

#[tokio::test]
async fn a_call_keeps_its_sandbox_from_being_idle_until_it_ends() {
    let (world, dir) = (World::new(), tempfile::tempdir().unwrap());
    let agent = Agent::start(&world, dir.path(), 0).await;
    agent.host.create(owner("sb-1", 1), order()).await.unwrap();
    let host = agent.host.clone();
    let call = tokio::spawn(async move { run(&host, Some("sb-1"), "wait").await });
    let vm = agent.host.find(&id("sb-1")).unwrap();
    let long_ago = SystemTime::UNIX_EPOCH;
    eventually("the call runs", || vm.last_used(long_ago) == long_ago).await;
    let epoch = owner("sb-1", 1).epoch;
    let spared = agent.host.delete(&id("sb-1"), epoch, Some(SystemTime::now())).await;
    assert!(matches!(spared, Err(VmError::Denied(Denied::Active))));

    // A caller that goes away ends its call.
    call.abort();
    let _ = call.await;
    eventually("it is idle", || vm.last_used(long_ago) != long_ago).await;
    agent.host.delete(&id("sb-1"), epoch, Some(SystemTime::now())).await.unwrap();
}

#[tokio::test]
async fn a_delete_ends_the_calls_of_its_sandbox() {
    let (world, dir) = (World::new(), tempfile::tempdir().unwrap());
    let agent = Agent::start(&world, dir.path(), 0).await;
    agent.host.create(owner("sb-1", 1), order()).await.unwrap();
    let host = agent.host.clone();
    let call = tokio::spawn(async move { reason(&host, Some("sb-1"), "wait").await });
    let vm = agent.host.find(&id("sb-1")).unwrap();
    let long_ago = SystemTime::UNIX_EPOCH;
    eventually("the call runs", || vm.last_used(long_ago) == long_ago).await;
    agent.host.delete(&id("sb-1"), owner("sb-1", 1).epoch, None).await.unwrap();
    assert_eq!(call.await.unwrap(), "SANDBOX_DELETED");
}

/// A stream that does not end by itself, and has begun.
async fn watch(plane: FilePlane) -> Streaming<WatchDirectoryResponse> {
    let mut request = Request::new(WatchDirectoryRequest::default());
    request.metadata_mut().insert("oc-sandbox-id", "sb-1".parse().unwrap());
    let mut events = FileServiceClient::new(plane).watch_directory(request).await.unwrap().into_inner();
    assert!(events.message().await.unwrap().is_some());
    events
}

#[tokio::test]
async fn an_endless_stream_is_a_use_of_its_sandbox_and_ends_with_the_agent() {
    let (world, dir) = (World::new(), tempfile::tempdir().unwrap());
    let agent = Agent::start(&world, dir.path(), 0).await;
    agent.host.create(owner("sb-1", 1), order()).await.unwrap();
    let draining = CancellationToken::new();
    let mut events = watch(FilePlane::new(agent.host.clone(), draining.clone())).await;
    let vm = agent.host.find(&id("sb-1")).unwrap();
    let long_ago = SystemTime::UNIX_EPOCH;
    assert_eq!(vm.last_used(long_ago), long_ago);
    draining.cancel();
    assert_eq!(reason_of(&events.message().await.unwrap_err()).unwrap(), "HOST_UNAVAILABLE");
    assert_ne!(vm.last_used(long_ago), long_ago, "it is over");
}

#[tokio::test]
async fn an_endless_stream_ends_with_its_sandbox() {
    let (world, dir) = (World::new(), tempfile::tempdir().unwrap());
    let agent = Agent::start(&world, dir.path(), 0).await;
    agent.host.create(owner("sb-1", 1), order()).await.unwrap();
    let mut events = watch(FilePlane::new(agent.host.clone(), CancellationToken::new())).await;
    agent.host.delete(&id("sb-1"), owner("sb-1", 1).epoch, None).await.unwrap();
    assert_eq!(reason_of(&events.message().await.unwrap_err()).unwrap(), "SANDBOX_DELETED");
}
