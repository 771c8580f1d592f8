use std::time::Duration;

use http::Method;
use oc_gateway::{listener::Limits, surface::Surface};
use oc_mesh::error::reason_of;
use oc_proto::{
    google::api::HttpBody,
    v1::{
        ReadFileRequest, RotatePreviewAuthRequest, RunRequest, WatchSandboxRequest, WriteFileRequest,
        exec_service_client::ExecServiceClient, file_service_client::FileServiceClient,
        preview_service_client::PreviewServiceClient, sandbox_service_client::SandboxServiceClient,
    },
};
use prost_reflect::DynamicMessage;
use tokio_stream::StreamExt as _;
use tonic::{Code, Request, metadata::MetadataValue, transport::Channel};
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};
use tonic_reflection::pb::v1::{
    ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
    server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
};

use crate::{
    mesh::{FOREIGN, Mesh, SANDBOX},
    websocket::PATIENCE,
};

impl Mesh {
    async fn channel(&self) -> Channel {
        Channel::from_shared(format!("http://{}", self.address)).unwrap().connect().await.unwrap()
    }
}

fn with<T>(credential: &str, message: T) -> Request<T> {
    let mut request = Request::new(message);
    let value = MetadataValue::try_from(format!("Bearer {credential}")).unwrap();
    request.metadata_mut().insert("authorization", value);
    request
}

fn run(sandbox: &str, cmd: &str, args: &[&str]) -> RunRequest {
    RunRequest {
        sandbox_id: sandbox.into(),
        cmd: cmd.into(),
        args: args.iter().map(|arg| (*arg).to_owned()).collect(),
        ..Default::default()
    }
}

#[tokio::test]
async fn calls_pass_through_with_key_and_token() {
    let mesh = Mesh::start().await;
    let mut client = ExecServiceClient::new(mesh.channel().await);
    for credential in [mesh.key.clone(), mesh.token(SANDBOX)] {
        let answer = client.run(with(&credential, run(SANDBOX, "bytes", &[]))).await.unwrap();
        assert_eq!(answer.into_inner().stdout, &b"\xff\0ok"[..]);
    }
    let error = client.run(with(&mesh.key, run(FOREIGN, "bytes", &[]))).await.unwrap_err();
    assert_eq!((error.code(), reason_of(&error).as_deref()), (Code::NotFound, Some("SANDBOX_NOT_FOUND")));
    let error = client.run(with(&mesh.key, run("", "bytes", &[]))).await.unwrap_err();
    assert_eq!(reason_of(&error).as_deref(), Some("INVALID_ARGUMENT"));
    let error = client.run(with(&mesh.key, run(SANDBOX, "fail", &["COMMAND_NOT_FOUND"]))).await.unwrap_err();
    assert_eq!(reason_of(&error).as_deref(), Some("COMMAND_NOT_FOUND"));
}

#[tokio::test]
async fn files_stream_both_ways() {
    let mesh = Mesh::start().await;
    let mut client = FileServiceClient::new(mesh.channel().await).max_decoding_message_size(4 << 20);
    let parts = (0..64).map(|index| WriteFileRequest {
        sandbox_id: if index == 0 { SANDBOX.into() } else { String::new() },
        path: if index == 0 { "/up".into() } else { String::new() },
        body: Some(HttpBody { data: vec![1; 512 << 10].into(), ..Default::default() }),
        ..Default::default()
    });
    client.write_file(with(&mesh.key, tokio_stream::iter(parts))).await.unwrap();
    let upload = mesh.agent.0.uploads.borrow().last().unwrap().clone();
    assert_eq!((upload.bytes, upload.whole), (32 << 20, Some(true)));

    let request = ReadFileRequest {
        sandbox_id: SANDBOX.into(),
        path: format!("/zeros/{}", 20 << 20),
        ..Default::default()
    };
    let mut stream = client.read_file(with(&mesh.key, request)).await.unwrap().into_inner();
    let mut read = 0;
    while let Some(message) = stream.next().await {
        read += message.unwrap().body.map_or(0, |body| body.data.len());
    }
    assert_eq!(read, 20 << 20);

    let request =
        ReadFileRequest { sandbox_id: SANDBOX.into(), path: "/breaks/9000000".into(), ..Default::default() };
    let mut stream = client.read_file(with(&mesh.key, request)).await.unwrap().into_inner();
    let mut last = None;
    while let Some(message) = stream.next().await {
        last = message.err();
    }
    assert_eq!(last.and_then(|error| reason_of(&error)).as_deref(), Some("HOST_UNAVAILABLE"));
}

#[tokio::test]
async fn a_watch_lasts_until_the_gateway_stops() {
    let mesh = Mesh::with_limits(Limits { drain: PATIENCE * 3, ..Limits::default() }, 4096).await;
    let mut client = SandboxServiceClient::new(mesh.channel().await);
    let mut watch = async |credential: &str, id: &str| {
        let request = WatchSandboxRequest { sandbox_id: id.into(), after_revision: 7 };
        client.watch_sandbox(with(credential, request)).await.map(tonic::Response::into_inner)
    };
    let token = mesh.token(SANDBOX);
    for sandbox in [FOREIGN, ""] {
        let error = watch(&token, sandbox).await.unwrap_err();
        assert_eq!(reason_of(&error).as_deref(), Some("WRONG_SANDBOX"), "{sandbox}");
    }
    let mut streams = [watch(&mesh.key, "").await.unwrap(), watch(&token, SANDBOX).await.unwrap()];
    for stream in &mut streams {
        assert_eq!(stream.next().await.unwrap().unwrap().revision, 7);
    }
    mesh.stop.cancel();
    for stream in &mut streams {
        // Long before the drain is over.
        let ended = tokio::time::timeout(PATIENCE, stream.next()).await.expect("it goes on");
        let error = ended.unwrap().unwrap_err();
        assert_eq!(reason_of(&error).as_deref(), Some("HOST_UNAVAILABLE"));
    }
}

#[tokio::test]
async fn a_cancelled_call_is_cancelled_at_the_host() {
    let mesh = Mesh::start().await;
    let mut client = ExecServiceClient::new(mesh.channel().await);
    let request = || with(&mesh.key, run(SANDBOX, "sleep", &["3600"]));
    let cancelled = || async {
        tokio::time::timeout(PATIENCE, mesh.agent.0.cancelled.notified()).await.expect("it still runs");
    };
    // The call alone is given up: its connection stays.
    let (mut caller, asked) = (client.clone(), request());
    let call = tokio::spawn(async move { caller.run(asked).await });
    mesh.agent.called(1).await;
    call.abort();
    cancelled().await;

    // By its deadline. If that is over before the host has the call there is nothing to cancel: then it is made again.
    let is_late = async {
        loop {
            let mut request = request();
            request.set_timeout(Duration::from_millis(300));
            if client.run(request).await.is_ok() {
                return;
            }
        }
    };
    tokio::select! {
        () = cancelled() => {}
        () = is_late => panic!("it was answered"),
    }
}

#[tokio::test]
async fn methods_that_are_not_public_do_not_exist() {
    let mesh = Mesh::start().await;
    let surface = Surface::load().unwrap();
    let message =
        DynamicMessage::new(surface.pool().get_message_by_name("oc.mesh.v1.ListVmsRequest").unwrap());
    for path in ["/oc.mesh.v1.AgentService/ListVms", "/oc.mesh.v1.GuestService/Quiesce", "/oc.v1.None/X", "/"]
    {
        let headers = [("x-api-key", mesh.admin.as_str())];
        let error = mesh.grpc(path, &headers, &message).await.unwrap_err();
        assert_eq!(error.code(), Code::Unimplemented, "{path}");
    }
}

#[tokio::test]
async fn health_and_reflection_are_open_and_show_the_public_part_alone() {
    let mesh = Mesh::start().await;
    let channel = mesh.channel().await;
    let mut health = HealthClient::new(channel.clone());
    for service in ["", "oc.v1.ExecService", "oc.v1.SandboxService"] {
        let request = HealthCheckRequest { service: service.into() };
        assert_eq!(health.check(request).await.unwrap().into_inner().status, 1, "{service}");
    }
    let mut reflection = ServerReflectionClient::new(channel);
    let request = ServerReflectionRequest {
        message_request: Some(MessageRequest::ListServices(String::new())),
        ..Default::default()
    };
    let mut answers =
        reflection.server_reflection_info(tokio_stream::iter([request])).await.unwrap().into_inner();
    let answer = answers.next().await.unwrap().unwrap().message_response.unwrap();
    let MessageResponse::ListServicesResponse(list) = answer else { panic!("{answer:?}") };
    let names: Vec<String> = list.service.into_iter().map(|service| service.name).collect();
    assert!(names.iter().any(|name| name == "oc.v1.FileService"), "{names:?}");
    assert!(!names.iter().any(|name| name.starts_with("oc.mesh")), "{names:?}");
}

#[tokio::test]
async fn what_can_be_no_sandbox_goes_no_further() {
    let mesh = Mesh::start().await;
    // Longer than what a header may have on the connection that all share to a scheduler.
    for name in ["a".repeat(70_000), "sb-A".to_owned(), "sb-1/../2".to_owned()] {
        let mut client = PreviewServiceClient::new(mesh.channel().await);
        let asks = RotatePreviewAuthRequest { sandbox_id: name.clone(), remove: false };
        let error = client.rotate_preview_auth(with(&mesh.key, asks)).await.unwrap_err();
        assert_eq!(reason_of(&error).as_deref(), Some("SANDBOX_NOT_FOUND"));
        let mut client = ExecServiceClient::new(mesh.channel().await);
        let error = client.run(with(&mesh.key, run(&name, "bytes", &[]))).await.unwrap_err();
        assert_eq!(reason_of(&error).as_deref(), Some("SANDBOX_NOT_FOUND"));
    }
    let path = format!("/api/sandboxes/{}", "a".repeat(65_000));
    assert_eq!(mesh.call(Method::GET, &path, "").await.error(), (404, "SANDBOX_NOT_FOUND".into()));
    assert_eq!(mesh.scheduler.0.lock().len(), 0);
}
