use std::time::Duration;

use http::Method;
use oc_gateway::{rest::route::Routes, surface::Surface};
use oc_mesh::file_url::Access;
use serde_json::json;

use crate::mesh::{
    CREATING, DELETED, FAILED, FOREIGN, HIBERNATED, Mesh, RESTORING, SANDBOX, STRANDED, put, sandbox_record,
};

#[tokio::test]
async fn every_route_reaches_its_rpc() {
    let mesh = Mesh::start().await;
    for route in Routes::new(&Surface::load().unwrap()).unwrap().all().to_vec() {
        mesh.scheduler.0.lock().clear();
        mesh.agent.0.calls.lock().clear();
        let path = route.template.replace("{sandbox_id}", SANDBOX).replace("{key_id}", "0123456789abcdef");
        let path = path.replace("{checkpoint_id}", crate::checkpoints::CHECKPOINT).replace("{port}", "8080");
        let headers = [("x-api-key", mesh.admin.as_str())];
        let query = match path.rsplit_once('/').unwrap().1 {
            "download" => format!("?{}", mesh.url_query(Access::Read, SANDBOX, "/zeros/3")),
            "upload" => format!("?{}", mesh.url_query(Access::Write, SANDBOX, "/x")),
            "files" => "?path=/zeros/3".to_owned(),
            _ => "?path=/x".to_owned(),
        };
        let answer = mesh.send(route.method.clone(), &format!("{path}{query}"), &headers, "").await;
        let name = route.rpc.method.name();
        assert_eq!(answer.status, route.rpc.success, "{name}: {:?}", answer.body);
        let mut called: Vec<&str> = mesh.scheduler.0.lock().iter().map(|(rpc, _)| *rpc).collect();
        called.extend(mesh.agent.0.calls.lock().iter().map(|(rpc, ..)| *rpc));
        assert_eq!(called, [name], "{path}");
    }
}

#[tokio::test]
async fn a_sandbox_is_created_and_shown_as_published_clients_expect() {
    let mesh = Mesh::start().await;
    let body = json!({"templateID": "base", "timeout": 300, "METADATA": {"a": "1"}, "sandboxFamily": {}});
    let answer = mesh.call(Method::POST, "/api/sandboxes", body.to_string()).await;
    assert_eq!(answer.status, 201);
    assert_eq!(answer.headers["content-type"], "application/json");
    let sandbox = answer.json();
    assert_eq!(sandbox["sandboxID"], "sb-new");
    assert_eq!(sandbox["status"], "running");
    assert_eq!(sandbox["connectURL"], format!("http://{}", mesh.address));
    assert_eq!(sandbox["token"], "a.b.c");
    assert_eq!(sandbox["metadata"], json!({"a": "1"}));
    // A client that would also take server-sent events is answered all the same.
    let headers = [("x-api-key", mesh.key.as_str()), ("accept", "text/event-stream")];
    assert_eq!(mesh.send(Method::POST, "/api/sandboxes", &headers, "{}").await.json()["sandboxID"], "sb-new");
    assert_eq!(mesh.call(Method::GET, "/api/sandboxes", "").await.body, "[]");
    let deleted = mesh.call(Method::DELETE, &format!("/api/sandboxes/{SANDBOX}"), "").await;
    assert_eq!((deleted.status.as_u16(), deleted.body.len()), (204, 0));
    // A JSON content type with nothing behind it.
    let refreshed = mesh.call(Method::POST, &format!("/api/sandboxes/{SANDBOX}/token/refresh"), "").await;
    assert_eq!(refreshed.json(), json!({"token": "d.e.f", "expiresAt": "2023-11-14T22:13:20Z"}));
}

#[tokio::test]
async fn commands_run_and_their_output_is_text() {
    let mesh = Mesh::start().await;
    let answer = mesh.run(json!({"cmd": "echo", "args": ["hé", "\u{0}x"]})).await;
    assert_eq!(answer.status, 200);
    assert_eq!(answer.json()["stdout"], "hé \u{0}x");
    assert_eq!(answer.json()["exitCode"], 0);
    let bytes = mesh.run(json!({"cmd": "bytes"})).await.json();
    assert_eq!(
        (bytes["stdout"].as_str(), bytes["stdoutBase64"].as_str()),
        (Some("\u{fffd}\0ok"), Some("/wBvaw=="))
    );
    let exact = mesh.run(json!({"cmd": "cat", "stdinBase64": "/wBvaw=="})).await.json();
    assert_eq!(exact["stdoutBase64"], "/wBvaw==");
    let much = mesh.run(json!({"cmd": "much"})).await.json();
    assert_eq!(much["stdout"].as_str().map(str::len), Some(4 << 20));
    let (_, sandbox, caller) = mesh.agent.0.calls.lock()[0].clone();
    assert_eq!((sandbox.as_str(), caller.tenant.as_str(), caller.admin), (SANDBOX, "ours", false));
}

#[tokio::test]
async fn a_call_wakes_a_hibernated_sandbox_of_its_own_tenant() {
    let mesh = Mesh::start().await;
    let path = format!("/api/sandboxes/{HIBERNATED}/exec/run");
    let body = json!({"cmd": "echo", "args": ["awake"]}).to_string();
    let foreign = [("x-api-key", mesh.foreign_key.as_str())];
    assert_eq!(mesh.send(Method::POST, &path, &foreign, body.clone()).await.status, 404);
    assert!(mesh.scheduler.0.lock().is_empty(), "nobody else's call wakes it");
    assert_eq!(mesh.call(Method::POST, &path, body.clone()).await.json()["stdout"], "awake");
    let woken = mesh.scheduler.0.lock().clone();
    assert_eq!(woken.iter().map(|(rpc, _)| *rpc).collect::<Vec<_>>(), ["WakeSandbox"]);
    assert_eq!(woken[0].1.tenant, "ours", "on its caller's behalf");
    // Who would rather ask again is told to.
    let headers = [("x-api-key", mesh.key.as_str()), ("x-osb-async-wake", "1")];
    let told = mesh.send(Method::POST, &path, &headers, body.clone()).await;
    assert_eq!((told.status.as_u16(), told.json()["waking"].clone()), (503, json!(true)));
    assert_eq!(told.json()["code"], "SANDBOX_WAKING");
    assert!(told.headers.contains_key("retry-after"));
}

#[tokio::test]
async fn files_are_listed_and_described() {
    let mesh = Mesh::start().await;
    let base = format!("/api/sandboxes/{SANDBOX}/files");
    let list = mesh.call(Method::GET, &format!("{base}/list?path=/tmp"), "").await.json();
    assert_eq!(
        list,
        json!([{
            "name": "a", "path": "/tmp/a", "type": "directory", "isDir": true, "size": 4096, "mode": 493, "uid": 0,
            "gid": 0, "modifiedAt": "2023-11-14T22:13:20.005Z", "linkTarget": ""
        }])
    );
    assert_eq!(mesh.call(Method::GET, &format!("{base}/list?path=/empty"), "").await.body, "[]");
    let many = mesh.call(Method::GET, &format!("{base}/list?path=/many"), "").await.json();
    assert_eq!(many.as_array().map(Vec::len), Some(100_000));
}

#[tokio::test]
async fn hostile_paths_are_judged_by_the_guest_and_not_normalised_on_the_way() {
    let mesh = Mesh::start().await;
    for path in ["..%2F..%2Fetc%2Fpasswd", "../../etc/passwd", "%00", "a%00b"] {
        let answer =
            mesh.call(Method::GET, &format!("/api/sandboxes/{SANDBOX}/files/stat?path={path}"), "").await;
        assert_eq!(answer.error(), (400, "INVALID_PATH".to_owned()), "{path}");
    }
    let answer = mesh.call(Method::GET, &format!("/api/sandboxes/{SANDBOX}/files/stat?path=%ff"), "").await;
    assert_eq!(answer.error(), (400, "INVALID_ARGUMENT".to_owned()));
    // In the HTTP path a sandbox's name is a name, not a way.
    for path in ["/api/sandboxes/..%2Fx", "/api/sandboxes/%00", "/api/sandboxes/%2e%2e"] {
        let answer = mesh.call(Method::POST, &format!("{path}/exec/run"), r#"{"cmd": "echo"}"#).await;
        assert_eq!(answer.error(), (404, "SANDBOX_NOT_FOUND".to_owned()), "{path}");
    }
    let answer = mesh.call(Method::GET, "/api/sandboxes/%ff", "").await;
    assert_eq!(answer.error(), (400, "INVALID_ARGUMENT".to_owned()));
}

#[tokio::test]
async fn malformed_requests_say_what_is_wrong() {
    let mesh = Mesh::start().await;
    for (body, named) in [
        ("{", "EOF"),
        ("[]", "object"),
        ("{\"cmd\": 7}", "`cmd`"),
        ("{\"timeout\": \"soon\"}", "`timeout`"),
        ("{\"args\": {}}", "`args`"),
        ("\u{1F4A9}", "expected"),
    ] {
        let path = format!("/api/sandboxes/{SANDBOX}/exec/run");
        let answer = mesh.call(Method::POST, &path, body.to_owned()).await;
        assert_eq!(answer.error(), (400, "INVALID_ARGUMENT".to_owned()), "{body}");
        assert!(answer.json()["error"].as_str().unwrap().contains(named), "{:?}", answer.body);
    }
    let huge = format!("{{\"cmd\": \"{}\"}}", "x".repeat(9 << 20));
    let answer = mesh.call(Method::POST, &format!("/api/sandboxes/{SANDBOX}/exec/run"), huge).await;
    assert_eq!(answer.error(), (413, "MESSAGE_TOO_LARGE".to_owned()));
}

#[tokio::test]
async fn unknown_routes_and_methods_are_told_apart() {
    let mesh = Mesh::start().await;
    assert_eq!(mesh.call(Method::GET, "/api/nothing", "").await.error(), (404, "ROUTE_NOT_FOUND".to_owned()));
    let answer = mesh.call(Method::PATCH, "/api/sandboxes", "").await;
    assert_eq!(answer.error(), (405, "METHOD_NOT_ALLOWED".to_owned()));
    assert_eq!(answer.headers["allow"], "GET, POST");
}

#[tokio::test]
async fn a_sandbox_that_cannot_be_used_says_why() {
    let mesh = Mesh::start().await;
    for (sandbox, error) in [
        (FOREIGN, (404, "SANDBOX_NOT_FOUND")),
        ("sb-zzzzzzzzzzzzzzzzzzzz", (404, "SANDBOX_NOT_FOUND")),
        ("no-such", (404, "SANDBOX_NOT_FOUND")),
        (DELETED, (410, "SANDBOX_DELETED")),
        (FAILED, (410, "SANDBOX_FAILED")),
        (CREATING, (503, "SANDBOX_NOT_READY")),
        (RESTORING, (503, "SANDBOX_NOT_READY")),
        (STRANDED, (503, "HOST_UNAVAILABLE")),
    ] {
        let answer = mesh.call(Method::POST, &format!("/api/sandboxes/{sandbox}/exec/run"), "{}").await;
        assert_eq!(answer.error(), (error.0, error.1.to_owned()), "{sandbox}");
        assert_eq!(answer.headers.contains_key("retry-after"), error.0 == 503, "{sandbox}");
    }
    assert!(mesh.agent.0.calls.lock().is_empty());
}

#[tokio::test]
async fn a_sandbox_is_usable_the_moment_its_record_says_so() {
    let mesh = Mesh::start().await;
    for index in 10..20 {
        let id = format!("sb-000000000000000000{index}");
        let record = sandbox_record(&id, "ours", oc_proto::v1::SandboxState::Running, "host-a");
        put(&mesh.store, &oc_mesh::keys::sandbox(&id), &record).await;
        let answer =
            mesh.call(Method::POST, &format!("/api/sandboxes/{id}/exec/run"), r#"{"cmd":"echo"}"#).await;
        assert_eq!(answer.status, 200);
    }
}

#[tokio::test]
async fn errors_of_the_other_parts_keep_their_meaning_and_secrets_stay_inside() {
    let mesh = Mesh::start().await;
    for reason in oc_mesh::error::Reason::ALL {
        let answer = mesh.run(json!({"cmd": "fail", "args": [reason.as_str()]})).await;
        assert_eq!(answer.error(), (reason.http_status().as_u16(), reason.as_str().to_owned()));
        assert_eq!(answer.headers.contains_key("retry-after"), answer.status == 503);
    }
    let answer = mesh.run(json!({"cmd": "bare"})).await;
    assert_eq!(answer.error(), (500, "INTERNAL".to_owned()));
    assert!(!String::from_utf8_lossy(&answer.body).contains("inside.sock"));
    let answer = mesh.call(Method::POST, "/api/sandboxes", r#"{"templateID": "none"}"#).await;
    assert_eq!(answer.error(), (404, "TEMPLATE_NOT_FOUND".to_owned()));
}

#[tokio::test]
async fn a_host_that_is_gone_is_unavailable() {
    let mesh = Mesh::start().await;
    let mut record = sandbox_record(SANDBOX, "ours", oc_proto::v1::SandboxState::Running, "host-dead");
    let host = oc_proto::mesh::HostRecord {
        host_id: "host-dead".into(),
        endpoint: "unix:///nonexistent/agent.sock".into(),
        ..Default::default()
    };
    put(&mesh.store, &oc_mesh::keys::host("host-dead"), &host).await;
    record.sandbox_id = "sb-0000000000000000dead".into();
    put(&mesh.store, &oc_mesh::keys::sandbox(&record.sandbox_id), &record).await;
    let path = format!("/api/sandboxes/{}/exec/run", record.sandbox_id);
    let answer =
        tokio::time::timeout(Duration::from_secs(20), mesh.call(Method::POST, &path, "{}")).await.unwrap();
    assert_eq!(answer.error(), (503, "HOST_UNAVAILABLE".to_owned()));
    assert!(!String::from_utf8_lossy(&answer.body).contains("nonexistent"));
}

#[tokio::test]
async fn request_ids_are_taken_over_passed_on_and_given_back() {
    let mesh = Mesh::start().await;
    let headers = [("x-api-key", mesh.key.as_str()), ("x-request-id", "trace-7")];
    let answer = mesh.send(Method::GET, "/api/sandboxes", &headers, "").await;
    assert_eq!(answer.headers["x-request-id"], "trace-7");
    assert_eq!(mesh.scheduler.0.lock()[0].1.request_id, "trace-7");
    let headers = [("x-api-key", mesh.key.as_str()), ("x-request-id", "\"},{")];
    let answer = mesh.send(Method::GET, "/api/nothing", &headers, "").await;
    assert_eq!(answer.headers["x-request-id"].len(), 36);
}

#[tokio::test]
async fn browsers_may_call_from_any_page() {
    let mesh = Mesh::start().await;
    let headers = [
        ("origin", "https://app.example"),
        ("access-control-request-method", "POST"),
        ("access-control-request-headers", "x-api-key"),
    ];
    let preflight = mesh.send(Method::OPTIONS, "/api/sandboxes", &headers, "").await;
    assert_eq!(preflight.status, 204);
    assert_eq!(preflight.headers["access-control-allow-origin"], "*");
    assert!(!preflight.headers.contains_key("access-control-allow-credentials"));
    let answer = mesh.send(Method::GET, "/api/sandboxes", &headers[..1], "").await;
    assert_eq!(
        (answer.status.as_u16(), &answer.headers["access-control-allow-origin"]),
        (401, &"*".parse().unwrap())
    );
}
