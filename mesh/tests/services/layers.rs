//! The stacks of client and server between real sockets. What one layer does by itself, its unit tests say.

use std::{sync::atomic::Ordering, time::Duration};

use http_body_util::BodyExt as _;
use oc_mesh::{channel::ClientChannel, layers::trace::TraceContext, serve::Serve, telemetry};
use tonic::{Code, service::Routes};
use tower::ServiceExt as _;

use crate::{
    slow::{Running, Slow, call, channel, on_socket, request, run},
    until, within,
};

/// A channel that has made its first call, so that the deadline of the next one is not spent on connecting.
async fn connected(running: &Running) -> ClientChannel {
    let channel = channel(running);
    assert_eq!(call(&channel, request("Headers")).await.unwrap().code, Code::Ok);
    channel
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_call_ends_at_its_deadline_and_so_does_its_work() {
    let directory = tempfile::tempdir().unwrap();
    let slow = Slow::default();
    let running = run(on_socket(&directory.path().join("a.sock"), Routes::new(slow.clone()))).await.unwrap();
    let channel = connected(&running).await;
    let mut asked = request("Run");
    asked.headers_mut().insert("grpc-timeout", "2S".parse().unwrap());
    let ended = call(&channel, asked).await.unwrap();
    assert_eq!((ended.code, ended.reason.as_deref()), (Code::DeadlineExceeded, Some("DEADLINE_EXCEEDED")));
    slow.0.left(2).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_that_never_pauses_ends_at_its_deadline() {
    let directory = tempfile::tempdir().unwrap();
    let slow = Slow::default();
    let running = run(on_socket(&directory.path().join("a.sock"), Routes::new(slow.clone()))).await.unwrap();
    let channel = connected(&running).await;
    let mut asked = request("Flood");
    asked.headers_mut().insert("grpc-timeout", "2S".parse().unwrap());
    let mut stream = channel.oneshot(asked).await.unwrap().into_body();
    let trailers = within("the end", async {
        loop {
            if let Ok(trailers) = stream.frame().await.unwrap().unwrap().into_trailers() {
                return trailers;
            }
        }
    })
    .await;
    assert_eq!(tonic::Status::from_header_map(&trailers).unwrap().code(), Code::DeadlineExceeded);
    slow.0.left(2).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_does_not_wait_longer_than_its_own_limit() {
    let directory = tempfile::tempdir().unwrap();
    let slow = Slow::default();
    let served = on_socket(&directory.path().join("a.sock"), Routes::new(slow.clone()));
    let running = run(Serve { max_deadline: Duration::from_millis(100), ..served }).await.unwrap();
    for timeout in [None, Some("1H")] {
        let mut asked = request("Run");
        if let Some(timeout) = timeout {
            asked.headers_mut().insert("grpc-timeout", timeout.parse().unwrap());
        }
        let ended = call(&channel(&running), asked).await.unwrap();
        assert_eq!(ended.reason.as_deref(), Some("DEADLINE_EXCEEDED"), "{timeout:?}");
    }
    slow.0.left(2).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn too_many_calls_are_refused_until_others_end() {
    let directory = tempfile::tempdir().unwrap();
    let slow = Slow::default();
    let served = on_socket(&directory.path().join("a.sock"), Routes::new(slow.clone()));
    let running = run(Serve { max_concurrent: 2, ..served }).await.unwrap();
    let channel = channel(&running);
    let waiting = tokio::spawn(channel.clone().oneshot(request("Run")));
    // A stream counts as long as it goes on.
    let stream = channel.clone().oneshot(request("Flood")).await.unwrap();
    slow.0.entered(2).await;
    let refused = call(&channel, request("Headers")).await.unwrap();
    assert_eq!((refused.code, refused.reason.as_deref()), (Code::ResourceExhausted, Some("OVERLOADED")));
    drop(stream);
    until("a place", async || call(&channel, request("Headers")).await.unwrap().code == Code::Ok).await;
    waiting.abort();
    slow.0.left(3).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_trace_goes_on_at_the_server() {
    let directory = tempfile::tempdir().unwrap();
    let running =
        run(on_socket(&directory.path().join("a.sock"), Routes::new(Slow::default()))).await.unwrap();
    let context = TraceContext::start();
    let mut asked = request("Headers");
    context.apply(asked.headers_mut());
    let ended = call(&channel(&running), asked).await.unwrap();
    let sent = format!("traceparent=00-{}-", context.trace_id());
    assert!(ended.text.lines().any(|header| header.starts_with(&sent)), "{}", ended.text);
    // A call outside of any trace begins one.
    let ended = call(&channel(&running), request("Headers")).await.unwrap();
    assert!(ended.text.contains("traceparent=00-") && !ended.text.contains(&sent));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn calls_are_counted_by_method_and_code() {
    let _logs = telemetry::init("test");
    let directory = tempfile::tempdir().unwrap();
    let slow = Slow::default();
    let running = run(on_socket(&directory.path().join("a.sock"), Routes::new(slow.clone()))).await.unwrap();
    let channel = channel(&running);
    slow.0.released.send_replace(true);
    assert_eq!(call(&channel, request("Run")).await.unwrap().code, Code::Ok);
    assert_eq!(call(&channel, request("Kill")).await.unwrap().code, Code::Unimplemented);
    assert_eq!(call(&channel, request("Made-up")).await.unwrap().code, Code::Unimplemented);
    let count = |metric: &str, method: &str, code: &str| {
        let (method, code) = (format!("method=\"{method}\""), format!("code=\"{code}\""));
        telemetry::render_metrics().lines().any(|line| {
            line.starts_with(&format!("{metric}{{")) && line.contains(&method) && line.contains(&code)
        })
    };
    until("the counts", async || {
        ["oc_grpc_server_calls_total", "oc_grpc_client_calls_total"].into_iter().all(|metric| {
            count(metric, "oc.v1.ExecService/Run", "Ok") && count(metric, "other", "Unimplemented")
        })
    })
    .await;
    let metrics = telemetry::render_metrics();
    assert!(!metrics.contains("Made-up"), "callers make no labels");
    assert!(metrics.contains("oc_grpc_server_duration_seconds_bucket"));
    assert!(metrics.contains("service=\"test\""));

    // A stream is in flight until its end, which is a cancellation here.
    let mut stream = channel.clone().oneshot(request("Flood")).await.unwrap();
    within("a frame", stream.body_mut().frame()).await.unwrap().unwrap();
    assert!(slow.0.produced.load(Ordering::Relaxed) > 0);
    drop(stream);
    until("the cancellation to be counted", async || {
        count("oc_grpc_server_calls_total", "other", "Cancelled")
    })
    .await;
}
