//! What attachments cost, in a gateway that is a process of its own.

use futures_util::{StreamExt as _, stream};
use oc_proto::v1::ExecStream;

use crate::{
    mesh::Mesh,
    process::Gateway,
    sessions::Session,
    websocket::{Client, Seen},
};

/// Attachments at the same time.
const MANY: usize = 1000;

async fn attach_many(mesh: &Mesh, count: usize) -> Vec<Client> {
    stream::iter(0..count)
        .map(|index| async move {
            let mut client = mesh.attach(&format!("exec/e-{index}")).await;
            assert_eq!(client.bytes().await, b"\x04");
            client
        })
        .buffered(32)
        .collect()
        .await
}

#[tokio::test]
async fn an_idle_attachment_costs_little_also_after_it_was_busy() {
    let mut mesh = Mesh::start().await;
    let sessions: Vec<Session> =
        (0..MANY).map(|index| mesh.agent.0.sessions.start(&format!("e-{index}"))).collect();
    let gateway = Gateway::start(&mut mesh).await;
    drop(attach_many(&mesh, 100).await);
    for session in &sessions[..100] {
        session.until(|state| state.attached == 0).await;
    }
    let before = gateway.resident_kib();
    let mut clients = attach_many(&mesh, MANY).await;
    let each = |now: u64| now.saturating_sub(before) as f64 / MANY as f64;
    let idle = each(gateway.resident_kib());
    println!("idle {idle:.1} KiB each");
    let write = |round: usize, index: usize| {
        let written = vec![u8::try_from(round).unwrap(); 20_000];
        sessions[index].write(ExecStream::Stdout, written);
    };
    // One after the other: what stays then is held by attachments.
    for round in 0..2 {
        for (index, client) in clients.iter_mut().enumerate() {
            write(round, index);
            client.collect(1, 20_000).await;
        }
        println!("after output in turn {:.1} KiB each", each(gateway.resident_kib()));
    }
    let busy = each(gateway.resident_kib());
    // All at once: what comes and goes beyond that was freed, and the allocator has not given it back yet.
    let mut at_once = Vec::new();
    for round in 2..8 {
        for index in 0..MANY {
            write(round, index);
        }
        for client in &mut clients {
            client.collect(1, 20_000).await;
        }
        at_once.push(each(gateway.resident_kib()));
    }
    println!("after output at once {at_once:.1?} KiB each");
    assert!(idle < 30.0 && busy < 30.0, "{idle} KiB each, {busy} KiB after output");
    assert!(at_once.iter().all(|each| *each < 64.0), "{at_once:?} KiB each");
}

#[tokio::test]
async fn one_stream_is_fast_and_passes_through_little_memory() {
    let mut mesh = Mesh::start().await;
    let session = mesh.agent.0.sessions.start("e-1");
    let gateway = Gateway::start(&mut mesh).await;
    session.flood();
    let mut client = mesh.attach("exec/e-1").await;
    let started = tokio::time::Instant::now();
    let mut read = 0;
    while read < 256 << 20 {
        match client.next().await {
            Seen::Bytes(bytes) => read += bytes.len(),
            other => panic!("{other:?}"),
        }
    }
    let speed = (read >> 20) as f64 / started.elapsed().as_secs_f64();
    println!("{speed:.0} MiB/s, peak {} MiB", gateway.peak_mib());
    assert!(gateway.peak_mib() < 64, "{} MiB", gateway.peak_mib());
    gateway.stop().await;
}

#[tokio::test]
async fn one_line_is_logged_at_the_end_of_an_attachment() {
    let mut mesh = Mesh::start().await;
    let session = mesh.agent.0.sessions.start("e-1");
    let gateway = Gateway::start(&mut mesh).await;
    session.say("hello");
    let path = format!(
        "/api/sandboxes/{}/exec/e-1?token={}",
        crate::mesh::SANDBOX,
        mesh.token(crate::mesh::SANDBOX)
    );
    let mut client = mesh.websocket(&path, &[("x-request-id", "r-1")]).await.unwrap();
    client.bytes().await;
    client.input("secret input").await;
    session.until(|state| !state.stdin.is_empty()).await;
    session.exit(0);
    assert_eq!(client.closed().await.0, 1000);
    let log = gateway.stop().await;
    let lines: Vec<serde_json::Value> = log.iter().map(|line| serde_json::from_str(line).unwrap()).collect();
    let of = |message: &str| lines.iter().filter(|line| line["message"] == message).collect::<Vec<_>>();
    let (requests, ends) = (of("request"), of("attachment"));
    assert_eq!((requests.len(), ends.len()), (1, 1), "{log:#?}");
    assert_eq!((&requests[0]["status"], &requests[0]["request_id"]), (&101.into(), &"r-1".into()));
    assert_eq!((&ends[0]["code"], &ends[0]["request_id"]), (&1000.into(), &"r-1".into()));
    // The output, the end of the replay, the exit code; the input. Each with its byte in front.
    assert_eq!((&ends[0]["bytes_sent"], &ends[0]["bytes_received"]), (&(6 + 1 + 5).into(), &13.into()));
    let log = log.join("\n");
    for secret in ["secret input", &mesh.token(crate::mesh::SANDBOX)[..20]] {
        assert!(!log.contains(secret), "{log}");
    }
}
