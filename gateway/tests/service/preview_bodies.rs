//! Bodies to and from ports of sandboxes: of any size, as they come, and with a side that stops amid one or answers
//! before it has all.

use std::{convert::Infallible, time::Duration};

use bytes::Bytes;
use http::{Method, Request};
use http_body::Frame;
use http_body_util::{BodyExt as _, Full, StreamBody};
use oc_gateway::app::Settings;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    sync::mpsc,
    task::JoinHandle,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::body::Body;

use crate::{
    client::{client, collect},
    http2::Http2,
    mesh::{Mesh, SANDBOX},
    ports::Server,
    previews::{PATIENCE, both_ways, get, host, raw, request},
};

#[tokio::test]
async fn bodies_of_any_size_pass_both_ways() {
    const SIZE: usize = 48 << 20;
    for mesh in both_ways(|_| ()).await {
        let server = Server::start().await;
        let name = host(SANDBOX, server.port);
        let answer = get(&mesh, &name, &format!("/big/{SIZE}"), &[]).await;
        assert_eq!(answer.body.len(), SIZE);
        assert!(
            answer
                .body
                .chunks(64 << 10)
                .enumerate()
                .all(|(index, piece)| piece.iter().all(|byte| *byte == index as u8))
        );
        let piece = Bytes::from(vec![7; 1 << 20]);
        let frames = (0..SIZE >> 20).map(move |_| Ok::<_, tonic::Status>(Frame::data(piece.clone())));
        let body = Body::new(StreamBody::new(futures_util::stream::iter(frames)));
        let mut upload = request(&mesh, false, &name, "/echo", &[], body);
        *upload.method_mut() = Method::PUT;
        let answer = collect(client(false).request(upload).await.unwrap()).await;
        assert_eq!(answer.json()["bytes"], SIZE);
        let mut sized =
            request(&mesh, false, &name, "/echo", &[], Body::new(Full::new(Bytes::from_static(b"12345"))));
        *sized.method_mut() = Method::POST;
        let told = collect(client(false).request(sized).await.unwrap()).await.json();
        assert_eq!((&told["bytes"], &told["headers"]["content-length"]), (&5.into(), &"5".into()));
    }
}

#[tokio::test]
async fn events_come_as_they_happen() {
    for mesh in both_ways(|_| ()).await {
        let server = Server::start().await;
        let asked = request(&mesh, false, &host(SANDBOX, server.port), "/events", &[], Body::empty());
        let response = client(false).request(asked).await.unwrap();
        let mut events = response.into_body();
        for number in 0..3 {
            server.say.notify_one();
            let event = tokio::time::timeout(PATIENCE, events.frame()).await.unwrap().unwrap().unwrap();
            assert_eq!(event.into_data().unwrap(), format!("data: {number}\n\n"));
        }
    }
}

#[tokio::test]
async fn a_client_that_stops_amid_its_upload_is_told_so() {
    let change = |settings: &mut Settings| {
        settings.previews.answer = Duration::from_millis(300);
        settings.linger = Duration::from_millis(50);
    };
    for mesh in both_ways(change).await {
        let server = Server::start().await;
        let name = host(SANDBOX, server.port);
        for body in [
            "Content-Length: 9\r\n\r\nsome",
            "Content-Length: 9\r\n\r\n",
            "Transfer-Encoding: chunked\r\n\r\n4\r\nso",
        ] {
            let answer = raw(&mesh, &format!("POST /echo HTTP/1.1\r\nHost: {name}\r\n{body}")).await;
            assert!(
                answer.starts_with("HTTP/1.1 408 ") && answer.contains("REQUEST_TIMEOUT"),
                "{body}: {answer}"
            );
            assert!(
                answer.contains("\r\nconnection: close\r\n") && answer.contains("\r\nx-request-id: "),
                "{answer}"
            );
        }
        let (sender, receiver) = mpsc::channel::<Result<Frame<Bytes>, Infallible>>(1);
        let mut http2 = Http2::over(TcpStream::connect(mesh.address).await.unwrap()).await;
        let body = Body::new(StreamBody::new(ReceiverStream::new(receiver)));
        let asked = Request::post(format!("http://{name}/echo")).body(body).unwrap();
        sender.send(Ok(Frame::data("some".into()))).await.unwrap();
        let answer = tokio::time::timeout(PATIENCE, http2.sender.send_request(asked)).await.unwrap();
        assert_eq!(collect(answer.unwrap()).await.error(), (408, "REQUEST_TIMEOUT".into()));
    }
}

#[tokio::test]
async fn a_port_that_stops_amid_an_upload_is_what_is_told_of() {
    let change = |settings: &mut Settings| {
        settings.previews.answer = Duration::from_secs(2);
        settings.linger = PATIENCE / 2;
    };
    for mesh in both_ways(change).await {
        let server = Server::start().await;
        let name = host(SANDBOX, server.port);
        // All of it is there, or more than the port takes.
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let deaf = host(SANDBOX, listener.local_addr().unwrap().port());
        for (name, path, pieces) in [(&name, "/never", 1), (&deaf, "/", 48)] {
            let piece = Bytes::from(vec![7; 1 << 20]);
            let frames = (0..pieces).map(move |_| Ok::<_, tonic::Status>(Frame::data(piece.clone())));
            let body = Body::new(StreamBody::new(futures_util::stream::iter(frames)));
            let mut asked = request(&mesh, false, name, path, &[], body);
            *asked.method_mut() = Method::POST;
            let answer = tokio::time::timeout(PATIENCE, client(false).request(asked)).await.unwrap();
            let answer = collect(answer.unwrap()).await;
            assert_eq!(answer.error(), (504, "DEADLINE_EXCEEDED".into()), "{path}");
        }
    }
}

const UPLOADED: usize = 3 << 20;

/// A port that answers as soon as it knows what is asked, and reads the rest then, if it does; the rest.
async fn hasty(answer: &'static str, reads_on: bool) -> (u16, JoinHandle<usize>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let serving = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut read = Vec::new();
        let body = loop {
            stream.read_buf(&mut read).await.unwrap();
            if let Some(end) = read.windows(4).position(|window| window == b"\r\n\r\n") {
                break end + 4;
            }
        };
        stream.write_all(answer.as_bytes()).await.unwrap();
        while reads_on && read.len() < body + UPLOADED && stream.read_buf(&mut read).await.unwrap() > 0 {}
        if !reads_on {
            std::future::pending::<()>().await;
        }
        read.len() - body
    });
    (port, serving)
}

/// Begins an upload, and waits for an answer with that end; the connection, and the answer.
async fn answered_early(mesh: &Mesh, name: &str, end: &[u8]) -> (TcpStream, Vec<u8>) {
    let mut stream = TcpStream::connect(mesh.address).await.unwrap();
    let head = format!("POST / HTTP/1.1\r\nHost: {name}\r\nContent-Length: {UPLOADED}\r\n\r\nx");
    stream.write_all(head.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    while !answer.ends_with(end) {
        let read = tokio::time::timeout(PATIENCE, stream.read_buf(&mut answer)).await.unwrap().unwrap();
        assert_ne!(read, 0, "{}", String::from_utf8_lossy(&answer));
    }
    (stream, answer)
}

#[tokio::test]
async fn an_answer_that_falls_silent_is_broken_off() {
    for mesh in both_ways(|settings| settings.previews.silence = Duration::from_millis(300)).await {
        let (port, _serving) = hasty("HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf", false).await;
        let asked = request(&mesh, false, &host(SANDBOX, port), "/", &[], Body::empty());
        let answered = tokio::time::timeout(PATIENCE, client(false).request(asked)).await.unwrap();
        let answer = answered.expect("its head comes");
        assert!(tokio::time::timeout(PATIENCE, answer.into_body().collect()).await.unwrap().is_err());
    }
}

#[tokio::test]
async fn a_port_may_answer_before_it_has_all() {
    for mesh in both_ways(|_| ()).await {
        let (port, serving) = hasty("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", true).await;
        let name = host(SANDBOX, port);
        let (mut stream, _) = answered_early(&mesh, &name, b"\r\n\r\nok").await;
        stream.write_all(&vec![b'x'; UPLOADED - 1]).await.unwrap();
        assert_eq!(tokio::time::timeout(PATIENCE, serving).await.unwrap().unwrap(), UPLOADED);

        let (port, serving) = hasty("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", true).await;
        let (sender, receiver) = mpsc::channel::<Result<Frame<Bytes>, Infallible>>(1);
        let stream = TcpStream::connect(mesh.address).await.unwrap();
        let mut http2 = Http2::over(stream).await;
        let body = Body::new(StreamBody::new(ReceiverStream::new(receiver)));
        let url = format!("http://{}/", host(SANDBOX, port));
        let asked = Request::post(url).header("content-length", UPLOADED).body(body).unwrap();
        let answer = collect(http2.sender.send_request(asked).await.unwrap());
        assert_eq!(tokio::time::timeout(PATIENCE, answer).await.unwrap().body, "ok");
        for _ in 0..UPLOADED >> 16 {
            sender.send(Ok(Frame::data(vec![b'x'; 1 << 16].into()))).await.unwrap();
        }
        drop(sender);
        assert_eq!(tokio::time::timeout(PATIENCE, serving).await.unwrap().unwrap(), UPLOADED);
    }
}

#[tokio::test]
async fn what_a_port_refuses_amid_an_upload_is_told_at_once() {
    for mesh in both_ways(|settings| settings.linger = Duration::from_secs(3600)).await {
        let refusal = "HTTP/1.1 413 Too Large\r\nContent-Length: 2\r\n\r\nno";
        let (port, serving) = hasty(refusal, false).await;
        let name = host(SANDBOX, port);
        let (_stream, answer) = answered_early(&mesh, &name, b"\r\n\r\nno").await;
        assert!(answer.starts_with(b"HTTP/1.1 413 "));
        serving.abort();
    }
}
