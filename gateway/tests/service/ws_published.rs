//! The framing of the published clients, byte for byte.

use futures_util::SinkExt as _;
use oc_mesh::error::Reason;
use oc_proto::v1::ExecStream;
use tokio_tungstenite::tungstenite::Message;

use crate::{
    mesh::{Mesh, SANDBOX},
    websocket::Seen,
};

#[tokio::test]
async fn an_exec_session_is_replayed_goes_on_and_ends() {
    let mesh = Mesh::start().await;
    let session = mesh.agent.0.sessions.start("e-1");
    session.say("out");
    session.write(ExecStream::Stderr, "err");
    let mut client = mesh.attach("exec/e-1").await;
    assert_eq!(client.bytes().await, b"\x01out");
    assert_eq!(client.bytes().await, b"\x02err");
    assert_eq!(client.bytes().await, b"\x04");
    session.say("live");
    assert_eq!(client.bytes().await, b"\x01live");
    client.input("ls").await;
    client.send("").await;
    client.input("\n").await;
    assert_eq!(session.until(|state| state.stdin.len() == 3).await.stdin, b"ls\n");
    session.exit(-1);
    assert_eq!(client.bytes().await, b"\x03\xff\xff\xff\xff");
    assert_eq!(client.next().await, Seen::Closed(1000, String::new()));
    let start = &session.state().starts[0];
    assert!(start.acknowledges && start.hold_ms == 15_000 && !start.attachment_id.is_empty());
    assert_eq!(session.state().detached, 0, "it ended by itself");
}

#[tokio::test]
async fn a_session_that_has_ended_is_replayed_with_its_end() {
    let mesh = Mesh::start().await;
    let session = mesh.agent.0.sessions.start("e-1");
    session.exit(256);
    for _ in 0..2 {
        let mut client = mesh.attach("agent/e-1").await;
        assert_eq!(client.bytes().await, b"\x04");
        assert_eq!(client.bytes().await, b"\x03\0\0\x01\0");
        assert_eq!(client.closed().await, (1000, String::new()));
    }
}

#[tokio::test]
async fn a_terminal_is_its_bytes() {
    let mesh = Mesh::start().await;
    let session = mesh.agent.0.sessions.start("t-1");
    session.say("$ ");
    let mut client = mesh.attach("pty/t-1").await;
    assert_eq!(client.bytes().await, b"$ ");
    client.socket.send(Message::text("é")).await.unwrap();
    client.send(&b"\0\x03\xff"[..]).await;
    let typed = session.until(|state| state.stdin.len() == 5).await.stdin;
    assert_eq!(typed, b"\xc3\xa9\0\x03\xff");
    session.say("bye");
    assert_eq!(client.bytes().await, b"bye");
    session.exit(0);
    assert_eq!(client.next().await, Seen::Closed(1000, String::new()));
}

#[tokio::test]
async fn a_replay_may_begin_later() {
    let mesh = Mesh::start().await;
    mesh.agent.0.sessions.start("e-1").say("0123456789");
    let path = format!("/sandboxes/{SANDBOX}/exec/e-1?offset=7&token={}", mesh.token(SANDBOX));
    let mut client = mesh.websocket(&path, &[]).await.unwrap();
    assert_eq!(client.bytes().await, b"\x01789");
    assert_eq!(client.bytes().await, b"\x04");
}

#[tokio::test]
async fn large_output_comes_in_messages_that_every_client_takes() {
    let mesh = Mesh::start().await;
    let session = mesh.agent.0.sessions.start("e-1");
    let written: Vec<u8> = (0..1_000_000_u32).map(|index| (index % 251) as u8).collect();
    for piece in written.chunks(250_000) {
        session.write(ExecStream::Stdout, piece.to_vec());
    }
    let mut client = mesh.attach("exec/e-1").await;
    let mut read = Vec::new();
    while read.len() < written.len() {
        let message = client.bytes().await;
        assert!(message.len() <= 64 << 10 && message[0] == 1);
        read.extend_from_slice(&message[1..]);
    }
    assert!(read == written);
    session.until(|state| state.acknowledged == 1_000_000).await;
}

#[tokio::test]
async fn what_has_no_meaning_closes_the_connection_and_says_so() {
    let mesh = Mesh::start().await;
    for (index, (message, code)) in [
        (Message::text("ls"), 1003),
        (Message::binary(b"\x01ls".to_vec()), 1007),
        (Message::binary(b"ls".to_vec()), 1007),
        (Message::binary(vec![0; (1 << 20) + 2]), 1009),
    ]
    .into_iter()
    .enumerate()
    {
        let id = format!("e-{index}");
        let session = mesh.agent.0.sessions.start(&id);
        let mut client = mesh.attach(&format!("exec/{id}")).await;
        client.socket.send(message).await.unwrap();
        let (given, reason) = client.closed().await;
        assert_eq!(given, code, "{reason}");
        assert!(!reason.is_empty());
        let state = session.until(|state| state.detached == 1 && state.attached == 0).await;
        assert!(state.stdin.is_empty());
    }
}

#[tokio::test]
async fn the_largest_message_is_taken_and_a_hundred_times_that_is_not() {
    let mesh = Mesh::start().await;
    let session = mesh.agent.0.sessions.start("e-1");
    let mut client = mesh.attach("exec/e-1").await;
    client.send(vec![0; (1 << 20) + 1]).await;
    session.until(|state| state.stdin.len() == 1 << 20).await;
    let sent = client.socket.send(Message::binary(vec![0; 100 << 20])).await;
    assert!(sent.is_ok(), "{sent:?}");
    assert_eq!(client.closed().await.0, 1009);
    assert_eq!(session.state().stdin.len(), 1 << 20);
}

#[tokio::test]
async fn a_session_that_goes_away_closes_with_its_reason() {
    let mesh = Mesh::start().await;
    for (index, (reason, code)) in [
        (Reason::Interrupted, 4409),
        (Reason::SandboxDeleted, 4410),
        (Reason::AttachedElsewhere, 4409),
        (Reason::SessionNotFound, 4404),
        (Reason::Internal, 1011),
    ]
    .into_iter()
    .enumerate()
    {
        let id = format!("e-{index}");
        let session = mesh.agent.0.sessions.start(&id);
        session.say("before");
        let mut client = mesh.attach(&format!("exec/{id}")).await;
        assert_eq!(client.bytes().await, b"\x01before");
        session.refuse(reason);
        let (given, text) = client.closed().await;
        assert_eq!(given, code);
        assert!(text.starts_with(&format!("{}: ", reason.as_str())), "{text}");
        assert_eq!(session.state().starts.len(), 1, "it is not tried again");
    }
}
