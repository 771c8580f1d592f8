//! The contract's own messages over WebSocket, for clients that resume by themselves.

use futures_util::SinkExt as _;
use oc_mesh::error::Reason;
use oc_proto::v1::{attach_exec_request::Input, attach_exec_response::Event, *};
use prost::Message as _;
use tokio_tungstenite::tungstenite::Message;

use crate::{
    mesh::{HIBERNATED, Mesh, SANDBOX},
    websocket::{Client, Seen},
};

impl Mesh {
    async fn subprotocol(&self, sandbox: &str, session: &str) -> Client {
        let headers = [("x-api-key", self.key.as_str()), ("sec-websocket-protocol", "oc.v1.exec")];
        let path = format!("/api/sandboxes/{sandbox}/{session}");
        let client = self.websocket(&path, &headers).await.unwrap();
        assert_eq!(client.subprotocol.as_deref(), Some("oc.v1.exec"));
        client
    }
}

impl Client {
    async fn ask(&mut self, input: Input) {
        self.send(AttachExecRequest { input: Some(input), ..Default::default() }.encode_to_vec()).await;
    }

    async fn start(&mut self, offset: u64) {
        let attachment_id = "mine".to_owned();
        self.ask(Input::Start(AttachStart {
            offset,
            attachment_id,
            acknowledges: true,
            ..Default::default()
        }))
        .await;
    }

    async fn told(&mut self) -> Event {
        AttachExecResponse::decode(self.bytes().await.as_slice()).unwrap().event.unwrap()
    }
}

fn output(offset: u64, data: &str) -> Event {
    Event::Output(ExecOutput { offset, stream: ExecStream::Stdout.into(), data: data.to_owned().into() })
}

#[tokio::test]
async fn messages_pass_as_they_are_both_ways() {
    let mesh = Mesh::start().await;
    let session = mesh.agent.0.sessions.start("e-1");
    session.say("0123456789");
    let mut client = mesh.subprotocol(SANDBOX, "exec/e-1").await;
    client.start(4).await;
    let Event::Attached(attached) = client.told().await else { panic!("not attached") };
    assert_eq!((attached.offset, attached.stdin_offset), (4, 0));
    assert_eq!(client.told().await, output(4, "456789"));
    assert_eq!(client.told().await, Event::Replayed(ExecReplayed { offset: 10 }));
    client.ask(Input::Stdin(ExecStdin { offset: 0, data: "ls".into() })).await;
    assert_eq!(client.told().await, Event::StdinAccepted(ExecStdinAccepted { offset: 2 }));
    for input in [
        Input::Acknowledge(ExecAcknowledgement { offset: 10 }),
        Input::Resize(TerminalSize { cols: 100, rows: 50 }),
        Input::Signal(ExecSignal { signal: 2 }),
    ] {
        client.ask(input.clone()).await;
        session.until(|state| state.inputs.contains(&input)).await;
    }
    session.exit(3);
    assert_eq!(client.told().await, Event::Exit(ExecExit { exit_code: 3, timed_out: false, offset: 10 }));
    assert_eq!(client.next().await, Seen::Closed(1000, String::new()));
    let starts = session.state().starts;
    assert_eq!((starts.len(), starts[0].offset, starts[0].attachment_id.as_str()), (1, 4, "mine"));
}

#[tokio::test]
async fn large_messages_come_whole() {
    let mesh = Mesh::start().await;
    let session = mesh.agent.0.sessions.start("t-1");
    session.say(&"x".repeat(256 << 10));
    let mut client = mesh.subprotocol(SANDBOX, "pty/t-1").await;
    client.start(0).await;
    client.told().await;
    assert_eq!(client.told().await, output(0, &"x".repeat(256 << 10)));
    client.told().await;
    let data = vec![7; 1 << 20];
    client.ask(Input::Stdin(ExecStdin { offset: 0, data: data.clone().into() })).await;
    assert!(session.until(|state| state.stdin.len() == 1 << 20).await.stdin == data);
}

#[tokio::test]
async fn the_gateway_does_not_resume_and_says_that_the_client_may() {
    let mesh = Mesh::start().await;
    let session = mesh.agent.0.sessions.start("e-1");
    session.say("before ");
    let mut client = mesh.subprotocol(SANDBOX, "exec/e-1").await;
    client.start(0).await;
    client.told().await;
    assert_eq!(client.told().await, output(0, "before "));
    session.break_off();
    let (code, reason) = client.closed().await;
    assert_eq!(code, 1012);
    assert!(reason.starts_with("HOST_UNAVAILABLE: "), "{reason}");
    session.say("after");
    let mut again = mesh.subprotocol(SANDBOX, "exec/e-1").await;
    again.start(7).await;
    again.told().await;
    assert_eq!(again.told().await, output(7, "after"));
}

#[tokio::test]
async fn errors_after_the_upgrade_are_told_by_the_close() {
    let mesh = Mesh::start().await;
    let mut client = mesh.subprotocol(SANDBOX, "exec/e-9").await;
    client.start(0).await;
    let (code, reason) = client.closed().await;
    assert_eq!((code, reason.as_str()), (4404, "SESSION_NOT_FOUND: there is no such session"));
    let session = mesh.agent.0.sessions.start("e-1");
    session.refuse(Reason::AttachedElsewhere);
    let mut client = mesh.subprotocol(SANDBOX, "exec/e-1").await;
    client.start(0).await;
    assert_eq!(client.closed().await.0, 4409);
}

#[tokio::test]
async fn a_hibernated_sandbox_is_woken_by_the_first_message() {
    let mesh = Mesh::start().await;
    mesh.agent.0.sessions.start("e-1");
    let mut client = mesh.subprotocol(HIBERNATED, "exec/e-1").await;
    assert!(mesh.agent.0.calls.lock().is_empty());
    client.start(0).await;
    assert!(matches!(client.told().await, Event::Attached(_)));
}

#[tokio::test]
async fn garbage_closes_the_connection_and_says_why() {
    let mesh = Mesh::start().await;
    mesh.agent.0.sessions.start("e-1");
    let named = |sandbox_id: &str, session_id: &str| {
        let input = Some(Input::Start(AttachStart::default()));
        let message =
            AttachExecRequest { sandbox_id: sandbox_id.into(), session_id: session_id.into(), input };
        Message::binary(message.encode_to_vec())
    };
    let stdin = Input::Stdin(ExecStdin { offset: 0, data: "ls".into() });
    for (message, code) in [
        (Message::text("start"), 1003),
        (Message::binary(b"\xff\xff".to_vec()), 1007),
        (Message::binary(b"".to_vec()), 1007),
        (
            Message::binary(AttachExecRequest { input: Some(stdin), ..Default::default() }.encode_to_vec()),
            1007,
        ),
        (named("sb-other", ""), 1007),
        (named("", "e-2"), 1007),
        (Message::binary(vec![0; 2 << 20]), 1009),
    ] {
        let mut client = mesh.subprotocol(SANDBOX, "exec/e-1").await;
        client.socket.send(message).await.unwrap();
        let (given, reason) = client.closed().await;
        assert_eq!(given, code, "{reason}");
    }
    assert!(mesh.agent.0.calls.lock().is_empty());
    let mut client = mesh.subprotocol(SANDBOX, "exec/e-1").await;
    client.socket.send(named(SANDBOX, "e-1")).await.unwrap();
    client.told().await;
    client.told().await;
    client.send(&b"\xff"[..]).await;
    assert_eq!(client.closed().await.0, 1007);
}

#[tokio::test]
async fn only_who_says_so_is_detached() {
    let mesh = Mesh::start().await;
    let session = mesh.agent.0.sessions.start("e-1");
    let mut client = mesh.subprotocol(SANDBOX, "exec/e-1").await;
    client.start(0).await;
    client.told().await;
    client.socket.close(None).await.unwrap();
    drop(client);
    session.until(|state| state.attached == 0).await;
    assert_eq!(session.state().detached, 0);
    let mut client = mesh.subprotocol(SANDBOX, "exec/e-1").await;
    client.start(0).await;
    client.ask(Input::Detach(ExecDetach {})).await;
    client.socket.close(None).await.unwrap();
    session.until(|state| state.detached == 1 && state.attached == 0).await;
}

#[tokio::test]
async fn a_gateway_that_goes_down_holds_the_place_of_its_clients() {
    let mesh = Mesh::start().await;
    let session = mesh.agent.0.sessions.start("e-1");
    let mut client = mesh.subprotocol(SANDBOX, "exec/e-1").await;
    client.start(0).await;
    client.told().await;
    mesh.stop.cancel();
    assert_eq!(client.closed().await.0, 1001);
    session.until(|state| state.attached == 0).await;
    assert_eq!(session.state().detached, 0);
}
