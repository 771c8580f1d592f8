//! Web servers in sandboxes, as those outside see them.

use std::{process::Command, sync::Arc, time::Duration};

use anyhow::{Context as _, ensure};
use futures_util::{SinkExt as _, StreamExt as _};
use oc_integration::{
    mesh::{Mesh, eventually, succeeded},
    prepared,
    rest::{Answer, Sandbox},
};
use reqwest::Method;
use serde_json::{Value, json};
use tokio::{net::TcpStream, time::timeout};
use tokio_tungstenite::{
    client_async,
    tungstenite::{Message, client::IntoClientRequest as _},
};

use crate::{browser::BROWSER, hibernation::hibernate};

const SERVER: &str = include_str!("previews/server.mjs");
/// What opens a page in a browser.
const OPEN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/functional/previews/open.mjs");
const PATIENCE: Duration = Duration::from_secs(60);
/// Bytes up and down: more than any buffer on the way holds.
const LARGE: usize = 24 << 20;

fn host(sandbox: &Sandbox, port: u16) -> String {
    format!("{}-p{port}.preview.localhost", sandbox.id)
}

/// A request to a port. Names below `localhost` lead to this machine in browsers, but not in every resolver.
async fn get(mesh: &Mesh, host: &str, path: &str) -> anyhow::Result<Answer> {
    let rest = mesh.rest();
    rest.send(rest.anonymous(Method::GET, path).header("host", host)).await
}

/// Starts Python's server on port 8000 and Node's on port 3000, and waits until both answer.
async fn serve(mesh: &Mesh, sandbox: &Sandbox) -> anyhow::Result<()> {
    sandbox.put("server.mjs", SERVER).await?.expect(204)?;
    sandbox.run("mkdir www && echo 'from the sandbox' > www/index.html").await?;
    sandbox.run(&format!("head -c {LARGE} /dev/zero > www/large")).await?;
    let script = "cd www && (python3 -m http.server 8000 >/dev/null 2>&1 &) && cd .. && (node server.mjs >node.log 2>&1 &)";
    sandbox.run(script).await?;
    for port in [8000, 3000] {
        eventually(&format!("port {port}"), async || {
            let answer = get(mesh, &host(sandbox, port), "/").await?;
            ensure!(answer.status == 200, "{} {}", answer.status, String::from_utf8_lossy(&answer.body));
            Ok(())
        })
        .await?;
    }
    Ok(())
}

/// Everything that a page may want.
async fn use_all(mesh: &Mesh, sandbox: &Sandbox) -> anyhow::Result<()> {
    let (python, node) = (host(sandbox, 8000), host(sandbox, 3000));
    assert_eq!(get(mesh, &python, "/").await?.body, "from the sandbox\n");
    let large = get(mesh, &python, "/large").await?;
    assert!(large.status == 200 && large.body.len() == LARGE && large.body.iter().all(|byte| *byte == 0));
    let rest = mesh.rest();
    let upload = rest.anonymous(Method::PUT, "/upload").header("host", &node).body(vec![1; LARGE]);
    assert_eq!(rest.send(upload).await?.body, LARGE.to_string());

    // The first event comes before the last is sent.
    let asked = rest.anonymous(Method::GET, "/events").header("host", &node);
    let mut events = asked.send().await?.bytes_stream();
    let first = timeout(PATIENCE, events.next()).await?.context("no event")??;
    assert_eq!(first, "data: event\n\n");
    let last = timeout(PATIENCE, events.next()).await?.context("no event")??;
    assert_eq!(last, "data: last\n\n");

    let address = mesh.url.strip_prefix("http://").context("no http URL")?;
    let request = format!("ws://{node}/socket").into_client_request()?;
    let (mut socket, _) = client_async(request, TcpStream::connect(address).await?).await?;
    socket.send(Message::text("hello")).await?;
    assert_eq!(timeout(PATIENCE, socket.next()).await?.context("no message")??, Message::text("hello"));
    socket.close(None).await?;
    Ok(())
}

/// Opens a port's page in a browser, by the URL that a user is told.
fn open(url: &str, says: &str) -> anyhow::Result<()> {
    let mut command = Command::new(prepared::tool("node/bin/node")?);
    command.arg(OPEN).env("OC_URL", format!("{url}/")).env("OC_SAYS", says).env("OC_BROWSER", BROWSER);
    succeeded(command).map(drop)
}

/// What `oc` says, as JSON.
pub fn oc(mesh: &Mesh, arguments: &[&str]) -> anyhow::Result<Value> {
    let mut command = mesh.oc();
    command.args(arguments).arg("--json");
    Ok(serde_json::from_str(&succeeded(command)?)?)
}

pub async fn a_page_in_a_sandbox_is_opened_before_and_after_it_slept(mesh: Arc<Mesh>) -> anyhow::Result<()> {
    let sandbox = mesh.rest().create(json!({ "timeout": 0 })).await?;
    let id = sandbox.id.as_str();
    let nobody = get(&mesh, &host(&sandbox, 3000), "/").await?;
    assert_eq!(nobody.refusal(), (502, "PORT_NOT_LISTENING".into()));
    serve(&mesh, &sandbox).await?;
    let python = oc(&mesh, &["preview", "create", id, "--port", "8000"])?;
    let node = oc(&mesh, &["preview", "create", id, "--port", "3000"])?;
    assert_eq!(node["hostname"], host(&sandbox, 3000));
    let url = |preview: &Value| preview["url"].as_str().map(str::to_owned).context("no URL");
    let (python, node) = (url(&python)?, url(&node)?);

    use_all(&mesh, &sandbox).await?;
    open(&python, "from the sandbox")?;
    open(&node, "3000000 event websocket")?;
    hibernate(&mesh.rest(), &sandbox).await?;
    open(&node, "3000000 event websocket")?;
    hibernate(&mesh.rest(), &sandbox).await?;
    use_all(&mesh, &sandbox).await?;
    open(&python, "from the sandbox")?;

    let listed = oc(&mesh, &["preview", "list", id])?;
    assert_eq!(listed.as_array().map(Vec::len), Some(2));
    oc(&mesh, &["preview", "delete", id, "8000"])?;
    assert_eq!(oc(&mesh, &["preview", "list", id])?.as_array().map(Vec::len), Some(1));
    sandbox.delete().await?;
    // A URL that is known brings nothing back.
    let gone = get(&mesh, &host(&sandbox, 8000), "/").await?;
    assert_eq!(gone.refusal(), (410, "SANDBOX_DELETED".into()));
    Ok(())
}

pub async fn a_preview_asks_for_its_token_and_wakes_nobody_without(mesh: Arc<Mesh>) -> anyhow::Result<()> {
    let rest = mesh.rest();
    let asked = json!({ "timeout": 0, "previewAuth": { "scheme": "bearer", "token": "auto" } });
    let sandbox = rest.create(asked).await?;
    let first = sandbox.facts["previewAuthToken"].as_str().context("no token")?.to_owned();
    assert_eq!(sandbox.facts["sandboxDomain"], "preview.localhost");
    // Only in that answer.
    assert_eq!(sandbox.get().await?.json()["previewAuthToken"], "");
    sandbox.run("(python3 -m http.server 8000 >/dev/null 2>&1 &)").await?;
    let name = host(&sandbox, 8000);
    let with = async |token: &str| {
        let asked =
            rest.anonymous(Method::GET, "/").header("host", &name).header("x-oc-preview-token", token);
        rest.send(asked).await
    };
    eventually("port 8000", async || {
        let status = with(&first).await?.status;
        ensure!(status == 200, "{status}");
        Ok(())
    })
    .await?;
    hibernate(&rest, &sandbox).await?;
    assert_eq!(get(&mesh, &name, "/").await?.refusal(), (401, "UNAUTHENTICATED".into()));
    assert_eq!(with("wrong").await?.refusal(), (401, "UNAUTHENTICATED".into()));
    assert_eq!(sandbox.get().await?.json()["status"], "hibernated");

    let second = rest.post(&sandbox.path("/preview/rotate"), json!({})).await?.expect(200)?.json();
    assert_eq!(second["scheme"], "bearer");
    let second = second["previewAuthToken"].as_str().context("no token")?.to_owned();
    eventually("the new token", async || {
        let status = with(&second).await?.status;
        ensure!(status == 200, "{status}");
        Ok(())
    })
    .await?;
    assert_eq!(with(&first).await?.status, 401);
    // 201 for a new one, 200 for one that is there, as the published clients have it.
    let body = || json!({ "port": 8000, "authConfig": {} });
    rest.post(&sandbox.path("/preview"), body()).await?.expect(201)?;
    let again = rest.post(&sandbox.path("/preview"), body()).await?.expect(200)?.json();
    assert_eq!((&again["sandboxId"], &again["authConfig"]["scheme"]), (&json!(sandbox.id), &json!("bearer")));
    let (_, theirs) = mesh.rest_of_new_tenant("previews-of-others").await?;
    let refused = theirs.get(&sandbox.path("/preview")).await?.refusal();
    assert_eq!(refused, (404, "SANDBOX_NOT_FOUND".into()));
    sandbox.delete().await
}
