//! A host that dies and comes back, which clients of the published framing do not notice.

use oc_gateway::{listener::Limits, ws};
use oc_mesh::error::Reason;
use oc_proto::v1::ExecStream;

use crate::{mesh::Mesh, websocket::Seen};

#[tokio::test]
async fn no_byte_comes_twice_and_none_is_lost() {
    let mesh = Mesh::start().await;
    let session = mesh.agent.0.sessions.start("e-1");
    session.say("before ");
    let mut client = mesh.attach("exec/e-1").await;
    assert_eq!(client.bytes().await, b"\x01before ");
    assert_eq!(client.bytes().await, b"\x04");
    for round in 0..3 {
        // Sent from the beginning by a host that repeats itself, or from the byte that is due.
        session.change(|state| state.repeats = round == 1);
        session.break_off();
        session.until(|state| state.starts.len() == round + 2).await;
        session.say("after ");
        assert_eq!(client.bytes().await, b"\x01after ");
    }
    session.exit(7);
    assert_eq!(client.bytes().await, [3, 0, 0, 0, 7]);
    assert_eq!(client.closed().await.0, 1000);
    let starts = session.state().starts;
    assert!(starts.iter().all(|start| start.attachment_id == starts[0].attachment_id));
    assert_eq!(starts.iter().map(|start| start.offset).collect::<Vec<_>>(), [0, 7, 13, 19]);
}

#[tokio::test]
async fn a_break_amid_the_replay_leaves_one_end_of_it() {
    let mesh = Mesh::start().await;
    let session = mesh.agent.0.sessions.start("e-1");
    let written: Vec<u8> = (0..4_000_000_u32).map(|index| (index % 253) as u8).collect();
    for piece in written.chunks(200_000) {
        session.write(ExecStream::Stdout, piece.to_vec());
    }
    let mut client = mesh.attach("exec/e-1").await;
    let mut read = client.collect(1, 300_000).await;
    session.break_off();
    // The end of the replay, or more of it.
    let (mut ends, mut breaks) = (0, 1);
    while read.len() < written.len() || ends == 0 {
        let message = client.bytes().await;
        match message[0] {
            4 => ends += 1,
            _ => read.extend_from_slice(&message[1..]),
        }
        if read.len() > 2_000_000 && breaks == 1 {
            breaks += 1;
            session.break_off();
        }
    }
    session.say("end");
    assert_eq!(client.bytes().await, b"\x01end");
    assert!(read == written);
    assert_eq!(ends, 1);
}

#[tokio::test]
async fn input_comes_once_whatever_became_of_its_acknowledgement() {
    let mesh = Mesh::start().await;
    let session = mesh.agent.0.sessions.start("e-1");
    let mut client = mesh.attach("exec/e-1").await;
    assert_eq!(client.bytes().await, b"\x04");
    client.input("one ").await;
    session.until(|state| state.stdin == b"one ").await;
    // It comes, and nobody is told.
    session.change(|state| state.mute = true);
    client.input("two ").await;
    session.until(|state| state.stdin == b"one two ").await;
    // It does not come.
    session.change(|state| {
        state.mute = false;
        state.deaf = true;
    });
    client.input("three ").await;
    session.break_off();
    session.change(|state| state.deaf = false);
    session.until(|state| state.stdin == b"one two three ").await;
    client.input("four").await;
    assert_eq!(session.until(|state| state.stdin.len() == 18).await.stdin, b"one two three four");
}

#[tokio::test]
async fn a_host_that_is_away_for_a_while_is_waited_for() {
    let mesh = Mesh::start().await;
    let session = mesh.agent.0.sessions.start("e-1");
    let mut client = mesh.attach("exec/e-1").await;
    assert_eq!(client.bytes().await, b"\x04");
    session.refuse(Reason::HostUnavailable);
    session.until(|state| state.starts.len() > 3).await;
    client.input("meanwhile").await;
    session.say("back");
    session.relent();
    assert_eq!(client.bytes().await, b"\x01back");
    session.until(|state| state.stdin == b"meanwhile").await;
}

#[tokio::test]
async fn a_host_that_stays_away_is_told_as_such() {
    let resume = std::time::Duration::from_secs(1);
    let mesh = Mesh::with(Limits::default(), |settings| {
        settings.websockets = ws::Limits { resume, ..ws::Limits::default() };
    })
    .await;
    let session = mesh.agent.0.sessions.start("e-1");
    let mut client = mesh.attach("exec/e-1").await;
    assert_eq!(client.bytes().await, b"\x04");
    session.refuse(Reason::HostUnavailable);
    match client.next().await {
        Seen::Closed(1012, reason) => assert!(reason.starts_with("HOST_UNAVAILABLE: "), "{reason}"),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_host_that_comes_back_only_to_die_again_is_not_waited_for_for_ever() {
    let mesh = Mesh::start().await;
    let session = mesh.agent.0.sessions.start("e-1");
    let mut client = mesh.attach("exec/e-1").await;
    let breaking = async {
        loop {
            let starts = session.state().starts.len();
            session.break_off();
            session.until(|state| state.starts.len() > starts && state.attached > 0).await;
        }
    };
    tokio::select! {
        () = breaking => {}
        (code, _) = client.closed() => assert_eq!(code, 1012),
    }
}
