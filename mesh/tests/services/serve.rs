//! Servers: their sockets, and how they stop.

use std::{
    fs, io,
    os::unix::{fs::PermissionsExt as _, net::UnixListener},
};

use oc_mesh::{
    channel::Channels,
    endpoint::Endpoint,
    serve::{Serve, ServeError},
};
use tonic::{Code, service::Routes};
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};
use tower::ServiceExt as _;

use crate::{
    slow::{Running, Slow, call, channel, ended, on_socket, request, run},
    until,
};

fn routes(slow: &Slow) -> Routes {
    Routes::new(slow.clone())
}

async fn answers(running: &Running) -> bool {
    let mut health = HealthClient::new(channel(running));
    health.check(HealthCheckRequest::default()).await.is_ok()
}

fn kind(result: Result<Running, ServeError>) -> io::ErrorKind {
    match result {
        Err(ServeError::Listen { error, .. }) => error.kind(),
        Err(error) => panic!("{error}"),
        Ok(_) => panic!("it listens"),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_socket_is_for_its_owner_and_goes_with_the_server() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a.sock");
    let running = run(on_socket(&path, routes(&Slow::default()))).await.unwrap();
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    assert!(answers(&running).await);
    running.shutdown.cancel();
    running.stopped().await.unwrap();
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0, "nothing is left");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dead_ones_socket_is_replaced_and_a_live_ones_is_not() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a.sock");
    // Closing a listener leaves its file, as dying does.
    drop(UnixListener::bind(&path).unwrap());
    let slow = Slow::default();
    let running = run(on_socket(&path, routes(&slow))).await.unwrap();
    assert!(answers(&running).await);

    assert_eq!(kind(run(on_socket(&path, routes(&slow))).await), io::ErrorKind::AddrInUse);
    assert!(answers(&running).await, "the first one is as before");
    running.shutdown.cancel();
    running.stopped().await.unwrap();
    assert!(answers(&run(on_socket(&path, routes(&slow))).await.unwrap()).await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_many_that_start_at_once_one_listens() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a.sock");
    drop(UnixListener::bind(&path).unwrap());
    let slow = Slow::default();
    let starts = (0..8).map(|_| tokio::spawn(run(on_socket(&path, routes(&slow)))));
    let started = futures_util::future::join_all(starts).await;
    let (won, lost): (Vec<_>, Vec<_>) = started.into_iter().map(Result::unwrap).partition(Result::is_ok);
    assert_eq!((won.len(), lost.len()), (1, 7));
    assert!(lost.into_iter().all(|lost| kind(lost) == io::ErrorKind::AddrInUse));
    assert!(answers(won[0].as_ref().unwrap()).await);
}

#[tokio::test]
async fn what_is_no_socket_is_left_alone() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("precious");
    fs::write(&path, "data").unwrap();
    let refused = kind(run(on_socket(&path, routes(&Slow::default()))).await);
    assert_eq!(refused, io::ErrorKind::AlreadyExists);
    assert_eq!(fs::read_to_string(&path).unwrap(), "data");
    let nowhere = directory.path().join("none/a.sock");
    assert_eq!(kind(run(on_socket(&nowhere, routes(&Slow::default()))).await), io::ErrorKind::NotFound);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_stops_ends_its_calls_and_takes_no_more() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a.sock");
    let slow = Slow::default();
    let running = run(on_socket(&path, routes(&slow))).await.unwrap();
    let waiting = tokio::spawn(channel(&running).oneshot(request("Run")));
    slow.0.entered(1).await;
    running.shutdown.cancel();
    until("the socket to go", async || !path.exists()).await;
    assert!(!answers(&running).await);
    assert!(!waiting.is_finished());
    slow.0.released.send_replace(true);
    let ended = ended(waiting.await.unwrap().unwrap()).await.unwrap();
    assert_eq!(ended.code, Code::Ok);
    running.stopped().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_channel_outlives_its_server() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a.sock");
    let slow = Slow::default();
    let channels = Channels::new();
    let endpoint = Endpoint::Unix(path.clone()).to_string();
    let channel = channels.get(&endpoint).unwrap();
    assert!(call(&channel, request("Headers")).await.is_err(), "nobody is there");
    for _ in 0..2 {
        let running = run(on_socket(&path, routes(&slow))).await.unwrap();
        until("the channel to connect", async || call(&channel, request("Headers")).await.is_ok()).await;
        running.shutdown.cancel();
        running.stopped().await.unwrap();
    }
    assert!(channels.get("nonsense").is_err());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_tcp_server_tells_its_port() {
    let directory = tempfile::tempdir().unwrap();
    let listen = "tcp://127.0.0.1:0".parse().unwrap();
    let serve = Serve { listen, ..on_socket(directory.path(), routes(&Slow::default())) };
    let running = run(serve).await.unwrap();
    assert!(!running.endpoint.ends_with(":0"));
    assert!(answers(&running).await);
}
