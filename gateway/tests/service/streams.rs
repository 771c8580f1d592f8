use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt as _;
use http::Method;
use http_body::Frame;
use http_body_util::{BodyExt as _, StreamBody};
use oc_gateway::listener::Limits;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, body::Body};

use crate::{
    agent::{ARCHIVE_PART, Upload},
    client::{client, collect},
    mesh::{Mesh, SANDBOX},
};

const PATIENCE: Duration = Duration::from_secs(20);

fn files(path: &str) -> String {
    format!("/api/sandboxes/{SANDBOX}/files?path={path}")
}

/// A body that is sent piece by piece.
fn pieces() -> (mpsc::Sender<Result<Frame<Bytes>, Status>>, Body) {
    let (sender, receiver) = mpsc::channel(1);
    (sender, Body::new(StreamBody::new(ReceiverStream::new(receiver))))
}

fn piece(size: usize) -> Result<Frame<Bytes>, Status> {
    Ok(Frame::data(Bytes::from(vec![7; size])))
}

/// A mesh whose gateway waits for those that are still sending, however slow this machine is.
async fn patient() -> Mesh {
    Mesh::with(Limits::default(), |settings| settings.linger = PATIENCE).await
}

impl Mesh {
    async fn upload_is(&self, what: impl Fn(&Upload) -> bool) -> Upload {
        let mut uploads = self.agent.0.uploads.subscribe();
        let seen = uploads.wait_for(|uploads| uploads.last().is_some_and(&what));
        tokio::time::timeout(PATIENCE, seen).await.expect("not seen in time").unwrap().last().unwrap().clone()
    }
}

#[tokio::test]
async fn a_file_goes_up_whole_in_bounded_messages() {
    let mesh = Mesh::start().await;
    for (http2, size) in [(false, 0), (false, 1), (false, 20 << 20), (true, 20 << 20), (true, 0)] {
        let headers = [("x-api-key", mesh.key.as_str())];
        let body = Body::new(http_body_util::Full::new(Bytes::from(vec![1; size])));
        let request = mesh.request(Method::PUT, &files("/up%20load"), &headers, body);
        let answer = collect(client(http2).request(request).await.unwrap()).await;
        assert_eq!((answer.status.as_u16(), answer.body.len()), (204, 0));
        let upload = mesh.upload_is(|upload| upload.whole.is_some()).await;
        assert_eq!((upload.whole, upload.bytes, upload.path.as_str()), (Some(true), size as u64, "/up load"));
        assert!(upload.largest <= 512 << 10);
    }
}

#[tokio::test]
async fn a_slow_client_is_followed_piece_by_piece() {
    let mesh = Mesh::start().await;
    let (sender, body) = pieces();
    let request = mesh.request(Method::PUT, &files("/slow"), &[("x-api-key", &mesh.key)], body);
    let answer = tokio::spawn(client(false).request(request));
    for index in 1..=5 {
        sender.send(piece(10)).await.unwrap();
        mesh.upload_is(|upload| upload.bytes == index * 10).await;
    }
    drop(sender);
    assert_eq!(answer.await.unwrap().unwrap().status(), 204);
    assert_eq!(mesh.upload_is(|upload| upload.whole.is_some()).await.whole, Some(true));
}

#[tokio::test]
async fn a_client_that_goes_away_breaks_the_upload_and_never_ends_it() {
    let mesh = Mesh::start().await;
    for http2 in [false, true] {
        let (sender, body) = pieces();
        let request = mesh.request(Method::PUT, &files("/gone"), &[("x-api-key", &mesh.key)], body);
        let answer = tokio::spawn(client(http2).request(request));
        sender.send(piece(100)).await.unwrap();
        mesh.upload_is(|upload| upload.bytes == 100 && upload.whole.is_none()).await;
        answer.abort();
        drop(sender);
        assert_eq!(
            mesh.upload_is(|upload| upload.whole.is_some()).await.whole,
            Some(false),
            "http2: {http2}"
        );
    }
}

#[tokio::test]
async fn a_slow_host_holds_the_client_back() {
    let mesh = Mesh::start().await;
    let (sender, body) = pieces();
    let request = mesh.request(Method::PUT, &files("/paused"), &[("x-api-key", &mesh.key)], body);
    let answer = tokio::spawn(client(false).request(request));
    let mut sent = 0_u64;
    // Until nothing more goes in: whatever lies between client and host is full.
    while let Ok(Ok(())) = tokio::time::timeout(Duration::from_secs(2), sender.send(piece(1 << 20))).await {
        sent += 1 << 20;
        assert!(sent < 64 << 20, "nothing holds the client back");
    }
    mesh.agent.0.go_on.notify_one();
    drop(sender);
    assert_eq!(answer.await.unwrap().unwrap().status(), 204);
    let upload = mesh.upload_is(|upload| upload.whole.is_some()).await;
    assert!(upload.bytes >= sent, "{} of {sent}", upload.bytes);
}

#[tokio::test]
async fn an_upload_that_is_refused_midway_is_answered_though_the_client_still_sends() {
    let mesh = patient().await;
    for http2 in [false, true] {
        let body = Body::new(http_body_util::Full::new(Bytes::from(vec![1; 30 << 20])));
        let request = mesh.request(Method::PUT, &files("/full"), &[("x-api-key", &mesh.key)], body);
        let answer = collect(client(http2).request(request).await.unwrap()).await;
        assert_eq!(answer.error(), (507, "GUEST_DISK_FULL".to_owned()));
    }
}

#[tokio::test]
async fn an_upload_with_a_wrong_key_is_answered_though_the_client_still_sends() {
    let mesh = patient().await;
    let body = Body::new(http_body_util::Full::new(Bytes::from(vec![1; 30 << 20])));
    let request = mesh.request(Method::PUT, &files("/x"), &[("x-api-key", "osb_wrong")], body);
    let answer = collect(client(false).request(request).await.unwrap()).await;
    assert_eq!(answer.error(), (403, "INVALID_CREDENTIALS".to_owned()));
}

#[tokio::test]
async fn a_file_comes_down_whole_and_says_how_long_it_is() {
    let mesh = Mesh::start().await;
    for http2 in [false, true] {
        for size in [1, 100_000, 20 << 20] {
            let path = files(&format!("/zeros/{size}"));
            let request = mesh.request(Method::GET, &path, &[("x-api-key", &mesh.key)], Body::empty());
            let answer = collect(client(http2).request(request).await.unwrap()).await;
            assert_eq!(answer.headers["content-length"], size.to_string());
            assert_eq!(answer.headers["content-type"], "application/octet-stream");
            assert_eq!(answer.body.len(), size);
            let piece = 256 << 10;
            assert!(answer.body.iter().enumerate().all(|(at, byte)| *byte == (at / piece) as u8));
        }
    }
}

#[tokio::test]
async fn an_empty_file_and_a_kernel_file_come_down_as_they_are() {
    let mesh = Mesh::start().await;
    let empty = mesh.call(Method::GET, &files("/zeros/0"), "").await;
    assert_eq!((empty.status.as_u16(), empty.body.len()), (200, 0));
    let hollow = mesh.call(Method::GET, &files("/hollow/4096"), "").await;
    assert_eq!((hollow.status.as_u16(), hollow.body.len()), (200, 0));
    for size in [0, 1, 4096] {
        let answer = mesh.call(Method::GET, &files(&format!("/liar/{size}")), "").await;
        let expected = if size == 1 { 1 } else { 3 };
        assert_eq!((answer.status.as_u16(), answer.body.len()), (200, expected), "{size}");
    }
}

#[tokio::test]
async fn an_error_before_the_first_byte_has_its_status() {
    let mesh = Mesh::start().await;
    assert_eq!(
        mesh.call(Method::GET, &files("/nothing"), "").await.error(),
        (404, "FILE_NOT_FOUND".to_owned())
    );
    assert_eq!(mesh.call(Method::GET, &files("/late"), "").await.error(), (404, "FILE_NOT_FOUND".to_owned()));
    assert_eq!(mesh.call(Method::GET, &files("/denied"), "").await.error(), (400, "NOT_A_FILE".to_owned()));
}

#[tokio::test]
async fn a_download_that_breaks_never_looks_whole() {
    let mesh = Mesh::start().await;
    for http2 in [false, true] {
        let path = files(&format!("/breaks/{}", 8 << 20));
        let request = mesh.request(Method::GET, &path, &[("x-api-key", &mesh.key)], Body::empty());
        let response = client(http2).request(request).await.unwrap();
        assert_eq!(response.status(), 200);
        assert!(response.into_body().collect().await.is_err(), "http2: {http2}");
    }
}

#[tokio::test]
async fn a_slow_reader_gets_everything() {
    let mesh = Mesh::start().await;
    let path = files(&format!("/zeros/{}", 8 << 20));
    let request = mesh.request(Method::GET, &path, &[("x-api-key", &mesh.key)], Body::empty());
    let mut body = client(false).request(request).await.unwrap().into_body().into_data_stream();
    let mut read = 0;
    while let Some(data) = body.next().await {
        read += data.unwrap().len();
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    assert_eq!(read, 8 << 20);
}

#[tokio::test]
async fn an_archive_goes_down_and_up() {
    let mesh = patient().await;
    let archive = |path: &str| format!("/api/sandboxes/{SANDBOX}/files/archive?path={path}");
    for http2 in [false, true] {
        let request =
            |method, path: &str, body| mesh.request(method, path, &[("x-api-key", &mesh.key)], body);
        let down = request(Method::GET, &archive("/d"), Body::empty());
        let down = collect(client(http2).request(down).await.unwrap()).await;
        assert_eq!(down.headers["content-type"], "application/octet-stream");
        assert_eq!(down.body, [vec![0; ARCHIVE_PART], vec![1; ARCHIVE_PART], vec![2; ARCHIVE_PART]].concat());
        let up = request(Method::PUT, &archive("/d"), Body::new(http_body_util::Full::new(down.body)));
        let up = collect(client(http2).request(up).await.unwrap()).await;
        assert_eq!((up.status.as_u16(), up.json()["bytes"].clone()), (200, (3 * ARCHIVE_PART).into()));

        let broken = request(Method::GET, &archive("/breaks"), Body::empty());
        let broken = client(http2).request(broken).await.unwrap();
        assert!(broken.into_body().collect().await.is_err(), "http2: {http2}");
        let hostile = Body::new(http_body_util::Full::new(Bytes::from(vec![1; 30 << 20])));
        let hostile = request(Method::PUT, &archive("/hostile"), hostile);
        let refused = collect(client(http2).request(hostile).await.unwrap()).await;
        assert_eq!(refused.error(), (400, "INVALID_PATH".to_owned()));
    }
    let missing = mesh.call(Method::GET, &archive("/nothing"), "").await;
    assert_eq!(missing.error(), (404, "FILE_NOT_FOUND".to_owned()));
}

#[tokio::test]
async fn a_command_is_given_up_when_its_caller_goes_away() {
    let mesh = Mesh::start().await;
    let path = format!("/api/sandboxes/{SANDBOX}/exec/run");
    for http2 in [false, true] {
        let body = Body::new(http_body_util::Full::new(Bytes::from(
            r#"{"cmd": "sleep", "args": ["3600"], "timeout": 0}"#,
        )));
        let request = mesh.request(Method::POST, &path, &[("x-api-key", &mesh.key)], body);
        let before = mesh.agent.0.calls.lock().len();
        let answer = tokio::spawn(client(http2).request(request));
        mesh.agent.called(before + 1).await;
        answer.abort();
        tokio::time::timeout(PATIENCE, mesh.agent.0.cancelled.notified()).await.expect("it still runs");
    }
}

#[tokio::test]
async fn a_long_command_is_answered_by_spaces_first() {
    let mesh = Mesh::start().await;
    let path = format!("/api/sandboxes/{SANDBOX}/exec/run");
    let body = Body::new(http_body_util::Full::new(Bytes::from(r#"{"cmd": "paused"}"#)));
    let request = mesh.request(Method::POST, &path, &[("x-api-key", &mesh.key)], body);
    let begins = async {
        let mut body = client(false).request(request).await.unwrap().into_body();
        let first = body.frame().await.unwrap().unwrap().into_data().unwrap();
        (first, body)
    };
    // Sooner than the command is given up, which does not end before it is told.
    let (first, body) = tokio::time::timeout(PATIENCE * 3, begins).await.expect("nothing comes");
    assert_eq!(first, " ");
    mesh.agent.0.go_on.notify_one();
    let rest = body.collect().await.unwrap().to_bytes();
    let rest: serde_json::Value = serde_json::from_slice(&rest).unwrap();
    assert_eq!(rest["exitCode"], 0);
}
