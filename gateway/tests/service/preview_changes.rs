//! What changes a sandbox's previews holds for the next request, whichever way it was asked for.

use http::Method;
use oc_gateway::surface::Surface;
use prost_reflect::{DynamicMessage, Value};

use crate::{
    client::Answer,
    mesh::{Mesh, SANDBOX},
    ports::Server,
};

/// Often enough for a copy that lags to be met.
const TIMES: usize = 30;

async fn get(mesh: &Mesh, host: &str, token: &str) -> Answer {
    mesh.send(Method::GET, "/echo", &[("host", host), ("x-oc-preview-token", token)], "").await
}

#[tokio::test]
async fn a_new_token_is_the_only_one_as_soon_as_it_is_told() {
    let (mesh, server) = (Mesh::start().await, Server::start().await);
    let surface = Surface::load().unwrap();
    let rotate = surface.find("/oc.v1.PreviewService/RotatePreviewAuth").unwrap();
    let mut asks = DynamicMessage::new(rotate.method.input());
    asks.set_field_by_name("sandbox_id", Value::String(SANDBOX.into()));
    let host = format!("{SANDBOX}-p{}.preview.localhost", server.port);
    let mut old = String::new();
    for turn in 0..TIMES {
        let new = format!("token-number-{turn:04}");
        if turn % 2 == 0 {
            let path = format!("/api/sandboxes/{SANDBOX}/preview/rotate");
            let headers = [("x-api-key", mesh.key.as_str()), ("x-request-id", &new)];
            assert_eq!(mesh.send(Method::POST, &path, &headers, "{}").await.status, 200);
        } else {
            let bearer = format!("Bearer {}", mesh.key);
            let headers = [("authorization", bearer.as_str()), ("x-request-id", &new)];
            mesh.grpc(rotate.path.as_str(), &headers, &asks).await.unwrap();
        }
        assert_eq!(get(&mesh, &host, &old).await.status, 401, "the old one, {turn}");
        assert_eq!(get(&mesh, &host, &new).await.status, 200, "the new one, {turn}");
        old = new;
    }
}

#[tokio::test]
async fn a_host_name_leads_to_its_port_as_soon_as_it_is_told() {
    let (mesh, server) = (Mesh::start().await, Server::start().await);
    for turn in 0..TIMES {
        let (path, domain) = (format!("/api/sandboxes/{SANDBOX}/preview"), format!("app{turn}.example"));
        let asks = format!(r#"{{"port": {}, "domain": "{domain}"}}"#, server.port);
        assert_eq!(mesh.call(Method::POST, &path, asks).await.status, 201);
        assert_eq!(get(&mesh, &domain, "").await.status, 200, "{turn}");
    }
}

#[tokio::test]
async fn a_host_name_that_moves_leads_to_who_has_it_as_soon_as_it_is_told() {
    let (mesh, server) = (Mesh::start().await, Server::start().await);
    let path = |sandbox: &str| format!("/api/sandboxes/{sandbox}/preview");
    let asks = format!(r#"{{"port": {}, "domain": "app.example"}}"#, server.port);
    let (mut old, mut new) = (SANDBOX, "sb-0000000000000000000a");
    assert_eq!(mesh.call(Method::POST, &path(old), asks.clone()).await.status, 201);
    for turn in 0..TIMES {
        let one = format!("{}/{}", path(old), server.port);
        assert_eq!(mesh.call(Method::DELETE, &one, "").await.status, 204);
        assert_eq!(get(&mesh, "app.example", "").await.status, 404, "{turn}");
        assert_eq!(mesh.call(Method::POST, &path(new), asks.clone()).await.status, 201);
        assert_eq!(get(&mesh, "app.example", "").await.status, 200, "{turn}");
        (old, new) = (new, old);
    }
}
