//! Slow clients, clients that vanish, and a gateway that goes down.

use std::{pin::pin, time::Duration};

use futures_util::{SinkExt as _, StreamExt as _};
use oc_gateway::{listener::Limits, ws};
use tokio::{io::AsyncWriteExt as _, net::TcpStream};
use tokio_tungstenite::tungstenite::Message;

use crate::{
    mesh::{Mesh, SANDBOX},
    sessions::Session,
    websocket::{PATIENCE, Seen},
};

/// Waits until what was sent no longer grows; how much it is.
async fn settled(session: &Session) -> u64 {
    let settling = async {
        let (mut before, mut looks) = (0, 0);
        loop {
            tokio::time::sleep(Duration::from_millis(500)).await;
            let sent = session.state().sent;
            looks = if sent == before && sent > 0 { looks + 1 } else { 0 };
            // One look may be of a time in which this process stood still.
            if looks == 2 {
                return sent;
            }
            before = sent;
        }
    };
    tokio::time::timeout(PATIENCE, settling).await.expect("nothing holds the host back")
}

#[tokio::test]
async fn a_client_that_does_not_read_holds_the_host_back_and_can_still_write() {
    let mesh = Mesh::start().await;
    let session = mesh.agent.0.sessions.start("e-1");
    session.flood();
    let mut client = mesh.attach("exec/e-1").await;
    // Windows and the kernel's buffers, on both sides.
    let sent = settled(&session).await;
    assert!(sent < 24 << 20, "{sent} bytes are on the way");
    client.input("stop").await;
    session.until(|state| state.inputs.iter().any(|input| format!("{input:?}").contains("stop"))).await;
    // What was taken is acknowledged, and nothing else is.
    assert!(session.state().acknowledged < sent);
    let mut read = 0;
    while read < 32 << 20 {
        let message = client.bytes().await;
        read += message.len();
    }
    session.until(|state| state.acknowledged >= 24 << 20).await;
}

#[tokio::test]
async fn a_session_that_does_not_read_holds_its_client_back_and_can_still_write() {
    let mesh = Mesh::start().await;
    let session = mesh.agent.0.sessions.start("e-1");
    session.change(|state| state.deaf = true);
    let mut client = mesh.attach("exec/e-1").await;
    assert_eq!(client.bytes().await, b"\x04");
    let piece = Message::binary([vec![0], vec![b'x'; 64 << 10]].concat());
    let (mut writer, mut reader) = client.socket.split();
    let mut sent = 0_u64;
    while let Ok(Ok(())) = tokio::time::timeout(Duration::from_secs(1), writer.send(piece.clone())).await {
        sent += 64 << 10;
        assert!(sent < 64 << 20, "nothing holds the client back");
    }
    session.say("output passes");
    let next = tokio::time::timeout(PATIENCE, reader.next()).await.unwrap().unwrap().unwrap();
    assert_eq!(next.into_data(), &b"\x01output passes"[..]);
    session.change(|state| state.deaf = false);
    // The piece that was begun comes as well.
    writer.flush().await.unwrap();
    let state = session.until(|state| state.stdin.len() as u64 > sent).await;
    assert_eq!(state.stdin.len() as u64, sent + (64 << 10));
}

#[tokio::test]
async fn pings_and_closes_are_noticed_while_input_is_held_back() {
    let mesh = Mesh::start().await;
    let session = mesh.agent.0.sessions.start("e-1");
    session.change(|state| state.deaf = true);
    let mut client = mesh.attach("exec/e-1").await;
    client.send([vec![0], vec![b'x'; 200 << 10]].concat()).await;
    client.socket.send(Message::Ping("there?".into())).await.unwrap();
    let pong = async {
        while !matches!(client.socket.next().await, Some(Ok(Message::Pong(text))) if text == "there?") {}
    };
    tokio::time::timeout(PATIENCE, pong).await.expect("no pong");
    client.socket.close(None).await.unwrap();
    session.change(|state| state.deaf = false);
    session.until(|state| state.attached == 0).await;
}

#[tokio::test]
async fn a_client_that_leaves_is_detached() {
    let mesh = Mesh::start().await;
    let session = mesh.agent.0.sessions.start("e-1");
    let mut closes = mesh.attach("exec/e-1").await;
    assert_eq!(closes.bytes().await, b"\x04");
    closes.socket.close(None).await.unwrap();
    while let Some(Ok(_)) = closes.socket.next().await {}
    session.until(|state| state.detached == 1 && state.attached == 0).await;
    let breaks = mesh.attach("exec/e-1").await;
    session.until(|state| state.attached == 1).await;
    drop(breaks);
    session.until(|state| state.detached == 2 && state.attached == 0).await;
}

#[tokio::test]
async fn a_client_that_vanishes_is_found_out_and_one_that_is_silent_is_not() {
    let mesh = Mesh::with(Limits::default(), |settings| {
        let patience = ws::liveness::Patience {
            quiet: Duration::from_millis(300),
            gone: Duration::from_secs(2),
            ..Default::default()
        };
        settings.websockets = ws::Limits { patience, ..ws::Limits::default() };
    })
    .await;
    let session = mesh.agent.0.sessions.start("e-1");
    // A client that answers pings, because it reads.
    let mut silent = mesh.attach("exec/e-1").await;
    assert_eq!(silent.bytes().await, b"\x04");
    // One that shakes hands and is never heard of again.
    let mut vanished = TcpStream::connect(mesh.address).await.unwrap();
    let head = format!(
        "GET /sandboxes/{SANDBOX}/exec/e-1 HTTP/1.1\r\nhost: x\r\nx-api-key: {}\r\nconnection: upgrade\r\n\
         upgrade: websocket\r\nsec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
        mesh.key
    );
    vanished.write_all(head.as_bytes()).await.unwrap();
    session.until(|state| state.attached == 2).await;
    let mut found_out = pin!(session.until(|state| state.attached == 1 && state.detached == 1));
    let (mut signs, mut is_found_out) = (0, false);
    while signs < 6 || !is_found_out {
        tokio::select! {
            sign = silent.bytes() => {
                assert_eq!(sign, b"", "a sign of life");
                signs += 1;
            }
            _ = &mut found_out, if !is_found_out => is_found_out = true,
        }
    }
    session.say("still there");
    let said = async {
        loop {
            // Signs of life go on coming.
            let said = silent.bytes().await;
            if !said.is_empty() {
                return said;
            }
        }
    };
    assert_eq!(tokio::time::timeout(PATIENCE, said).await.expect("nothing is said"), b"\x01still there");
}

#[tokio::test]
async fn a_gateway_that_goes_down_says_so_and_waits_for_its_clients() {
    let mut mesh = Mesh::start().await;
    let session = mesh.agent.0.sessions.start("e-1");
    session.say("before");
    let mut clients = vec![mesh.attach("exec/e-1").await, mesh.attach("pty/e-1").await];
    for client in &mut clients {
        client.bytes().await;
    }
    mesh.stop.cancel();
    for mut client in clients {
        let (code, reason) = client.closed().await;
        assert_eq!(code, 1001);
        assert!(reason.contains("again"), "{reason}");
    }
    let ended = async { while mesh.tasks.join_next().await.is_some() {} };
    tokio::time::timeout(PATIENCE, ended).await.expect("the gateway does not end");
    assert_eq!(session.state().detached, 2);
}

#[tokio::test]
async fn a_client_that_does_not_answer_does_not_hold_up_the_end() {
    let mut mesh = Mesh::with(Limits { drain: Duration::from_secs(2), ..Limits::default() }, |_| {}).await;
    let session = mesh.agent.0.sessions.start("e-1");
    session.flood();
    let client = mesh.attach("exec/e-1").await;
    settled(&session).await;
    mesh.stop.cancel();
    let ended = async { while mesh.tasks.join_next().await.is_some() {} };
    // Not the minute that a client has for the rest of a session that has ended.
    tokio::time::timeout(Duration::from_secs(40), ended).await.expect("the gateway does not end");
    drop(client);
}

#[tokio::test]
async fn one_stream_is_fast() {
    let mesh = Mesh::start().await;
    let session = mesh.agent.0.sessions.start("e-1");
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
    // Host, gateway and client share this process and its cores.
    println!("{} MiB/s", (read >> 20) as f64 / started.elapsed().as_secs_f64());
}
