use http::Method;
use oc_gateway::{
    rest::route::{RouteInfo, Routes},
    surface::{Access, Backend, Rpc, Surface},
};
use oc_mesh::{api_key::ApiKey, error::reason_of, keys};
use oc_proto::mesh::KeyRecord;
use prost_reflect::{DynamicMessage, Value};

use crate::mesh::{FOREIGN, Mesh, SANDBOX, put, put_key};

/// What a credential gets at an RPC: nothing (it passes), or a status and a code.
type Verdict = Option<(u16, &'static str)>;

/// Every kind of credential, and what it must get at an RPC of this kind.
fn credentials(mesh: &Mesh, rpc: &Rpc) -> Vec<(&'static str, Option<String>, Verdict)> {
    let tokens_suffice = rpc.access == Access::Sandbox;
    let wrong = Some((403, "INVALID_CREDENTIALS"));
    let unless_admin = if rpc.access == Access::Admin { Some((403, "NOT_ADMIN")) } else { None };
    vec![
        ("none", None, Some((401, "UNAUTHENTICATED"))),
        ("unknown key", Some(ApiKey::generate().unwrap().expose().to_owned()), wrong),
        ("malformed key", Some("osb_123".into()), wrong),
        ("garbage", Some("x".repeat(5000)), wrong),
        ("no token", Some("a.b.c".into()), wrong),
        ("forged token", Some(mesh.forged_token()), wrong),
        ("expired token", Some(mesh.expired_token(SANDBOX)), Some((401, "TOKEN_EXPIRED"))),
        (
            "token of another sandbox",
            Some(mesh.token(FOREIGN)),
            Some((403, if tokens_suffice { "WRONG_SANDBOX" } else { "INVALID_CREDENTIALS" })),
        ),
        ("own token", Some(mesh.token(SANDBOX)), if tokens_suffice { None } else { wrong }),
        (
            "key of another tenant",
            Some(mesh.foreign_key.clone()),
            if rpc.backend == Backend::Host { Some((404, "SANDBOX_NOT_FOUND")) } else { unless_admin },
        ),
        ("key", Some(mesh.key.clone()), unless_admin),
        ("administrator's key", Some(mesh.admin.clone()), None),
    ]
}

fn upstream_calls(mesh: &Mesh) -> usize {
    mesh.scheduler.0.lock().len() + mesh.agent.0.calls.lock().len()
}

#[tokio::test]
async fn every_route_refuses_every_wrong_credential_and_takes_every_right_one() {
    let mesh = Mesh::start().await;
    for RouteInfo { method, template, rpc } in Routes::new(&Surface::load().unwrap()).unwrap().all().to_vec()
    {
        // They take no credential: see file_urls.rs.
        if template.ends_with("/files/download") || template.ends_with("/files/upload") {
            continue;
        }
        let path = template
            .replace("{sandbox_id}", SANDBOX)
            .replace("{key_id}", "0123456789abcdef")
            .replace("{node_id}", "host-a");
        for (name, credential, verdict) in credentials(&mesh, &rpc) {
            let before = upstream_calls(&mesh);
            let header = credential.as_deref().map(|credential| ("x-api-key", credential));
            let answer =
                mesh.send(method.clone(), &format!("{path}?path=/zeros/1"), header.as_slice(), "{}").await;
            let context = format!("{name} at {method} {template}: {:?}", answer.body);
            match verdict {
                // What the fakes cannot do is none of the credential's faults.
                None => assert!(!matches!(answer.status.as_u16(), 401 | 403), "{context}"),
                Some((status, code)) => {
                    assert_eq!(answer.error(), (status, code.to_owned()), "{context}");
                    assert_eq!(upstream_calls(&mesh), before, "{context}");
                }
            }
        }
    }
}

#[tokio::test]
async fn every_rpc_refuses_every_wrong_credential_and_takes_every_right_one() {
    let mesh = Mesh::start().await;
    for rpc in Surface::load().unwrap().rpcs() {
        let mut message = DynamicMessage::new(rpc.method.input());
        if let Some(field) = &rpc.sandbox_field {
            message.set_field(field, Value::String(SANDBOX.to_owned()));
        }
        if rpc.method.name() == "ReadFile" {
            message.set_field_by_name("path", Value::String("/zeros/1".to_owned()));
        }
        for (name, credential, verdict) in credentials(&mesh, rpc) {
            let before = upstream_calls(&mesh);
            let bearer = credential.map(|credential| format!("Bearer {credential}"));
            let header = bearer.as_deref().map(|bearer| ("authorization", bearer));
            let answer = mesh.grpc(rpc.path.as_str(), header.as_slice(), &message).await;
            let context = format!("{name} at {}: {answer:?}", rpc.path);
            match verdict {
                None => {
                    let code = answer.err().map_or(tonic::Code::Ok, |error| error.code());
                    let refused = [tonic::Code::Unauthenticated, tonic::Code::PermissionDenied];
                    assert!(!refused.contains(&code), "{context}");
                }
                Some((_, code)) => {
                    assert_eq!(reason_of(&answer.unwrap_err()).as_deref(), Some(code), "{context}");
                    assert_eq!(upstream_calls(&mesh), before, "{context}");
                }
            }
        }
    }
}

#[tokio::test]
async fn nobody_speaks_for_another_tenant() {
    let mesh = Mesh::start().await;
    let headers = [("x-api-key", mesh.foreign_key.as_str()), ("oc-tenant", "ours"), ("oc-admin", "true")];
    mesh.send(Method::GET, &format!("/api/sandboxes/{SANDBOX}"), &headers, "").await;
    let mut message = DynamicMessage::new(
        Surface::load().unwrap().find("/oc.v1.SandboxService/GetSandbox").unwrap().method.input(),
    );
    message.set_field_by_name("sandbox_id", Value::String(SANDBOX.to_owned()));
    mesh.grpc("/oc.v1.SandboxService/GetSandbox", &headers, &message).await.unwrap();
    let calls = mesh.scheduler.0.lock().clone();
    assert_eq!(calls.len(), 2);
    for (_, caller) in calls {
        assert_eq!((caller.tenant.as_str(), caller.admin, caller.sandbox), ("theirs", false, None));
    }
}

#[tokio::test]
async fn a_token_is_taken_wherever_clients_put_it() {
    let mesh = Mesh::start().await;
    let token = mesh.token(SANDBOX);
    let bearer = format!("Bearer {token}");
    let path = format!("/sandboxes/{SANDBOX}/exec/run");
    for (headers, query) in [
        (vec![("authorization", bearer.as_str())], String::new()),
        (vec![("x-api-key", token.as_str())], String::new()),
        (vec![], format!("?token={token}")),
        (vec![], format!("?api_key={token}")),
    ] {
        let answer = mesh.send(Method::POST, &format!("{path}{query}"), &headers, r#"{"cmd": "echo"}"#).await;
        assert_eq!(answer.status, 200, "{headers:?} {query}");
    }
    for caller in mesh.agent.0.calls.lock().iter().map(|(.., caller)| caller) {
        assert_eq!((caller.tenant.as_str(), caller.sandbox.as_deref()), ("ours", Some(SANDBOX)));
    }
    let answer = mesh.send(Method::GET, &format!("/api/sandboxes?api_key={}", mesh.key), &[], "").await;
    assert_eq!(answer.status, 200);
}

#[tokio::test]
async fn a_key_works_at_once_and_stops_working_when_it_is_revoked() {
    let mesh = Mesh::start().await;
    for _ in 0..10 {
        let key = put_key(&mesh.store, "ours", false).await;
        let answer = mesh.send(Method::GET, "/api/sandboxes", &[("x-api-key", &key)], "").await;
        assert_eq!(answer.status, 200);
    }
    let hash = mesh.key.parse::<ApiKey>().unwrap().hash();
    let revoked = KeyRecord { tenant: "ours".into(), revoked: true, ..Default::default() };
    put(&mesh.store, &keys::api_key(&hash), &revoked).await;
    let refused = async {
        while mesh.call(Method::GET, "/api/sandboxes", "").await.status != 403 {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(std::time::Duration::from_secs(10), refused)
        .await
        .expect("a revoked key still works");
}
